"""Sixteen points of a scaling law from four long runs: WSD trunks with cooldown branches.

Claim: a constant-rate trunk per size, with a cooldown of 20% branched off at four token counts, gives the
same surface as separate runs for 37% fewer FLOPs; the branches end where runs with a linear decay of their
own end, within the noise of the seeds.
Command:
    python tools/corpus.py --source=library --out=data/library
    jaxlm plan --config=experiments/scaling/trunks.py --workdir=runs/trunks
    jaxlm sweep --workdir=runs/trunks
    jaxlm collect --workdir=runs/trunks
    jaxlm fit --table=runs/trunks/table.csv --columns=block=block --out=runs/trunks/fits/surface
Hardware: two CPU cores, 4 GB.
Expected: not run yet.
Last run: none.

The points of one trunk share data and most of their path: resample by trunk (column `block`), not by point.
`standalone` repeats the second branch of every size as a run of its own with a linear decay to 0, so that the
gap between branch and fresh run is measured. `:tiny` is the same made so small that it runs in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.config import load_experiment
from jaxlm.errors import check_choice


def get_config(part: str = "grid") -> ConfigDict:
    check_choice(part, ("grid", "tiny"), "--config: part after the colon")
    config = load_experiment(f"{Path(__file__).with_name('smoke.py')}:{part}")
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
