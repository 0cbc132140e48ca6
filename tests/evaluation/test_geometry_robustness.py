"""Geometry in closed form, and effective robustness against its formula."""

import json

import numpy as np
import pytest

from rankclip_jax.common.errors import InputError
from rankclip_jax.evaluation import geometry, robustness


def unit(rng, n, d=8):
    z = rng.normal(size=(n, d))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def test_geometry_of_a_known_arrangement():
    z = np.eye(4, dtype=np.float32)
    numbers = geometry.geometry(z, np.roll(z, 1, axis=1))
    # Orthogonal pairs: distance^2 2 between all, mean embeddings equal.
    assert numbers["n"] == 4 and numbers["alignment"] == pytest.approx(2)
    assert numbers["modality_gap"] == pytest.approx(0, abs=1e-6)
    assert numbers["uniformity_image"] == pytest.approx(-4) and numbers["similarity_positive"] == pytest.approx(0)


def test_geometry_looks_at_every_pair_and_not_at_a_sample_of_them():
    rng = np.random.default_rng(0)
    z_img, z_txt = unit(rng, 700), unit(rng, 700)
    gap = np.linalg.norm(z_img.astype(np.float64).mean(0) - z_txt.astype(np.float64).mean(0))
    numbers = geometry.geometry(z_img, z_txt)
    assert numbers["n"] == 700 and numbers["modality_gap"] == pytest.approx(gap, rel=1e-4)
    assert geometry.geometry(z_img, z_img)["spearman_cross_modal"] == pytest.approx(1)


def test_histograms_count_pairs_and_all_others():
    rng = np.random.default_rng(0)
    z_img, z_txt = unit(rng, 50), unit(rng, 50)
    found = geometry.similarity_histograms(z_img, z_txt)
    scores = z_img @ z_txt.T
    assert found["positive"].sum() == 50 and found["negative"].sum() == 50 * 49
    assert found["positive"][:30].sum() == (np.diag(scores) < 0).sum()
    assert geometry.similarity_histograms(z_img, z_img)["positive"][-1] == 50  # cosines of 1 + eps count too


def test_projection_is_principal_components_and_the_same_for_mirrored_axes():
    rng = np.random.default_rng(0)
    z_img, z_txt = unit(rng, 60) * [5, 3, 1, 1, 1, 1, 1, 1], unit(rng, 60) * [5, 3, 1, 1, 1, 1, 1, 1]
    found = geometry.project(z_img, z_txt)
    points = np.concatenate([found["image"], found["text"]])
    values = np.linalg.eigvalsh(np.cov(np.concatenate([z_img, z_txt]).T))[::-1]
    np.testing.assert_allclose(np.cov(points.T), np.diag(values[:2]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["explained"], values[:2] / values.sum(), rtol=1e-6)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-5)


def test_effective_robustness_by_its_formula(tmp_path):
    logit = lambda x: np.log(x / (1 - x))  # noqa: E731
    a, b = -1.2, 0.9
    points = [[x, float(1 / (1 + np.exp(-(a + b * logit(x)))))] for x in (0.3, 0.5, 0.6, 0.8)]
    (tmp_path / "b.json").write_text(json.dumps({"shifted": points}))
    fitted = robustness.read_baselines(tmp_path / "b.json")["shifted"]
    assert fitted == pytest.approx((a, b))
    row = robustness.table_row(0.4, 0.7, fitted)
    expected = 0.4 - 1 / (1 + np.exp(-(a + b * logit(0.7))))
    assert row == pytest.approx({"reference": 0.7, "shifted": 0.4, "drop": 0.3, "effective": expected})
    assert robustness.table_row(0.4, 0.7) == pytest.approx({"reference": 0.7, "shifted": 0.4, "drop": 0.3})
    assert "effective" not in robustness.table_row(0.4, 1.0, fitted)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("nonsense", "Expecting value"),
        ('{"a": [[0.5, 0.4]]}', "at least two models"),
        ('{"a": [[0.5, 0.4], [0.5, 0.3]]}', "at least two models"),
        ('{"a": [[50, 40], [60, 50]]}', "greater than 0 and less than 1"),
        ('["a"]', "baselines"),
        ('{"a": {"b": 1}}', "baselines"),
        ("[" * 100_000, "baselines"),
    ],
)
def test_wrong_baselines_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "b.json").write_text(content)
    with pytest.raises(InputError, match=message):
        robustness.read_baselines(tmp_path / "b.json")


def test_shared_classes_are_found_by_name_and_only_when_all_are_there_once():
    assert robustness.shared_classes(["a", "b", "c"], ["c", "a"]).tolist() == [2, 0]
    assert robustness.shared_classes(["a", "b"], ["a", "z"]) is None
    assert robustness.shared_classes(["a", "b", "b"], ["a"]).tolist() == [0]  # b is not asked for
    assert robustness.shared_classes(["a", "b", "b"], ["b"]) is None
    assert robustness.shared_classes(["a", "b", "b"], ["a", "b", "b"]).tolist() == [0, 1, 2]  # the same list
