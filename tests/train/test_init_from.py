"""Starting from trained models: which parameters come along, which do not fit, what stays frozen, who learns slowly."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.common.trees import by_name
from rankclip_jax.models import unstack_layers
from rankclip_jax.parallel.mesh import make_mesh, to_devices
from rankclip_jax.train import init_from, loop, optim, rules
from rankclip_jax.train import step as steps
from rankclip_jax.train.session import build_model
from rankclip_jax.weights import export, pretrained
from tests.support.made_models import RESNET, SIGLIP, VIT, make_config, make_workdir


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return {"vit": make_workdir(folder / "vit", VIT), "resnet": make_workdir(folder / "resnet", RESNET)}


def start(config):
    """(fresh state, state that starts from config.init_from)."""
    origin = init_from.read(config)
    tokenizer = init_from.tokenizer(origin, config) or origin.tokenizer or Tokenizer.train(["a", "b"], 300)
    model, tx = build_model(config, tokenizer), optim.make_optimizer(config.optim, 10)
    mesh = make_mesh(config.mesh)
    fresh = Constant(model, tx, 0, mesh, config.sharding)
    return fresh.state(), init_from.apply(fresh, origin, model.config, config)


class Constant(steps.Fresh):
    """All that is not taken is 0.25, which takes no program."""

    def state(self, taken=None):
        def leaf(x):
            shape = isinstance(x, jax.ShapeDtypeStruct)
            return jax.device_put(np.full(x.shape, 0.25, x.dtype), x.sharding) if shape else x

        return jax.tree.map(leaf, self.abstract if taken is None else taken)


@pytest.mark.parametrize(("devices", "kind"), [(1, None), (8, "fsdp")])
def test_what_is_taken_is_not_drawn_and_the_rest_has_its_usual_bits(devices, kind, monkeypatch):
    config = make_config(VIT, optim={"ema": 0.9, "warmup_steps": 1}, mesh={"data": 1, "fsdp": devices}, sharding=kind)
    model = build_model(config, Tokenizer.train(["a", "b"], 300))
    tx, mesh = optim.make_optimizer(config.optim, 10), make_mesh(config.mesh, jax.devices()[:devices])
    traced, fresh_state, jit = [], steps.fresh_state, jax.jit
    monkeypatch.setattr(steps, "fresh_state", lambda *given: traced.append(1) or fresh_state(*given))
    fresh = steps.Fresh(model, tx, 0, mesh, kind, config.optim)
    usual, programs = fresh.state(), []
    monkeypatch.setattr(jax, "jit", lambda *args, **options: programs.append(made := jit(*args, **options)) or made)
    visual = jax.tree.map(jnp.ones_like, usual.params["visual"])
    state = fresh.state(dataclasses.replace(fresh.abstract, params=fresh.abstract.params | {"visual": visual}))
    assert all(map(operator.is_, jax.tree.leaves(state.params["visual"]), jax.tree.leaves(visual)))
    assert_same(dataclasses.replace(state, params=state.params | {"visual": usual.params["visual"]}), usual)
    assert jax.tree.map(lambda x: x.sharding, state.opt_state) == jax.tree.map(lambda x: x.sharding, usual.opt_state)
    whole, drawn = (len(jax.tree.leaves(program.eval_shape())) for program in programs[:2])
    assert (whole, drawn) == (len(jax.tree.leaves(usual)), whole - len(jax.tree.leaves(visual)))
    assert traced == [1]  # of a large model it takes a third of a second


def leaves(tree):
    return {name: np.asarray(x) for name, x in by_name(tree).items()}


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_everything_comes_along_from_any_layout_also_scanned_and_sharded(workdirs, tmp_path):
    source = pretrained.read(workdirs["vit"])
    export.write(source, tmp_path / "hf", "hf")
    for path, change, groups in (
        (workdirs["vit"], {}, {}),
        (tmp_path / "hf", {"scan_layers": True}, {"mesh": {"data": 2, "fsdp": 4}, "sharding": "fsdp"}),
    ):
        fresh, state = start(make_config(VIT | change, init_from=str(path), **groups))
        params = source.variables["params"]
        assert_same(unstack_layers(jax.device_get(state.params)), params)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)
        assert state.step == 0


def test_a_run_with_siglips_loss_goes_on_with_its_bias_and_no_beginning_is_ignored(tmp_path, capsys):
    siglip = dict(loss=dict(objective="siglip"), init_from=str(tmp_path / "run"))
    make_workdir(tmp_path / "run", VIT, loss=dict(objective="siglip"))  # whose numbers are drawn
    fresh, state = start(make_config(VIT, **siglip))
    bias = float(pretrained.read(tmp_path / "run").loss_bias)
    assert float(state.params["logit_bias"]) == bias != float(fresh.params["logit_bias"])
    for key in "logit_bias", "logit_scale":
        given = make_config(VIT | {key: 1.5}, **siglip)
        with pytest.raises(InputError, match=f"config.model.{key}=1.5 is the start of a fresh one. "):
            start(given)
        given.init_skip = (f"^{key}$",)
        fresh, state = start(given)
        assert float(state.params[key]) == float(fresh.params[key])
    _, state = start(make_config(VIT, init_from=str(tmp_path / "run")))  # which has none
    assert "logit_bias" not in state.params
    capsys.readouterr()
    start(make_config(VIT | dict(context_length=12), **siglip))
    assert "text/positional_embedding cut from (16, 64) to (12, 64)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_siglip_brings_its_bias_and_its_grid_and_no_other_kind(tmp_path):
    source = pretrained.read(make_workdir(tmp_path / "run", SIGLIP))
    params = source.variables["params"]
    _, state = start(make_config(SIGLIP, init_from=str(tmp_path / "run")))
    assert_same(state.params, params)
    assert "logit_bias" in params
    _, state = start(make_config(SIGLIP | dict(image_size=48), init_from=str(tmp_path / "run")))
    cells = params["visual"]["positional_embedding"].reshape(4, 4, 64)  # of all its positions, none is a class token's
    expected = jax.image.resize(cells, (6, 6, 64), "cubic").reshape(36, 64)
    np.testing.assert_array_equal(state.params["visual"]["positional_embedding"], expected)
    shorter = make_config(SIGLIP | dict(context_length=12), init_from=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"text/positional_embedding is \(16, 64\) there, \(12, 64\) here"):
        start(shorter)  # the last position is pooled, which a shorter text does not have
    with pytest.raises(InputError, match=r"visual is of another kind \(pool 'map' there\); .*text is of another kind"):
        start(make_config(VIT, init_from=str(tmp_path / "run")))


def test_a_resnet_brings_its_statistics(workdirs):
    _, state = start(make_config(RESNET, init_from=str(workdirs["resnet"])))
    for name, theirs in pretrained.read(workdirs["resnet"]).variables.items():
        assert_same(getattr(state, name), theirs)


@pytest.mark.parametrize("towers, taken", [("vision", ("visual",)), ("text", ("text",))])
def test_one_tower(workdirs, towers, taken):
    fresh, state = start(make_config(RESNET, init_from=str(workdirs["resnet"]), init_towers=towers))
    source = pretrained.read(workdirs["resnet"]).variables
    for key in ("visual", "text", "logit_scale"):
        assert_same(state.params[key], (source["params"] if key in taken else fresh.params)[key])
    assert_same(state.batch_stats, source["batch_stats"] if "visual" in taken else fresh.batch_stats)


def test_every_parameter_that_does_not_fit_is_named(workdirs):
    other = VIT | dict(vision=VIT["vision"] | dict(layers=3, mlp_width=100), text=VIT["text"] | dict(layers=1))
    config = make_config(other, init_from=str(workdirs["vit"]))
    with pytest.raises(InputError) as error:
        start(config)
    message = str(error.value)
    block = "visual/transformer/resblocks_{}/mlp/{}"
    assert f"{block.format(1, 'c_fc/kernel')} is (64, 256) there, (64, 100) here" in message
    assert f"{block.format(2, 'c_proj/bias')} is not there" in message
    assert "text/transformer/resblocks_1/ln_1/scale is not here" in message
    # Two blocks with c_fc (kernel, bias) and c_proj's kernel; a third of 16 arrays there is not; one of 16 too many.
    assert message.count(" there, ") == 2 * 3 and message.count(" is not there") == message.count(" is not here") == 16
    assert message.startswith(f"config.init_from = {workdirs['vit']} does not fit config.model: ")
    assert "\n" not in message


def test_skipped_parameters_start_fresh(workdirs, capsys):
    small = make_config(VIT | dict(vision=VIT["vision"] | dict(mlp_width=100)), init_from=str(workdirs["vit"]))
    small.init_skip = (r"^visual/.*mlp/c_(fc|proj)/(kernel|bias)",)
    fresh, state = start(small)
    source = pretrained.read(workdirs["vit"]).variables["params"]
    assert_same(state.params["text"], source["text"])
    visual = state.params["visual"]
    mlp, fresh_mlp = (tree["transformer"]["resblocks_0"]["mlp"] for tree in (visual, fresh.params["visual"]))
    assert_same(mlp, fresh_mlp)
    assert_same(visual["proj"], source["visual"]["proj"])
    assert "visual/transformer/resblocks_1/mlp/c_fc/kernel fresh" in capsys.readouterr().out
    small.model.scan_layers = True  # the same names
    _, scanned = start(small)
    stacked = scanned.params["visual"]["transformer"]["resblocks"]["mlp"]["c_fc"]["kernel"]
    assert stacked.shape[1:] == (64, 100)
    small.init_skip = (r"^visual/.*mlp/c_(fc|proj)/(kernel|bias)", "visual/transformer/resblocks_0/ln_1")
    with pytest.raises(InputError, match=r"resblocks/ln_1/scale: config.init_skip names a part of it; name"):
        start(small)
    small.model.scan_layers = False
    small.init_skip = (*small.init_skip, "vishual")
    with pytest.raises(InputError, match=r"config.init_skip: 'vishual' matches no parameter"):
        start(small)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "gelu"}, "visual has activation quick_gelu there, gelu here; text has activation"),
        ({"vision": VIT["vision"] | {"heads": 2}}, r"model: visual has 1 heads there, 2 here\."),
        ({"text": VIT["text"] | {"heads": 4}}, r"model: text has 1 heads there, 4 here\."),
    ],
)
def test_what_no_shape_shows_is_compared_too(workdirs, change, message):
    with pytest.raises(InputError, match=message):
        start(make_config(VIT | change, init_from=str(workdirs["vit"])))


def test_the_text_tower_needs_its_tokenizer(workdirs, tmp_path):
    export.write(dataclasses.replace(pretrained.read(workdirs["vit"]), tokenizer=None), tmp_path / "bare", "hf")
    config = make_config(VIT, init_from=str(tmp_path / "bare"))
    with pytest.raises(InputError, match=r"bare has no tokenizer; give --config.tokenizer.path=.*towers=vision"):
        start(config)
    config.init_towers = "vision"
    assert init_from.tokenizer(init_from.read(config), config) is None
    config.init_towers, config.tokenizer.path = "both", str(workdirs["vit"] / "tokenizer.json")
    own = Tokenizer.load(config.tokenizer.path)
    assert init_from.tokenizer(init_from.read(config), config).to_dict() == own.to_dict()


@pytest.mark.parametrize("old, new", [(7, 14), (14, 7), (4, 5), (3, 1), (1, 4)])
def test_positions_are_resized_as_pytorch_does(old, new):
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).normal(size=(1 + old * old, 6)).astype(np.float32)
    grid = torch.tensor(positions[1:]).T.reshape(1, 6, old, old)
    theirs = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    expected = np.concatenate([positions[:1], theirs.reshape(6, -1).T.numpy()])
    np.testing.assert_allclose(init_from.resize_grid(positions, new), expected, atol=1e-5)


def test_another_image_size_and_a_shorter_context(workdirs, capsys):
    config = make_config(VIT | dict(image_size=48, context_length=9), init_from=str(workdirs["vit"]))
    _, state = start(config)
    source = pretrained.read(workdirs["vit"]).variables["params"]
    positions = source["visual"]["positional_embedding"]
    np.testing.assert_array_equal(state.params["visual"]["positional_embedding"], init_from.resize_grid(positions, 6))
    kept = source["text"]["positional_embedding"][:9]
    np.testing.assert_array_equal(state.params["text"]["positional_embedding"], kept)
    assert "visual/positional_embedding resized from (17, 64) to (37, 64)" in capsys.readouterr().out
    config.model.context_length = 20
    with pytest.raises(InputError, match=r"model: text/positional_embedding is \(16, 64\) there, \(20, 64\) here\."):
        start(config)


@pytest.mark.slow
@pytest.mark.parametrize("freeze, model", [("vision", RESNET), ("text", VIT)])
def test_a_frozen_tower_stays_to_the_bit(workdirs, freeze, model):
    name = "resnet" if model is RESNET else "vit"
    config = make_config(model, init_from=str(workdirs[name]), loss=dict(objective="clip"))
    config.optim.freeze, config.optim.weight_decay, config.optim.lr = freeze, 0.5, 1e-2
    tokenizer = pretrained.read(workdirs[name]).tokenizer
    network, tx = build_model(config, tokenizer), optim.make_optimizer(config.optim, 10)
    mesh = make_mesh(config.mesh)
    _, state = start(config)
    before = jax.device_get(state)
    step = steps.make_train_step(network, tx, config, mesh, total_steps=10, steps_per_epoch=5)
    side, length = network.config.vision.image_size, network.config.text.context_length
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, side, side, 3), np.uint8),
        "tokens": rng.integers(3, 200, (8, length)).astype(np.int32),
    }
    batch["tokens"][:, -1] = tokenizer.eot_id
    for _ in range(2):
        state, metrics = step(state, to_devices(batch, mesh))
    after, frozen = jax.device_get(state), rules.FROZEN[freeze]
    assert_same(after.params[frozen], before.params[frozen])
    if freeze == "vision":
        assert_same(after.batch_stats, before.batch_stats)
    moved = "text" if frozen == "visual" else "visual"
    assert all((leaves(after.params[moved])[k] != v).any() for k, v in leaves(before.params[moved]).items())
    assert metrics["grad_norm"] > 0
    moments = [x for x in jax.tree.leaves(after.opt_state) if np.ndim(x)]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(after.params[moved]))


@pytest.mark.parametrize("scan", [False, True])
def test_layer_wise_rates_are_powers_of_the_distance_to_the_end(scan):
    config = make_config(VIT | dict(scan_layers=scan, vision=VIT["vision"] | dict(layers=3)))
    model = build_model(config, Tokenizer.train(["a", "b"], 300))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs()))["params"]
    config.optim.layer_lr_decay = 0.5
    treated = rules.treatments(config.optim, shapes)
    scale = {name: np.broadcast_to(treated[name].lr, x.shape) for name, x in by_name(shapes).items()}
    for name in ("conv1/kernel", "class_embedding", "positional_embedding", "ln_pre/scale"):
        assert (scale[f"visual/{name}"] == 0.5**4).all()
    for tower, layers in (("visual", 3), ("text", 2)):
        for block in range(layers):
            path = f"{tower}/transformer/resblocks" + ("" if scan else f"_{block}") + "/mlp/c_fc/kernel"
            got = scale[path][block] if scan else scale[path]
            assert got.shape == (64, 256) and (got == 0.5 ** (layers - block)).all()
    for name in ("visual/proj", "visual/ln_post/bias", "text/text_projection", "text/ln_final/scale", "logit_scale"):
        assert (scale[name] == 1).all()
    assert (scale["text/token_embedding/embedding"] == 0.5**3).all()


def test_layer_wise_rates_of_a_resnet():
    config = make_config(RESNET | dict(vision=dict(layers=(1, 2, 1), width=16)))
    model = build_model(config, Tokenizer.train(["a", "b"], 300))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs()))["params"]
    config.optim.layer_lr_decay, scales = 0.5, {}
    for name, treatment in rules.treatments(config.optim, {"visual": shapes["visual"]}).items():
        scales.setdefault(name.split("/")[1], set()).add(treatment.lr)
    expected = dict(conv1=5, bn1=5, layer1_0=4, layer2_0=3, layer2_1=2, layer3_0=1, attnpool=0)
    assert scales == {k: {0.5**d} for k, d in expected.items()}


def test_layer_wise_rates_beside_a_frozen_tower_and_weight_decay():
    ones = np.ones((2, 2), np.float32)
    blocks = {f"resblocks_{i}": {"mlp": {"kernel": ones}} for i in range(3)}
    params = {
        "visual": {"conv1": {"kernel": ones}, "transformer": blocks},
        "text": {"token_embedding": {"embedding": ones}, "transformer": blocks, "text_projection": ones},
        "logit_scale": np.float32(1),
    }
    config = make_config(VIT).optim
    config.freeze, updates = "vision", {}
    for config.layer_lr_decay in (None, 0.5):
        tx = optim.make_optimizer(config, 10)
        updates[config.layer_lr_decay] = tx.update(params, tx.init(params), params)[0]
        assert not any(x.any() for x in jax.tree.leaves(updates[config.layer_lr_decay]["visual"]))
    fast, slow = (leaves(updates[decay]) for decay in (None, 0.5))
    for name, before_the_end in (
        ("token_embedding/embedding", 4),
        ("transformer/resblocks_0/mlp/kernel", 3),
        ("transformer/resblocks_2/mlp/kernel", 1),
        ("text_projection", 0),
    ):
        assert (fast[f"text/{name}"] < 0).all()
        np.testing.assert_allclose(slow[f"text/{name}"], fast[f"text/{name}"] * 0.5**before_the_end, rtol=1e-6)


@pytest.mark.slow
def test_a_run_starts_from_another_and_resumes_without_it(workdirs, tmp_path, capsys, one_device):
    """In the loop: the first loss is that of the model started from, and a resumed run does not read it again."""
    moved = tmp_path / "origin"
    workdirs["vit"].rename(moved)
    config = make_config(
        VIT,
        init_from=str(moved),
        batch_size=16,
        loss=dict(objective="clip"),  # sooner compiled
        data=dict(train=32),
        steps=2,
        optim=dict(lr=1e-4, warmup_steps=1),
    )
    loop.train(config, tmp_path / "run")
    assert f"starting from {moved}, step 1 (both)" in capsys.readouterr().out
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (moved / "tokenizer.json").read_text()
    own, theirs = pretrained.read(tmp_path / "run").variables, pretrained.read(moved).variables
    near = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(theirs), strict=True)]
    assert 0 < max(near) < 1e-3  # two steps of 1e-4
    moved.rename(workdirs["vit"])
    loop.train(config, tmp_path / "run")
    assert "is trained to its last step, 2" in capsys.readouterr().out
