"""Scores a Kneser-Ney n-gram on the tokens of a run: what the run's model has to beat.

    python tools/compare_ngram.py --workdir=runs/quickstart

It is fitted on all of the run's training tokens (once, whatever the run saw of them), evaluated on its eval
set, and set beside the run's own bits per byte. The same tokens, the same bytes. Writes `ngram.json` into the
run directory and prints which one is better.
"""

import argparse
import itertools
import json
import pathlib
import sys
import time

import numpy as np

from jaxlm.config import load_config
from jaxlm.data.loader import make_dataset
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.errors import UserError
from jaxlm.model.ngram import KneserNey, bits_per_byte


def read_documents(store, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The documents of a token store without the EOS that ends each."""
    starts = store.document_starts()
    bounds = itertools.pairwise(starts)
    documents = [np.asarray(store.read(int(a), int(b)), np.int64) for a, b in bounds]
    return [d[:-1] if len(d) and d[-1] == tokenizer.eos_id else d for d in documents]


def compare(workdir: pathlib.Path, order: int) -> dict:
    """Bits per byte of the n-gram and of the run's model on the run's eval set.

    Raises:
        UserError: not the directory of a finished run with an eval set.
    """
    cfg = load_config(workdir / "config.json")
    record = workdir / "result.json"
    scored = json.loads(record.read_text()).get("eval/bpb") if record.exists() else None
    if scored is None or not cfg.data.eval:
        raise UserError(f"{workdir} has no result.json with an eval/bpb: train it to the end, with data.eval")
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    cache = workdir.absolute().parent / "data_cache"
    train = make_dataset(cfg.data, tokenizer, cache_dir=cache)
    held_out = make_dataset(cfg.data, tokenizer, cache_dir=cache, split="eval")
    began = time.perf_counter()
    documents = [d for source in train.sources for d in read_documents(source.store, tokenizer)]
    model = KneserNey.fit(documents, order=order, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    log_probs = model.log_prob(read_documents(held_out.sources[0].store, tokenizer))
    if len(log_probs) != held_out.num_tokens:
        raise UserError(f"data.eval_tokens={cfg.data.eval_tokens}: the comparison needs the whole eval set")
    return {
        "order": order,
        "ngram_nll": float(-log_probs.mean()),
        "ngram_bpb": bits_per_byte(log_probs, held_out.num_bytes),
        "model_bpb": scored,
        "train_tokens": train.num_tokens,
        "eval_tokens": held_out.num_tokens,
        "eval_bytes": held_out.num_bytes,
        "seconds": round(time.perf_counter() - began, 2),
    }


def main(argv: list[str] | None = None) -> int:
    """Parses the flags, compares, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="run directory")
    parser.add_argument(
        "--order", type=int, default=5, help="longest n-gram (default 5: four tokens of context)"
    )
    args = parser.parse_args(argv)
    try:
        result = compare(args.workdir, args.order)
    except UserError as error:
        print(f"compare_ngram: {error}", file=sys.stderr)
        return 2
    (args.workdir / "ngram.json").write_text(json.dumps(result, indent=1) + "\n")
    better = result["model_bpb"] < result["ngram_bpb"]
    verdict = "better" if better else "NOT better"
    print(
        f"{result['eval_tokens']:,} held-out tokens, {result['eval_bytes']:,} bytes\n"
        f"  Kneser-Ney {result['order']}-gram  {result['ngram_bpb']:.4f} bits per byte\n"
        f"  this model         {result['model_bpb']:.4f} bits per byte: {verdict}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
