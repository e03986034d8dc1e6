"""Trains word vectors on text files, prints neighbours, and answers analogies.

    python tools/word2vec.py --input='data/quickstart/text/*/*.txt' --out=runs/word2vec --words=king,sword
    python tools/word2vec.py --out=runs/word2vec --questions=questions-words.txt

Without --input it reads what is in --out. Writes `vectors.txt` (the text format of word2vec, which other
tools read) and `result.json` there. A file is a document.
"""

import argparse
import dataclasses
import glob
import json
import pathlib
import sys
import time

from jaxlm.errors import UserError, check
from jaxlm.model.word2vec import Vectors, Word2VecConfig, analogies, read_questions, split_words
from jaxlm.train.word2vec import OPTIM, train_vectors


def read_documents(pattern: str) -> list[list[str]]:
    """The words of every file that the pattern names.

    Raises:
        UserError: no such file.
    """
    paths = sorted(glob.glob(pattern, recursive=True))
    check(bool(paths), f"--input={pattern}: no file")
    return [split_words(pathlib.Path(path).read_text(encoding="utf-8")) for path in paths]


def train_to(out: pathlib.Path, args: argparse.Namespace) -> Vectors:
    """Trains, and writes vectors and facts to `out`."""
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Word2VecConfig)}
    cfg, began = Word2VecConfig(**fields), time.perf_counter()
    trained = train_vectors(
        read_documents(args.input),
        cfg,
        epochs=args.epochs,
        batch_size=args.batch_size,
        optim=dataclasses.replace(OPTIM, lr=args.lr),
        seed=args.seed,
        tick=lambda text: print(text, flush=True),
    )
    seconds = time.perf_counter() - began
    out.mkdir(parents=True, exist_ok=True)
    trained.vectors.save(out / "vectors.txt")
    facts = {name: getattr(trained, name) for name in ("losses", "steps", "tokens", "vocabulary")}
    record = {**facts, "seconds": round(seconds, 1), "config": dataclasses.asdict(cfg)}
    (out / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{trained.vocabulary:,} words, {trained.tokens:,} occurrences, {seconds:.0f} s; {out}/vectors.txt")
    return trained.vectors


def main(argv: list[str] | None = None) -> int:
    """Parses the flags, trains or reads, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the vectors")
    parser.add_argument("--input", help="glob of text files to train on")
    for field in dataclasses.fields(Word2VecConfig):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=4096, help="pairs an update")
    parser.add_argument("--lr", type=float, default=OPTIM.lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", default="", help="print the neighbours of these, separated by commas")
    parser.add_argument("--neighbours", type=int, default=8, help="how many of them")
    parser.add_argument("--questions", help="analogies in the format of questions-words.txt")
    args = parser.parse_args(argv)
    try:
        vectors = train_to(args.out, args) if args.input else Vectors.load(args.out / "vectors.txt")
        for word in filter(None, args.words.split(",")):
            found = vectors.most_similar(word, args.neighbours)
            print(f"{word:12} " + ", ".join(f"{other} {cosine:.2f}" for other, cosine in found))
        if args.questions:
            for section, score in analogies(vectors, read_questions(args.questions)).items():
                print(
                    f"{section:28} {score.accuracy:6.1%}  {score.right} of {score.asked}, "
                    f"{score.skipped} skipped"
                )
    except (UserError, OSError) as error:
        print(f"word2vec: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
