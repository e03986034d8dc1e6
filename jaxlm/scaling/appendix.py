"""The last sections of a report: diagnostics in words, exclusions, loss curves, provenance."""

import jaxlm
from jaxlm.errors import UserError
from jaxlm.scaling import curve_figures
from jaxlm.scaling.curves import Curve, read_curve
from jaxlm.scaling.diagnostics import compare
from jaxlm.scaling.evidence import Evidence, texts
from jaxlm.scaling.page import Block, Bullets, Grid, Heading, Picture, Text
from jaxlm.scaling.sections import CAPTIONS
from jaxlm.scaling.style import count_text, png

MOST_CURVES = 80  # runs in the picture of loss curves
LEVELS = {"refusal": "refused", "warning": "warning", "note": "note"}


def diagnostics(evidence: Evidence) -> list[Block]:
    out: list[Block] = [Heading("Diagnostics")]
    if not evidence.fits:
        return [*out, Text("There is no fit to examine.")]
    between = compare(list(evidence.fits.values())) if len(evidence.fits) > 1 else []
    for label, found in [*((k, f.diagnostics) for k, f in evidence.fits.items()), ("between fits", between)]:
        ranked = sorted(found, key=lambda d: list(LEVELS).index(d["level"]))
        out.append(Heading(label, 3))
        items = [(f"{LEVELS[d['level']]}, {d['name']}:", d["text"]) for d in ranked]
        out.append(Bullets(items) if items else Text("Nothing was found."))
    return out


def exclusions(evidence: Evidence) -> list[Block]:
    out: list[Block] = [Heading("Excluded runs")]
    fit, table = evidence.main, evidence.table
    if fit is None:
        return [*out, Text("There is no fit.")]
    if not fit.excluded:
        return [*out, Text("The main fit excluded no row of its table.")]
    ids = texts(table, "id") if table and not evidence.stale(fit) else []
    names = {i: x for i, x in enumerate(ids) if x}
    rules: dict[str, list[dict]] = {}
    for e in fit.excluded:
        rules.setdefault(e["rule"], []).append(e)
    out.append(Bullets([(f"{rule}:", f"{len(es)} rows") for rule, es in rules.items()]))
    rows = [
        (names.get(int(e["row"]), f"row {e['row']}"), e["rule"], str(e["detail"]))
        for es in rules.values()
        for e in es
    ]
    out.append(Grid(("run", "rule", "detail"), rows, folded=f"All {len(rows)} excluded rows"))
    return out


def curves(evidence: Evidence) -> list[Block]:
    """Loss curves, where the run directories are still there."""
    table, out = evidence.table, [Heading("Loss curves")]
    known: dict[str, Curve] = {}
    if table is not None:
        for name in texts(table, "id"):
            run = evidence.workdir / "runs" / name
            if name and len(known) < MOST_CURVES and (run / "metrics.jsonl").is_file():
                try:
                    known[name] = read_curve(run, reach=2)
                except UserError as error:
                    out.append(Text(str(error)))
    if not known:
        return [*out, Text("The run directories are not here: no loss curves.")]
    rows = {
        name: (float(n), float(tokens), role, parent)
        for name, n, tokens, role, parent in zip(
            *(texts(table, c) for c in ("id", "n_total", "batch_tokens", "role", "parent")), strict=True
        )
        if name in known and n and tokens
    }
    names = list(rows)
    if names:
        figure = curve_figures.loss_curves(
            [known[n] for n in names], [rows[n][0] for n in names], [rows[n][1] for n in names]
        )
        text = (
            "Training loss (mean of five logged steps) of the runs, coloured by size; dots mark their ends."
        )
        out.append(Picture("loss-curves", png(figure), text))
    families, sizes = {}, []
    for name in names:
        if rows[name][2] == "trunk":
            branches = [known[other] for other in names if rows[other][3] == name]
            families[f"{count_text(rows[name][0])} parameters"] = (known[name], branches)
            sizes.append(rows[name][0])
    if families:
        figure = curve_figures.trunks(
            families, next(rows[n][1] for n in names if rows[n][2] == "trunk"), sizes
        )
        out.append(Picture("trunks", png(figure), CAPTIONS["trunks"]))
    return out


def provenance(evidence: Evidence) -> list[Block]:
    table = evidence.table
    items = [("report:", f"written by jaxlm {jaxlm.__version__}")]
    if table is not None:
        items.append(("table.csv:", f"sha256 {table.sha256}, {len(table)} rows"))

        def counted(name: str) -> str:
            values = [x for x in texts(table, name) if x]
            return ", ".join(f"{x} ({values.count(x)} runs)" for x in dict.fromkeys(values))

        for name, what in (("commit", "git commit of the runs:"), ("device", "devices:")):
            items.append((what, counted(name) or "not stated"))
        hashes = {x for x in texts(table, "config_hash") if x}
        items.append(("config hashes:", f"{len(hashes)} distinct, in table.csv" if hashes else "not stated"))
        seconds = [float(x) for x in texts(table, "seconds") if x]
        if seconds:
            items.append(("wall time of the runs:", f"{sum(seconds) / 3600:.3g} hours in all"))
    items += [
        (f"plan {name}:", f"config hash {plan.get('hash', 'not stated')}")
        for name, plan in evidence.plans.items()
    ]
    for label, fit in evidence.fits.items():
        versions = ", ".join(
            f"{k} {fit.settings[k]}" for k in ("numpy", "scipy", "python") if k in fit.settings
        )
        data = fit.data.get("sha256") or "not stated"
        where = f"; where {fit.data['where']!r}" if fit.data.get("where") else ""
        same = "" if not evidence.stale(fit) else " (not the table.csv that is here now)"
        items.append(
            (f"fit {label}:", f"table sha256 {data}{same}{where}; {versions or 'versions not stated'}")
        )
        columns = fit.data.get("columns") or {}
        items.append(
            (f"fit {label}, columns:", ", ".join(f"{k}={v}" for k, v in columns.items()) or "not stated")
        )
    return [Heading("Provenance"), Bullets(items)]
