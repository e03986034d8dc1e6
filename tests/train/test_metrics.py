import io
import json
import math
import time

import numpy as np
import pytest

from jaxlm.chips import PEAKS, peak_flops
from jaxlm.errors import UserError
from jaxlm.train.metrics import (
    Clock,
    Console,
    JsonlWriter,
    Reporter,
    StepReport,
    TensorBoardWriter,
    add_pairs,
    read_rows,
    value,
    values,
)
from jaxlm.train.plot import plot_loss, smooth


def write_rows(path, steps, resume_step=0):
    writer = JsonlWriter(path, resume_step)
    for step in steps:
        writer.write(step, {"train/nll": 1.0 / (step + 1)})
    writer.close()


def steps_in(path):
    return [row["step"] for row in read_rows(path)]


def report(step, nll=2.0, **fields):
    given = {"extra": {}, "steps": 10, "seconds": 2.0, "data_wait": 0.5, **fields}
    return StepReport(step=step, metrics={"nll": (nll * 4, 4.0)}, **given)


# -------------------------------------------------------------------------------------------- metrics.jsonl


def test_every_step_stands_once_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [1, 10, 20, 30])
    write_rows(path, [21, 30, 40], resume_step=20)
    assert steps_in(path) == [1, 10, 20, 21, 30, 40]
    write_rows(path, [1, 10], resume_step=0)
    assert steps_in(path) == [1, 10]


TORN = {
    "half a name": b'{"step": 30, "train/n',
    "no newline": b'{"step": 30, "train/nll": 1.0}',
    "zeros": b"\0" * 100,
    "zeros and a newline": b"\0\0\n",
}


@pytest.mark.parametrize("torn", TORN.values(), ids=TORN)
def test_a_torn_last_line_is_cut(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [10, 20])
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(torn)
    if b"\n" not in torn:
        assert steps_in(path) == [10, 20]
    write_rows(path, [], resume_step=25)
    assert path.read_bytes() == whole


def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not a row"):
        JsonlWriter(path, 10)
    assert path.read_text() == '{"step": 1}\nhello\n'


def test_rows_are_on_disk_at_once_and_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"a": math.nan, "b": math.inf, "c": np.float32(0.5)})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "a": None, "b": None, "c": 0.5}]
    with pytest.raises(ValueError, match="step 1 after that of step 1"):
        writer.write(1, {"a": 1.0})
    writer.close()


def test_tensorboard_events_hold_the_rows(tmp_path):
    writer = TensorBoardWriter(tmp_path, resume_step=5)
    writer.write(6, {"train/nll": 0.25})
    writer.close()
    (file,) = tmp_path.glob("events*")
    data = file.read_bytes()
    assert b"train/nll" in data
    assert np.float32(0.25).tobytes() in data


# -------------------------------------------------------------------------------------------------- values


def test_pairs_are_added_before_they_are_divided():
    parts = [{"nll": (6.0, 3.0)}, {"nll": (1.0, 1.0), "aux": (2.0, 1.0)}]
    total = add_pairs(*parts)
    assert total == {"nll": (7.0, 4.0), "aux": (2.0, 1.0)}
    assert value(total["nll"]) == 1.75 != np.mean([value(p["nll"]) for p in parts])
    assert math.isnan(value((0.0, 0.0)))
    assert values({"a": (1.0, 2.0), "b": (0.0, 0.0)}, "train/") == {"train/a": 0.5}


def test_reporter_computes_throughput_and_mfu(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reporter = Reporter(
        [JsonlWriter(path)], tokens_per_step=1000, flops_per_token=6e9, peak=1e14, num_devices=4
    )
    reporter(report(10))
    reporter(report(20, extra={"eval/nll": 3.0}))
    reporter(StepReport(step=30, metrics={}, extra={"eval/nll": 2.5}, steps=0, seconds=0.0, data_wait=0.0))
    reporter.close()
    first, second, third = read_rows(path)
    assert first["perf/tokens_per_second"] == 5000.0
    assert first["perf/step_seconds"] == 0.2
    assert first["perf/data_wait"] == 0.25
    assert first["perf/mfu"] == pytest.approx(5000 * 6e9 / 4e14)
    assert first["tokens"] == 10_000
    assert first["train/nll"] == 2.0
    assert second["eval/nll"] == 3.0
    assert "perf/mfu" not in third
    assert reporter.last["eval/nll"] == 2.5
    assert reporter.last["train/nll"] == 2.0


def test_no_peak_no_mfu(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reporter = Reporter([JsonlWriter(path)], tokens_per_step=10, flops_per_token=1e9, peak=peak_flops("cpu"))
    reporter(report(10))
    reporter.close()
    assert "perf/mfu" not in read_rows(path)[0]


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v2", 23), ("TPU v3", 61.5), ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459),
        ("TPU v5p", 459), ("TPU v6 lite", 918), ("TPU7x", 1153.5), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
        ("cpu", None), ("TPU v99", None), ("AMD EPYC", None),
    ],
)  # fmt: skip
def test_peak_table(kind, tera):
    assert peak_flops(kind) == (tera and tera * 1e12)


def test_no_entry_of_the_peak_table_is_hidden_by_an_earlier_one():
    assert all(peak_flops(name) == peak for name, peak in PEAKS)


# ------------------------------------------------------------------------------------------ clock and console


def test_clock_books_nested_time_once_and_adds_up():
    clock = Clock()
    with clock.spend("eval"):
        time.sleep(0.02)
        with clock.spend("compile"):
            time.sleep(0.05)
    with pytest.raises(ZeroDivisionError), clock.spend("step"):
        1 / 0  # noqa: B018
    time.sleep(0.02)
    seconds, total = clock.seconds(), clock.total()
    assert 0.05 <= seconds["compile"] < 0.5
    assert 0.02 <= seconds["eval"] < seconds["compile"] + 0.4
    assert seconds["eval"] + seconds["compile"] <= total
    assert seconds["other"] >= 0.02
    assert sum(seconds.values()) == pytest.approx(total, abs=0.01)
    assert "step" in seconds


def test_clock_exclusive_time_is_exact(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()  # 0
    with clock.spend("outer"), clock.spend("inner"):  # 1, 3
        pass  # inner ends at 6, outer at 10
    assert clock._booked == {"inner": 3.0, "outer": 6.0}


def test_plain_console_prints_one_readable_line_per_row():
    stream = io.StringIO()
    console = Console(200, stream=stream)
    console.tick(1)
    console.write(
        10, {"train/nll": 3.25, "train/lr": 1e-3, "perf/tokens_per_second": 12345.0, "perf/mfu": 0.4}
    )
    console.write(200, {"eval/nll": 3.0})
    console.log("saved")
    console.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step  10/200  nll 3.2500  lr 1.00e-03  12.3k tok/s  MFU 40.0%  ")
    assert lines[0].endswith(" left")
    assert lines[1] == "step 200/200  eval nll 3.0000"
    assert lines[2] == "saved"
    assert "\x1b" not in stream.getvalue()


def test_console_bar_shows_progress_and_prints_evaluations_above():
    stream = io.StringIO()
    console = Console(200, start=50, stream=stream, bar=True)
    console.tick(120)
    console.write(120, {"train/nll": 3.25})
    console.write(120, {"eval/nll": 3.0})
    console.log("a [bracket]")
    console.close()
    text = stream.getvalue()
    assert "120/200" in text
    assert "nll 3.2500" in text
    assert "step 120  eval nll 3.0000" in text
    assert "a [bracket]" in text


# ---------------------------------------------------------------------------------------------------- plot


def test_smoothing_does_not_shift_a_slope():
    slope = np.linspace(5.0, 1.0, 50)
    np.testing.assert_allclose(smooth(slope, 5), slope, rtol=1e-12)
    noisy = slope + np.tile([0.1, -0.1], 25)
    assert np.abs(smooth(noisy, 5) - slope)[10:40].max() < 0.02
    np.testing.assert_allclose(smooth(noisy, 0), noisy, rtol=1e-12)


def test_plot_draws_a_png_and_refuses_an_empty_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(0, 200, 5):
        row = {"train/nll": 5.0 / (1 + step / 50), "train/lr": 1e-3, "tokens": step * 4096}
        writer.write(step, row | ({"eval/nll": 2.0} if step % 50 == 0 else {}))
    writer.write(500, {"train/nll": math.nan})
    writer.close()
    out = plot_loss(path, tmp_path / "loss.png", title="toy")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 10_000
    (tmp_path / "empty.jsonl").write_text('{"step": 1, "train/nll": null}\n')
    with pytest.raises(UserError, match="no row with a finite loss"):
        plot_loss(tmp_path / "empty.jsonl", out)
