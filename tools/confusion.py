"""Which labels a classifier gives to the texts of its eval set: counts, and F1 of every class.

    python tools/confusion.py --workdir=runs/spam

Writes `confusion.json` into the run directory and prints it: `counts[i][j]` texts of class i that were given
class j, accuracy, the share of the larger class, and precision, recall and F1 of each class; under
`naive_bayes` the same of a rule that knows no order, the token frequencies of each class, on the same rows.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxlm.data.loader import eval_batches
from jaxlm.data.packing import Batch
from jaxlm.errors import UserError
from jaxlm.sharding import use
from jaxlm.train.feed import place_batch
from jaxlm.train.programs import Model
from jaxlm.train.trained import load_trained


def measures(counts_CC: Int[np.ndarray, "C C"], classes: tuple[str, ...]) -> dict[str, Any]:
    """What follows from the counts; 0 where nothing is of a class.

    >>> found = measures(np.array([[6, 2], [1, 3]]), ("ham", "spam"))
    >>> found["accuracy"], round(found["larger_class"], 3), found["spam"]["precision"], found["spam"]["f1"]
    (0.75, 0.667, 0.6, 0.6666666666666666)
    """
    total, right_C = counts_CC.sum(), np.diag(counts_CC)
    given_C, real_C = counts_CC.sum(0), counts_CC.sum(1)
    out: dict[str, Any] = {
        "counts": counts_CC.tolist(),
        "accuracy": float(right_C.sum() / total),
        "larger_class": float(real_C.max() / total),
    }
    for c, name in enumerate(classes):
        out[name] = {
            "precision": float(right_C[c] / max(given_C[c], 1)),
            "recall": float(right_C[c] / max(real_C[c], 1)),
            "f1": float(2 * right_C[c] / max(given_C[c] + real_C[c], 1)),
        }
    return out


def naive_bayes(train: list[Batch], batches: list[Batch], vocab_size: int, classes: int) -> np.ndarray:
    """Counts as of `measures`, by the classes' shares and token frequencies, one added to each.

    Args:
        train, batches: of labelled rows.
    """
    counts_CV, shares_C = np.ones((classes, vocab_size)), np.zeros(classes)
    for batch in train:
        rows_B, columns_B = np.nonzero((batch["segments"] > 0) & (batch["label_weights"][:, None] > 0))
        np.add.at(counts_CV, (batch["labels"][rows_B], batch["tokens"][rows_B, columns_B]), 1)
        np.add.at(shares_C, batch["labels"][batch["label_weights"] > 0], 1)
    logs_CV = np.log(counts_CV / counts_CV.sum(1, keepdims=True))
    found_CC = np.zeros((classes, classes), np.int64)
    for batch in batches:
        seen_BT = batch["segments"] > 0
        scores_CB = np.log(shares_C)[:, None] + np.sum(logs_CV[:, batch["tokens"]] * seen_BT, axis=2)
        scored_B = batch["label_weights"] > 0
        np.add.at(found_CC, (batch["labels"][scored_B], scores_CB.argmax(0)[scored_B]), 1)
    return found_CC


def confusion(workdir: pathlib.Path) -> dict[str, Any]:
    """The measures of a run's newest checkpoint on its eval set.

    Raises:
        UserError: no run of a classifier.
    """
    trained = load_trained(workdir)
    cfg, params = trained.cfg, trained.params
    if cfg.data.format != "classification":
        raise UserError(f"{workdir} has data.format={cfg.data.format!r}, which gives no class to a text")
    model, C = Model(cfg.model), len(cfg.data.classes)

    @jax.jit
    def classes_of(params: Any, batch: Any) -> jax.Array:
        hidden_BTD, _ = model.apply(params, batch, None)
        return model.classify(params, batch, hidden_BTD, None).argmax(-1)

    counts_CC = np.zeros((C, C), np.int64)
    with use(trained.layout):
        place = partial(place_batch, trained.layout)
        cached = dict(cache_dir=trained.workdir.parent / "data_cache", vocab_size=cfg.model.vocab_size)
        held_out = list(eval_batches(cfg.data, trained.tokenizer, **cached))
        for batch in held_out:
            got_B, real_B = np.asarray(classes_of(params, place(batch))), batch["labels"]
            scored_B = batch["label_weights"] > 0
            np.add.at(counts_CC, (real_B[scored_B], got_B[scored_B]), 1)
    every = dataclasses.replace(cfg.data, eval=cfg.data.train, eval_tokens=0)
    train = list(eval_batches(every, trained.tokenizer, **cached))
    by_counts_CC = naive_bayes(train, held_out, cfg.model.vocab_size, C)
    own = measures(counts_CC, cfg.data.classes)
    return {**own, "naive_bayes": measures(by_counts_CC, cfg.data.classes)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    workdir = parser.parse_args().workdir
    try:
        found = confusion(workdir)
    except UserError as error:
        print(f"confusion.py: {error}", file=sys.stderr)
        return 2
    (workdir / "confusion.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
