"""Lines over the steps: nothing that matters is thinned away, and ticks read well at any scale."""

import json
import math
import warnings

import numpy as np
import pytest

from rankclip_jax import figures
from rankclip_jax.figures.curves import MOST_POINTS


def lines_of(figure):
    return figure.axes[0].lines


def ticks_of(axis):
    """What is written at the ticks inside the view."""
    low, high = sorted(axis.get_view_interval())
    return [label.get_text() for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            if low <= at <= high]  # fmt: skip


def test_a_long_line_is_thinned_and_keeps_its_ends_and_its_spikes():
    points = [(step, 1 / (step + 1)) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    points[77_777] = (77_777, -3.0)
    (line,) = lines_of(figures.chart([figures.Line(points)]))
    drawn = list(zip(*line.get_data(), strict=True))
    assert len(drawn) <= MOST_POINTS and drawn == sorted(drawn)
    assert {points[0], points[54_321], points[77_777], points[-1]} <= set(drawn) <= set(points)


def test_a_line_that_is_short_enough_is_drawn_whole():
    points = [(step, math.sin(step)) for step in range(MOST_POINTS)]
    (line,) = lines_of(figures.chart([figures.Line(points)]))
    assert list(zip(*line.get_data(), strict=True)) == points


def test_each_run_has_its_colour_and_validation_its_dashes():
    both = [figures.Line([(1, 1.0), (2, 2.0)], run, dashed) for dashed in (False, True) for run in (0, 7)]
    found = lines_of(figures.chart(both))
    assert [line.get_color() for line in found] == [figures.colour(0), figures.colour(7)] * 2
    assert [line.get_linestyle() for line in found] == ["-", "-", "--", "--"]
    assert len({figures.colour(run) for run in range(10)}) == 10


def test_a_single_point_is_seen():
    (line,) = lines_of(figures.chart([figures.Line([(0, 3.0)])]))
    assert line.get_marker() == "o"


@pytest.mark.parametrize(
    "low, high, last",
    [
        (0, 1, 1), (0, 0, 3), (-3.2, 7e5, 4_999), (1e-9, 2e-9, 2_000_000), (5, 5, 0), (-1, -1, 2), (0.3333, 0.3334, 9),
    ],
)  # fmt: skip
def test_ticks_are_few_and_told_apart(low, high, last):
    figure = figures.chart([figures.Line([(0, low), (last, high)])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        written = ticks_of(axis)
        assert 1 <= len(written) <= 7 and len(set(written)) == len(written)
    assert all(text.rstrip("kM").replace(".", "").isdigit() for text in ticks_of(figure.axes[0].xaxis))


def test_shares_are_written_in_per_cent():
    figure = figures.chart([figures.Line([(1, 0.1), (9, 0.3)])], percent=True)
    figure.draw_without_rendering()
    assert ticks_of(figure.axes[0].yaxis) == ["10 %", "15 %", "20 %", "25 %", "30 %"]


def test_names_that_matplotlib_would_leave_out_or_read_as_formulas_stand_in_the_legend(tmp_path):
    for name in ("_a", "$b$"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "clip": 2.0}) + "\n")
    figure = figures.curves({name: tmp_path / name for name in ("_a", "$b$")})
    figure.draw_without_rendering()
    texts = figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["_a, training", "$b$, training"]
    assert not any(text.get_parse_math() for text in texts)


def test_bands_lie_around_their_means():
    numbers = ([10, 20], np.array([1.0, 2.0]), np.array([0.5, 0.25]))
    figure = figures.bands({"first": {"_a": numbers, "b": numbers}, "second": {"_a": numbers}})
    figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes] == ["first", "second"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    box = figure.axes[0].collections[0].get_paths()[0].get_extents()
    assert (box.x0, box.y0, box.x1, box.y1) == (10, 0.5, 20, 2.25)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_a", "b"]
