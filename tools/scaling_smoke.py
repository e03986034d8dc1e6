"""The scaling lab from plan to report on a small sweep, command by command: the end of tools/quickstart.

    python tools/scaling_smoke.py --workdir=runs/scaling     # minutes on two cores; goes on where it stopped

Tunes the learning rate at one size, trains the fifteen models of experiments/scaling/smoke.py, fits in two
ways, predicts the loss at four times the largest budget, trains that model, and says how far off it was.
"""

import argparse
import csv
import json
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENT = "experiments/scaling/smoke.py"


def run(*words: str, quiet: bool = False, devices: int = 1) -> str:
    """Prints a command and runs it in the repository, on so many emulated devices; its output if `quiet`."""
    told = f"JAX_NUM_CPU_DEVICES={devices} " if devices > 1 else ""
    print(f"\n$ {told}{shlex.join(words)}", flush=True)
    program = (
        [sys.executable, "-m", "jaxlm", *words[1:]] if words[0] == "jaxlm" else [sys.executable, *words[1:]]
    )
    done = subprocess.run(
        program,
        cwd=ROOT,
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def rows(workdir: str, role: str) -> list[dict[str, str]]:
    """Finished runs of that role in the collected table."""
    with (ROOT / workdir / "table.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["role"] == role and row["status"] == "finished"]


def best_lr(workdir: str) -> float:
    """The learning rate of the lowest loss, of all runs at the size that was tuned."""
    with (ROOT / workdir / "table.csv").open() as file:
        tuned = [row for row in csv.DictReader(file) if "tune" in row["plan"].split("+") and row["loss"]]
    if not tuned:
        sys.exit(f"no run that tunes the learning rate has finished in {workdir}; see its table.csv")
    best = min(tuned, key=lambda row: float(row["loss"]))
    rates = sorted(float(row["lr"]) for row in tuned)
    lr = float(best["lr"])
    edge = " (at the grid's edge: the best may lie outside)" if lr in (rates[0], rates[-1]) else ""
    print(f"best of {len(rates)} learning rates from {rates[0]:g} to {rates[-1]:g}: {lr:g}{edge}", flush=True)
    return lr


def main() -> None:
    """Parses the flags and runs the chain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", default="runs/scaling", help="sweep directory")
    workdir = parser.parse_args().workdir
    here = f"--workdir={workdir}"

    run("python", "tools/corpus.py", "--source=library", "--out=data/library", quiet=True)
    run("jaxlm", "plan", f"--config={EXPERIMENT}:tune", here, "--name=tune")
    run("jaxlm", "sweep", here, "--name=tune", "--vectorize=8")
    run("jaxlm", "collect", here)
    lr = f"--config.run.optim.lr={best_lr(workdir):g}"

    run("jaxlm", "plan", f"--config={EXPERIMENT}", here, lr)
    run("jaxlm", "sweep", here, "--workers=2")
    run("jaxlm", "collect", here)
    table, fits = f"--table={workdir}/table.csv", f"{workdir}/fits"
    # What the law misses about a shape it misses in all runs of that size: sizes are resampled whole.
    blocks = "--block=n_total"
    run("jaxlm", "fit", table, "--method=surface", "--tie=alpha=beta", blocks, f"--out={fits}/surface")
    run("jaxlm", "fit", table, "--method=parabola", f"--out={fits}/parabola")

    # It has the machine to itself: on two devices it takes .6 of the time on one with two threads.
    devices = min(2, os.cpu_count() or 1)
    mesh = f"--config.run.mesh.data={devices}"
    run("jaxlm", "plan", f"--config={EXPERIMENT}:holdout", here, "--name=holdout", lr, mesh, devices=devices)
    run("jaxlm", "sweep", here, "--name=holdout", devices=devices)
    run("jaxlm", "collect", here)
    (measured,) = rows(workdir, "holdout")
    budget = f"--budget={float(measured['flops_exact']):.6g}"
    told = {
        name: run("jaxlm", "predict", f"--fit={fits}/{name}/fit.json", budget, "--json", quiet=True)
        for name in ("surface", "parabola")
    }
    run("jaxlm", "report", here)

    loss = float(measured["loss"])
    print(f"\nat {float(measured['flops_exact']):.3g} FLOPs, nats per byte: measured {loss:.4f}")
    for name, text in told.items():
        predicted = json.loads(text)["L"]
        value, low, high = (predicted[key] for key in ("value", "lo", "hi"))
        inside = "inside" if low <= loss <= high else "OUTSIDE"
        error = f"{100 * (value / loss - 1):+.2f}%"
        print(f"  {name:8} predicted {value:.4f}, {error}: {inside} the interval, {low:.4f} to {high:.4f}")
    print(f"report: {workdir}/report.html")


if __name__ == "__main__":
    main()
