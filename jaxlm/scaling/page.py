"""Documents of headings, texts, tables and pictures: one HTML file, or Markdown with PNGs beside it.

Texts are plain: what comes from files (names, messages, settings) is escaped here, and nowhere else.
"""

import base64
import dataclasses
import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

# --- Files ---


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file that a reader, or a crash, sees whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of UTF-8; lone surrogates, which JSON can bring in, become question marks."""
    return write_bytes(path, text.encode("utf-8", "replace"))


# --- Blocks ---

MARKS = {"pass": "PASS", "fail": "FAIL", "warn": "note", "": ""}  # status of a line of the summary


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section (level 2) or a part of one (level 3)."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list; `strong` words stand before each item."""

    items: Sequence[tuple[str, str]]  # (strong, text)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of texts; columns of numbers are aligned at the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: str = ""  # in HTML the table is shown on a click on this text


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG with a caption that says what to see."""

    name: str  # of the file beside the Markdown, without its suffix
    png: bytes
    caption: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """The box at the top: what a reader with one minute reads."""

    lines: Sequence[tuple[str, str, str]]  # (label, text, status: a key of MARKS)


Block = Heading | Text | Bullets | Grid | Picture | Summary

_CSS = """
:root { --ink: #20242c; --soft: #5b6472; --line: #dfe2e7; --back: #ffffff; --box: #f5f6f8;
  --good: #00734f; --bad: #b23c00; --link: #005c94; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #a0a8b5; --line: #363c47;
  --back: #15181d; --box: #1e2229; --good: #4cc79a; --bad: #f08a4b; --link: #6db9ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p, ul { margin: .6rem 0; max-width: 46rem; } li { margin: .3rem 0; }
a { color: var(--link); }
nav { font-size: .88rem; color: var(--soft); margin: 1rem 0; }
nav a { margin-right: .9rem; white-space: nowrap; text-decoration: none; }
.summary { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .5rem 1.1rem; }
.summary dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .15rem 1.2rem;
  margin: .4rem 0; }
.summary dt { color: var(--soft); } .summary dd { margin: 0; }
.mark { font-weight: 700; font-size: .8rem; letter-spacing: .03em; padding: .05rem .45rem;
  margin-right: .5rem; border: 1.5px solid; border-radius: 4px; }
.mark.pass { color: var(--good); } .mark.fail { color: var(--bad); } .mark.warn { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--soft); padding-top: .4rem; }
th { text-align: left; font-weight: 600; border-bottom: 1.5px solid var(--soft);
  padding: .25rem .7rem .25rem 0; vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); padding: .22rem .7rem .22rem 0; vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
td { overflow-wrap: break-word; }
figure { margin: 1.2rem 0 1.6rem; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: .4rem; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; margin-top: .35rem; }
summary { cursor: pointer; color: var(--link); }
@media print { :root { --ink: #000; --soft: #444; --line: #ccc; --back: #fff; --box: #fff; --good: #00734f;
    --bad: #b23c00; --link: #000; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } nav { display: none; }
  figure, .summary, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  thead { display: table-header-group; } .scroll { overflow: visible; } }
"""
_NUMBER = re.compile(r"^[\s(<>~±+-]*[\d.][\d.,]*([eE][+-]?\d+)?[kMBT%x]?(\s*(\[.*\]|\(.*\)))?$|^(-|n/a|)$")


def slug(text: str) -> str:
    """A heading as an anchor or file name.

    >>> slug("N*(C) and D*(C)")
    'n-c-and-d-c'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in rows]
    return any(cells) and all(_NUMBER.match(cell) for cell in cells)


# --- HTML ---


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One self-contained file: styles inline, pictures as data, no scripts, nothing fetched."""
    heads = [b for b in blocks if isinstance(b, Heading) and b.level == 2]
    links = "".join(f'<a href="#{slug(h.text)}">{_e(h.text)}</a> ' for h in heads)
    body = [_html(block) for block in blocks]
    first = next((i + 1 for i, b in enumerate(blocks) if isinstance(b, Summary)), 0)
    body.insert(first, f"<nav>{links}</nav>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n<h1>{_e(title)}</h1>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _e(text: str) -> str:
    return html.escape(str(text), quote=True)


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f'<h{level} id="{slug(text)}">{_e(text)}</h{level}>'
        case Text(text):
            return f"<p>{_e(text)}</p>"
        case Bullets(items):
            lines = (f"<li>{f'<strong>{_e(s)}</strong> ' if s else ''}{_e(t)}</li>" for s, t in items)
            return f"<ul>\n{chr(10).join(lines)}\n</ul>"
        case Picture(name, content, caption):
            data = base64.b64encode(content).decode()
            return (
                f'<figure id="fig-{_e(slug(name))}"><img alt="{_e(name)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{_e(caption)}</figcaption></figure>"
            )
        case Summary(lines):
            out = []
            for label, text, status in lines:
                mark = f'<span class="mark {status}">{MARKS[status]}</span>' if status else ""
                out.append(f"<dt>{_e(label)}</dt><dd>{mark}{_e(text)}</dd>")
            return f'<div class="summary"><dl>{"".join(out)}</dl></div>'
        case Grid():
            return _html_table(block)


def _html_table(grid: Grid) -> str:
    right = [' class="number"' if _numeric(grid.rows, i) else "" for i in range(len(grid.header))]
    head = "".join(f"<th{c}>{_e(t)}</th>" for t, c in zip(grid.header, right, strict=True))
    rows = (
        "<tr>" + "".join(f"<td{c}>{_e(t)}</td>" for t, c in zip(row, right, strict=True)) + "</tr>"
        for row in grid.rows
    )
    caption = f"<caption>{_e(grid.caption)}</caption>" if grid.caption else ""
    table = f"<table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(rows)}</tbody></table>"
    table = f'<div class="scroll">{table}</div>'
    return f"<details><summary>{_e(grid.folded)}</summary>{table}</details>" if grid.folded else table


# --- Markdown ---


def to_markdown(title: str, blocks: Sequence[Block], folder: str) -> str:
    """The same in Markdown; pictures are `folder/NAME.png` beside it."""
    out = [f"# {_m(title)}"] + [_markdown(block, folder) for block in blocks]
    return "\n\n".join(out) + "\n"


def _m(text: str) -> str:
    """Plain text, with what Markdown or its embedded HTML would read as marks escaped."""
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(str(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _markdown(block: Block, folder: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_m(text)}"
        case Text(text):
            return _m(text)
        case Bullets(items):
            return "\n".join(f"- {f'**{_m(s)}** ' if s else ''}{_m(t)}" for s, t in items)
        case Picture(name, _, caption):
            return f"![{_m(name)}]({folder}/{slug(name)}.png)\n\n{_m(caption)}"
        case Summary(lines):
            rows = (
                f"| {_m(label)} | {f'**{MARKS[status]}** ' if status else ''}{_m(text)} |"
                for label, text, status in lines
            )
            return "| | |\n|---|---|\n" + "\n".join(rows)
        case Grid(header, rows, caption):
            right = ["---:" if _numeric(rows, i) else "---" for i in range(len(header))]
            lines = [header, *rows]
            text = ["| " + " | ".join(_m(cell) for cell in line) + " |" for line in lines]
            text.insert(1, "| " + " | ".join(right) + " |")
            return "\n".join(text) + (f"\n\n{_m(caption)}" if caption else "")


def write_document(
    title: str, blocks: Sequence[Block], html_path: str | Path, markdown_path: str | Path, folder: str | Path
) -> list[Path]:
    """Write all three: the pictures first, so that neither document names one that is not there."""
    folder = Path(folder)
    pictures = [b for b in blocks if isinstance(b, Picture)]
    written = [write_bytes(folder / f"{slug(p.name)}.png", p.png) for p in pictures]
    return [
        write_text(html_path, to_html(title, blocks)),
        write_text(markdown_path, to_markdown(title, blocks, folder.name)),
        *written,
    ]
