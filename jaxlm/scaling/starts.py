"""Where the fits of each law start: grids of coordinates z (S, P) made from the features and the target."""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxlm.scaling.forms import Array, Features


def hoffmann(x: Features, y: Array) -> Array:
    """The 4500 starts of Hoffmann et al. 2022 for E, log A, log B, alpha, beta; E = exp(e)."""
    e, coefficient, exponent = np.arange(-1, 1.01, 0.5), np.arange(0, 25.1, 5), np.arange(0, 2.01, 0.5)
    grid = np.array(list(itertools.product(e, coefficient, coefficient, exponent, exponent)))
    grid[:, 0] = np.exp(grid[:, 0])
    return grid


def powers(
    names: Sequence[str],
    logs: Sequence[str],
    terms: Sequence,
    exponents: Sequence[Sequence[float]],
    x: Features,
    y: Array,
) -> Array:
    """Every combination of values of the exponents, with the coefficients of least relative squares for each.

    `terms` are those of `laws.Law`, `exponents` the values of each exponent in the order of `names`.
    """
    used = {e for _, factors in terms for e, _, _ in factors if e}
    free = [name for name in names if name in used]
    at = {name: i for i, name in enumerate(names)}
    grid = list(itertools.product(*exponents))
    out = np.zeros((len(grid), len(names)))
    ridge = 1e-3 * np.eye(len(terms))  # columns that hardly differ must not cancel with huge coefficients
    rhs = np.concatenate([np.ones(len(y)), np.zeros(len(terms))])
    for row, values in zip(out, grid, strict=True):
        named = {"": 1.0, **dict(zip(free, values, strict=True))}
        row[[at[name] for name in free]] = values
        logs_of = [sum((s * named[e] * x[i] for e, i, s in f), np.zeros(len(y))) for _, f in terms]
        columns = np.stack([np.exp(c - c.mean()) / y for c in logs_of], -1)
        found = np.linalg.lstsq(np.concatenate([columns, ridge]), rhs, rcond=None)[0]
        # A term that the squares would drop keeps 2% of the mean, else no gradient could bring it back.
        found = np.maximum(found, 0.02 * np.mean(y))
        for (name, _), coefficient, c in zip(terms, found, logs_of, strict=True):
            row[at[name]] = np.log(coefficient) - c.mean() if name in logs else coefficient
    return out


def kaplan(x: Features, y: Array) -> Array:
    """For log N_c, log D_c, alpha_N, alpha_D: the two terms share the loss of the mean point."""
    rows = []
    exponents = (0.03, 0.1, 0.3)
    for an, ad, share in itertools.product(exponents, exponents, (0.2, 0.5, 0.8)):
        top = np.log(np.mean(y)) / ad
        log_nc = x["N"].mean() + (top + np.log(share)) * ad / an
        rows.append([log_nc, x["D"].mean() + top + np.log1p(-share), an, ad])
    return np.array(rows)


def data_constrained(names: Sequence[str], terms: Sequence, x: Features, y: Array) -> Array:
    """Single-epoch starts of the first five coordinates with log R_D and log R_N beside them."""
    exponents = (0.15, 0.3, 0.5, 0.8)
    base = powers(names[:5], ("A", "B"), terms, (exponents, exponents), x, y)
    rates = np.log(np.array(list(itertools.product((2.0, 8.0, 30.0), repeat=2))))
    return np.concatenate([np.repeat(base, len(rates), 0), np.tile(rates, (len(base), 1))], 1)


def farseer(x: Features, y: Array) -> Array:
    """Chinchilla-like surfaces: level and data exponent nearly constant in N."""
    rows = []
    powers_of = itertools.product((-0.2, 0.15), (-0.15, 0.15), (-0.3, 0.1))
    for (al, be, g), slope, share in itertools.product(powers_of, (0.2, 0.35, 0.6), (0.4, 0.7)):
        coefficient = np.log((1 - share) * np.mean(y)) + slope * x["D"].mean()
        rows.append([np.log(slope), 0.02, al, coefficient, 0.05, be, np.log(share * np.mean(y)), -0.05, g])
    return np.array(rows)


def routed(x: Features, y: Array) -> Array:
    """For a, b, c, d, log E_s, log(E_m/E_s - 1)."""
    rows = []
    ten = np.log(10.0)
    for a, b, log_es in itertools.product((-0.05, -0.15), (-0.02, -0.15), (0.2, 0.7, 1.5)):
        d = np.mean(np.log10(y)) - a * x["N"].mean() / ten - b * x["E"].mean() / ten
        rows.append([a, b, 0.0, d, log_es, 4.0])
    return np.array(rows)


def sigmoid(x: Features, y: Array) -> Array:
    """For a, b, log k, L0, from the spread of the losses and of the accuracies."""
    low, high, loss = y.min(), y.max(), x["L"]
    spread = max(float(np.ptp(loss)), 1e-6)
    grid = itertools.product((0.8, 1.5, 3.0), (2.0, 6.0, 15.0), (0.2, 0.5, 0.8))
    rows = [[f * (high - low) + 1e-9, low, np.log(k / spread), loss.min() + s * spread] for f, k, s in grid]
    return np.array(rows)


def exponential_error(x: Features, y: Array) -> Array:
    """For eps, log k, gamma."""
    rows = []
    spread = max(float(np.ptp(x["L"])), 1e-6)
    for top, rate in itertools.product((1.02, 1.2, 2.0), (0.3, 1.0, 3.0, 8.0)):
        eps, gamma = top * y.max(), rate / spread
        rows.append([eps, np.log(max(eps - np.mean(y), 1e-9)) + gamma * np.mean(x["L"]), gamma])
    return np.array(rows)
