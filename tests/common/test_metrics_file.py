import json

import pytest

from rankclip_jax import figures
from rankclip_jax.common import metrics_file as metrics
from rankclip_jax.common.errors import InputError
from rankclip_jax.evaluation import tables


def test_a_resumed_run_drops_the_lines_after_its_start_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 2}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [1, 2, 3]
    metrics.MetricsFile(tmp_path, 2).write(3, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in metrics.read_metrics(tmp_path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]


@pytest.mark.parametrize(
    "line, message",
    [
        (b"nonsense", "is not JSON"),
        (b'{"step": 2, "a": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"3", "is not an object with a step"),
        (b'{"loss": 1}', "is not an object with a step"),
        (b'{"step": "2"}', "is not an object with a step"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(InputError, match=f"metrics.jsonl line 2 {message}"):
        metrics.read_metrics(tmp_path)


def test_a_last_line_may_be_cut_off_inside_a_letter(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "a": "\xc3')
    assert metrics.read_metrics(tmp_path) == [{"step": 1}]


def test_the_table_has_a_row_for_each_set_and_a_gap_for_what_a_set_lacks():
    lines = tables.table({"a": {"top1": 0.5, "n": 4}, "b": {"top1": 1.0, "top3": 0.25, "n": 8}}).splitlines()
    assert lines[0].split() == ["zero-shot", "top1", "n", "top3"]
    assert lines[1].split() == ["a", "50.00", "%", "4"]
    assert lines[2].split() == ["b", "100.00", "%", "8", "25.00", "%"]


def test_curves_are_drawn_of_what_is_there(tmp_path):
    rows = [{"step": 1, "loss": 3.0, "clip": 2.0}, {"step": 2, "zero_shot/x/top1": 0.5, "val/clip": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss, top = figures.curves({"": tmp_path}).axes
    assert [len(axes.lines) for axes in (loss, top)] == [3, 1]


def test_the_first_line_of_each_start_says_when_and_on_what_it_was(tmp_path):
    for step in (1, 3):
        lines = metrics.MetricsFile(tmp_path, step - 1, {"device": "2 x TPU v4"})
        lines.write(step, {"loss": 1.0})
        lines.write(step + 1, {"loss": 0.5})
    rows = metrics.read_metrics(tmp_path)
    assert [row.get("start", {}).get("device") for row in rows] == ["2 x TPU v4", None] * 2
    assert all(row["seconds"] >= 0 for row in rows) and {"seconds", "start"} <= set(metrics.OF_THE_MACHINE)
