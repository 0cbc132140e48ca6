"""SigLIP, CyCLIP, ranking alone, the released form, and sums of terms, against float64 and other libraries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rankclip_jax.losses import objective_loss, rank_consistency, siglip_loss
from tests.losses.test_chunked import embeddings
from tests.support import oracle

VALUE, GRADIENT = 1e-5, 1e-4


@functools.cache
def value_and_grad(objective, **options):
    terms = dict(options.pop("terms", ()))
    return jax.jit(
        jax.value_and_grad(
            lambda *args: objective_loss(*args, objective=objective, terms=terms, **options), (0, 1, 2, 3), has_aux=True
        )
    )


def siglip(img, txt, scale, bias):
    """Value and gradients, in float64, by the definition."""
    img, txt = np.asarray(img, np.float64), np.asarray(txt, np.float64)
    sign = 2 * np.eye(len(img)) - 1
    cosine = img @ txt.T
    x = sign * (scale * cosine + bias)
    value = np.logaddexp(0, -x).sum() / len(img)
    g = -sign * np.exp(-np.logaddexp(0, x)) / len(img)
    return value, scale * g @ txt, scale * g.T @ img, (g * cosine).sum(), g.sum()


def cyclic(img, txt, in_modal):
    """B times the mean squared difference of cosines, with gradients, in float64."""
    img, txt = np.asarray(img, np.float64), np.asarray(txt, np.float64)
    if in_modal:
        d = img @ img.T - txt @ txt.T
        return (d**2).sum() / len(img), 4 * d @ img / len(img), -4 * d @ txt / len(img), 0.0, 0.0
    d = img @ txt.T - txt @ img.T
    return (d**2).sum() / len(img), 4 * d @ txt / len(img), 4 * d.T @ img / len(img), 0.0, 0.0


def check(got, want, floor=1e-6):
    (loss, _), grads = got
    assert float(loss) == pytest.approx(want[0], rel=VALUE)
    for g, w in zip(grads, want[1:], strict=True):
        assert np.linalg.norm(g - w) < GRADIENT * np.linalg.norm(w) + floor * max(1, abs(want[0]))


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (100.0, -20.0), (100.0, 50.0)])
def test_siglip_equals_float64(scale, bias):
    img, txt = embeddings(40)
    check(value_and_grad("siglip")(img, txt, scale, bias), siglip(img, txt, scale, bias))


def test_siglip_equals_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.SiglipConfig(
        text_config=small | dict(vocab_size=32, max_position_embeddings=8),
        vision_config=small | dict(image_size=16, patch_size=8),
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_bias.fill_(-3.0)
        model.logit_scale.fill_(2.0)
        out = model(input_ids=torch.randint(0, 32, (6, 8)), pixel_values=torch.randn(6, 3, 16, 16), return_loss=True)
    ours = siglip_loss(out.image_embeds.numpy(), out.text_embeds.numpy(), np.exp(2.0), -3.0)
    assert float(ours) == pytest.approx(out.loss.item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_cyclip_equals_float64(scale):
    img, txt = embeddings(40)
    (loss, parts), grads = value_and_grad("cyclip")(img, txt, scale, 0.0)
    clip = (*oracle.terms(img, txt, scale)["clip"], 0.0)
    across, within = cyclic(img, txt, False), cyclic(img, txt, True)
    check(((loss, parts), grads), [c + 0.25 * (a + w) for c, a, w in zip(clip, across, within, strict=True)])
    assert float(parts["cyclic_cross_modal"]) == pytest.approx(across[0], rel=VALUE)
    assert float(parts["cyclic_in_modal"]) == pytest.approx(within[0], rel=VALUE)


def test_ranking_alone_and_sums_of_terms():
    img, txt = embeddings(24)
    want = oracle.terms(img, txt, 20.0)
    rank = [(a + b) / 16 for a, b in zip(want["in_modal"], want["cross_modal"], strict=True)]
    got = value_and_grad("rank")(img, txt, 20.0, 0.0)
    check(got, (*rank, 0.0))
    assert set(got[0][1]) == {"rank_in_modal", "rank_cross_modal"}
    # SigLIP with CyCLIP's in-modal term and half of the cross-modal ranking.
    terms = (("cyclic_in_modal", 0.25), ("cross_modal", 0.5))
    got = value_and_grad("siglip", terms=terms)(img, txt, 20.0, -10.0)
    parts = siglip(img, txt, 20.0, -10.0), cyclic(img, txt, True), (*want["cross_modal"], 0.0)
    check(got, [a + 0.25 * b + 0.5 * c for a, b, c in zip(*parts, strict=True)])
    # In place of an objective's own term, and without it.
    parts = jax.eval_shape(lambda: objective_loss(img, txt, 20.0, objective="rankclip", terms={"clip": 0}))[1]
    assert set(parts) == {"rank_in_modal", "rank_cross_modal"}


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_released_form_is_what_the_formula_and_its_autograd_give(scale):
    torch = pytest.importorskip("torch")
    img, txt = embeddings(32, share=0.9)

    def listmle(scores, reference):
        order = torch.argsort(reference, dim=1, descending=True, stable=True)
        placed = torch.gather(scores, 1, order)
        shifted = placed - placed.max(dim=1, keepdim=True).values
        left = torch.cumsum(shifted.exp().flip(1), 1).flip(1)
        return (torch.log(left + 1e-10) - shifted).mean()

    a, b = (torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in (img, txt))
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    ii, tt, it = s * a @ a.T, s * b @ b.T, s * a @ b.T
    pairs = {"in_modal": (ii, tt), "cross_modal": (it, it.T)}
    for name, (x, y) in pairs.items():
        value = (listmle(x, y.detach()) + listmle(y, x.detach())) / 2
        want = value.item(), *(g.numpy() for g in torch.autograd.grad(value, (a, b, s), retain_graph=True))
        f = jax.jit(jax.value_and_grad(lambda *z, n=name: getattr(rank_consistency(*z, form="released"), n), (0, 1, 2)))
        got, grads = f(img, txt, scale)
        assert float(got) == pytest.approx(want[0], rel=1e-4), name
        for g, w in zip(grads, want[1:], strict=True):
            assert oracle.relative(g, w) < 1e-3, name


def test_released_form_is_exact_at_small_scales_and_wrong_at_large_ones():
    img, txt = embeddings(32, share=0.9)
    in_either_form = jax.jit(lambda *z: [rank_consistency(*z, form=form) for form in ("exact", "released")])
    for scale, near in ((5.0, True), (100.0, False)):
        exact, released = in_either_form(img, txt, scale)
        assert (abs(float(released.in_modal / exact.in_modal) - 1) < 1e-3) == near


@pytest.mark.parametrize("objective", ["siglip", pytest.param("cyclip", marks=pytest.mark.slow)])
def test_eight_devices_and_chunks_give_what_one_gives(objective):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("data"))
    img, txt = embeddings(64)
    one = value_and_grad(objective)(img, txt, 30.0, -10.0)
    eight = value_and_grad(objective, mesh=mesh, chunk=3)(*jax.device_put((img, txt), where), 30.0, -10.0)
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)  # the sums run in another order


@pytest.mark.parametrize("objective", ["clip", "rankclip", "rank", "siglip", "cyclip"])
def test_no_pairs_have_no_loss(objective):
    empty = jnp.zeros((0, 8))
    with pytest.raises(ValueError, match="a batch of 0 pairs has no loss"):
        objective_loss(empty, empty, 10.0, objective=objective)


def test_extremes_stay_finite():
    z = np.tile(np.eye(1, 16, dtype=np.float32), (8, 1))  # all the same
    for objective in ("siglip", "cyclip", "rank"):
        (loss, _), grads = value_and_grad(objective)(z, -z, 100.0, -100.0)
        assert np.isfinite(loss) and all(jnp.isfinite(g).all() for g in grads), objective
