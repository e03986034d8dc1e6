"""Speed and memory of the data pipeline, from prepared token shards to batches, on one core.

    python tools/bench_data.py                       # about two minutes
    python tools/bench_data.py --step_rate 2400      # tokens/s that tools/bench_train.py measured
    python tools/bench_data.py --quick               # a little text: shows that it runs, measures little

Makes documents of random lengths, prepares them with `jaxlm.data.prepare`, and reads batches through the
loader and its prefetch thread, once for each packing, in a process of its own that is bound to one core.

Prints one JSON line. For each packing: tokens per second (padding is not counted), the ratio to the training
step's rate, the share of the positions that is not padding, the seconds until the first batch, and the peak
resident memory above that of the imports beside its bound:

    tokens on disk (mapped and reclaimable)
    + while the packing plan is made: 8 B a document and 160 B a piece (`first_fit`), 24 B a document (`pad`)
    + (prefetch + 3) batches of 20 B a token + 32 MiB

`resident_plan_bytes` is what of the plan stays.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

PACKINGS = ("concat", "first_fit", "pad")
SLACK = 32 << 20


def write_documents(path: pathlib.Path, num_bytes: int, seed: int = 0) -> int:
    """Writes a jsonl file of about that many bytes of text; returns the number of documents."""
    rng = np.random.default_rng(seed)
    written = documents = 0
    with path.open("w") as file:
        while written < num_bytes:
            length = 1 + int(rng.lognormal(6.5, 1.0))
            text = rng.integers(97, 123, length, np.uint8).tobytes().decode()
            file.write(json.dumps({"text": text}) + "\n")
            written, documents = written + length, documents + 1
    return documents


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(flags: argparse.Namespace) -> dict:
    """Reads batches for a while in this process; what the parent reports of a packing."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from jaxlm.data.loader import DataConfig, Loader, make_dataset, prefetch
    from jaxlm.data.tokenizer import load_tokenizer

    cfg = DataConfig(
        train=str(flags.folder),
        seq_len=flags.seq_len,
        batch_size=flags.batch_size,
        packing=flags.measure,
        prefetch=flags.prefetch,
    )
    imports = peak_memory()
    began = time.perf_counter()
    dataset = make_dataset(cfg, load_tokenizer(cfg.tokenizer))
    targets = 0
    with prefetch(Loader(dataset, cfg), 0, cfg.prefetch) as batches:
        next(batches)
        first = time.perf_counter() - began
        began, seconds, steps = time.perf_counter(), 0.0, 0
        while seconds < flags.seconds:
            batch = next(batches)
            steps += 1
            targets += int(batch["weights"].sum())
            seconds = time.perf_counter() - began
    peak = peak_memory() - imports
    (source,) = dataset.sources
    lengths = np.diff(source.store.document_starts())
    pieces = int((-(-lengths // cfg.seq_len)).sum())
    plan = {"concat": 0, "first_fit": 8 * len(lengths) + 160 * pieces, "pad": 24 * len(lengths)}[cfg.packing]
    batches = (cfg.prefetch + 3) * 20 * cfg.batch_size * cfg.seq_len
    bound = source.store.num_tokens * source.store.dtype.itemsize + plan + batches + SLACK
    return {
        "tokens_per_second": round(targets / seconds),
        "fill": round(targets / (steps * cfg.batch_size * cfg.seq_len), 4),
        "first_batch_seconds": round(first, 3),
        "peak_bytes": peak,
        "bound_bytes": bound,
        "within_bound": peak <= bound,
        "import_bytes": imports,
        "resident_plan_bytes": dataset.nbytes,
    }


def main() -> None:
    """Parses the flags, prepares the shards, measures every packing in a child, prints one JSON line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--step_rate", type=float, default=2400, help="tokens/s of the training step")
    parser.add_argument("--megabytes", type=float, default=64, help="text to prepare; a byte is a token")
    parser.add_argument("--seconds", type=float, default=10, help="how long to read with each packing")
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="1 MB, half a second")
    parser.add_argument("--measure", choices=PACKINGS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(flags)))
        return
    if flags.quick:
        flags.megabytes, flags.seconds = 1, 0.5
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from jaxlm.data.prepare import prepare

    report = {"benchmark": "data", "step_rate": flags.step_rate, "seq_len": flags.seq_len}
    report |= {
        "batch_size": flags.batch_size,
        "prefetch": flags.prefetch,
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        report["documents"] = write_documents(folder / "text.jsonl", int(flags.megabytes * 1e6))
        began = time.perf_counter()
        prepared = prepare(str(folder / "text.jsonl"), folder / "tokens", "byte", shard_tokens=1 << 23)
        seconds = time.perf_counter() - began
        report["tokens"] = prepared.tokens
        report["prepare_megabytes_per_second"] = round(prepared.bytes / seconds / 1e6, 1)
        for packing in PACKINGS:
            command = [sys.executable, __file__, "--measure", packing, "--folder", str(folder / "tokens")]
            for option in ("seconds", "seq_len", "batch_size", "prefetch"):
                command += [f"--{option}", str(getattr(flags, option))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"error: measuring {packing} ended with exit code {done.returncode}")
            found = json.loads(done.stdout.splitlines()[-1])
            ratio = found["tokens_per_second"] / flags.step_rate
            report[packing] = {"ratio_to_step": round(ratio, 1), **found}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
