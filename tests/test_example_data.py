"""The tools that make what the experiments on other objectives read, and those that read their runs."""

import ast
import datetime
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import load_experiment
from jaxlm.errors import UserError

TOOLS = Path(__file__).parents[1] / "tools"


def load(name: str):
    """The module tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


spam, dates, roles = load("spam"), load("dates"), load("roles")
plot_runs, confusion = load("plot_runs"), load("confusion")


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


def test_every_word_of_a_function_is_tagged_with_what_it_is():
    source = (
        "class Shop:\n"
        "    def price(self, items, *, tax=0.2):\n"
        "        'Documented.'\n"
        "        total = sum(item.cost for item in items)  # a comment\n"
        "        return math.ceil(total * (1 + tax)) if self.open else limit(x=tax)\n"
    )
    function = ast.parse(ast.unparse(ast.parse(source).body[0].body[0])).body[0]
    words = roles.tagged(function, ast.unparse(function))
    assert {tag for _, tag in words} == set(roles.TAGS)
    experiment = load_experiment(str(TOOLS.parent / "experiments" / "objectives" / "roles.py"))
    assert tuple(experiment.data.classes) == roles.TAGS
    of = {}
    for word, tag in words:
        of.setdefault(word, []).append(tag)
    assert of["tax"] == ["parameter"] * 3
    assert (of["item"], of["cost"], of["total"]) == (["local"] * 2, ["attribute"], ["local"] * 2)
    assert (of["sum"], of["math"], of["ceil"]) == (["builtin"], ["global"], ["attribute"])
    assert (of["x"], of["limit"], of["price"], of["''"]) == (
        ["option"],
        ["global"],
        ["definition"],
        ["string"],
    )
    assert "#" not in "".join(of)


def test_rules_are_scored_on_words_held_out():
    train = [[("a", "local"), ("b", "keyword"), ("b", "local")], [("b", "keyword"), ("d", "local")]]
    held_out = [[("b", "keyword"), ("b", "local"), ("c", "keyword"), ("a", "local")]]
    shares = roles.right_by_rule(train, held_out)
    assert shares == {"commonest_tag": 0.5, "commonest_tag_of_the_word": 0.5}
    assert roles.right_by_rule(train, [[("b", "keyword"), ("c", "local")]]) == {
        "commonest_tag": 0.5,
        "commonest_tag_of_the_word": 1.0,
    }


def test_tools_that_read_runs_name_what_is_missing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "eval/nll": 2.0}\n{"step": 2, "eval/nll": 1.0, "train/nll": 1.5}\n'
    )
    assert plot_runs.series(tmp_path, "eval/nll") == ([1, 2], [2.0, 1.0])
    with pytest.raises(UserError, match="has no 'eval/exact'; it has: eval/nll, train/nll"):
        plot_runs.series(tmp_path, "eval/exact")
    out = tmp_path / "a.png"
    arguments = ["--metric=eval/nll", f"--out={out}", f"here:{tmp_path}", "--line=chance=1.5"]
    assert plot_runs.main(arguments) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert plot_runs.main([*arguments, "--line=chance"]) == 2
    found = confusion.measures(np.array([[6, 2], [1, 3]]), ("ham", "spam"))
    assert found["accuracy"] == 0.75
    assert found["larger_class"] == pytest.approx(8 / 12)
    assert found["spam"] == {"precision": 0.6, "recall": 0.75, "f1": pytest.approx(2 / 3)}


def test_naive_bayes_counts_tokens_by_class():
    def batch(tokens, labels, weights=(1.0, 1.0)):
        arrays = dict(tokens=tokens, segments=np.asarray(tokens) > 0, labels=labels, label_weights=weights)
        return {name: np.asarray(x) for name, x in arrays.items()}

    train = [batch([[1, 1, 2], [3, 3, 0]], [0, 1])]
    held_out = [batch([[1, 2, 0], [1, 3, 3]], [0, 0]), batch([[3, 0, 0], [0, 0, 0]], [1, 0], (1.0, 0.0))]
    assert confusion.naive_bayes(train, held_out, 4, 2).tolist() == [[1, 1], [0, 1]]
