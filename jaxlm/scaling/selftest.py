"""`jaxlm selftest scaling`: known laws, recovered from tables made up of them, by every law and method.

A row says what was recovered, got, want and the tolerance. Tables are noise-free unless the row says
otherwise, so what is off is the code. Published values are those of the papers named; where a paper gives a
form and no values, the row says made up.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float64

from jaxlm.scaling import laws
from jaxlm.scaling.fit import run_fit
from jaxlm.scaling.optima import fit_envelope, fit_isoflop
from jaxlm.scaling.predict import next_runs, predict
from jaxlm.scaling.problem import make_problem
from jaxlm.scaling.record import Fit
from jaxlm.scaling.table import Points
from jaxlm.scaling.vertices import VARIANTS, parabola_bias

Array = np.ndarray
BESIROGLU = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
HOFFMANN = dict(  # the TeX source's values
    E=math.exp(0.5267228), A=math.exp(6.0073404), B=math.exp(6.0179186), alpha=0.33917084, beta=0.2849083
)
MUENNIGHOFF = dict(
    E=math.exp(0.6254804),
    A=math.exp(6.255414),
    B=math.exp(7.3049974),
    alpha=0.3526596,
    beta=0.3526596,
    R_D=15.387756,
    R_N=5.309743,
)
KAPLAN = dict(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)
CLARK = dict(a=-0.082, b=-0.108, c=0.009, d=1.104, E_s=1.847, E_m=314.478)
KRAJEWSKI = dict(E=0.47, A=18.1, B=30.8, g=2.1, alpha=0.115, beta=0.147, gamma=0.58)


@dataclasses.dataclass(frozen=True)
class Row:
    """One number that was recovered."""

    what: str
    got: float
    want: float
    tolerance: float  # absolute

    @property
    def ok(self) -> bool:
        return bool(abs(self.got - self.want) <= self.tolerance)  # False for NaN


def selftest() -> list[Row]:
    """All rows: closed forms, surfaces, lines, other laws, uncertainty."""
    return [row for part in PARTS for row in part()]


def _rows(what: str, got: Mapping[str, float], want: Mapping[str, float], tolerance: float) -> list[Row]:
    """A row for each wanted number, with a tolerance relative to it."""
    return [
        Row(f"{what}: {name}", float(got[name]), value, tolerance * abs(value))
        for name, value in want.items()
    ]


def _grid(
    low: float = 3e7, high: float = 1e10, sizes: int = 8, ratios: tuple = (2, 200), tokens: int = 7
) -> Points:
    """A rectangle of sizes and tokens per parameter; the losses are filled in later."""
    n = np.repeat(np.geomspace(low, high, sizes), tokens)
    d = n * np.tile(np.geomspace(*ratios, tokens), sizes)
    return Points(n, d, 6 * n * d, np.ones_like(n))


def _made_up(law: str, p: Mapping[str, float], points: Points) -> Points:
    """The same runs with the law's values in the column that it is fitted to."""
    kind = laws.get_law(law)
    columns = {"N": points.N, "D": points.D, "C": points.C, "L": points.L} | dict(points.extra)
    values = laws.predict(kind, p, {name: columns[name] for name in kind.inputs})
    if kind.target == "L":
        return dataclasses.replace(points, L=values)
    return dataclasses.replace(points, extra=dict(points.extra) | {kind.target: values})


def _recovered(law: str, points: Points, **options) -> dict[str, float]:
    options = dict(method="surface", objective="log_mse", starts=8) | options
    fit = run_fit(points, law, draws=0, profile=False, **options)
    return fit.parameters | fit.derived


# --- The parts ---


def closed_forms() -> list[Row]:
    """Published exponents of N*(C) from published surfaces."""
    surface = laws.get_law("chinchilla").derived
    got = surface(HOFFMANN)
    rows = [
        Row("Hoffmann 2022 approach 3, TeX values: a", float(got["a"]), 0.4565, 5e-5),
        Row("Hoffmann 2022 approach 3, TeX values: b", float(got["b"]), 0.5435, 5e-5),
        Row("Besiroglu 2024: a", float(surface(BESIROGLU)["a"]), 0.513, 5e-4),
    ]
    sizes = np.array([0.4, 1, 10, 67, 175, 280, 520, 1e3, 1e4]) * 1e9
    for name, tokens, want in (
        ("1", [8.0, 20.2, 205.1, 1.5e3, 3.7e3, 5.9e3, 11e3, 21.2e3, 216.2e3], 0.50 / 0.50),
        ("2", [7.7, 20.0, 219.5, 1.7e3, 4.3e3, 7.1e3, 13.4e3, 26.5e3, 292e3], 0.51 / 0.49),
    ):
        slope = np.polyfit(np.log(sizes), np.log(np.array(tokens) * 1e9), 1)[0]
        rows.append(Row(f"Hoffmann 2022 table of tokens, approach {name}: b / a", float(slope), want, 0.01))
    tokens = 0.299 * 3.8e25**0.537
    rows.append(Row("Llama 3, D* = .299 C^.537 at 3.8e25, in 1e12", tokens / 1e12, 16.55, 0.02 * 16.55))
    product = 0.1715 * 5.8316  # DeepSeek counts M N* in FLOPs per token: C = M D
    rows.append(Row("DeepSeek LLM, M* D* / C", product, 1.0, 2e-3))
    steps = 1 / (1.2 - 1) + 1  # S / S_min where 20% more tokens than E_min are spent
    rows.append(Row("Zhang 2024, batch at 20% overhead / B_crit", 1.2 / steps, 0.2, 1e-12))
    return rows


def surfaces() -> list[Row]:
    """Surface fits by both solvers and all objectives."""
    rows = []
    points = _made_up("chinchilla", BESIROGLU, _grid())
    for objective in ("huber", "lad", "log_mse", "mse"):
        got = _recovered("chinchilla", points, objective=objective)
        want = BESIROGLU if objective == "huber" else {k: BESIROGLU[k] for k in ("E", "alpha", "beta")}
        rows += _rows(f"Besiroglu 2024, surface, {objective}", got, want, 1e-5)
    got = _recovered("chinchilla", points, method="varpro")
    rows += _rows("Besiroglu 2024, variable projection", got, BESIROGLU, 1e-5)
    hoffmann = _made_up("chinchilla", HOFFMANN, _grid())
    rows += _rows(
        "Hoffmann 2022 TeX, surface, huber",
        _recovered("chinchilla", hoffmann, objective="huber"),
        HOFFMANN,
        1e-5,
    )
    tied = BESIROGLU | {"alpha": 0.35, "beta": 0.35}
    got = _recovered(
        "chinchilla", _made_up("chinchilla", tied, _grid()), ties=("alpha=beta",), fixed={"E": tied["E"]}
    )
    rows += _rows(
        "alpha = beta tied, E fixed (made up)", got, {k: tied[k] for k in ("A", "B", "alpha")}, 1e-6
    )
    rows += _rows(
        "Kaplan 2020, L(N, D)", _recovered("kaplan", _made_up("kaplan", KAPLAN, _grid())), KAPLAN, 1e-4
    )
    return rows


def lines() -> list[Row]:
    """Envelope and iso-FLOP lines, and the parabola's bias."""
    rows = []
    budgets = np.geomspace(6e18, 3e21, 9)
    for a, name in ((0.50, "Hoffmann 2022 approach 1"), (0.49, "Hoffmann 2022 approach 2")):
        # alpha = c / a and beta = c / b with c = .17: the surface whose N* grows like C^a.
        p = BESIROGLU | {"alpha": 0.17 / a, "beta": 0.17 / (1 - a)}
        law = laws.get_law("chinchilla")
        best = laws.optimum(law, p, budgets)[0]
        if a == 0.50:
            n = np.repeat(np.geomspace(4.4e7, 1.6e10, 40), 200)
            c = (n / laws.optimum(law, p, 1.0)[0]) ** (1 / a) * np.tile(np.geomspace(0.02, 50, 200), 40)
            fit = fit_envelope(_made_up("chinchilla", p, Points(n, c / 6 / n, c, n)), draws=0)
            rows.append(Row(f"{name}, envelope of 40 sizes: a", fit.parameters["a"], a, 1e-5))
            rows.append(Row(f"{name}, envelope of 40 sizes: b", fit.parameters["b"], 1 - a, 1e-5))
        for variant in VARIANTS:
            sizes = np.exp(np.linspace(-1, 1, 9) * math.log(4))
            n, c = np.outer(best, sizes).ravel(), np.repeat(budgets, 9)
            points = _made_up("chinchilla", p, Points(n, c / 6 / n, c, n))
            fit = fit_isoflop(points, variant=variant, draws=2)
            near = 1e-6 if a == 0.50 or variant == "parabola" else 1e-3
            rows.append(Row(f"{name}, iso-FLOP {variant}: a", fit.parameters["a"], a, near))
    rows += _llama(budgets)
    grid = np.linspace(-1, 1, 15) * math.log(16)
    p = dict(A=406.4, B=410.7, alpha=0.34, beta=0.28)
    true = -math.log10(float(laws.get_law("chinchilla").derived(p)["G"])) - 0.34 / 0.62 * math.log10(6)
    biased = true - parabola_bias(0.34, 0.28, grid) / math.log(10)
    rows.append(Row("log10 k_D of the Chinchilla surface", true, -0.5554, 5e-5))
    rows.append(Row("the same by parabolas over 16x", biased, -0.5781, 5e-5))
    rows.append(
        Row("D* by parabolas, exponents 3:1", math.exp(-parabola_bias(0.465, 0.155, grid)), 0.77, 0.005)
    )
    return rows


def _llama(budgets: Float64[Array, "M"]) -> list[Row]:
    """Llama 3's line: parabolas in log D with their vertices on it."""
    best = 0.299 * budgets**0.537
    offsets = np.linspace(-1, 1, 9) * math.log(8)
    d, c = np.outer(best, np.exp(offsets)).ravel(), np.repeat(budgets, 9)
    values = 1.7 + 2e3 * c**-0.17 * (1 + 0.05 * np.tile(offsets, len(budgets)) ** 2)
    fit = fit_isoflop(Points(c / 6 / d, d, c, values), draws=2)
    return [
        Row("Llama 3, iso-FLOP parabola in log D: b", fit.parameters["b"], 0.537, 1e-6),
        Row("Llama 3, coefficient of D*", math.exp(fit.parameters["log_kD"]), 0.299, 1e-4),
    ]


def other_laws() -> list[Row]:
    """Data-constrained, over-training, mixture of experts, Farseer, hyper-parameters, downstream."""
    rows = []
    unique = np.tile([1e8, 1e9, 1e10], 40)
    n = np.repeat(np.geomspace(1e7, 1e10, 8), 15)
    d = unique * np.tile(np.repeat([0.5, 1, 4, 16, 64], 3), 8)
    points = _made_up("data_constrained", MUENNIGHOFF, Points(n, d, 6 * n * d, n, extra={"U": unique}))
    got = _recovered("data_constrained", points, starts=24)
    rows += _rows(
        "Muennighoff 2023", got, {k: MUENNIGHOFF[k] for k in ("E", "alpha", "beta", "R_D", "R_N")}, 1e-4
    )
    p = dict(E=1.8, A=60.0, B=140.0, eta=0.12)
    rows += _rows(
        "Gadre 2024 form (made up)",
        _recovered("over_training", _made_up("over_training", p, _grid())),
        p,
        1e-5,
    )
    rows += _farseer()
    experts = np.tile([2.0, 8, 32, 128, 512], 9)
    n = np.repeat(np.geomspace(1.5e7, 1.3e9, 9), 5)
    points = _made_up("moe_routed", CLARK, Points(n, n, n * n, n, extra={"E": experts}))
    rows += _rows("Clark 2022, S-BASE", _recovered("moe_routed", points, starts=24), CLARK, 1e-3)
    base = _grid(sizes=6, tokens=5)
    many = base.take(np.repeat(np.arange(len(base)), 4))
    fine = dataclasses.replace(many, extra={"granularity": np.tile([1.0, 2, 4, 16], len(base))})
    got = _recovered("moe_granularity", _made_up("moe_granularity", KRAJEWSKI, fine), starts=24)
    rows += _rows("Krajewski 2024", got, KRAJEWSKI, 1e-3)
    sparse = dataclasses.replace(many, extra={"sparsity": np.tile([0.0, 0.5, 0.9, 0.98], len(base))})
    abnar = dict(E=0.9, A=300.0, B=900.0, c=0.4, d=20.0, alpha=0.35, beta=0.33, delta=-0.1, gamma=0.15)
    abnar["lambda"] = -0.2
    got = laws.predict(laws.get_law("moe_sparsity"), abnar, _inputs(sparse))
    fitted = _recovered("moe_sparsity", _made_up("moe_sparsity", abnar, sparse), starts=24)
    again = laws.predict(laws.get_law("moe_sparsity"), fitted, _inputs(sparse))
    rows.append(
        Row(
            "Abnar 2025 form (made up): worst relative loss error",
            float(np.max(np.abs(again / got - 1))),
            0,
            1e-5,
        )
    )
    return rows + _hyper_parameters() + _downstream()


def _inputs(points: Points) -> dict[str, Array]:
    return {"N": points.N, "D": points.D, "C": points.C} | dict(points.extra)


def _farseer() -> list[Row]:
    """Farseer's form, judged by its values and by how its data exponent depends on N."""
    p = dict(
        a1=-0.124, b1=0.424, alpha=0.123, a2=88.01, b2=-5.287, beta=-0.1, a3=-0.021, b3=0.091, gamma=0.169
    )
    points = _made_up("farseer", p, _grid())
    fitted = _recovered("farseer", points, starts=24)
    law = laws.get_law("farseer")
    off = np.max(np.abs(laws.predict(law, fitted, _inputs(points)) / points.L - 1))
    rows = [Row("Farseer form (made up): worst relative loss error", float(off), 0, 1e-4)]
    for n in (1e8, 1e10):
        want, got = (math.exp(q["a1"] * n ** q["alpha"] + q["b1"]) for q in (p, fitted))
        rows.append(Row(f"Farseer form: exponent of D at N = {n:.0e}", got, want, 1e-3 * want))
    return rows


def _hyper_parameters() -> list[Row]:
    rows = []
    points = _grid()
    for law, p, what in (
        ("lr_compute", dict(c=0.3118, a=-0.125), "DeepSeek LLM, lr*"),
        ("batch_compute", dict(c=0.2920, a=0.3271), "DeepSeek LLM, batch*"),
        ("lr_power", dict(c=1.79, a=-0.713, b=0.307), "Step law, lr*"),
        ("critical_batch_data", dict(c=5e2, a=0.47), "Zhang 2024 exponent, c made up"),
    ):
        rows += _rows(what, _recovered(law, _made_up(law, p, points)), p, 1e-5)
    p = dict(c=0.58, a=0.0, b=0.571)
    got = _recovered("batch_power", _made_up("batch_power", p, points), fixed={"a": 0.0})
    rows += _rows("Step law, batch*", got, {"c": 0.58, "b": 0.571}, 1e-5)
    losses = dataclasses.replace(points, L=np.linspace(2, 5, len(points)))
    p = dict(c=2e8, a=1 / 0.21)
    rows += _rows(
        "Kaplan 2020, B_crit(L)",
        _recovered("critical_batch_loss", _made_up("critical_batch_loss", p, losses)),
        p,
        1e-5,
    )
    for law, exponent, scale, what in (
        ("loss_n", 0.076, 8.8e13, "L(N)"),
        ("loss_d", 0.095, 5.4e13, "L(D)"),
        ("loss_c", 0.050, 3.1e8 * 8.64e19, "L(C), C in FLOPs"),
    ):
        p = dict(E=0.0, A=scale**exponent, alpha=exponent)
        got = _recovered(law, _made_up(law, p, points), fixed={"E": 0.0})
        rows.append(Row(f"Kaplan 2020, {what}: exponent", got["alpha"], exponent, 1e-6))
    batch = np.geomspace(1e3, 1e7, 12)
    p = dict(S_min=1e4, E_min=2e9)
    trade = Points(batch, batch, batch, batch, extra={"batch": batch})
    rows += _rows(
        "McCandlish 2018 (made up)",
        _recovered("critical_batch", _made_up("critical_batch", p, trade)),
        p,
        1e-5,
    )
    return rows


def _downstream() -> list[Row]:
    rows = []
    at = Points(*np.ones((3, 30)), np.linspace(1.8, 4.0, 30))
    for law, p, what in (
        ("loss_to_error", dict(eps=0.86, k=2.1, gamma=0.75), "Gadre 2024 error form (made up)"),
        ("loss_to_accuracy", dict(a=0.7, b=0.25, k=3.0, L0=2.6), "OLMo ladder sigmoid (made up)"),
    ):
        kind = laws.get_law(law)
        points = _made_up(law, p, at)
        fitted = _recovered(law, points, objective="mse")
        off = np.max(np.abs(laws.predict(kind, fitted, {"L": at.L}) - points.extra[kind.target]))
        rows.append(Row(f"{what}: worst error", float(off), 0.0, 1e-5))
    return rows


def uncertainty() -> list[Row]:
    """Errors of a noisy made-up sweep: two theories agree, and more runs shrink them."""
    base = _grid(sizes=9, tokens=9)
    points = _made_up("chinchilla", BESIROGLU, base)
    noisy = dataclasses.replace(
        points, L=points.L * np.exp(np.random.default_rng(0).normal(0, 0.002, len(points)))
    )
    fit = run_fit(noisy, "chinchilla", "surface", "log_mse", draws=200, starts=4, profile=False)
    rows = []
    theory = np.sqrt(np.diag(np.array(fit.covariance["gauss_newton"])))
    for name in ("E", "alpha", "beta"):
        i = fit.names.index(name)
        ratio = float(np.std(np.array(fit.draws)[:, i]) / theory[i])
        rows.append(Row(f"81 runs, noise .2%: bootstrap / Gauss-Newton error of {name}", ratio, 1.0, 0.25))
    target = 10 * points.C.max()
    result = predict(fit, target)
    true = float(laws.optimum(laws.get_law("chinchilla"), BESIROGLU, target)[0])
    width = math.log(result.N.hi / result.N.lo)
    rows.append(Row("log N* at 10x compute", math.log(result.N.value), math.log(true), width))
    rows.append(_next_run(fit, points, target))
    return rows


def _next_run(fit: Fit, points: Points, target: float) -> Row:
    """What the best next run leaves of the error of log N*: by the draws, over the Gauss-Newton value."""
    run = next_runs(fit, target, k=1)[0]
    more = Points(
        *(
            np.append(v, w)
            for v, w in ((points.N, run.N), (points.D, run.D), (points.C, run.C), (points.L, 2.0))
        )
    )
    problem = make_problem(more, fit.law, fit.objective)
    law = problem.law
    z = laws.to_coordinates(law, np.array([fit.parameters[name] for name in law.names]), problem.x)
    phi = problem.free(z)
    jac = problem.residuals(phi[None])[1][0]

    def log_n(at: Array) -> float:
        p = dict(zip(law.names, problem.parameters(at), strict=True))
        return math.log(laws.optimum(law, p, target)[0])

    step = 1e-5
    slope = np.array([(log_n(phi + step * e) - log_n(phi - step * e)) / (2 * step) for e in np.eye(len(phi))])
    before, after = (math.sqrt(slope @ np.linalg.solve(j.T @ j, slope)) for j in (jac[:-1], jac))
    ratio = (run.sd_after / run.sd_before) / (after / before)
    return Row(
        "81 runs: error of log N* that the best next run leaves, draws / Gauss-Newton", ratio, 1.0, 0.05
    )


PARTS: tuple[Callable[[], list[Row]], ...] = (closed_forms, surfaces, lines, other_laws, uncertainty)


def selftest_command() -> int:
    """`jaxlm selftest scaling`: prints the table; 1 if anything is off."""
    from rich.console import Console
    from rich.table import Table

    began = time.monotonic()
    rows = selftest()
    table = Table(title="known laws, recovered from tables made up of them", title_justify="left")
    for column in ("what", "got", "want", "tolerance", "ok"):
        table.add_column(column, justify="left" if column in ("what", "ok") else "right")
    for row in rows:
        numbers = (f"{row.got:.7g}", f"{row.want:.7g}", f"{row.tolerance:.2g}")
        table.add_row(row.what, *numbers, "yes" if row.ok else "NO", style=None if row.ok else "bold red")
    console = Console(width=None if Console().is_terminal else 130)
    console.print(table)
    off = sum(not row.ok for row in rows)
    console.print(f"{len(rows)} numbers, {off} off, {time.monotonic() - began:.1f} s", highlight=False)
    return 1 if off else 0
