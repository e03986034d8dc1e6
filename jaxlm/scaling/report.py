"""The report of a sweep: one HTML file and its Markdown twin, made of the files in its directory alone.

    S/report.html       everything, pictures inside
    S/report.md         the same, with S/report/*.png

Nothing is skipped in silence: what is missing (a hold-out, a second method, the table) is said where it
belongs.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.scaling import appendix, sections
from jaxlm.scaling.backtest import back_tests
from jaxlm.scaling.bands import best_interval, describe, has_optimum, typical_inputs
from jaxlm.scaling.checklist import checklist
from jaxlm.scaling.comparisons import HeldOut
from jaxlm.scaling.evidence import Evidence, exponent, gather, texts, variants
from jaxlm.scaling.page import Block, Heading, Summary, Text, write_document
from jaxlm.scaling.predict import predict
from jaxlm.scaling.record import Fit
from jaxlm.scaling.sections import Test, all_tests, main_test, with_interval
from jaxlm.scaling.style import count_text


def write_report(workdir: str | Path) -> list[Path]:
    """Write `report.html`, `report.md` and `report/*.png` into a sweep directory.

    Args:
        workdir: holds plan.json, table.csv and fits/*/fit.json; what is not there is said to be missing.

    Returns:
        The files, the HTML first.

    Raises:
        UserError: no sweep directory, or a table that cannot be read.
    """
    evidence = gather(workdir)
    name = evidence.workdir.resolve().name
    blocks = report_blocks(evidence)
    folder = evidence.workdir
    return write_document(
        f"Scaling report: {name}", blocks, folder / "report.html", folder / "report.md", folder / "report"
    )


def report_command(workdir: str | Path) -> int:
    """What `jaxlm report` does: write the report, print its summary; returns the exit code."""
    from rich.console import Console

    written = write_report(workdir)
    console = Console()
    evidence = gather(workdir)
    for label, text, status in _summary(evidence, all_tests(evidence)).lines:
        mark = f"{status.upper()}: " if status in ("pass", "fail") else ""
        console.print(f"{label}: {mark}{text}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {written[0]} and {written[1]}", markup=False, highlight=False, soft_wrap=True)
    return 0


def report_blocks(evidence: Evidence) -> list[Block]:
    """The report's sections, in order."""
    tests = all_tests(evidence)
    changed, tested_back = variants(evidence), back_tests(evidence)
    return [
        _summary(evidence, tests),
        *sections.grid(evidence),
        *sections.fits(evidence),
        *sections.pictures(evidence, tests),
        *sections.holdout(evidence, tests),
        *sections.backtest(*tested_back),
        *sections.choices(evidence, changed),
        *appendix.diagnostics(evidence),
        *appendix.exclusions(evidence),
        *appendix.curves(evidence),
        *appendix.provenance(evidence),
        Heading("Reporting checklist"),
        Text("What a reader needs to judge or repeat the fit (main fit; pitfalls 15 and 17)."),
        checklist(evidence, *main_test(tests)),
    ]


# --- Summary ---


def _summary(evidence: Evidence, tests: Sequence[Test]) -> Summary:
    lines: list[tuple[str, str, str]] = []
    fit, table = evidence.main, evidence.table
    if table is not None:
        finished = sum(s in ("", "finished") for s in texts(table, "status"))
        lines.append(("runs", f"{len(table)} in the table, {finished} of them finished", ""))
    else:
        lines.append(
            ("runs", "no table.csv: run `jaxlm collect` for the grid, the hold-out and the refits", "warn")
        )
    if fit is None:
        lines.append(("fit", "no fits/*/fit.json: run `jaxlm fit --out=S/fits/NAME` first", "warn"))
        return Summary(lines)
    label = next(iter(evidence.fits))
    count = len(next(iter(fit.points.values()), []))
    lines.append(("main fit", f"{label}: {describe(fit)}, {count} runs", ""))
    for name, what in (("a", "N* grows as C^a"), ("b", "D* grows as C^b")):
        found = exponent(fit, name)
        if found:
            lines.append(
                (f"exponent {name}", f"{with_interval(*found)} ({what}, {100 * fit.level:g}% interval)", "")
            )
    if "E" in fit.parameters:
        floor = f"{with_interval(fit.parameters['E'], best_interval(fit, 'E'))} nats/token"
        loose = [d for d in fit.diagnostics if d["name"] in ("E_not_identified", "flat_ridge")]
        lines.append(
            ("floor E", floor + ("; not identified by these runs" if loose else ""), "warn" if loose else "")
        )
    lines += _next_budget(fit)
    runs, why = main_test(tests)
    lines.append(("hold-out", *_verdict(runs, why, fit.level)))
    for test in tests[:1]:
        for leak in test.leaks:
            lines.append(
                ("hold-out", f"run {leak.name} was planned as a hold-out, but the fit has seen it", "fail")
            )
    alarms = [d for f in evidence.fits.values() for d in f.diagnostics if d["level"] != "note"]
    names = ", ".join(dict.fromkeys(d["name"] for d in alarms))
    lines.append(("warnings", f"{len(alarms)} ({names})" if alarms else "none", "warn" if alarms else ""))
    stale = [label for label, f in evidence.fits.items() if evidence.stale(f)]
    if stale:
        text = f"{', '.join(stale)}: made from another table than table.csv now holds; fit again"
        lines.append(("out of date", text, "fail"))
    lines += [("not read", text, "warn") for text in evidence.unreadable]
    return Summary(lines)


def _verdict(runs: Sequence[HeldOut], why_not: str, level: float) -> tuple[str, str]:
    if not runs:
        return f"not tested: {why_not}", "warn"
    inside = sum(run.inside for run in runs)
    worst = max(runs, key=lambda run: abs(run.error))
    text = (
        f"{inside} of {len(runs)} measured losses inside the {100 * level:g}% prediction interval; "
        f"largest error {100 * worst.error:+.2f}% (measured {worst.measured:.4f}, predicted "
        f"{worst.predicted:.4f})"
    )
    return text, "pass" if inside == len(runs) else "fail"


def _next_budget(fit: Fit) -> list[tuple[str, str, str]]:
    """What the main fit says about ten times the largest compute."""
    if not has_optimum(fit) or "C" not in fit.points:
        return []
    budget = 10 * max(fit.points["C"])
    try:
        p = predict(fit, budget, fit.level, **typical_inputs(fit))
    except UserError as error:
        return [("at 10x compute", f"no prediction: {error}", "warn")]
    text = ", ".join(
        f"{name} {count_text(x.value)} [{count_text(x.lo)}, {count_text(x.hi)}]"
        for name, x in (("N*", p.N), ("D*", p.D))
    )
    return [(f"at {budget:.3g} FLOPs", f"{text}, loss {with_interval(p.L.value, p.L[1:])}", "")]
