"""The self-test passes, says so by its exit code, and fails when the code is wrong."""

import math

import pytest

from jaxlm.scaling import selftest
from jaxlm.scaling.selftest import Row, closed_forms, lines, selftest_command


def test_a_row_is_within_its_tolerance():
    assert Row("x", 1.05, 1.0, 0.1).ok
    assert not Row("x", 1.05, 1.0, 0.01).ok
    assert not Row("x", math.nan, 1.0, 0.01).ok


@pytest.mark.parametrize("part", [closed_forms, lines])
def test_quick_parts_recover_the_published_numbers(part):
    rows = part()
    assert len(rows) >= 8
    assert [row for row in rows if not row.ok] == []


def test_the_command_fails_when_a_number_is_off(monkeypatch, capsys):
    monkeypatch.setattr(
        selftest, "PARTS", (lambda: [Row("fine", 1.0, 1.0, 0.1), Row("broken", 2.0, 1.0, 0.1)],)
    )
    assert selftest_command() == 1
    text = capsys.readouterr().out
    assert "NO" in text
    assert "2 numbers, 1 off" in text
    monkeypatch.setattr(selftest, "PARTS", (lambda: [Row("fine", 1.0, 1.0, 0.1)],))
    assert selftest_command() == 0


def test_a_wrong_bias_is_found(monkeypatch):
    monkeypatch.setattr(selftest, "parabola_bias", lambda alpha, beta, grid: 0.0)
    assert {row.what for row in lines() if not row.ok} == {
        "the same by parabolas over 16x",
        "D* by parabolas, exponents 3:1",
    }


@pytest.mark.slow
def test_every_law_and_method_recovers():
    rows = selftest.selftest()
    assert len(rows) >= 80
    assert [row for row in rows if not row.ok] == []
