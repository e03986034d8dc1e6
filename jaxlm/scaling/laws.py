"""The scaling laws, each one frozen value: parameters, formula, inputs, starts, compute optimum.

A law works in coordinates `z`: a positive coefficient is its logarithm, everything else is itself. The solver
centres them (log A - alpha mean log N in place of log A), which takes the correlation out of the problem.
`LAWS` lists them; `predict`, `optimum` and `derived` are what others ask of a fitted one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np
from scipy.optimize import minimize_scalar

from jaxlm.errors import UserError, check, nearest
from jaxlm.scaling import forms, starts
from jaxlm.scaling.forms import Array, Features, Value

FLOPS_PER_PARAM_TOKEN = 6.0  # C = 6 N D, where the caller does not say otherwise
Inputs = Mapping[str, np.ndarray]
Params = Mapping[str, float | np.ndarray]
# (coefficient, ((exponent, or '' for 1, input, sign), ...)): coefficient * product of input^(sign exponent)
Terms = tuple[tuple[str, tuple[tuple[str, str, float], ...]], ...]
EXPONENT = (1e-4, 10.0)  # what an exponent may be, where a law does not say otherwise
UNBOUNDED = (-np.inf, np.inf)


@dataclasses.dataclass(frozen=True)
class Law:
    """One law: what it says, what it needs, where a fit of it starts."""

    formula: str
    names: tuple[str, ...]  # public parameters, in the order of z
    inputs: tuple[str, ...]  # roles of the columns that it reads
    form: Callable[[Array, Features], Value]  # z, features -> value, d value / d z
    starts: Callable[[Features, Array], Array]  # features, target -> grid of z
    logs: tuple[str, ...] = ()  # parameters whose coordinate is their logarithm
    limits: Mapping[str, tuple[float, float]] = dataclasses.field(
        default_factory=dict
    )  # of z; else UNBOUNDED
    terms: Terms = ()  # powers, for centring and for variable projection
    separable: bool = False  # the value is the sum of `terms` and nothing else
    mixed: tuple[str, ...] = ()  # parameters without a coordinate of their own: they cannot be fixed
    target: str = "L"  # role of the column that is fitted
    derived: Callable[[Params], dict] = lambda p: {}  # a, b, G ... from parameters (arrays allowed)
    compute: str = ""  # how N*(C) is found: '' not at all | closed (from a, b, G) | numeric
    link: Callable[[Array, Features], Array] | None = None  # parameters -> z, where `logs` does not say it
    unlink: Callable[[Array, Features], Array] | None = None  # z -> parameters
    source: str = ""


def features(inputs: Inputs) -> dict[str, np.ndarray]:
    """What the forms read: logs of N, D, C, U ..., of M = D/N and density = 1 - sparsity; L as it is."""
    arrays = {name: np.atleast_1d(np.asarray(v, float)) for name, v in inputs.items()}
    x = {name: np.log(v) for name, v in arrays.items() if name not in ("L", "sparsity")}
    if "N" in x and "D" in x:
        x["M"] = x["D"] - x["N"]
    if "sparsity" in arrays:
        x["density"] = np.log1p(-arrays["sparsity"])
    if "L" in arrays:
        x["L"], x["log_L"] = arrays["L"], np.log(arrays["L"])
    return x


def to_coordinates(law: Law, p: Array, x: Features) -> Array:
    """Parameters (..., P) in the order of `law.names` -> z."""
    if law.link:
        return law.link(np.asarray(p, float), x)
    out = np.array(p, float)
    for i, name in enumerate(law.names):
        if name in law.logs:
            out[..., i] = np.log(np.maximum(out[..., i], 1e-300))
    return out


def to_parameters(law: Law, z: Array, x: Features) -> Array:
    """z (..., P) -> parameters in the order of `law.names`."""
    if law.unlink:
        return law.unlink(np.asarray(z, float), x)
    out = np.array(z, float)
    for i, name in enumerate(law.names):
        if name in law.logs:
            out[..., i] = np.exp(out[..., i])
    return out


def get_law(name: str) -> Law:
    """The law of this name, or `UserError` with the nearest one."""
    if name not in LAWS:
        raise UserError(f"law={name!r} is not one of {', '.join(LAWS)}{nearest(name, LAWS)}")
    return LAWS[name]


def predict(law: Law, p: Params, inputs: Inputs) -> Array:
    """The law's value at inputs that broadcast together; `UserError` where one is missing or not positive."""
    missing = [name for name in law.inputs if name not in inputs]
    check(not missing, f"the law needs {', '.join(missing)} too: {law.formula}")
    arrays = np.broadcast_arrays(*(np.asarray(inputs[name], float) for name in law.inputs))
    named = dict(zip(law.inputs, arrays, strict=True))
    for name, value in named.items():
        good = np.isfinite(value) & ((value > 0) if name != "sparsity" else (value >= 0) & (value < 1))
        check(bool(good.all()), f"{name}={value[~good].ravel()[:1]} is outside what the law takes")
    x = features({name: a.ravel() for name, a in named.items()})
    z = to_coordinates(law, np.array([p[name] for name in law.names], float), x)
    return law.form(z, x)[0].reshape(arrays[0].shape)


def optimum(
    law: Law,
    p: Params,
    compute: Array,
    flops_per_param_token: float = FLOPS_PER_PARAM_TOKEN,
    extra: Inputs = {},  # noqa: B006  never written to
) -> tuple[Array, Array]:
    """N* and D* of least loss at these FLOPs, with C = flops_per_param_token N D.

    Closed form where the law has one, else the lowest minimum inside 1 <= N <= N D, to about 1e-8 of log N:
    farseer falls again at sizes far outside any data. `extra` holds the other inputs (U, sparsity, ...), one
    value each.

    Raises:
      UserError: the law has no optimum, or none in the interior.
    """
    check(bool(law.compute), f"this law has no compute optimum: {law.formula}")
    c = np.asarray(compute, float)
    check(bool(np.all(np.isfinite(c) & (c > 0))), f"compute={compute} must be positive FLOPs")
    product = c / flops_per_param_token  # N D
    if law.compute == "closed":
        d = law.derived(p)
        n = d["G"] * product ** d["a"]
        return n, product / n
    others = {k: float(np.asarray(v)) for k, v in extra.items()}

    def best(nd: float) -> float:
        def loss(log_n: Array) -> Array:
            n = np.exp(log_n)
            inputs = {"N": n, "D": nd / n, "C": np.full_like(n, nd * flops_per_param_token)}
            inputs |= {k: np.full_like(n, v) for k, v in others.items()}
            return predict(law, p, inputs)

        grid = np.linspace(0, np.log(nd), 1001)
        values = loss(grid)
        inner = 1 + np.flatnonzero((values[1:-1] < values[:-2]) & (values[1:-1] < values[2:]))
        check(len(inner) > 0, f"no interior optimum at N D = {nd:.6g}: the loss falls to the edge")
        at = int(inner[np.argmin(values[inner])])
        found = minimize_scalar(
            lambda u: float(loss(np.array([u]))[0]),
            bounds=(grid[at - 1], grid[at + 1]),
            method="bounded",
            options={"xatol": 1e-10},
        )
        return float(np.exp(found.x))

    n = np.array([best(float(v)) for v in np.atleast_1d(product)]).reshape(product.shape)
    return n, product / n


def _indexed(names: tuple[str, ...], logs: tuple[str, ...], terms: Terms) -> list:
    at = {"": None, **{name: i for i, name in enumerate(names)}}
    return [(at[c], c in logs, tuple((at[e], i, s) for e, i, s in factors)) for c, factors in terms]


def _sum(formula: str, names: str, inputs: str, terms: Terms, grid: tuple = (), **options) -> Law:
    """A law that is a sum of coefficients times powers; all but E are positive by their logarithms."""
    order = tuple(names.split())
    logs = tuple(c for c, _ in terms if c != "E")
    form = functools.partial(_sum_form, terms=_indexed(order, logs, terms))
    options.setdefault("starts", functools.partial(starts.powers, order, logs, terms, grid))
    exponents = {e: EXPONENT for _, factors in terms for e, _, _ in factors if e}
    limits = {"E": (0.0, np.inf), **exponents, **options.pop("limits", {})}
    limits = {name: limit for name, limit in limits.items() if name in order}
    return Law(
        formula,
        order,
        tuple(inputs.split()),
        form,
        logs=logs,
        limits=limits,
        terms=terms,
        separable=True,
        **options,
    )


def _sum_form(z: Array, x: Features, terms: list) -> Value:
    return forms.sum_of_powers(z, x, terms)


def _chinchilla_derived(p: Params) -> dict:
    """a, b, G with N* = G (C/6)^a, and c with reducible loss ~ C^-c."""
    al, be = p["alpha"], p["beta"]
    log_g = np.log(al * p["A"] / (be * p["B"])) / (al + be)
    return {"a": be / (al + be), "b": al / (al + be), "G": np.exp(log_g), "c": al * be / (al + be)}


def _kaplan_derived(p: Params) -> dict:
    """From r N_c^r N^(-r-1) = 6 D_c / C with r = alpha_N / alpha_D."""
    r = p["alpha_N"] / p["alpha_D"]
    log_g = (np.log(r) + r * np.log(p["N_c"]) - np.log(p["D_c"])) / (1 + r)
    return {"a": 1 / (1 + r), "b": r / (1 + r), "G": np.exp(log_g), "c": p["alpha_N"] / (1 + r)}


def _over_training_derived(p: Params) -> dict:
    """Least loss at M* = (B/A)^(1/(2 eta)) tokens a parameter; N* = sqrt(C/(6 M*))."""
    m = (p["B"] / p["A"]) ** (1 / (2 * p["eta"]))
    half = np.full_like(m, 0.5)
    return {"a": half, "b": half, "G": m**-0.5, "c": p["eta"], "M": m}


SURFACE: Terms = (("E", ()), ("A", (("alpha", "N", -1),)), ("B", (("beta", "D", -1),)))
SMALL, WIDE = (0.15, 0.3, 0.5, 0.8), (-1.0, -0.5, -0.2, 0.2, 0.5, 1.0)
SIGNED = (-10.0, 10.0)  # an exponent of either sign


def _single(variable: str) -> Law:
    """`E + A x^-alpha` of one variable; fix E = 0 for Kaplan's pure power law."""
    terms: Terms = (("E", ()), ("A", (("alpha", variable, -1),)))
    text = f"L = E + A {variable}^-alpha"
    return _sum(text, "E A alpha", variable, terms, grid=((0.03, 0.1, 0.2, 0.4, 0.8),))


def _monomial(target: str, formula: str, names: str, factors: tuple, source: str, **options) -> Law:
    """`target = c times powers`: the column of optima is fitted, its logarithm is linear."""
    inputs = " ".join("L" if i == "log_L" else i for _, i, _ in factors)
    limits = {e: SIGNED for e, _, _ in factors}
    grid = (WIDE,) * len(factors)
    terms: Terms = (("c", factors),)
    return _sum(
        formula, names, inputs, terms, grid=grid, target=target, limits=limits, source=source, **options
    )


LAWS: dict[str, Law] = {
    "chinchilla": _sum(
        "L = E + A N^-alpha + B D^-beta",
        "E A B alpha beta",
        "N D",
        SURFACE,
        starts=starts.hoffmann,
        derived=_chinchilla_derived,
        compute="closed",
        source="Hoffmann et al. 2022, arXiv:2203.15556",
    ),
    "kaplan": Law(
        "L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D",
        ("N_c", "D_c", "alpha_N", "alpha_D"),
        ("N", "D"),
        forms.kaplan,
        starts.kaplan,
        logs=("N_c", "D_c"),
        limits={"alpha_N": EXPONENT, "alpha_D": EXPONENT},
        derived=_kaplan_derived,
        compute="closed",
        source="Kaplan et al. 2020, arXiv:2001.08361, equation 1.5",
    ),
    "data_constrained": Law(
        "L = E + A N'^-alpha + B D'^-beta, X' = U_X (1 + R_X (1 - exp(-(X/U_X - 1)/R_X)))",
        ("E", "A", "B", "alpha", "beta", "R_D", "R_N"),
        ("N", "D", "U"),
        forms.data_constrained,
        functools.partial(starts.data_constrained, ("E", "A", "B", "alpha", "beta", "R_D", "R_N"), SURFACE),
        logs=("A", "B", "R_D", "R_N"),
        limits={
            "E": (0.0, np.inf),
            "alpha": EXPONENT,
            "beta": EXPONENT,
            "R_D": (-7.0, 12.0),
            "R_N": (-7.0, 12.0),
        },
        terms=SURFACE,
        derived=_chinchilla_derived,
        compute="numeric",
        source="Muennighoff et al. 2023, arXiv:2305.16264",
    ),
    "over_training": _sum(
        "L = E + (A M^eta + B M^-eta) C^-eta, M = D/N",
        "E A B eta",
        "N D C",
        (
            ("E", ()),
            ("A", (("eta", "M", 1), ("eta", "C", -1))),
            ("B", (("eta", "M", -1), ("eta", "C", -1))),
        ),
        grid=((0.05, 0.1, 0.2, 0.3, 0.5),),
        derived=_over_training_derived,
        compute="closed",
        source="Gadre et al. 2024, arXiv:2403.08540, equation 4 (a is A, b is B here)",
    ),
    "farseer": Law(
        "L = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) D^(-exp(a1 N^alpha + b1))",
        ("a1", "b1", "alpha", "a2", "b2", "beta", "a3", "b3", "gamma"),
        ("N", "D"),
        forms.farseer,
        starts.farseer,
        limits={
            "a1": (-10.0, 2.0),
            "alpha": (-3.0, 3.0),
            "beta": (-3.0, 3.0),
            "gamma": (-3.0, 3.0),
        },
        mixed=("a1", "b1", "a2", "b2", "a3", "b3"),
        compute="numeric",
        link=forms.farseer_link,
        unlink=forms.farseer_unlink,
        source="Li et al. 2025, arXiv:2506.10972",
    ),
    "moe_sparsity": _sum(
        "L = E + A N^-alpha + B D^-beta + c (1-S)^-lambda + d (1-S)^-delta N^-gamma",
        "E A B c d alpha beta lambda delta gamma",
        "N D sparsity",
        (
            *SURFACE,
            ("c", (("lambda", "density", -1),)),
            ("d", (("delta", "density", -1), ("gamma", "N", -1))),
        ),
        grid=((0.3, 0.6), (0.3, 0.6), (-0.4, -0.15, 0.15), (-0.2, 0.2), (0.1, 0.25)),
        limits={"lambda": SIGNED, "delta": SIGNED},
        compute="numeric",
        source="Abnar et al. 2025, arXiv:2501.12370",
    ),
    "moe_granularity": _sum(
        "L = E + (g G^-gamma + A) N^-alpha + B D^-beta",
        "E A B g alpha beta gamma",
        "N D granularity",
        (*SURFACE, ("g", (("alpha", "N", -1), ("gamma", "granularity", -1)))),
        grid=(SMALL, SMALL, (0.2, 0.5, 1.0)),
        compute="numeric",
        source="Krajewski et al. 2024, arXiv:2402.07871",
    ),
    "moe_routed": Law(
        "log10 L = a log10 N + b log10 F + c log10 N log10 F + d, 1/F = 1/(E-1+1/(1/E_s-1/E_m)) + 1/E_m",
        ("a", "b", "c", "d", "E_s", "E_m"),
        ("N", "E"),
        forms.routed,
        starts.routed,
        limits={"E_s": (-3.0, 10.0), "E_m": (-3.0, 15.0)},
        mixed=("E_s", "E_m"),
        link=forms.routed_link,
        unlink=forms.routed_unlink,
        source="Clark et al. 2022, arXiv:2202.01169",
    ),
    "loss_n": _single("N"),
    "loss_d": _single("D"),
    "loss_c": _single("C"),
    "lr_power": _monomial(
        "lr",
        "lr* = c N^a D^b",
        "c a b",
        (("a", "N", 1), ("b", "D", 1)),
        "Li et al. 2025 (Step law), arXiv:2503.04715",
    ),
    "lr_compute": _monomial(
        "lr", "lr* = c C^a", "c a", (("a", "C", 1),), "DeepSeek LLM 2024, arXiv:2401.02954"
    ),
    "batch_power": _monomial(
        "batch",
        "batch* = c N^a D^b",
        "c a b",
        (("a", "N", 1), ("b", "D", 1)),
        "fix a=0 for the Step law, arXiv:2503.04715",
    ),
    "batch_compute": _monomial(
        "batch", "batch* = c C^a", "c a", (("a", "C", 1),), "DeepSeek LLM 2024, arXiv:2401.02954"
    ),
    "critical_batch_loss": _monomial(
        "batch",
        "B_crit = c L^-a, a = 1/alpha_B",
        "c a",
        (("a", "log_L", -1),),
        "Kaplan et al. 2020, arXiv:2001.08361, equation 1.4",
        derived=lambda p: {"alpha_B": 1 / p["a"]},
    ),
    "critical_batch_data": _monomial(
        "batch", "B_crit = c D^a", "c a", (("a", "D", 1),), "Zhang et al. 2024, arXiv:2410.21676"
    ),
    "critical_batch": _sum(
        "(S/S_min - 1)(E/E_min - 1) = 1 with E = batch S: S = S_min + E_min / batch",
        "S_min E_min",
        "batch",
        (("S_min", ()), ("E_min", (("", "batch", -1),))),
        target="steps",
        derived=lambda p: {"B_crit": p["E_min"] / p["S_min"]},
        source="McCandlish et al. 2018, arXiv:1812.06162, equation 2.11",
    ),
    "loss_to_accuracy": Law(
        "accuracy = b + a / (1 + exp(k (L - L0)))",
        ("a", "b", "k", "L0"),
        ("L",),
        forms.sigmoid,
        starts.sigmoid,
        logs=("k",),
        limits={"a": (0.0, 10.0), "b": (-10.0, 10.0), "k": (-12.0, 12.0)},
        target="accuracy",
        source="Bhagia et al. 2024 (OLMo ladder), arXiv:2412.04403; k is -k there",
    ),
    "loss_to_error": Law(
        "error = eps - k exp(-gamma L)",
        ("eps", "k", "gamma"),
        ("L",),
        forms.exponential_error,
        starts.exponential_error,
        logs=("k",),
        limits={"eps": (0.0, 10.0), "gamma": (1e-4, 50.0)},
        target="error",
        source="Gadre et al. 2024, arXiv:2403.08540, equation 5",
    ),
}
