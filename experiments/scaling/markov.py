"""The one sweep whose floor is known: text from an order-2 Markov source of exact entropy rate.

Claim: a surface fit's E can be trusted no further than its law holds. The floor is 2.2448 nats per byte on
rows of 128 (the source's entropy rate is 2.2365), the best run ends at 2.339, and the interval of E misses
the floor: it lies below it, and rises towards it as the smallest budgets are left out.
Command:
    python -m jaxlm.data.markov --out=data/markov --train_symbols=16000000
    jaxlm plan --config=experiments/scaling/markov.py --workdir=runs/markov
    jaxlm sweep --workdir=runs/markov
    jaxlm collect --workdir=runs/markov
    jaxlm fit --table=runs/markov/table.csv --out=runs/markov/fits/surface
Hardware: two CPU cores, 4 GB.
Expected: E 1.948 (95% 1.848 to 2.115) of all 20 runs, 2.073 (1.842 to 2.187) without the budget of 1e11,
2.152 (1.730 to 2.183; sandwich 1.958 to 2.346) of the 10 runs from 1e12 on: at first the loss falls faster
than by a power law. N* = G C^0.60 of all runs, C^0.51 without the smallest budget.
Report: experiments/scaling/results/markov/report.md
Last run: 2026-11-22, commit a060450.

Differs from `smoke.py` in its text alone, of which there is as much as one likes: every run reads it once.
The floor is `floor` in data/markov/markov.json, see `jaxlm.data.markov`. `:tiny` is the same made so small
that it runs in seconds, on Python's own source code.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.config import load_experiment
from jaxlm.errors import check_choice


def get_config(part: str = "grid") -> ConfigDict:
    check_choice(part, ("grid", "tune", "tiny"), "--config: part after the colon")
    config = load_experiment(f"{Path(__file__).with_name('smoke.py')}:{part}")
    config.run.optim.lr = 4e-3
    if part == "tiny":
        return config
    config.run.data.train = "data/markov/train/*.txt"
    config.run.data.eval = "data/markov/heldout/*.txt"
    grid = config.grid
    if part == "tune":
        grid.lrs = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
        return config
    grid.budgets = (1e11, 3e11, 1e12, 3e12)
    grid.centers = (22e3, 45e3, 90e3, 170e3)
    return config
