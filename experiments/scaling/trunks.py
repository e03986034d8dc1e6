"""Sixteen points of a scaling law from four long runs: WSD trunks with cooldown branches.

Claim: a constant-rate trunk per size, with a cooldown of 20% branched off at four token counts, gives the
points of a surface for 37% fewer FLOPs than separate runs; the branches end no higher than runs with a linear
decay of their own.
Command:
    python tools/corpus.py --source=library --out=data/library
    jaxlm plan --config=experiments/scaling/trunks.py --workdir=runs/trunks
    jaxlm sweep --workdir=runs/trunks
    jaxlm collect --workdir=runs/trunks
    jaxlm fit --table=runs/trunks/table.csv --block=block --out=runs/trunks/fits/surface
Hardware: two CPU cores, 4 GB.
Expected: after 1.5 million bytes the branches of 41k, 80k, 131k and 195k parameters end at 1.729, 1.654,
1.595, 1.554 nats per byte, and the runs with a linear decay at 1.753, 1.660, 1.599, 1.557: 1.4, 0.4, 0.2 and
0.2% higher. Four sizes within a factor of 5 and four trunks do not identify the surface: a = 0.83 (95% 0.36
to 0.87), E between 0 and 1.16; the report warns of each.
Report: experiments/scaling/results/trunks/report.md; the annealing law on the curves: annealing.md beside it.
Last run: 2026-11-22, commit a060450.

The points of one trunk share data and most of their path: `--block=block` resamples trunks, not points.
The activation is GELU. `standalone` repeats the second branch of every size as a run of its own with a linear
decay to 0, so that the gap between branch and fresh run is measured. `:tiny` is the same made so small that
it runs in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.config import load_experiment
from jaxlm.errors import check_choice


def get_config(part: str = "grid") -> ConfigDict:
    check_choice(part, ("grid", "tiny"), "--config: part after the colon")
    config = load_experiment(f"{Path(__file__).with_name('smoke.py')}:{part}")
    config.run.model.activation = "gelu"
    config.run.optim.cooldown, config.run.optim.cooldown_shape = 0.2, "1-sqrt"
    grid = config.grid
    grid.kind = "trunks"
    grid.budgets, grid.centers = (), ()
    grid.sizes = (41e3, 80e3, 131e3, 195e3)
    grid.tokens = (0.75e6, 1.5e6, 3e6, 6e6)
    grid.standalone = (1.5e6,)
    if part == "tiny":
        grid.sizes, grid.tokens, grid.standalone = (5.7e3, 14e3), (3840, 7680), (3840,)
    return config
