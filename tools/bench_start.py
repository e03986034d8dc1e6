"""Time from the start of the process to the end of the first training step, and what it consists of.

    python tools/bench_start.py                      # the quickstart's model; run tools/quickstart first
    python tools/bench_start.py --config experiments/quickstart.py:smoke
    python tools/bench_start.py --quick              # the same as :smoke

Starts the experiment twice in new run directories beside each other: `cold` with an empty compilation cache,
`warm` with what the first one left there. Prints one JSON line, in seconds:

    imports      Python and every module
    init         mesh, model, optimizer, and the parameters' values
    prepare      opening the token shards (cold, for raw text: tokenising it)
    data_wait    the first batch
    compile      tracing and compiling the step, or reading it from the cache
    step         running it
    first_step   all of these
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CAUSES = ("init", "prepare", "data_wait", "compile", "step")


def start(config: str, workdir: str, began: float) -> dict:
    """One step of the experiment in this process, which was started at `began` (seconds since the epoch)."""
    sys.path.insert(0, str(ROOT))
    from jaxlm import cli  # noqa: F401  (what the console command imports)
    from jaxlm.config import build, load_experiment
    from jaxlm.train.run import train

    imports = time.time() - began
    experiment = load_experiment(config)
    experiment.train.num_steps = 1
    experiment.train.sample_prompts = ()  # the rest of what is done at the end is not counted either
    result = train(build(experiment), workdir, bar=False)
    seconds = {"imports": imports} | {cause: result.seconds.get(cause, 0.0) for cause in CAUSES}
    found = {cause: round(value, 2) for cause, value in seconds.items()}
    cache = {name: result.compilation[name] for name in ("cache_hits", "cache_misses")}
    return {"first_step": round(sum(seconds.values()), 2), **found, **cache}


def main() -> None:
    """Parses the flags, starts the experiment cold and warm in children, prints one JSON line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument(
        "--config", default="experiments/quickstart.py", help="experiment, from the repository"
    )
    parser.add_argument("--quick", action="store_true", help="the smoke size")
    parser.add_argument("--workdir", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.quick:
        flags.config = "experiments/quickstart.py:smoke"
    if flags.workdir:
        answers = os.dup(1)
        os.dup2(2, 1)
        found = start(flags.config, flags.workdir, flags.began)
        os.write(answers, json.dumps(found).encode())
        return
    report = {"benchmark": "start", "config": flags.config, "python": platform.python_version()}
    sys.path.insert(0, str(ROOT))
    from jaxlm.cli import MALLOC

    environment = {**os.environ, "GLIBC_TUNABLES": MALLOC}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            command = [sys.executable, __file__, "--config", flags.config, "--workdir", f"{folder}/{name}"]
            command += ["--began", repr(time.time())]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
            if done.returncode:
                sys.exit(f"error: the {name} start ended with exit code {done.returncode}")
            report[name] = json.loads(done.stdout)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
