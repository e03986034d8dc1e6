"""What a fit leaves behind: `Fit`, the file `fit.json` that holds exactly this, and what can be asked of it.

`jaxlm.scaling.fit`, which makes fits, stands to the right of the methods, the diagnostics and the figures,
and
those read fits: hence this module of its own.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError, check, nearest
from jaxlm.scaling import laws
from jaxlm.scaling.forms import Array

FORMAT = 1
SURFACES = ("surface", "varpro")  # methods whose parameters are those of a law


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law with its uncertainty and its history: every number that a report needs."""

    law: str  # a name in laws.LAWS; 'power' of the methods that fit lines to optima
    method: str  # surface | varpro | envelope | parabola | akima | robust
    objective: str  # huber | lad | mse | log_mse
    delta: float  # of huber, in log loss
    # Surface laws: E, A, B, alpha, beta ... Line methods: log_kN, a, log_kD, b with N* = exp(log_kN) C^a,
    # D* = exp(log_kD) C^b and, where known, E_L, log_kL, c with L* = E_L + exp(log_kL) C^-c.
    parameters: dict[str, float]
    derived: dict[str, float] = dataclasses.field(default_factory=dict)  # a, b, G ... of laws that have them
    names: tuple[str, ...] = ()  # the parameters that were not fixed: order of covariance and draws
    # gauss_newton, sandwich; of the parameters themselves (A, not log A)
    covariance: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    draws: list[list[float]] = dataclasses.field(default_factory=list)  # bootstrap, in the order of names
    # kind (case | block), seed, asked, failed; of a surface also blocks, see uncertainty.tail_share
    bootstrap: dict = dataclasses.field(default_factory=dict)
    # name -> {'bootstrap': [lo, hi], 'gauss_newton': [..], 'sandwich': [..], 'profile': [..]}; derived too
    intervals: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    level: float = 0.95  # of the intervals
    value: float = 0.0  # objective at the optimum, summed over the points
    # start (parameter -> value), value, iterations, converged, gap = value - best
    starts: list[dict] = dataclasses.field(default_factory=list)
    # name -> grid, value, interval, cutoff; an end of the interval that is the grid's end is open
    profile: dict[str, dict] = dataclasses.field(default_factory=dict)
    optima: list[dict] = dataclasses.field(default_factory=list)  # per budget, of approaches 1 and 2
    sigma: float = 0.0  # residual standard deviation of log L
    residuals: list[float] = dataclasses.field(default_factory=list)  # log L - log predicted, per point
    points: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # N, D, C, L, row, extras
    excluded: list[dict] = dataclasses.field(default_factory=list)  # table.Exclusion as dicts
    diagnostics: list[dict] = dataclasses.field(default_factory=list)  # name, level, text, value
    notes: list[str] = dataclasses.field(default_factory=list)
    data: dict = dataclasses.field(default_factory=dict)  # path, sha256, rows, columns, where, ranges
    settings: dict = dataclasses.field(default_factory=dict)  # every setting, tolerances, grid, versions


def calibrated(fit: Fit) -> str:
    """What must be said beside a number of draws whose percentiles were calibrated, else ''."""
    factor = fit.bootstrap.get("calibration", 1.0)
    return "" if factor == 1 else f", normal quantile x {factor:.3g} by a double bootstrap"


def flops_per_param_token(fit: Fit) -> float:
    """k of C = k N D: the geometric mean over the fit's points in the top decade of C; 6 without points.

    Exactly 6 where the table defines D or C by the identity.
    """
    c, n, d = (np.asarray(fit.points.get(name, []), float) for name in "CND")
    good = np.isfinite(c) & np.isfinite(n) & np.isfinite(d) if len(c) else np.zeros(0, bool)
    if not good.any():
        return laws.FLOPS_PER_PARAM_TOKEN
    ratio = np.log(c[good] / (n[good] * d[good]))[c[good] >= c[good].max() / 10]
    if np.ptp(ratio) < 1e-9:
        near = float(np.exp(ratio[0]))
        return round(near) * 1.0 if abs(near - round(near)) < 1e-8 * near else near
    return float(np.exp(ratio.mean()))


def predict_loss(fit: Fit, N: Array, D: Array, **extra: Array) -> Array:
    """The law at N parameters and D tokens; arrays broadcast.

    Args:
      fit: of method surface or varpro and a law of N and D.
      N: parameters.
      D: tokens.
      extra: what else the law reads (U, sparsity, granularity, ...); C where it is not k N D.

    Raises:
      UserError: the fit has no surface, or an input is missing or not positive.
    """
    check(
        fit.method in SURFACES,
        f"method={fit.method!r} fits N*(C), D*(C), L*(C) and no loss of N and D: use method=surface",
    )
    law = laws.get_law(fit.law)
    inputs = {"N": N, "D": D, **extra}
    if "C" in law.inputs and "C" not in extra:
        inputs["C"] = flops_per_param_token(fit) * np.asarray(N, float) * np.asarray(D, float)
    return laws.predict(law, fit.parameters, inputs)


def optimum(fit: Fit, C: Array, k: float | None = None, **extra: float) -> tuple[Array, Array, Array]:
    """N*, D* and the loss there for a compute of C FLOPs.

    Args:
      fit: any; the line methods give L* where they fitted it, else NaN.
      C: training FLOPs.
      k: FLOPs per parameter and token, C = k N D; None: `flops_per_param_token(fit)`. Line methods need none.
      extra: what else the law reads, one value each (U, sparsity, ...).

    Raises:
      UserError: the law has no compute optimum, or it is not in the interior.
    """
    compute = np.asarray(C, float)
    if fit.method not in SURFACES:
        check(bool(np.all(np.isfinite(compute) & (compute > 0))), f"compute={C} must be positive FLOPs")
        p, log_c = fit.parameters, np.log(compute)
        loss = np.full(compute.shape, np.nan)
        if "log_kL" in p:
            loss = p.get("E_L", 0.0) + np.exp(p["log_kL"] - p["c"] * log_c)
        return np.exp(p["log_kN"] + p["a"] * log_c), np.exp(p["log_kD"] + p["b"] * log_c), loss
    law = laws.get_law(fit.law)
    k = flops_per_param_token(fit) if k is None else k
    n, d = laws.optimum(law, fit.parameters, compute, k, extra)
    inputs = {"N": n, "D": d, "C": compute, **extra}
    return n, d, laws.predict(law, fit.parameters, {name: inputs[name] for name in law.inputs})


def _plain(tree):
    """The same with None for numbers that JSON does not have, and Python's own types."""
    if isinstance(tree, dict):
        return {str(name): _plain(x) for name, x in tree.items()}
    if isinstance(tree, (list, tuple, np.ndarray)):
        return [_plain(x) for x in tree]
    if isinstance(tree, np.generic):
        tree = tree.item()
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def save_fit(fit: Fit, directory: str | Path) -> Path:
    """Writes `directory`/fit.json, whole or not at all; numbers at 17 digits read back to the bit."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(directory)!r}: {error.strerror}") from None
    tree = {"format": FORMAT, **_plain({f.name: getattr(fit, f.name) for f in dataclasses.fields(fit)})}
    # repr of a float, which json writes, is the shortest text that reads back to the same bits.
    text = json.dumps(tree, indent=1, allow_nan=False)
    handle, name = tempfile.mkstemp(dir=directory, prefix=".fit.json.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, directory / "fit.json")
    except BaseException:
        os.unlink(name)
        raise
    return directory / "fit.json"


def load_fit(path: str | Path) -> Fit:
    """The fit in a fit.json, or in a folder that holds one; NaN where it says null among numbers.

    Raises:
      UserError: there is none, or it is not one of ours.
    """
    path = Path(path)
    path = path / "fit.json" if path.is_dir() else path
    check(path.is_file(), f"no fit at {str(path)!r}")
    try:
        tree = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not a fit.json: {error}") from None
    names = {f.name for f in dataclasses.fields(Fit)}
    need = {"format", "law", "method", "objective", "delta", "parameters"}
    good = isinstance(tree, dict) and need <= set(tree)
    check(good, f"{str(path)!r} is not a fit.json: it needs {', '.join(sorted(need))}")
    check(tree.pop("format") == FORMAT, f"{str(path)!r} has another format than {FORMAT}")
    for name in tree:
        check(name in names, f"{str(path)!r}: unknown entry {name!r}{nearest(name, names)}")
    if tree["law"] != "power":
        laws.get_law(tree["law"])
    methods = (*SURFACES, "envelope", "parabola", "akima", "robust")
    check(
        tree["method"] in methods,
        f"{str(path)!r}: method {tree['method']!r} is not one of {', '.join(methods)}",
    )
    kinds = {"parameters": dict, "points": dict, "draws": list, "names": list, "intervals": dict}
    for part, kind in kinds.items():
        check(isinstance(tree.get(part, kind()), kind), f"{str(path)!r}: {part} is not a {kind.__name__}")
    tree["names"] = tuple(tree.get("names", ()))
    absent = set(tree["names"]) - set(tree["parameters"])
    check(not absent, f"{str(path)!r} names {', '.join(sorted(absent))}, but has no value for it")
    short = any(len(draw) != len(tree["names"]) for draw in tree.get("draws", ()))
    check(not short, f"{str(path)!r}: a draw has another length than names")
    for part in ("parameters", "derived"):
        tree[part] = {name: _nan(v) for name, v in tree.get(part, {}).items()}
    for part in ("draws", "residuals", "points", "intervals", "covariance", "profile"):
        if part in tree:
            tree[part] = _nan(tree[part])
    return Fit(**tree)


def _nan(tree):
    """NaN for None."""
    if isinstance(tree, dict):
        return {name: _nan(x) for name, x in tree.items()}
    if isinstance(tree, list):
        return [_nan(x) for x in tree]
    return float("nan") if tree is None else tree
