"""Alarms of the envelope and of iso-FLOP lines. `diagnostics.examine` calls them."""

import math

import numpy as np

from jaxlm.scaling.design_checks import Found, found
from jaxlm.scaling.lines import line
from jaxlm.scaling.record import Fit
from jaxlm.scaling.table import Points
from jaxlm.scaling.vertices import parabola_bias

DRIFT = 1.5  # of the grid's centre against N*, over the sampled compute
SPREAD = 0.05  # of the FLOPs within a budget


def budgets(fit: Fit, points: Points) -> Found:
    """No interior minimum, vertices at the edge, uneven budgets, too few of them."""
    out: Found = []
    lost = [o for o in fit.optima if not o["used"]]
    used = [o for o in fit.optima if o["used"]]
    if lost:
        each = "; ".join(f"C = {o['budget']:.3g}: {o['reason']}" for o in lost)
        text = f"{len(lost)} of {len(fit.optima)} budgets have no usable minimum and are left out ({each})"
        out += found("no_interior_minimum", "warning", text, [o["budget"] for o in lost])
    edge = [o for o in used if o.get("edge")]
    if edge:
        each = ", ".join(f"{o['budget']:.3g}" for o in edge)
        text = f"the best run is the smallest or the largest size at C = {each}: add sizes beyond it"
        out += found("vertex_at_edge", "warning", text, [o["budget"] for o in edge])
    if len(used) < 4:
        text = (
            f"a line through {len(used)} optima"
            + (" has no residual" if len(used) == 2 else "")
            + "; the loss line has no floor and will be too low far out"
        )
        out += found("few_optima", "warning" if len(used) < 3 else "note", text, len(used))
    wide = max((o.get("C_spread", 0.0) for o in used), default=0.0)
    if wide > SPREAD:
        text = f"the FLOPs within a budget differ by up to {wide:.1%}: its runs do not share one C"
        out += found("budget_spread", "warning", text, wide)
    return out


def drift(fit: Fit, points: Points) -> Found:
    """A grid whose centre moves against N* bends the exponent (pitfall 7)."""
    used = [o for o in fit.optima if o["used"] and o.get("distance") is not None]
    if len(used) < 3:
        return []
    x = np.log([[o["budget"] for o in used]])
    y = np.array([[o["distance"] for o in used]])
    slope = float(line(x, y, np.ones_like(x))[1][0])
    moved = math.exp(abs(slope) * float(np.ptp(x)))
    errors = np.sqrt(sum(o["sigma_log_N"] ** 2 for o in used) / len(used)) / (x.std() * math.sqrt(len(used)))
    if moved < DRIFT or abs(slope) < 2 * errors:
        return []
    text = (
        f"the centre of the sizes moves against the vertex by a factor {moved:.3g} from the smallest to the "
        "largest budget: off-centre vertices are biased, so the exponent bends. Centre the grid on N*(C) "
        "and repeat"
    )
    return found("drifting_centre", "warning", text, slope)


def scatter(fit: Fit, points: Points) -> Found:
    """Vertices that lie further from their line than their own noise allows."""
    excess, ratio = (fit.settings.get(name, 0.0) for name in ("excess_scatter", "scatter_ratio"))
    if not excess:
        return []
    text = (
        f"the optima scatter {ratio:.2g} times as much about their line as the noise of the runs explains. "
        f"The intervals hold the rest ({math.expm1(excess):.1%} of N*, taken for independent at every "
        "budget); look for budgets of fewer sizes or other settings, or for a bend: then it is no power law"
    )
    return found("scattered_vertices", "warning", text, ratio)


def exponents(fit: Fit, points: Points) -> Found:
    """a + b = 1 where C / (N D) is the same at all scales."""
    total = fit.parameters["a"] + fit.parameters["b"]
    if not fit.draws:
        return []
    at = [fit.names.index(name) for name in ("a", "b")]
    spread = float(np.asarray(fit.draws)[:, at].sum(-1).std())
    if abs(total - 1) < max(3 * spread, 0.01):
        return []
    text = (
        f"a + b = {total:.4f}: N* D* does not grow like C. FLOPs per parameter and token differ between "
        "scales (attention, head), or the two parabolas disagree"
    )
    return found("exponents_do_not_add", "note", text, total)


def bias(fit: Fit, points: Points, alpha: float, beta: float) -> Found:
    """By how much a quadratic's vertices are off on a surface with these exponents (pitfall 7)."""
    used = [o for o in fit.optima if o["used"] and o.get("N")]
    if fit.method not in ("parabola", "robust") or not used:
        return []
    log_n, log_c = np.log(points.N), np.log(points.C)
    shifts = []
    for o in used:
        reach = math.log1p(o["C_spread"]) + 1e-9
        near = np.abs(log_c - math.log(o["budget"])) <= reach
        low, high = o["N_low"], o["N_high"]
        near &= (low <= points.N) & (high >= points.N)
        shift = 0.0
        for _ in range(3):  # offsets are from the true optimum, which is the vertex less the bias
            shift = parabola_bias(alpha, beta, log_n[near] - math.log(o["N"]) + shift)
        shifts.append(shift)
    middle = float(np.median(shifts))
    noise = float(np.median([o["sigma_log_N"] for o in used])) / math.sqrt(len(used))
    serious = abs(middle) > max(0.02, 2 * noise)
    text = (
        f"with alpha = {alpha:.3f} and beta = {beta:.3f} (of a surface through the same runs) the vertices "
        f"of parabolas over these sizes put N* {math.expm1(middle):+.1%} and D* {math.expm1(-middle):+.1%} "
        "off at every budget; the exponent stays right if the grids are alike. Narrower grids (4x to each "
        "side) or a surface have less"
    )
    return found("parabola_bias", "warning" if serious else "note", text, middle)


def no_interval(fit: Fit, points: Points) -> Found:
    """A line without draws has no error bars."""
    if fit.draws:
        return []
    return found("no_interval", "warning", "no bootstrap draws: nothing is known about the errors", 0)


CHECKS = (budgets, drift, scatter, exponents, no_interval)
