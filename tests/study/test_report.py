"""The pictures of a study: means over the seeds with their 95 % intervals, shares in per cent."""

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from rankclip_jax import figures
from rankclip_jax.config import complete
from rankclip_jax.study import report

VALUES = {"clip": [[0.1, 0.2], [0.3, 0.5], [0.2, 0.2]], "rankclip": [[0.4, 0.6]]}  # a list a seed, a value a step


def made_runs():
    runs = []
    for objective, seeds in VALUES.items():
        for seed, values in enumerate(seeds):
            curve = [
                {"step": 10 * (i + 1), "zero_shot/toys": v, "geometry/modality_gap": v} for i, v in enumerate(values)
            ]
            run = dict(condition="", objective=objective, seed=seed, lr=1e-3, seconds=1.0)
            runs.append(run | dict(curve=curve, final=curve[-1]))
    return [run | {"final": {k: v for k, v in run["final"].items() if k != "step"}} for run in runs]


def test_a_band_is_the_interval_of_the_mean_over_the_seeds(tmp_path, monkeypatch):
    drawn, bands = [], figures.bands
    monkeypatch.setattr(figures, "bands", lambda panels: drawn.append(panels) or bands(panels))
    config = complete({"study": {"objectives": {"clip": {}, "rankclip": {}}}})
    report.write(tmp_path, config, made_runs())
    assert [list(panels) for panels in drawn] == [["toys, top-1 %"], ["modality gap"]]
    for panels, scale in zip(drawn, (100, 1), strict=True):
        ((clip, rankclip),) = (named.values() for named in panels.values())
        steps, mean, half = clip
        at_each_step = scale * np.array(VALUES["clip"]).T
        assert steps == [10, 20] and mean == pytest.approx(at_each_step.mean(axis=1))
        assert half == pytest.approx(scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(at_each_step, axis=1))
        assert rankclip[1] == pytest.approx(scale * np.array([0.4, 0.6])) and list(rankclip[2]) == [0, 0]
    for name in ("curves.png", "dynamics.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (4.2 * 75, 3 * 75)
