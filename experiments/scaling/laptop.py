"""A scaling law from 3e11 to 1e13 FLOPs on a laptop, with three seeds and a hold-out at four times the end.

Claim: methods agree on N*(C) within their joint interval, and the surface predicts the loss at 4e13 FLOPs to
2%, inside its interval. E is not identified at this scale: losses are far above any floor.
Command:
    python tools/corpus.py --source=library --with_tests --out=data/laptop
    jaxlm plan --config=experiments/scaling/laptop.py:tune --workdir=runs/laptop --name=tune
    jaxlm plan --config=experiments/scaling/laptop.py --workdir=runs/laptop
    jaxlm sweep --workdir=runs/laptop
    jaxlm collect --workdir=runs/laptop
    jaxlm fit --table=runs/laptop/table.csv --block=n_total --out=runs/laptop/fits/surface
    jaxlm plan --config=experiments/scaling/laptop.py:holdout --workdir=runs/laptop --name=holdout
    jaxlm sweep --workdir=runs/laptop
    jaxlm report --workdir=runs/laptop
Hardware: two CPU cores, 4 GB.
Expected: an interior minimum at every budget, a loss within 2% of the prediction and inside its interval.
Last run: 2026-11-22, on the library without its tests (12 MB), with other centres, which three parts found:
    --config.grid.budgets=3e11,1e12,3e12 --config.grid.centers=38e3,82e3,150e3
    --name=large --config.grid.budgets=1e13, --config.grid.centers=430e3,
    --config.run.data.train='data/library/train/*.txt' --config.run.data.eval='data/library/heldout/*.txt'
34 runs, all finished, interior minima at all four budgets. At 4e13 FLOPs, four times the largest: 1.2400
(95% 1.1859 to 1.2903) predicted, 1.2056 measured: inside, and 2.8% off, more than the 2% aimed at. Exponent a
of N*(C) .63 (95% .43 to .84) by the surface, .61, .61, .52 by parabola, robust parabola and Akima, all inside
each other's intervals. E is not identified (.93, 95% .01 to 1.13). Sizes are resampled whole, as residuals of
one size share a third of their variance (intraclass correlation .31; F = 2.0 with 11 and 16 degrees). What
limits the fit: a model of one layer more than its neighbours (272k) lies below their curve at 3e12 and 1e13,
and losses fall faster than the law between 1e13 and 4e13. A fit of the three smaller budgets alone had
predicted 1.3658 (1.3204 to 1.4031, resampling runs) at 1.2e13, where 1.3149 was measured: outside. The best
learning rate was 4e-3 at both sizes that were tuned.
Report: results/laptop/report.md

Differs from `smoke.py` in its activation (GELU), its budgets, its depth, which grows with the width
(D / L = 32), its seeds and its text: Python's standard library with its tests, 31 MB, so that the smallest
model at 1e13 FLOPs (about 20 MB) reads nothing twice.

`:tune` is a grid of three learning rates at the middle sizes of the two smallest budgets; what it says of the
rate's fall with size goes into grid.lr_exponent. `:holdout` is the run at 4e13 FLOPs of the size that the fit
in the sweep directory finds best. `:tiny` is the same made so small that it runs in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.config import load_experiment
from jaxlm.errors import check_choice


def get_config(part: str = "grid") -> ConfigDict:
    check_choice(part, ("grid", "tune", "holdout", "tiny"), "--config: part after the colon")
    base = "tiny" if part == "tiny" else "grid"
    config = load_experiment(f"{Path(__file__).with_name('smoke.py')}:{base}")
    config.run.model.activation = "gelu"

    shape = config.grid.shape
    shape.depth, shape.depth_min, shape.aspect = 0, 2, 32.0
    shape.head_dims = ((0, 8), (128, 16))  # D in steps of 8 up to 128: the depth alone makes steps enough

    grid = config.grid
    grid.seeds = (1, 2)
    if part == "tiny":
        return config
    config.run.data.train = "data/laptop/train/*.txt"
    config.run.data.eval = "data/laptop/heldout/*.txt"
    grid.budgets = (3e11, 1e12, 3e12, 1e13)
    grid.centers = (43e3, 80e3, 140e3, 255e3)

    if part == "tune":
        grid.kind, grid.role, grid.seeds = "isoflop", "tune", ()
        grid.budgets, grid.centers = (3e11, 1e12), (43e3, 80e3)
        grid.sizes_per_budget = 1
        grid.lrs = (2e-3, 4e-3, 8e-3)
    if part == "holdout":
        grid.role, grid.seeds = "holdout", ()
        grid.budgets, grid.centers = (4e13,), ()
        grid.center_fit, grid.sizes_per_budget = "fits/surface/fit.json", 1
    return config
