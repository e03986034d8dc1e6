"""A scaling law in minutes on two CPU cores: the sweep that `tools/quickstart` runs.

Claim: fifteen byte-level transformers at 1e11, 3e11 and 1e12 training FLOPs give isoFLOP curves with interior
minima, and a surface that predicts the loss at 4e12 FLOPs within its interval.
Command:
    python tools/corpus.py --source=library --out=data/library
    lr=--config.run.optim.lr=4e-3
    jaxlm plan --config=experiments/scaling/smoke.py:tune --workdir=runs/smoke --name=tune
    jaxlm sweep --workdir=runs/smoke --vectorize=8
    jaxlm plan --config=experiments/scaling/smoke.py --workdir=runs/smoke $lr
    jaxlm sweep --workdir=runs/smoke
    jaxlm collect --workdir=runs/smoke
    jaxlm fit --table=runs/smoke/table.csv --tie=alpha=beta --block=n_total --out=runs/smoke/fits/surface
    jaxlm plan --config=experiments/scaling/smoke.py:holdout --workdir=runs/smoke --name=holdout $lr
    jaxlm sweep --workdir=runs/smoke && jaxlm collect --workdir=runs/smoke
    jaxlm predict --fit=runs/smoke/fits/surface/fit.json --budget=4e12
Hardware: two CPU cores, 4 GB.
Expected: `tune` is best at 4e-3 (8e-3 is .2% worse); N* = 0.073 C^0.5; at 4e12 FLOPs 1.480 nats per byte
    (95% 1.414 to 1.544) predicted, 1.437 measured on two devices (1.444 on one, which rounds otherwise). By
    resampling runs instead of sizes the interval is 1.438 to 1.527, and 1.4373 just outside of it.
Report: experiments/scaling/results/smoke/report.md
Last run: 2026-11-22, commit 4099b29.

The text is the source of Python's standard library (11.4 MB of bytes to train on), which every machine has:
the smallest model at 1e12 FLOPs and the hold-out at 4e12 read up to 7 MB, so that no run sees a byte twice.
Shakespeare (4.7 MB, what the quickstart's other model reads) would do for the grid, but not for the hold-out.

`:tune` is the grid of learning rates at the middle size of the smallest budget, `:holdout` the run at four
times the largest budget, of the size that the fit in the sweep directory finds best. `:tiny` is the same made
so small that it runs in seconds.
"""

import os

from ml_collections import ConfigDict

from jaxlm.config import default_config
from jaxlm.errors import check_choice
from jaxlm.sweep.plan import SweepConfig


def get_config(part: str = "grid") -> ConfigDict:
    check_choice(part, ("grid", "tune", "holdout", "tiny"), "--config: part after the colon")
    config = default_config(SweepConfig)

    model = config.run.model
    model.vocab_size = 256
    # Two matrices of 4 D: 12 D^2 weights a layer at every size, nothing to round. With it a CPU's step takes
    # 0.85 of the time that it takes with the exact GELU, at these widths.
    model.activation = "relu2"
    model.init_std = 0.0  # fan_in ** -0.5: one standard deviation does not suit D from 8 to 200
    model.scan = False  # two layers compile quickly, and unrolled is faster on a CPU

    data = config.run.data
    data.train, data.eval = "data/library/train/*.txt", "data/library/heldout/*.txt"
    data.eval_tokens = 1 << 18  # the same for all runs
    data.seq_len, data.batch_size = 128, 4  # at 1e11 FLOPs the best model has but 1,200 such steps

    optim = config.run.optim
    optim.lr = 4e-3  # at D = 64, for all matrices
    optim.b2 = 0.98
    optim.weight_decay = 0.0  # its effect depends on the number of steps
    optim.schedule, optim.final, optim.warmup = "linear", 0.0, 0.1

    config.run.mesh.data = 1  # one device a run: four rows are not worth dividing
    train = config.run.train
    train.log_every = 20
    train.save_every = 2000  # what a killed worker loses at most
    train.sample_prompts = ()
    train.keep_last, train.keep_best = 1, 0

    shape = config.grid.shape
    shape.dim_min, shape.dim_max, shape.dim_step = 8, 256, 8
    shape.head_dims = ((0, 8), (64, 16))
    shape.depth = 2

    grid = config.grid
    grid.kind = "isoflop"
    grid.budgets = (1e11, 3e11, 1e12)
    grid.centers = (25e3, 43e3, 80e3)
    grid.span, grid.sizes_per_budget = 2.8, 5
    grid.lr_rule, grid.lr_base_dim = "width", 64  # hidden matrices learn at lr * 64 / D

    if part == "tune":
        grid.kind, grid.centers = "lr_batch", ()
        grid.budgets, grid.sizes = (1e11,), (25e3,)
        grid.lrs = (2e-3, 4e-3, 8e-3, 16e-3)
    if part == "holdout":
        grid.role = "holdout"
        grid.budgets, grid.centers = (4e12,), ()
        grid.center_fit, grid.sizes_per_budget = "fits/surface/fit.json", 1
    if part == "tiny":
        stdlib = os.path.dirname(os.__file__)
        data.train, data.eval = f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len, data.batch_size, data.eval_tokens = 32, 2, 1 << 12
        grid.budgets, grid.centers, grid.sizes_per_budget = (1e9, 2e9), (14e3, 26e3), 3
        train.log_every = 5
    return config
