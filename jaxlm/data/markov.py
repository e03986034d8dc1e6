"""Text from a random order-2 Markov source whose entropy rate is known: a corpus with a floor.

For every pair (a, b) of symbols the next symbol c has a Zipf distribution over a ranking of its own:

    P(c | a, b) = rank_ab(c)^-s_ab / sum_r r^-s_ab

rank_ab sorts the symbols by spread ln(c + 1) + ((a + 1)(b + 1))^-decay ln E_abc with exponential E_abc: at
decay 0 a draw without replacement with weights (c + 1)^-spread. So early symbols are the frequent ones, and
pairs have Zipf-like frequencies, too; and with a decay the rows of rare pairs depart less from the common
order, so that what it is worth to know a row falls steadily with the row's place. Exponents s_ab are uniform.
All of it is a function of the seed. The entropy rate is the mean of the rows' entropies under the stationary
distribution pi of the pairs,

    h = - sum_ab pi(a, b) sum_c P(c | a, b) ln P(c | a, b),   pi(b, c) = sum_a pi(a, b) P(c | a, b),

in nats per symbol. No model can do better on average. A row of T targets that begins inside a document shows
only one symbol before its first target: `floor` says what that costs.

    python -m jaxlm.data.markov --out=data/markov --train_symbols=16000000
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import tempfile
from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxlm.errors import UserError, check

FIRST = 33  # symbol 0 is '!', and all are printable ASCII: one byte each
RECORD = "markov.json"


@dataclasses.dataclass(frozen=True)
class MarkovConfig:
    """A source."""

    symbols: int = 94  # V
    exponent_low: float = 1.5  # s_ab are uniform from here ...
    exponent_high: float = 1.5  # ... to here
    spread: float = 0.5  # how much alike the rankings are; 0 = all symbols are equally frequent
    decay: float = 0.3  # how much more alike those of rarer pairs are; 0 = not at all
    seed: int = 0  # of the transition probabilities

    def __post_init__(self) -> None:
        check(2 <= self.symbols <= 94, f"symbols={self.symbols} must lie in [2, 94]: printable ASCII")
        low, high = self.exponent_low, self.exponent_high
        check(0 <= low <= high, f"exponents from {low:g} to {high:g}: 0 <= exponent_low <= exponent_high")
        check(self.spread >= 0, f"spread={self.spread:g} must not be negative")
        check(self.decay >= 0, f"decay={self.decay:g} must not be negative")


@dataclasses.dataclass(frozen=True)
class MarkovSource:
    """Transition probabilities, and what follows from them; entropies in nats per symbol."""

    probabilities: Float[np.ndarray, "V V V"]  # P(c | a, b)

    @cached_property
    def stationary(self) -> Float[np.ndarray, "V V"]:
        """pi(a, b), by iteration of the pair chain until it moves by less than 1e-15 in total."""
        V = len(self.probabilities)
        pi = np.full((V, V), V**-2.0)
        for _ in range(100_000):
            new = np.einsum("ab,abc->bc", pi, self.probabilities)
            new /= new.sum()
            if np.abs(new - pi).sum() < 1e-15:
                return new
            pi = 0.5 * (pi + new)  # lazy: converges for periodic chains, to the same pi
        raise UserError("the pair chain has not converged: are there symbols that never follow each other?")

    @property
    def entropy_rate(self) -> float:
        """h: given the two symbols before."""
        return float(np.sum(self.stationary * _entropy(self.probabilities)))

    @property
    def first_order(self) -> float:
        """Entropy of a symbol given only the one before."""
        return float(_entropy(self.stationary.ravel())) - self.zeroth_order

    @property
    def zeroth_order(self) -> float:
        """Entropy of a symbol given nothing."""
        return float(_entropy(self.stationary.sum(0)))

    def floor(self, seq_len: int) -> float:
        """Smallest possible mean loss on rows of T targets, each row the continuation of a document.

            ((T - 1) h + H(symbol | one before)) / T

        Left out: the few ends of documents.
        """
        return ((seq_len - 1) * self.entropy_rate + self.first_order) / seq_len

    def sample(self, length: int, seed: int) -> Int[np.ndarray, "length"]:
        """A stretch of the stationary source, uint8; of one seed, a longer one begins with a shorter one."""
        V = len(self.probabilities)
        # RandomState and not Generator: numpy promises that its stream never changes.
        random = np.random.RandomState(seed)
        pair = int(np.searchsorted(np.cumsum(self.stationary), random.random_sample(), side="right"))
        state = min(pair, V * V - 1)
        rows = np.cumsum(self.probabilities, axis=-1).reshape(V * V, V)[:, :-1].tolist()
        out = np.empty(length, np.uint8)
        for start in range(0, length, 1 << 16):
            drawn = random.random_sample(min(1 << 16, length - start)).tolist()
            for i, u in enumerate(drawn):
                symbol = bisect_right(rows[state], u)
                state = state % V * V + symbol
                drawn[i] = symbol
            out[start : start + len(drawn)] = drawn
        return out


def _entropy(p: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
    """Entropy along the last axis, nats."""
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), axis=-1)


def make_source(cfg: MarkovConfig) -> MarkovSource:
    """The source of a config.

    >>> source = make_source(MarkovConfig(symbols=5, exponent_low=0.0, exponent_high=0.0))
    >>> round(source.entropy_rate - float(np.log(5)), 12)
    0.0
    """
    V, random = cfg.symbols, np.random.RandomState(cfg.seed)
    ranks = np.arange(1.0, V + 1)
    # The order of arrival times E / w with rates w is a draw without replacement with weights w.
    noise = np.log(-np.log1p(-random.random_sample((V, V, V))))
    own = np.outer(ranks, ranks)[..., None] ** -cfg.decay
    order = np.argsort(own * noise + cfg.spread * np.log(ranks), axis=-1)
    exponents = cfg.exponent_low + (cfg.exponent_high - cfg.exponent_low) * random.random_sample((V, V, 1))
    zipf = ranks**-exponents
    probabilities = np.empty((V, V, V))
    np.put_along_axis(probabilities, order, zipf / zipf.sum(-1, keepdims=True), axis=-1)
    return MarkovSource(probabilities)


def write_corpus(
    out: str | Path, cfg: MarkovConfig, train_symbols: int, heldout_symbols: int = 1 << 18, seq_len: int = 128
) -> dict[str, Any]:
    """Write `train/markov.txt`, `heldout/markov.txt` and `markov.json` (what they are, and their entropies).

    A folder that holds the same is left as it is; one that is not there is made aside and renamed.

    Args:
        out: the folder.
        cfg: the source.
        train_symbols, heldout_symbols: bytes of the two texts, which are independent stretches.
        seq_len: T of the `floor` in the record.

    Returns:
        What `markov.json` says.

    Raises:
        UserError: `out` holds something else.
    """
    out = Path(out)
    check(min(train_symbols, heldout_symbols, seq_len) >= 1, "lengths must be at least 1")
    asked = dict(source=dataclasses.asdict(cfg), train_symbols=train_symbols, heldout_symbols=heldout_symbols)
    asked["seq_len"] = seq_len
    if (out / RECORD).exists():
        facts = json.loads((out / RECORD).read_text())
        changed = {k: v for k, v in asked.items() if facts.get(k) != v}
        check(not changed, f"{out} holds another corpus: asked for {changed}; choose another folder")
        return facts
    check(not (out.exists() and any(out.iterdir())), f"{out} is not empty and holds no {RECORD}: not touched")
    source = make_source(cfg)
    facts = {
        **asked,
        "entropy_rate": source.entropy_rate,
        "first_order": source.first_order,
        "zeroth_order": source.zeroth_order,
        "floor": source.floor(seq_len),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        made = Path(aside) / "made"
        for k, (split, length) in enumerate((("train", train_symbols), ("heldout", heldout_symbols))):
            (made / split).mkdir(parents=True)
            data = (source.sample(length, seed=1000 + k) + np.uint8(FIRST)).tobytes()
            (made / split / "markov.txt").write_bytes(data)
            facts[f"{split}_sha256"] = hashlib.sha256(data).hexdigest()
        (made / RECORD).write_text(json.dumps(facts, indent=1) + "\n")
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    return facts


def _main() -> None:
    parser = argparse.ArgumentParser(description="Make a corpus with a known entropy rate.")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--train_symbols", type=int, default=16_000_000)
    parser.add_argument("--heldout_symbols", type=int, default=1 << 18)
    parser.add_argument("--seq_len", type=int, default=128, help="T of the floor in the record")
    for field in dataclasses.fields(MarkovConfig):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    values = vars(parser.parse_args())
    sizes = {name: values.pop(name) for name in ("out", "train_symbols", "heldout_symbols", "seq_len")}
    facts = write_corpus(cfg=MarkovConfig(**values), **sizes)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    _main()
