"""The tools that fetch or write what the experiments on other objectives read."""

import datetime
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def load(name: str):
    """The module tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


spam, dates = load("spam"), load("dates")


def test_mails_are_read_with_their_label_and_without_their_headers(tmp_path, monkeypatch, capsys):
    mails = {
        "easy-ham-1/1.abc": "Received: from a server\nSubject: Lunch\n\nAt noon?\n",
        "spam-2/2.def": "Subject: Buy\nContent-Type: text/html\n\n<p>Now&nbsp;<b>cheap</b><style>x</style>",
    }
    archive = tmp_path / "a.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in {**mails, "README": "no mail"}.items():
            data = json.dumps({"text": text, "group": name.split("/")[0]}).encode()
            member = tarfile.TarInfo(f"package/data/{name}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match="hash is pinned"):
        spam.read_archive(archive)
    monkeypatch.setattr(spam.shutil, "which", lambda name: None)
    assert spam.main(["--out", str(tmp_path / "spam")]) == 1
    assert "there is no `npm` here" in capsys.readouterr().err
    found = spam.read_archive(archive, hashlib.sha256(archive.read_bytes()).hexdigest())
    assert [(spam.text_of(mail), label) for mail, label in found] == [
        ("Lunch\nAt noon?", "ham"),
        ("Buy\nNow cheap", "spam"),
    ]


def test_one_text_is_on_one_side_only():
    mails = [(f"Subject: s\n\nText number {'x' * i} and {i * 7}", "ham") for i in range(200)]
    repeated = [(mail.replace("Text", "TEXT  1"), "spam") for mail, _ in mails]
    parts = spam.split(mails + repeated)
    assert len(parts["train"]) + len(parts["heldout"]) == 200
    assert 20 < len(parts["heldout"]) < 60
    assert {row["label"] for rows in parts.values() for row in rows} == {"ham"}


def test_every_spelling_of_a_day_is_its_own():
    days = [datetime.date(1904, 2, 29), datetime.date(2004, 2, 29), datetime.date(1904, 12, 2)]
    spellings = [text for day in days for text in dates.spellings(day)]
    assert len(set(spellings)) == len(spellings) == 24
    assert "the 29th of February 1904" in spellings
    records = dates.records()
    assert {name: len(rows) for name, rows in records.items()} == dates.RECORDS
    sides = [{row["iso"] for row in rows} for rows in records.values()]
    assert not sides[0] & sides[1]
    assert dates.records() == records
