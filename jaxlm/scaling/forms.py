"""The formulas of the laws: value and analytic gradient, batched over parameter vectors.

A form maps coordinates `z` (..., P) and a mapping of features (arrays of R points) to the value (..., R) and
its derivatives (..., R, P). Positive coefficients enter as logarithms. `jaxlm.scaling.laws` names the
parameters.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

LARGE = 300.0  # exponents are clipped here: exp() of it is finite, and no law comes near it

Array = Float64[np.ndarray, "..."]
Features = Mapping[str, np.ndarray]
Value = tuple[Array, Array]
Terms = Sequence[tuple[int, bool, Sequence[tuple[int | None, str, float]]]]


def _exp(x: Array) -> Array:
    return np.exp(np.clip(x, -LARGE, LARGE))


def sum_of_powers(z: Array, x: Features, terms: Terms) -> Value:
    """`sum over terms of coefficient * product of input^(sign exponent)`.

    A term is (index of the coefficient, whether it is a logarithm, ((index of the exponent, input, sign),
    ...)),
    where x[input] is the logarithm of the input; the exponent None is the constant 1.
    """
    rows = len(next(iter(x.values())))
    value = np.zeros((*z.shape[:-1], rows))
    jac = np.zeros((*z.shape[:-1], rows, z.shape[-1]))
    for coefficient, is_log, factors in terms:
        log_power = np.zeros_like(value)
        for exponent, name, sign in factors:
            log_power += sign * (1.0 if exponent is None else z[..., exponent, None]) * x[name]
        c = z[..., coefficient, None]
        if is_log:
            term = _exp(c + log_power)
            jac[..., coefficient] += term
        else:
            power = _exp(log_power) if factors else 1.0
            term = c * power
            jac[..., coefficient] += power
        for exponent, name, sign in factors:
            if exponent is not None:
                jac[..., exponent] += sign * x[name] * term
        value += term
    return value, jac


def kaplan(z: Array, x: Features) -> Value:
    """`[(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D`; z = log N_c, log D_c, alpha_N, alpha_D."""
    log_nc, log_dc, an, ad = (z[..., i, None] for i in range(4))
    ad = np.maximum(ad, 1e-12)
    n, d = log_nc - x["N"], log_dc - x["D"]
    u = n * an / ad
    log_sum = np.logaddexp(u, d)
    share = np.exp(u - log_sum)  # of the size term
    value = _exp(ad * log_sum)
    jac = np.empty((*value.shape, 4))
    jac[..., 0] = value * share * an
    jac[..., 1] = value * (1 - share) * ad
    jac[..., 2] = value * share * n
    jac[..., 3] = value * (log_sum - share * u)
    return value, jac


def _effective(log_once: Array, log_all: Array, r_star: Array) -> tuple[Array, Array, Array]:
    """Muennighoff's `X' = U (1 + R* (1 - exp(-R/R*)))`, R = X/U - 1.

    Returns log X', d log X'/d log U and d log X'/d log R*.
    """
    ratio = np.exp(np.minimum(log_all - log_once, LARGE))
    repeats = np.maximum(ratio - 1, 0)
    t = repeats / r_star
    decay = np.exp(-t)
    factor = 1 - r_star * np.expm1(-t)  # 1 + R* (1 - e^-t)
    by_once = 1 - decay * ratio / factor
    by_star = r_star * (-np.expm1(-t) - t * decay) / factor
    return log_once + np.log(factor), np.where(repeats > 0, by_once, 1.0), by_star


def data_constrained(z: Array, x: Features) -> Value:
    """`E + A N'^-alpha + B D'^-beta`; z = E, log A, log B, alpha, beta, log R_D, log R_N.

    U_D = min(U, D); U_N = min(N, N*(U_D)) with the optimum N* of the single-epoch law, where alpha A
    N*^-alpha = beta B U_D^-beta. Source: Muennighoff et al. 2023, arXiv:2305.16264, section 3 and appendix A.
    """
    e, a, b, al, be, log_rd, log_rn = (z[..., i, None] for i in range(7))
    rd, rn = _exp(log_rd), _exp(log_rn)
    al_, be_ = np.maximum(al, 1e-12), np.maximum(be, 1e-12)
    log_u = np.minimum(x["U"], x["D"])
    n_of_u = (np.log(al_ / be_) + a - b + be * log_u) / al_
    few = n_of_u < x["N"]  # more parameters than the unique tokens ask for
    log_un = np.where(few, n_of_u, x["N"])
    log_d, _, d_by_star = _effective(np.broadcast_to(log_u, log_un.shape), x["D"], rd)
    log_n, n_by_once, n_by_star = _effective(log_un, x["N"], rn)
    t_n, t_d = _exp(a - al * log_n), _exp(b - be * log_d)
    slope = np.where(few, -al * t_n * n_by_once, 0.0)  # d value / d log U_N, where U_N moves
    jac = np.empty((*log_un.shape, 7))
    jac[..., 0] = 1.0
    jac[..., 1] = t_n + slope / al_
    jac[..., 2] = t_d - slope / al_
    jac[..., 3] = -log_n * t_n + slope * (1 / al_ - n_of_u) / al_
    jac[..., 4] = -log_d * t_d + slope * (log_u - 1 / be_) / al_
    jac[..., 5] = -be * t_d * d_by_star
    jac[..., 6] = -al * t_n * n_by_star
    return e + t_n + t_d, jac


def box_cox(n: Array, power: Array) -> Value:
    """`(exp(power n) - 1) / power` and its derivative by `power`, without cancellation at small powers."""
    u = power * n
    small = np.abs(u) < 1e-4
    safe = np.where(small, 1.0, u)
    e = np.expm1(np.clip(safe, -LARGE, LARGE))
    value = np.where(small, n * (1 + u / 2 + u * u / 6), n * e / safe)
    slope = np.where(small, n * n * (0.5 + u / 3 + u * u / 8), n * n * ((e + 1) * safe - e) / safe**2)
    return value, slope


def farseer(z: Array, x: Features) -> Value:
    """`exp(a3 N^g + b3) + exp(a2 N^be + b2) D^(-exp(a1 N^al + b1))`.

    Each `a N^g + b` is `p + q box_cox(log N/N_0, g)` here, N_0 the geometric mean of x's N (`farseer_link`);
    z = p1, q1, al, p2, q2, be, p3, q3, g. Source: Li et al. 2025, arXiv:2506.10972.
    """
    p1, q1, al, p2, q2, be, p3, q3, g = (z[..., i, None] for i in range(9))
    n = x["N"] - x["N"].mean()
    c1, s1 = box_cox(n, al)
    c2, s2 = box_cox(n, be)
    c3, s3 = box_cox(n, g)
    exponent = np.exp(np.clip(p1 + q1 * c1, -LARGE, 5.0))
    t2 = _exp(p2 + q2 * c2 - exponent * x["D"])
    t3 = _exp(p3 + q3 * c3)
    down = -t2 * exponent * x["D"]
    parts = (down, down * c1, down * q1 * s1, t2, t2 * c2, t2 * q2 * s2, t3, t3 * c3, t3 * q3 * s3)
    return t2 + t3, np.stack(np.broadcast_arrays(*parts), -1)


def farseer_link(p: Array, x: Features) -> Array:
    """(a, b, g) thrice -> (p, q, g) thrice: q = g a N_0^g, p = b + a N_0^g."""
    out = np.array(p, float)
    for i in (0, 3, 6):
        scaled = p[..., i] * np.exp(p[..., i + 2] * x["N"].mean())
        out[..., i], out[..., i + 1] = p[..., i + 1] + scaled, scaled * p[..., i + 2]
    return out


def farseer_unlink(z: Array, x: Features) -> Array:
    """The inverse of `farseer_link`."""
    out = np.array(z, float)
    for i in (0, 3, 6):
        g = np.where(np.abs(z[..., i + 2]) < 1e-12, 1e-12, z[..., i + 2])
        out[..., i] = z[..., i + 1] / g * np.exp(-g * x["N"].mean())
        out[..., i + 1] = z[..., i] - z[..., i + 1] / g
    return out


def routed(z: Array, x: Features) -> Value:
    """`log L = a log N + b log F + c log N log F + d`, logs to base 10, of Clark et al. 2022, equation 6.

    `1/F = 1/(E - 1 + 1/(1/E_s - 1/E_m)) + 1/E_m` for E experts; z = a, b, c, d, log E_s, log(E_m/E_s - 1).
    """
    a, b, c, d, log_es, log_gap = (z[..., i, None] for i in range(6))
    ten = np.log(10.0)
    n, experts = x["N"] / ten, np.exp(x["E"])
    es, gap = _exp(log_es), _exp(log_gap)
    em = es * (1 + gap)
    first = es * (1 + 1 / gap)  # 1 / (1/E_s - 1/E_m)
    inner = experts - 1 + first
    inverse = 1 / inner + 1 / em
    f = -np.log(inverse) / ten
    # d f / d log E_s and by log gap, through 1/inner (first) and 1/E_m.
    by_es = (first / inner**2 + 1 / em) / inverse / ten
    by_gap = (-(es / gap) / inner**2 + gap * es / em**2) / inverse / ten
    value = _exp(ten * (a * n + b * f + c * n * f + d))
    slope = value * ten * (b + c * n)
    parts = (
        value * ten * n,
        value * ten * f,
        value * ten * n * f,
        value * ten,
        slope * by_es,
        slope * by_gap,
    )
    return value, np.stack(np.broadcast_arrays(*parts), -1)


def routed_link(p: Array, x: Features) -> Array:
    """a, b, c, d, E_s, E_m -> a, b, c, d, log E_s, log(E_m/E_s - 1)."""
    out = np.array(p, float)
    out[..., 4], out[..., 5] = np.log(p[..., 4]), np.log(p[..., 5] / p[..., 4] - 1)
    return out


def routed_unlink(z: Array, x: Features) -> Array:
    """The inverse of `routed_link`."""
    out = np.array(z, float)
    out[..., 4] = np.exp(z[..., 4])
    out[..., 5] = out[..., 4] * (1 + np.exp(z[..., 5]))
    return out


def sigmoid(z: Array, x: Features) -> Value:
    """`b + a / (1 + exp(k (L - L0)))`; z = a, b, log k, L0. Falls from b + a to b as the loss L grows."""
    a, b, log_k, l0 = (z[..., i, None] for i in range(4))
    k = _exp(log_k)
    u = k * (x["L"] - l0)
    s = 0.5 * (1 - np.tanh(u / 2))
    bend = a * s * (1 - s)
    parts = (s, np.ones_like(s), -bend * u, bend * k)
    return b + a * s, np.stack(np.broadcast_arrays(*parts), -1)


def exponential_error(z: Array, x: Features) -> Value:
    """`eps - k exp(-gamma L)`; z = eps, log k, gamma.

    Source: Gadre et al. 2024, arXiv:2403.08540, equation 5.
    """
    eps, log_k, gamma = (z[..., i, None] for i in range(3))
    t = _exp(log_k - gamma * x["L"])
    parts = (np.ones_like(t), -t, x["L"] * t)
    return eps - t, np.stack(np.broadcast_arrays(*parts), -1)
