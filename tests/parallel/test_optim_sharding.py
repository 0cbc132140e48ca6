import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.config import complete
from rankclip_jax.parallel import sharding
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.train import optim, rules
from rankclip_jax.weights.layouts import openai


def config(**fields):
    return complete({"optim": fields}).optim


def decayed_in(params, **fields):
    """Name -> whether weight decay applies."""
    return {name: treatment.weight_decay > 0 for name, treatment in rules.treatments(config(**fields), params).items()}


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny", "SigLIP-B/16"])
@pytest.mark.parametrize("scan", [False, True])
def test_decay_is_on_matrices_only(name, scan):
    model = models.build(name, scan_layers=scan)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    decayed = decayed_in(params)
    never = ("bias", "scale", "logit_scale", "logit_bias", "class_embedding", "positional_embedding", "probe")
    for path, yes in decayed.items():
        assert yes == (path.split("/")[-1] not in never), path
    assert sum(decayed.values()) >= 10


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny"])
@pytest.mark.parametrize("scan", [False, True])
def test_the_released_recipe_decays_whatever_has_no_such_name_in_torch(name, scan):
    model = models.build(name, scan_layers=scan)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    found = decayed_in(params, recipe="released")
    for name, decayed in found.items():
        theirs = openai(name.replace("resblocks/", "resblocks_0/"), 2).key
        assert decayed == (not any(part in theirs for part in ("bn", "ln", "bias", "logit_scale"))), theirs
    more = sum(found.values()) - sum(decayed_in(params).values())
    # Two towers' positions and the class; or the texts', the attention pool's, and a gain for each of four shortcuts.
    assert more == (3 if isinstance(model.config.vision, models.VitConfig) else 6)


def test_clipping_bounds_the_gradient_norm():
    params = {"kernel": jnp.zeros((2, 2))}
    grads = {"kernel": jnp.full((2, 2), 1e6)}
    for clip in (None, 0.5):
        tx = optim.make_optimizer(config(grad_clip_norm=clip, warmup_steps=0), 10)
        _, state = tx.update(grads, tx.init(params), params)
        mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
        norm = float(jnp.linalg.norm(mu["kernel"])) / (1 - 0.9)
        assert norm == pytest.approx(2e6 if clip is None else clip, rel=1e-3)


def test_mesh_sizes_must_fit_the_devices():
    assert make_mesh({"data": -1}).shape == {"data": 8}
    assert make_mesh({"data": -1, "fsdp": 2}).shape == {"data": 4, "fsdp": 2}
    with pytest.raises(InputError, match=r"takes 3 devices; there are 8"):
        make_mesh({"data": 3})
    with pytest.raises(InputError, match=r"takes a multiple of 16 devices; there are 8"):
        make_mesh({"data": -1, "model": 16})
    with pytest.raises(InputError, match=r"takes a multiple of 3 devices; there are 8"):
        make_mesh({"data": -1, "model": 3})
    with pytest.raises(InputError, match=r"expected one axis of -1, which takes what the others leave"):
        make_mesh({"data": -1, "model": -1})
    with pytest.raises(InputError, match=r'no axis "data"'):
        make_mesh({"model": 8})


def test_rules_place_parameters_and_complain_when_they_do_not_fit():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    state = {"params": {"a": {"kernel": jnp.zeros((4, 4))}, "b": jnp.zeros(4)}, "step": jnp.int32(0)}
    placed = sharding.state_shardings(state, mesh, (("kernel", ("fsdp", None)), (".*", ())))
    assert placed["params"]["a"]["kernel"].spec == P("fsdp", None) and placed["params"]["b"].spec == P()
    with pytest.raises(InputError, match="no rule for params/b"):
        sharding.state_shardings(state, mesh, (("kernel", ()),))
    with pytest.raises(InputError, match="'attn' matches no parameter"):
        sharding.state_shardings(state, mesh, (("attn", ()), (".*", ())))
    with pytest.raises(InputError, match="Unknown config.sharding='zero'. Expected one of replicated, fsdp, tensor"):
        sharding.state_shardings(state, mesh, "zero")
    with pytest.raises(InputError, match="an axis 'model', which config.mesh lacks"):
        sharding.state_shardings(state, mesh, (("kernel", (None, "model")), (".*", ())))
    with pytest.raises(InputError, match=r"params/c \(3,\) does not divide over 'fsdp' = 2"):
        sharding.state_shardings({"params": {"c": jnp.zeros(3)}}, mesh, ((".*", ("fsdp",)),))
    with pytest.raises(InputError, match=r"params/b \(4,\) has fewer dimensions than its rule's axes \('fsdp', None\)"):
        sharding.state_shardings(state, mesh, ((".*", ("fsdp", None)),))


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50", "SigLIP-B/16"])
@pytest.mark.parametrize("scan", [False, True])
def test_kinds_split_what_they_should(name, scan):
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    model = models.build(name, scan_layers=scan)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]

    def share(kind):  # of the parameters, how much lies on one device
        placed = sharding.state_shardings(params, mesh, kind)
        sizes = jax.tree.map(lambda p, s: np.prod(s.shard_shape(p.shape)), params, placed)
        return sum(jax.tree.leaves(sizes)) / sum(p.size for p in jax.tree.leaves(params)), placed

    assert share(None)[0] == share("replicated")[0] == 1
    assert 0.5 <= share("fsdp")[0] < 0.51  # all but the small ones
    tensor, placed = share("tensor")
    assert 0.5 < tensor < 0.85  # embeddings and convolutions stay whole
    both, _ = share("fsdp+tensor")
    assert 0.25 < both < min(0.45, tensor)
    blocks = placed["text"]["transformer"]
    mlp = (blocks["resblocks"] if scan else blocks["resblocks_0"])["mlp"]
    assert mlp["c_fc"]["kernel"].spec[-2:] == (None, "model") and mlp["c_proj"]["kernel"].spec[-2:] == ("model", None)
    assert mlp["c_fc"]["bias"].spec[-1] == "model"
    if name == "SigLIP-B/16":
        pool = placed["visual"]["attnpool"]
        assert pool["k_proj"]["kernel"].spec == pool["mlp"]["c_fc"]["kernel"].spec == P(None, "model")
        assert pool["c_proj"]["kernel"].spec == pool["mlp"]["c_proj"]["kernel"].spec == P("model", None)
