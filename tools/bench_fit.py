"""Speed of `jaxlm fit`: every method with its bootstrap on a table of 245 runs, on one core.

    python tools/bench_fit.py                            # half a minute
    python tools/bench_fit.py --table runs.csv --columns N=params,C=train_flop,loss=loss_nats --drop_highest 5
    python tools/bench_fit.py --quick                    # few draws: shows that it runs, measures little

Without --table it makes one up: nine budgets, sizes within a factor of nine of the optimum, heavy-tailed
noise.

Prints one JSON line. Seconds of every method (starts, bootstrap draws, covariance, profiles, diagnostics; no
pictures) and of all together, processor time beside wall time, the bound that the sum has to keep, and how
many of
the surface's starts ended at its optimum.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time

# One core: before NumPy starts its threads.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import scipy

from jaxlm.errors import UserError
from jaxlm.scaling.fit import METHODS, run_fit
from jaxlm.scaling.table import Points, parse_columns, read_table, select

BOUND = 60.0  # seconds for all methods


def made_up(count: int, seed: int = 0) -> Points:
    """Runs of a Chinchilla-like surface."""
    rng = np.random.default_rng(seed)
    c = rng.choice(np.geomspace(6e18, 3e21, 9), count)
    n = 0.1 * np.sqrt(c / 6) * np.exp(rng.uniform(-2.2, 2.2, count))
    d = c / 6 / n
    loss = (1.8172 + 482.01 * n**-0.3478 + 2085.43 * d**-0.3658) * np.exp(0.004 * rng.standard_t(4, count))
    return Points(n, d, c, loss)


def main() -> None:
    """Parses the flags, fits by every method, prints one JSON line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--table", help="a table of your own")
    parser.add_argument("--columns", default="N=params,C=train_flop,loss=loss_nats")
    parser.add_argument("--drop_highest", type=int, default=0)
    parser.add_argument("--runs", type=int, default=245, help="of the made-up table")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--objective", default="huber")
    parser.add_argument("--quick", action="store_true", help="10 draws, 2 starts, 60 runs")
    flags = parser.parse_args()
    if flags.quick:
        flags.draws, flags.starts, flags.runs = 10, 2, 60
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    points = made_up(flags.runs)
    if flags.table:
        points = select(
            read_table(flags.table), parse_columns(flags.columns), drop_highest=flags.drop_highest
        )[0]
    report = {"benchmark": "fit", "runs": len(points), "draws": flags.draws, "starts": flags.starts}
    report |= {"objective": flags.objective, "python": platform.python_version()}
    report |= {"numpy": np.__version__, "scipy": scipy.__version__}
    total_wall, total_cpu = time.perf_counter(), time.process_time()
    for method in METHODS:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            fit = run_fit(
                points, method=method, objective=flags.objective, draws=flags.draws, starts=flags.starts
            )
            found = {"draws": len(fit.draws)}
            if method == "surface":
                found["same_optimum"] = sum(abs(s["gap"]) <= 1e-8 * fit.value for s in fit.starts)
                found["objective"] = fit.value
        except UserError as error:
            found = {"refused": str(error)}
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        report[method] = {**{name: round(v, 3) for name, v in seconds.items()}, **found}
    report["seconds"] = round(time.perf_counter() - total_wall, 2)
    report["cpu_seconds"] = round(time.process_time() - total_cpu, 2)
    report |= {"bound_seconds": BOUND, "within_bound": report["cpu_seconds"] <= BOUND}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
