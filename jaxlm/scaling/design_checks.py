"""Alarms that need only the runs: what was sampled, tuned and repeated. `diagnostics.examine` calls them.

Each takes the points and the law and returns what it found; columns that a table does not have are not
judged.
"""

import numpy as np

from jaxlm.scaling.laws import LAWS
from jaxlm.scaling.table import Points
from jaxlm.scaling.vertices import size_labels, sizes

Found = list[dict]
PORIAN_BATCH = 128 * 2048  # tokens: at or below it, beta2 = .95 was too low
MIXED = 0.05  # median range of log loss within the cells of one (N, D), from which it is no seed noise
GRID = 2.0  # ratio of learning rates or batches of one cell, from which they are no repeats of one optimum
PREFIXES = {"G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21}  # of FLOPs; PF-days are 8.64e19


def found(name: str, level: str, text: str, value: object) -> Found:
    """One diagnostic: level is note, warning or refusal."""
    return [dict(name=name, level=level, text=text, value=value)]


def narrow_range(points: Points, law: str) -> Found:
    """An exponent of something that hardly varies is not identified."""
    out: Found = []
    for name in "ND":
        values = getattr(points, name)
        ratio = float(values.max() / values.min())
        if law not in ("loss_n", "loss_d", "loss_c") and ratio < 5:
            text = f"{name} varies by a factor {ratio:.3g} only: its exponent is hardly identified"
            out += found("narrow_range", "warning", text, ratio)
    return out


def multi_epoch(points: Points, law: str) -> Found:
    """Repeated tokens in a law that takes every token for a new one (pitfall 16)."""
    if law == "data_constrained":
        return []
    epochs = points.extra.get("epochs")
    if epochs is None and "U" in points.extra:
        epochs = points.D / points.extra["U"]
    if epochs is None:
        return []
    many = int((np.nan_to_num(epochs) > 1.001).sum())
    if not many:
        return []
    text = (
        f"{many} of {len(points)} runs saw tokens more than once (up to {np.nanmax(epochs):.3g} epochs), "
        f"which law={law!r} takes for new ones: leave them out (--where='epochs<=1') or fit "
        "law=data_constrained"
    )
    return found("multi_epoch", "warning", text, many)


def no_repeats(points: Points, law: str) -> Found:
    """The data-constrained law on runs that repeat no token: R_D does nothing; often U and D are swapped."""
    if law != "data_constrained" or "U" not in points.extra:
        return []
    epochs = points.D / points.extra["U"]
    if (epochs > 1.001).any():
        return []
    more = int((epochs < 0.999).sum())
    text = (
        "no run sees a token twice (D <= U in every row): R_D does nothing, and stays where its search began"
    )
    if more > len(points) / 2:
        text += (
            f". In {more} of {len(points)} rows U is above D: are the columns of tokens and of unique tokens "
            "swapped?"
        )
    return found("no_repeats", "warning", text, more)


def mixed_rows(points: Points, law: str) -> Found:
    """Rows of one N and D whose losses differ by more than seeds do: several things in one table."""
    if "lr" in points.extra or not np.isfinite(points.L).all():
        return []
    inputs = np.stack([points.N, points.D, *_further(points, law)], -1)
    _, label = np.unique(inputs, axis=0, return_inverse=True)
    ranges = [float(np.ptp(np.log(points.L[label.ravel() == k]))) for k in np.unique(label)]
    several = [r for r, n in zip(ranges, np.bincount(label.ravel()), strict=True) if n > 1]
    if not several or (middle := float(np.median(several))) < MIXED:
        return []
    text = (
        f"rows of one N and D differ in loss by {np.expm1(middle):.0%} at the median of {len(several)} "
        "cells, more than seeds do: several metrics, data sets, learning rates or stages of training? Fit "
        "one kind of row with --where, or each with --group"
    )
    return found("mixed_rows", "warning", text, middle)


def not_optima(points: Points, law: str) -> Found:
    """A whole grid of learning rates or batches in a law of the best one of each cell."""
    target = LAWS[law].target if law in LAWS else ""
    if target not in ("lr", "batch") or target not in points.extra:
        return []
    values = points.extra[target]
    inputs = [points.N, points.D, points.C, *([points.L] if "L" in LAWS[law].inputs else [])]
    _, label = np.unique(np.nan_to_num(np.stack(inputs, -1)), axis=0, return_inverse=True)
    ratios = [values[label.ravel() == k].max() / values[label.ravel() == k].min() for k in np.unique(label)]
    grids = sum(ratio > GRID for ratio in ratios)
    if not grids:
        return []
    text = (
        f"{grids} of {len(ratios)} cells of the same runs hold several {target}, up to a factor "
        f"{max(ratios):.3g} apart: the law is of the best {target} of each. Keep that row of each cell, "
        "or the minimum of a smooth curve through its losses"
    )
    return found("not_optima", "warning", text, int(grids))


def _further(points: Points, law: str) -> list[np.ndarray]:
    """The columns that the law reads beside N, D, C and L."""
    roles = LAWS[law].inputs if law in LAWS else ()
    return [points.extra[role] for role in roles if role in points.extra]


def _cells(points: Points) -> np.ndarray:
    """Labels of runs of the same N and D."""
    return size_labels(points.N) * (len(points) + 1) + size_labels(points.D)


def learning_rates(points: Points, law: str) -> Found:
    """Edges, ragged grids, chosen minima and a single rate for all sizes (pitfalls 8 and 11)."""
    lr = points.extra.get("lr")
    if lr is None or law.startswith("lr_") or not np.isfinite(lr).all():
        return []
    cells = _cells(points)
    tried = {cell: np.unique(lr[cells == cell]) for cell in np.unique(cells)}
    several = {cell: rates for cell, rates in tried.items() if len(rates) > 1}
    out: Found = []
    edges = 0
    for cell, rates in several.items():
        at = cells == cell
        edges += lr[at][points.L[at].argmin()] in (rates[0], rates[-1])
    if edges:
        text = (
            f"the best learning rate of {edges} of the {len(several)} (N, D) cells with several is the "
            "smallest or the largest tried there: the optimum is outside the grid, and the loss is not the "
            "tuned one"
        )
        out += found("lr_edge", "warning", text, int(edges))
    if several:
        text = (
            f"{len(several)} cells of one (N, D) have several learning rates: a law of N and D sees their "
            "spread as noise, and untuned runs as runs. Fit at a smooth rule lr*(N, D), not at the best of "
            "each cell"
        )
        out += found("lr_in_cells", "warning", text, len(several))
    counts = {len(rates) for rates in tried.values()}
    chosen = points.extra.get("candidates")  # how many runs a row was chosen from
    picked = chosen is not None and bool((np.nan_to_num(chosen) > 1).any())
    if (several and len(counts) > 1) or picked or _looks_picked(points, lr, tried):
        text = (
            "each cell seems to be represented by the best of several learning rates, without the others: "
            "the minimum of noisy losses is too low, and more so where more rates were tried (measured: "
            "alpha .200 -> .138, E 1.81 -> 1.40). Keep all runs and take the minimum of a smooth curve, or "
            "one fitted lr rule"
        )
        out += found("best_of_grid", "warning", text, sorted(counts))
    if len(np.unique(lr)) == 1 and points.N.max() / points.N.min() >= 10:
        text = "one learning rate for sizes a decade apart: untuned, unless it is a base rate that muP scales"
        out += found("one_lr", "note", text, float(lr[0]))
    return out


def _looks_picked(points: Points, lr: np.ndarray, tried: dict) -> bool:
    """One run a cell, few distinct rates, and the rate no function of N, of D or of C."""
    rates = len(np.unique(lr))
    if any(len(r) > 1 for r in tried.values()) or not 1 < rates <= max(len(points) // 2, 2):
        return False
    for values in (points.N, points.D, points.C, points.C / points.D):
        labels = size_labels(values)
        if labels.max() + 1 <= len(points) / 2 and all(
            len(np.unique(lr[labels == k])) == 1 for k in np.unique(labels)
        ):
            return False
    # A smooth rule of N and D, however rounded to a grid, is still nearly linear in the logs.
    basis = np.stack([np.ones(len(points)), np.log(points.N), np.log(points.D)], -1)
    rest = np.log(lr) - basis @ np.linalg.lstsq(basis, np.log(lr), rcond=None)[0]
    step = np.diff(np.log(np.unique(lr))).min()
    return bool(rest.std() > 0.45 * step)


def schedules(points: Points, law: str) -> Found:
    """Points on the way of one decayed run; a warm-up that is long for the run; beta2 (pitfalls 8 and 9)."""
    out: Found = []
    run = points.extra.get("run")
    if run is not None:
        runs, index = np.unique(run, return_inverse=True)
        many = sum(sizes(points.D[index == k]) > 1 for k in range(len(runs)))
        if many:
            text = (
                f"{many} runs appear at several D: points on the way of a decayed schedule are worse than "
                "runs of that length. Use one schedule a point, or cooldown branches (which are runs of "
                "their own)"
            )
            out += found("checkpoints_as_runs", "warning", text, int(many))
    warmup = points.extra.get("warmup_tokens")
    if warmup is not None and (warmup > 0.25 * points.D).any():
        many = int((warmup > 0.25 * points.D).sum())
        text = f"{many} runs warm up for more than a quarter of their tokens: small budgets come out too bad"
        out += found("long_warmup", "warning", text, many)
    b2, batch = points.extra.get("b2"), points.extra.get("batch")
    if b2 is not None and batch is not None:
        low = int(((b2 <= 0.95) & (batch <= PORIAN_BATCH)).sum())
        if low:
            text = f"{low} runs have beta2 <= .95, too low for batches of up to {PORIAN_BATCH:,} tokens"
            out += found("low_beta2", "note", text, low)
    return out


def seed_noise(points: Points, law: str) -> Found:
    """Whether anything but the fit's residuals tells the noise (pitfall 15)."""
    _, counts = np.unique(_cells(points), return_counts=True)
    if points.sigma is not None or "lr" in points.extra or (counts > 1).any():
        return []
    text = (
        "no run is repeated with another seed and there is no sigma column: the noise is known from "
        "residuals only, which hold the law's own errors too. Two seeds at a few points would tell them apart"
    )
    return found("no_seed_noise", "note", text, 0)


def token_counts(points: Points, law: str) -> Found:
    """D that is C / (6 N) to the last digit was not counted (section 1)."""
    if not np.allclose(points.C, 6.0 * points.N * points.D, rtol=1e-9):
        return []
    text = (
        "C = 6 N D holds exactly: one of the three was computed from the other two, so that attention, head "
        "and embedding FLOPs are not in the fit"
    )
    return found("flops_by_6nd", "note", text, 6.0)


def odd_units(points: Points, law: str) -> Found:
    """Counts in another unit than runs, parameters, tokens and FLOPs (pitfall 15): a law fits those too."""
    ratio = float(np.median(points.C / (6.0 * points.N * points.D)))
    n, d = float(np.median(points.N)), float(np.median(points.D))
    prefix = next((p for p, unit in PREFIXES.items() if 0.3 <= ratio * unit <= 10), "")
    unit = f" (as if in {prefix}FLOP: C=COLUMN*{PREFIXES[prefix]:g})" if prefix else ""
    what = [f"C is {ratio:.3g} times 6 N D{unit}"] if not 0.3 <= ratio <= 10 else []
    what += [f"{name} is {v:.3g}" for name, v in (("N", n), ("D", d)) if v < 1e3]
    if not what:
        return []
    text = (
        f"at the median run {' and '.join(what)}: is C in FLOPs, N in parameters, D in tokens? Budgets, "
        "tokens per parameter and the D = C/(6N) of a table without tokens are in those units"
    )
    return found("odd_units", "warning", text, [ratio, n, d])


def duplicate_rows(points: Points, law: str) -> Found:
    """The same run twice, which a bootstrap takes for two (pitfall 3)."""
    runs = np.stack([points.N, points.D, points.C, points.L, *_further(points, law)], -1)
    _, first, counts = np.unique(runs, axis=0, return_index=True, return_counts=True)
    copies = len(runs) - len(counts)
    if not copies or not np.isfinite(points.L).all():
        return []
    rows = np.arange(len(runs)) if points.rows is None else points.rows
    again = np.setdiff1d(np.arange(len(runs)), first)
    text = (
        f"{copies} of {len(runs)} runs repeat another's N, D, C and loss to the last digit (rows "
        f"{', '.join(map(str, rows[again][:8]))} from 0): copies say nothing new and make every interval too "
        "narrow. Keep one of each"
    )
    return found("duplicate_rows", "warning", text, copies)


def large_scatter(points: Points, law: str) -> Found:
    """Repeated runs against the sigma column."""
    if points.sigma is None:
        return []
    cells = _cells(points)
    chi2 = dof = 0.0
    for cell in np.unique(cells):
        at = cells == cell
        chi2 += float((((points.L[at] - points.L[at].mean()) / points.sigma[at]) ** 2).sum())
        dof += at.sum() - 1
    if dof < 3 or chi2 / dof < 1 + 4 * np.sqrt(2 / dof):
        return []
    text = f"runs of one (N, D) differ by {np.sqrt(chi2 / dof):.2g} times what the sigma column says"
    return found("sigma_too_small", "warning", text, float(np.sqrt(chi2 / dof)))


CHECKS = (
    narrow_range,
    multi_epoch,
    learning_rates,
    schedules,
    seed_noise,
    token_counts,
    large_scatter,
    odd_units,
    duplicate_rows,
    no_repeats,
    mixed_rows,
    not_optima,
)
