"""What a run of masked tokens has to beat: the frequencies of single tokens, which know no context.

    python tools/compare_unigram.py --workdir=runs/masked

Counts the tokens of the run's training rows, one added to each, and scores the hidden tokens of its eval set
with them. Writes `unigram.json` into the run directory and prints both losses.
"""

import argparse
import json
import math
import pathlib
import sys

import numpy as np

from jaxlm.config import load_config
from jaxlm.data.loader import EvalBatches, make_dataset
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UserError


def compare(workdir: pathlib.Path) -> dict[str, float]:
    """Nats per hidden token of single-token frequencies and of the run's model.

    Raises:
        UserError: not the directory of a finished run of masked tokens.
    """
    cfg = load_config(workdir / "config.json")
    record = workdir / "result.json"
    scored = json.loads(record.read_text()).get("eval/nll") if record.exists() else None
    if cfg.data.format != "mlm" or scored is None:
        raise UserError(f"{workdir} is not a finished run of data.format='mlm' with data.eval")
    options = dict(cache_dir=workdir.absolute().parent / "data_cache", vocab_size=cfg.model.vocab_size)
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    counts_V = np.ones(cfg.model.vocab_size)
    for source in make_dataset(cfg.data, tokenizer, **options).sources:
        tokens = source.store.read(0, source.store.num_tokens)
        counts_V += np.bincount(tokens[tokens != tokenizer.eos_id], minlength=len(counts_V))
    surprise_V = -np.log(counts_V / counts_V.sum())
    hidden = [
        batch["targets"][batch["weights"] > 0]
        for batch in EvalBatches(
            make_dataset(cfg.data, tokenizer, split="eval", **options), cfg.data.batch_size
        )
    ]
    unigram = float(surprise_V[np.concatenate(hidden)].mean())
    return {
        "unigram_nll": unigram,
        "model_nll": scored,
        "perplexity_ratio": math.exp(unigram - scored),
        "hidden_tokens": sum(map(len, hidden)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    workdir = parser.parse_args().workdir
    try:
        found = compare(workdir)
    except UserError as error:
        print(f"compare_unigram.py: {error}", file=sys.stderr)
        return 2
    (workdir / "unigram.json").write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"single tokens {found['unigram_nll']:.3f} nats, the model {found['model_nll']:.3f}: on average it "
        f"chooses among {found['perplexity_ratio']:.1f} times fewer ({found['hidden_tokens']:,} in all)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
