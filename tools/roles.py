"""Writes the functions of Python's standard library as words, each tagged with what it is: an exact answer.

    python tools/roles.py --out data/roles

A record is a function's tokens with spaces between them (`text`; a string is '', comments are left out) and
as many `tags`: keyword, operator, number, string, attribute (after a dot), definition (after def or class),
option (of a call), and names: parameter, local (assigned in the function), builtin or global. One file in
five is held out. Writes `train.jsonl`, `heldout.jsonl` and `counts.json`, with what two rules get right of
the held-out words: the commonest tag, and each word's own commonest tag.
"""

import argparse
import ast
import builtins
import collections
import hashlib
import io
import json
import keyword
import pathlib
import sys
import sysconfig
import token
import tokenize

TAGS = (
    "attribute",
    "builtin",
    "definition",
    "global",
    "keyword",
    "local",
    "number",
    "operator",
    "option",
    "parameter",
    "string",
)
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data", "encodings"}
LONGEST, SHORTEST = 200, 8  # words of a function that are kept, and that it must have


def tagged(function: ast.FunctionDef | ast.AsyncFunctionDef, source: str) -> list[tuple[str, str]]:
    """(word, tag) of a function's source, in order.

    >>> source = "def f(a, n=1):\\n    b = a.real + len(N)\\n    return g(b, n=n)"
    >>> words = tagged(ast.parse(source).body[0], source)
    >>> names = [f"{word} {tag}" for word, tag in words if tag not in ("operator", "keyword")]
    >>> names[:6]
    ['f definition', 'a parameter', 'n parameter', '1 number', 'b local', 'a parameter']
    >>> names[6:]
    ['real attribute', 'len builtin', 'N global', 'g global', 'b local', 'n option', 'n parameter']
    """
    nodes = list(ast.walk(function))
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    options = {(n.lineno, n.col_offset) for n in nodes if isinstance(n, ast.keyword) and n.arg is not None}
    lines = source.splitlines()
    out, before = [], ""
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type == token.NAME:
            line, column = t.start
            place = (line, len(lines[line - 1][:column].encode()))  # ast counts bytes
            tag = (
                "keyword"
                if keyword.iskeyword(t.string)
                else "attribute"
                if before == "."
                else "definition"
                if before in ("def", "class")
                else "option"
                if place in options
                else "parameter"
                if t.string in parameters
                else "local"
                if t.string in stored
                else "builtin"
                if hasattr(builtins, t.string)
                else "global"
            )
            out.append((t.string, tag))
        elif t.type in (token.NUMBER, token.OP, token.STRING):
            word = "''" if t.type == token.STRING else t.string
            tag = {token.NUMBER: "number", token.OP: "operator", token.STRING: "string"}[t.type]
            out.append((word, tag))
        if t.string.strip():
            before = t.string
    return out


def functions(path: pathlib.Path) -> list[list[tuple[str, str]]]:
    """Every function of a file that stands in no other one; none of a file that is not Python of today."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return []
    out, open_nodes = [], list(ast.iter_child_nodes(tree))
    while open_nodes:
        node = open_nodes.pop(0)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            open_nodes += ast.iter_child_nodes(node)
            continue
        source = ast.unparse(node)  # one spelling, and positions that begin at the function
        words = tagged(ast.parse(source).body[0], source)
        if len(words) >= SHORTEST and all(len(word.split()) == 1 for word, _ in words):
            out.append(words[:LONGEST])
    return out


def right_by_rule(
    train: list[list[tuple[str, str]]], held_out: list[list[tuple[str, str]]]
) -> dict[str, float]:
    """Shares of the held-out words that the commonest tag, and each word's own commonest one, get right."""
    tags = collections.Counter(tag for row in train for _, tag in row)
    common = tags.most_common(1)[0][0]
    of_word: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row in train:
        for word, tag in row:
            of_word[word][tag] += 1
    own = {word: counts.most_common(1)[0][0] for word, counts in of_word.items()}
    words = [pair for row in held_out for pair in row]
    return {
        "commonest_tag": sum(tag == common for _, tag in words) / len(words),
        "commonest_tag_of_the_word": sum(tag == own.get(word, common) for word, tag in words) / len(words),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=pathlib.Path)
    out = parser.parse_args().out
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list] = {"train": [], "heldout": []}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if not LEFT_OUT & set(name.parts):
            side = int(hashlib.sha256(str(name).encode()).hexdigest()[:8], 16) % 5
            parts["train" if side else "heldout"] += functions(path)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        records = ({"text": " ".join(w for w, _ in r), "tags": " ".join(t for _, t in r)} for r in rows)
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    counts = {name: {"functions": len(rows), "words": sum(map(len, rows))} for name, rows in parts.items()}
    counts["right_by_rule"] = right_by_rule(parts["train"], parts["heldout"])
    (out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
