"""The report: self-contained, escaped, honest about what is missing, and right about hold-outs."""

import csv
import dataclasses
import html.parser
import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.scaling import page
from jaxlm.scaling.backtest import LATEST, back_tests
from jaxlm.scaling.evidence import gather, held_out
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.fit_table import fit_command
from jaxlm.scaling.optima import fit_isoflop
from jaxlm.scaling.page import Bullets, Grid, Heading, Summary, Text, to_html, to_markdown
from jaxlm.scaling.record import save_fit
from jaxlm.scaling.report import report_command, write_report
from jaxlm.scaling.table import read_table, select

TRUTH = {"E": 1.2, "A": 70.0, "B": 130.0, "alpha": 0.36, "beta": 0.33}
EVIL = '<script>alert("x")</script> & | `code` **bold**'
COLUMNS = {"N": "n_total", "D": "tokens", "C": "flops_exact", "loss": "loss", "budget": "budget"}


def table_rows(holdout_error: float = 0.0) -> list[dict]:
    """Four budgets of six sizes, one held-out budget of three, one tuning run."""
    rng, p, rows = np.random.default_rng(0), TRUTH, []
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))

    def add(role: str, c: float, size: float, error: float = 0.0) -> None:
        n = size * g * (c / 6) ** (p["beta"] / (p["alpha"] + p["beta"]))
        d = c / (6 * n)
        loss = p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]
        rows.append(
            dict(
                id=f"{len(rows):012x}",
                config_hash=f"{len(rows):064x}",
                plan="holdout" if role == "holdout" else "grid",
                role=role,
                status="finished",
                exclude="" if role == "grid" else role,
                detail=EVIL if len(rows) == 3 else "",
                seed=0,
                budget=c,
                n_total=n,
                n_non_embedding=n - 3.0 * n**0.6,
                n_products=n - n**0.6,
                tokens=d,
                flops_exact=c,
                flops_6nd=6 * (n - n**0.6) * d,
                flops_kaplan=6 * (n - 3.0 * n**0.6) * d,
                loss=loss * np.exp(0.003 * rng.normal()) * (1 + error),
                lr=4e-3,
                commit="abc123",
                device="cpu",
            )
        )

    for c in (3e11, 1e12, 3e12, 1e13):
        for size in 6.0 ** np.linspace(-1, 1, 6):
            add("grid", c, size)
    for size in (0.6, 1.0, 1.6):
        add("holdout", 4e13, size, holdout_error)
    add("tune", 3e11, 1.0)
    return rows


def write_table(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_fits(folder: Path, methods: tuple[str, ...] = ("surface", "parabola"), draws: int = 40) -> None:
    table = read_table(folder / "table.csv")
    points, excluded, _ = select(table, COLUMNS)
    data = {"path": table.path, "sha256": table.sha256, "rows": len(table), "columns": COLUMNS}
    for method in methods:
        if method == "surface":
            fit = run_fit(points, draws=draws, starts=4, objective="log_mse", profile=False)
        else:
            fit = fit_isoflop(points, draws=draws)
        alarm = {"name": "E_not_identified", "level": "warning", "text": EVIL, "value": 1.0}
        fit = dataclasses.replace(
            fit, data=data, excluded=[dataclasses.asdict(e) for e in excluded], diagnostics=[alarm]
        )
        save_fit(fit, folder / "fits" / method)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep directory with everything, and its report."""
    folder = tmp_path_factory.mktemp("sweep") / "S"
    rows = table_rows()
    write_table(folder, rows)
    write_fits(folder)
    cells = [
        {"id": r["id"], "role": r["role"], "flops": 1.004 * r["budget"], "budget": r["budget"]} for r in rows
    ]
    plan = {"config": {}, "hash": "f" * 64, "cells": cells, "notes": []}
    (folder / "plan.json").write_text(json.dumps({"format": 1, "plans": {"grid": plan}}))
    write_report(folder)
    return folder


class Structure(html.parser.HTMLParser):
    """Checks that tags balance and collects what a browser would fetch or run."""

    VOID = ("meta", "img", "br", "link", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.fetched, self.images, self.ids, self.links, self.tags = [], [], 0, [], [], set()
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        if "src" in attrs:
            self.images += tag == "img"
            if not attrs["src"].startswith("data:image/png;base64,"):
                self.fetched.append(attrs["src"])
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.mark.slow
def test_one_file_that_fetches_and_runs_nothing(whole):
    text = (whole / "report.html").read_text()
    seen = Structure(text)
    assert seen.fetched == []
    assert not {"script", "link", "iframe", "b"} & seen.tags
    assert "http" not in text
    assert all(link[1:] in seen.ids for link in seen.links)
    assert seen.images >= 9
    markdown = (whole / "report.md").read_text()
    named = {part.split(")")[0] for part in markdown.split("](report/")[1:]}
    assert named == {p.name for p in (whole / "report").iterdir()}
    assert len(named) == seen.images


@pytest.mark.slow
def test_what_comes_from_files_is_escaped(whole):
    text, markdown = (whole / "report.html").read_text(), (whole / "report.md").read_text()
    assert "&lt;script&gt;alert(&quot;x&quot;)" in text
    assert "<script" not in text + markdown
    assert r"\| \`code\` \*\*bold\*\*" in markdown


@pytest.mark.slow
def test_says_what_the_sweep_shows(whole):
    text = (whole / "report.md").read_text()
    for line in (
        "3 of 3 measured losses inside the 95% prediction interval",
        "Kaplan: C = 6 N D, N = non-embedding",
        "| parabola | 1e+13 | 3.3x | 18 | 1 of 1 |",
        "without the smallest budget",
        "not identified by these runs",
        "3 rows",
        "not stated",
        "0.40%",
        "abc123 (28 runs)",
    ):
        assert line in text, line
    assert "**PASS**" in text


@pytest.mark.slow
def test_counting_moves_the_exponent_as_it_should(whole):
    """Leaving out embeddings, a part that shrinks with size, makes N* grow faster in what is left."""
    rows = [
        line.split("|") for line in (whole / "report.md").read_text().splitlines() if "counting conv" in line
    ]
    a = {row[2].strip(): float(row[3].split()[0].replace("\\", "")) for row in rows}
    assert len(a) == 5
    assert a["exact FLOPs, N = non-embedding"] > a["exact FLOPs, N = all parameters"] + 0.005


def test_a_missed_hold_out_fails_and_a_seen_one_is_told(tmp_path, capsys):
    write_table(tmp_path, table_rows(holdout_error=0.05))
    write_fits(tmp_path, ("parabola",))
    evidence = gather(tmp_path)
    runs, leaks, _ = held_out(evidence, evidence.main)
    assert [run.inside for run in runs] == [False]
    assert runs[0].C == 4e13
    assert leaks == []
    points = {**evidence.main.points, "row": [24.0, *evidence.main.points["row"][1:]]}
    _, leaks, _ = held_out(evidence, dataclasses.replace(evidence.main, points=points))
    assert [leak.row for leak in leaks] == [24]


@pytest.mark.parametrize("bend", [0.0, -0.05])
def test_a_back_test_predicts_the_largest_budget_from_those_below(tmp_path, bend):
    """A law that holds is followed within its noise of .3%; what bends off it is told with its sign."""
    rows = table_rows()
    for row in rows:
        row["loss"] *= 1 + bend * (row["budget"] == 1e13)
    lucky = next(row for row in rows if row["budget"] == 1e13)
    rows += [
        dict(lucky, id=f"{k:012x}", seed=k, loss=lucky["loss"] * (1 + 0.1 * (k - 101.5))) for k in (101, 102)
    ]
    write_table(tmp_path, rows)
    write_fits(tmp_path)
    evidence = gather(tmp_path)
    tests, _ = back_tests(evidence)
    assert [(t.label, t.budget, t.fitted, len(t.runs)) for t in tests] == [
        ("surface", pytest.approx(1e13), 18, 8),
        ("parabola", pytest.approx(1e13), 18, 1),
    ]
    surface, line = tests
    own = [run.error for run in surface.runs if run.name not in (f"{101:012x}", f"{102:012x}")]
    assert np.mean(own) == pytest.approx(bend, abs=0.006)
    assert line.error == pytest.approx(bend, abs=0.012)
    assert (line.inside == 1) == (bend == 0)
    fewer = dataclasses.replace(evidence.main, points={k: v[6:] for k, v in evidence.main.points.items()})
    none, why = back_tests(dataclasses.replace(evidence, fits={"surface": fewer}))
    assert none == []
    assert "the runs have 3 budgets, 4 are needed" in why


def test_a_back_test_that_cannot_judge_says_so_and_the_report_goes_on(tmp_path):
    """Three sizes a budget tell no noise; a loss that is a word was left out by the fit's own --where."""
    rows = []
    for budget in np.geomspace(1e18, 1e20, 10):
        for factor in (0.25, 1.0, 4.0):
            n = 0.13 * budget**0.5 * factor
            d = budget / (6 * n)
            rows.append((n, d, budget, 1.69 + 406 / n**0.34 + 410 / d**0.28))
    lines = [",".join(map(repr, map(float, row))) for row in rows]
    (tmp_path / "table.csv").write_text("\n".join(["N,D,C,loss", *lines, "1e8,1e9,6e17,diverged"]))
    columns = "N=N,D=D,C=C,loss=loss"
    common = dict(where="loss >= 0", out=str(tmp_path / "fits" / "p"), plots=False, draws=30)
    fit_command(str(tmp_path / "table.csv"), columns, method="parabola", **common)
    evidence = gather(tmp_path)
    tests, _ = back_tests(evidence)
    assert [t.budget for t in tests] == pytest.approx(np.geomspace(1e18, 1e20, 10)[-LATEST:])
    assert {t.text for t in tests} == {"0 bootstrap draws: no interval"}
    assert held_out(evidence, evidence.main)[0] == []


def test_a_table_that_changed_since_the_fit_is_told(tmp_path):
    rows = table_rows()
    write_table(tmp_path, rows)
    write_fits(tmp_path, ("parabola",))
    write_table(tmp_path, rows[:-1])  # the last row is a hold-out, which the fit does not see
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "made from another table than table.csv now holds" not in text
    write_table(tmp_path, rows[1:])
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "made from another table than table.csv now holds" in text
    assert "No refits" in text


def test_what_is_missing_is_said(tmp_path, capsys):
    with pytest.raises(UserError, match="is it a sweep directory"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        write_report(tmp_path / "nowhere")
    write_table(tmp_path, table_rows())
    assert report_command(tmp_path) == 0
    assert "run `jaxlm fit" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert "There is no fit in fits/." in text
    assert "There is no plan.json" in text
    assert "run directories are not here" in text
    write_fits(tmp_path, ("parabola",))
    (tmp_path / "table.csv").unlink()
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "fits/broken").mkdir()
    (tmp_path / "fits/broken/fit.json").write_text("[")
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    for line in ("one fit only", "not tested", "no table.csv", "is not a plan", "is not a fit.json"):
        assert line in text.replace("\\", ""), line


def test_blocks_in_both_forms():
    blocks = [
        Summary([("a", "<b>", "pass"), ("c", "d", "")]),
        Heading("N*(C) & more"),
        Text("x < y"),
        Bullets([("k:", "v|w")]),
        Grid(("name", "value"), [("n", "1.5e3"), ("m|", "2 [1, 3]")], "caption", folded="more"),
    ]
    text = to_html("T & U", blocks)
    Structure(text)
    assert '<td class="number">1.5e3</td>' in text
    assert "<td>n</td>" in text
    assert '<a href="#n-c-more">' in text
    markdown = to_markdown("T", blocks, "report")
    assert "| m\\| | 2 \\[1, 3\\] |" in markdown
    assert "| --- | ---: |" in markdown
    assert "**PASS** &lt;b&gt;" in markdown


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = page.write_text(tmp_path / "a.txt", "old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        page.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
