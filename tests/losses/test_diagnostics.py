import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.stats import spearmanr

from rankclip_jax.losses import embedding_diagnostics, gradient_cosine
from tests.support import oracle

DIAGNOSTICS = jax.jit(embedding_diagnostics)


def embeddings(batch=30, share=0.5):
    rng = np.random.default_rng(0)
    img = oracle.unit_rows(rng, batch, 12)
    return img, oracle.unit_rows(rng, batch, 12, towards=img, share=share)


def test_agreement_equals_scipy():
    img, txt = embeddings()
    got = jax.jit(functools.partial(embedding_diagnostics, top_k=5))(img, txt)
    n = len(img)
    ii, tt, it = img @ img.T, txt @ txt.T, img @ txt.T
    others = ~np.eye(n, dtype=bool)
    pairs = {"in_modal": [x[others].reshape(n, -1) for x in (ii, tt)], "cross_modal": [it, it.T]}
    for name, (a, b) in pairs.items():
        want = np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
        assert float(got[f"spearman_{name}"]) == pytest.approx(want, abs=1e-5)
        shared = [len({*np.argsort(-x)[:5]} & {*np.argsort(-y)[:5]}) / 5 for x, y in zip(a, b, strict=True)]
        assert float(got[f"overlap_{name}"]) == pytest.approx(np.mean(shared), abs=1e-6)


def test_geometry_by_the_formulas():
    img, txt = (z.astype(np.float64) for z in embeddings())
    got = DIAGNOSTICS(*embeddings())
    others = ~np.eye(len(img), dtype=bool)
    distance = ((img[:, None] - img[None]) ** 2).sum(-1)
    want = {
        "similarity_positive": np.mean(np.sum(img * txt, 1)),
        "similarity_negative": (img @ txt.T)[others].mean(),
        "modality_gap": np.linalg.norm(img.mean(0) - txt.mean(0)),
        "alignment": ((img - txt) ** 2).sum(1).mean(),
        "uniformity_image": np.log(np.exp(-2 * distance[others]).mean()),
    }
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(value, rel=1e-4), name


def test_identical_modalities_agree_entirely():
    img, _ = embeddings()
    got = DIAGNOSTICS(img, img)
    for name in ("spearman_in_modal", "spearman_cross_modal", "overlap_in_modal", "overlap_cross_modal"):
        assert float(got[name]) == pytest.approx(1, abs=1e-6), name
    assert float(got["modality_gap"]) == 0


def test_gradient_cosine_equals_the_oracles():
    img, txt = embeddings()
    terms = oracle.terms(img, txt, 20.0)
    clip = np.concatenate([terms["clip"][1], terms["clip"][2]]).ravel()
    rank = np.concatenate([terms["in_modal"][i] + terms["cross_modal"][i] for i in (1, 2)]).ravel()
    want = clip @ rank / np.linalg.norm(clip) / np.linalg.norm(rank)
    assert float(jax.jit(gradient_cosine)(img, txt, 20.0)) == pytest.approx(want, abs=1e-4)


def test_no_gradient_no_cosine():
    one = np.ones((1, 4), np.float32) / 2
    assert float(gradient_cosine(one, one, 20.0)) == 0


@pytest.mark.slow
def test_on_eight_devices_as_on_one_and_only_a_sample():
    img, txt = embeddings(64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = [jax.device_put(z, NamedSharding(mesh, PartitionSpec("data"))) for z in (img, txt)]

    def both(img, txt):
        cosine = gradient_cosine(img, txt, 20.0, sample=24)
        return embedding_diagnostics(img, txt, sample=24) | {"gradient_cosine": cosine}

    got, want = jax.jit(both)(*spread), jax.jit(both)(img[:24], txt[:24])
    for name in want:
        assert float(got[name]) == pytest.approx(float(want[name]), abs=1e-5), name


def test_too_few_pairs():
    with pytest.raises(ValueError, match="at least 3 pairs, not 2"):
        embedding_diagnostics(*(z[:2] for z in embeddings()))


def test_similarities_are_in_full_float32_also_where_the_default_is_less():
    _, *products = " ".join(str(jax.make_jaxpr(embedding_diagnostics)(*embeddings())).split()).split("dot_general[")
    assert len(products) == 5  # three matrices, and two for the uniformities
    for product in products:
        assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in product.partition(" ] ")[0]


def test_a_gradient_that_is_not_finite_has_no_cosine():
    img, txt = embeddings()
    img[3, 2] = np.nan
    assert np.isnan(jax.jit(gradient_cosine)(img, txt, 30.0))
