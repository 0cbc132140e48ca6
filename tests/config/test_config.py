import importlib
import json

import numpy as np
import pytest

from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import flatten
from rankclip_jax.config import keys as config_keys
from rankclip_jax.config.key import Key
from rankclip_jax.losses.spec import MATRICES, OBJECTIVES
from rankclip_jax.study.arms import merged


def test_a_mistyped_key_names_the_nearest_valid_one():
    with pytest.raises(InputError, match=r"config\.optim\.learning_rat does not exist; the nearest key is config\.\w+"):
        configs.complete({"optim": {"learning_rat": 1.0}})
    with pytest.raises(InputError, match=r"config\.bach_size .*config\.batch_size"):
        configs.complete({"bach_size": 1})
    with pytest.raises(InputError, match=r"config\.lr does not exist; the nearest key is config\.optim\.lr"):
        configs.complete({"lr": 1})
    with pytest.raises(InputError, match=r"config\.optim\.batch_size does not exist; .* is config\.batch_size"):
        configs.complete({"optim": {"batch_size": 8}})
    with pytest.raises(InputError, match=r"config\.eval\.zero_shot\.x\.clases .*\.classes"):
        configs.complete({"eval": {"zero_shot": {"x": {"clases": "c.json"}}}})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": "many"}, "config.batch_size='many'. Expected an integer of at least 1"),
        ({"batch_size": 2.5}, "config.batch_size=2.5. Expected an integer"),
        ({"batch_size": True}, "config.batch_size=True. Expected an integer"),
        ({"batch_size": 1}, "config.batch_size=1. A contrastive or ranking loss needs at least 2 pairs"),
        ({"log": "mlflow"}, "config.log='mlflow'. Expected a tuple of tensorboard and wandb"),
        ({"log": ["wandb", "wandb"]}, r"config.log=\['wandb', 'wandb'\]. Expected a tuple of"),
        ({"steps": "abc"}, "config.steps='abc'. Expected an integer of at least 1 or None"),
        ({"model": 3}, "config.model=3. Expected a group of keys"),
        ({"loss": {"objective": "siglip2"}}, "config.loss.objective='siglip2'. Expected one of rankclip, clip"),
        ({"loss": {"terms": {"clipp": 1.0}}}, "config.loss.terms.clipp does not exist. Expected one of clip"),
        ({"loss": {"terms": {"clip": "1"}}}, "config.loss.terms.clip='1'. Expected a number"),
        ({"loss": {"schedule": "linear"}}, "config.loss.schedule='linear'. Expected one of ramp, constant"),
        ({"loss": {"lambda_in": None}}, "config.loss.lambda_in=None. Expected a number at least 0$"),
        ({"loss": {"lambda_in": float("nan")}}, "config.loss.lambda_in=nan"),
        ({"model": {"dtype": "float16"}}, "config.model.dtype='float16'. Expected one of float32, bfloat16"),
        ({"optim": {"grad_clip_norm": "yes"}}, "config.optim.grad_clip_norm='yes'. Expected a number above 0 or None"),
        ({"optim": {"schedule": "wsd"}}, "config.optim.decay_steps=None. Expected the number of last steps"),
        ({"optim": {"decay_steps": 5}}, "config.optim.decay_steps=5. Expected None, since .*schedule=cosine"),
        ({"optim": {"schedule": "constant", "decay_steps": 5}}, "decay_steps=5. Expected None, since .*=constant"),
        ({"optim": {"schedule": "wsd", "decay_steps": 0}}, "config.optim.decay_steps=0. Expected an integer of"),
        (
            {"optim": {"schedule": "wsd", "decay_steps": 5, "recipe": "released"}},
            "config.optim.schedule=wsd. Expected cosine, since config.optim.recipe=released",
        ),
        ({"optim": {"schedule": "constant", "recipe": "released"}}, "config.optim.schedule=constant. Expected cosine"),
        ({"optim": {"b2": 1}}, "config.optim.b2=1. Expected a number at least 0 and below 1"),
        ({"data": {"canvas": "big"}}, "config.data.canvas='big'. Expected an integer of at least 1 or None"),
        ({"data": {"crop_scale": (0.9, 0.1)}}, r"config.data.crop_scale=\(0.9, 0.1\). Expected \(low, high\)"),
        ({"data": {"delimiter": ";;"}}, "config.data.delimiter=';;'. Expected one character"),
        ({"data": {"train": {"a": 3}}}, "config.data.train.a=3. Expected a group of keys"),
        ({"data": {"train": {"a": {"weight": 0}}}}, "config.data.train.a.weight=0. Expected a number above 0"),
        ({"mesh": {"data": 0}}, "config.mesh.data=0. Expected a number of devices"),
        ({"mesh": {"data": "all"}}, "config.mesh.data='all'. Expected an integer"),
        ({"sharding": 3}, "config.sharding=3. Expected one of replicated, fsdp"),
        ({"sharding": [("(", ())]}, "Expected one of replicated, fsdp"),
        ({"sharding": [(".*", ("fsdp", "fsdp"))]}, "Expected one of replicated, fsdp"),
        ({"sharding": [(".*", [["data", "fsdp"]])]}, "Expected one of replicated, fsdp"),
        ({"init_skip": ["proj", "("]}, "Expected a tuple of regular expressions"),
        ({"study": {"more_seeds": {"clip": 0}}}, "config.study.more_seeds.clip=0. Expected an integer of at least 1"),
        ({"eval": {"zero_shot": {"x": "c.csv"}}}, "config.eval.zero_shot.x='c.csv'. Expected a group of keys"),
        ({"loss": {1: 2}}, "config.loss has a key 1. Expected a string without dots"),
        ({"model": {"vision": {"a.b": 2}}}, "config.model.vision has a key 'a.b'. Expected a string without dots"),
        ({"data": {"train": {"a.b": {"path": "x"}}}}, "config.data.train has a key 'a.b'"),
        ({"optim": {"lr": 10**400}}, "config.optim.lr=1000.*Expected a number above 0"),
        ({"seed": 2**32}, "config.seed=4294967296. Expected an integer of at least 0 and at most 4294967295"),
        ({"tokenizer": {"vocab_size": 2**64}}, "config.tokenizer.vocab_size=18446744073709551616. Expected an integer"),
        ({"study": {"search_seed": 2**64}}, "config.study.search_seed=18446744073709551616. Expected an integer of"),
    ],
)
def test_a_wrong_value_says_which_and_what_is_expected(wrong, message):
    with pytest.raises(InputError, match=message):
        configs.complete(wrong)


CSV_SET, SHAPES_SET = {"path": "x.csv", "delimiter": ";"}, {"format": "shapes", "path": "seen"}
MEANS_NOTHING = [
    (
        {"init_towers": "vision"},
        "config.init_towers='vision'. Expected 'both', since config.init_from=None",
        {"init_from": "x"},
    ),
    (
        {"init_skip": ("proj",)},
        r"config.init_skip=\('proj',\). Expected \(\), since config.init_from=None",
        {"init_from": "x"},
    ),
    (
        {"optim": {"eps": 1e-3, "name": "lion"}},
        "config.optim.eps=0.001. Expected 1e-08, since config.optim.name=lion has none",
        {"optim": {"name": "muon"}},
    ),
    (
        {"model": {"vision": {"patch_dropout_until": 0.5}}},
        "config.model.vision.patch_dropout_until=0.5. Expected 1.0, since no patches are left out",
        {"model": {"vision": {"patch_dropout": 0.5}}},
    ),
    (
        {"data": {"synonyms": "words.json"}},
        "config.data.synonyms='words.json'. Expected None, since config.data.two_views=False",
        {"data": {"two_views": True}},
    ),
    (
        {"data": {"canvas": 64, "resize": "host"}},
        "config.data.canvas=64. Expected None, since config.data.resize=host",
        {"data": {"resize": "device"}},
    ),
    (
        {"eval": {"data_dir": "sets"}},
        "config.eval.data_dir='sets'. Expected None, since config.eval.suite=None",
        {"eval": {"suite": "mnist"}},
    ),
    (
        {"data": {"image_folder": "pictures"}},
        "config.data.image_folder='pictures'. Expected None, since config.data.format=shapes",
        {"data": {"format": "csv", "train": "x.csv"}},
    ),
    (
        {"data": {"format": "webdataset", "delimiter": ";"}},
        "config.data.delimiter=';'. Expected ',', since config.data.format=webdataset",
        {"data": {"train": {"a": {"format": "csv", "path": "x"}}}},
    ),
    (
        {"data": {"format": "csv", "train": {"a": {"format": "tfrecord", "path": "x", "data_dir": "y"}}}},
        "config.data.train.a.data_dir='y'. Expected None, since its format is tfrecord",
        {"data": {"train": {"a": {"format": "tfds"}}}},
    ),
    (
        {"eval": {"zero_shot": {"x": {"format": "folder", "path": "x", "label_key": "name"}}}},
        "config.eval.zero_shot.x.label_key='name'. Expected 'label', since config.eval.zero_shot.x.format=folder",
        {"eval": {"zero_shot": {"x": {"format": "csv"}}}},
    ),
    (
        {"eval": {"retrieval": {"x": SHAPES_SET | {"caption_key": "text"}}}},
        "config.eval.retrieval.x.caption_key='text'. Expected None, since config.eval.retrieval.x.format=shapes",
        {"eval": {"retrieval": {"x": {"format": "csv"}}}},
    ),
    (
        {"eval": {"zero_shot": {"x": CSV_SET | {"protocol_set": "dtd"}}}},
        "config.eval.zero_shot.x.protocol_set='dtd'. Expected None, since config.eval.zero_shot.x.protocol=None",
        {"eval": {"zero_shot": {"x": {"protocol": "openai"}}}},
    ),
    (
        {"eval": {"linear_probe": {"x": CSV_SET | {"protocol": "openai"}}}},
        "config.eval.linear_probe.x.protocol='openai'. Expected None, since a linear probe has no prompts",
        {"eval": {"linear_probe": {"x": {"protocol": None}}}},
    ),
    (
        {"eval": {"linear_probe": {"x": CSV_SET | {"templates": "prompts.json"}}}},
        "config.eval.linear_probe.x.templates='prompts.json'. Expected None, since a linear probe has no prompts",
        {"eval": {"linear_probe": {"x": {"templates": None}}}},
    ),
]


@pytest.mark.parametrize("given, message, needed", MEANS_NOTHING)
def test_a_key_that_means_nothing_is_refused_and_beside_what_it_needs_taken(given, message, needed):
    with pytest.raises(InputError, match=f"^{message}$"):
        configs.complete(given)
    configs.complete(merged(given, needed))


@pytest.mark.parametrize("given, message, needed", MEANS_NOTHING)
def test_a_run_of_before_that_ignored_a_key_resumes_without_it(given, message, needed):
    stored = json.loads(json.dumps(merged(configs.complete({}).to_dict(), given)))
    name = message.partition("=")[0].removeprefix("config.")
    assert flatten(configs.completed(stored).to_dict())[name] in (None, "both", (), 1.0, False, ",", "label", 1e-8)


def declared(keys, prefix=""):
    for name, key in keys.items():
        if isinstance(key, Key):
            yield f"{prefix}{name}", key
        elif isinstance(key, dict):
            yield from declared(key, f"{prefix}{name}.")


def given(name, value):
    *parents, last = name.split(".")
    tree = {last: value}
    for parent in reversed(parents):
        tree = {parent: tree}
    return tree


ODD = [None, "nonsense \n", "", 0, -1, 0.5, float("nan"), float("inf"), True, [], (), {}, (1, 2), object()]


@pytest.mark.parametrize("name, key", declared(config_keys.KEYS))
@pytest.mark.parametrize("value", ODD, ids=lambda value: "an object" if type(value) is object else repr(value))
def test_every_key_refuses_what_it_does_not_take_in_one_line(name, key, value):
    try:
        config = configs.complete(given(name, value))
    except InputError as error:
        assert str(error).startswith(f"config.{name}=") and "Expected" in str(error) and "\n" not in str(error)
        return
    for part in name.split("."):
        config = config[part]
    if value is None:
        assert key.optional and config is None
    elif isinstance(key.default, bool):
        assert isinstance(config, bool)
    elif isinstance(key.default, int | float):
        assert isinstance(config, type(key.default)) and not isinstance(config, bool) and np.isfinite(config)
    else:
        assert config == value or config == (value,) or config == tuple(value)


@pytest.mark.parametrize("name, key", declared(config_keys.KEYS))
def test_every_default_is_a_value_that_its_key_takes(name, key):
    assert key.check(key.default, name) == key.default


@pytest.mark.parametrize("written", ["\t", "\\t", "tab"])
def test_a_tab_as_shells_pass_it_on(written):
    given = configs.override({}, ["data.format=csv", f"data.delimiter={written}"])
    assert configs.complete(given).data.delimiter == "\t"


@pytest.mark.parametrize(
    "spec", [f"configs/{wrong}" for wrong in ("cc3m.py:objectiv=clip", "shapes.py:clip", "shapes.py:objective=")]
)
def test_a_wrong_argument_of_an_experiment_is_one_line(spec):
    with pytest.raises(InputError, match=f"--config={spec}: argument .*. Expected objective=..."):
        configs.load(spec)


def test_an_argument_reaches_the_experiment():
    config = configs.load("configs/cc3m.py:objective=clip,model=RN50")
    assert (config.loss.objective, config.model.name) == ("clip", "RN50")


def test_given_values_replace_defaults_and_the_rest_stays():
    config = configs.complete({"optim": {"lr": 1}, "mesh": {"data": 2, "fsdp": 4}})
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.optim.b2 == config_keys.default_config().optim.b2
    assert config.mesh.to_dict() == {"data": 2, "fsdp": 4}


@pytest.mark.parametrize("name", ["shapes", "cifar10", "cc3m", "finetune"])
def test_every_experiment_is_complete_and_takes_its_argument(name):
    module = importlib.import_module(f"configs.{name}")
    assert configs.complete(module.get_config()).loss.objective == "rankclip"
    assert configs.complete(module.get_config(objective="clip")).loss.objective == "clip"


def test_cc3m_has_the_published_hyperparameters():
    config = configs.complete(importlib.import_module("configs.cc3m").get_config(model="RN50"))
    assert (config.optim.b1, config.optim.b2, config.optim.eps) == (0.9, 0.999, 1e-8)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_steps) == (5e-4, 0.1, 10_000)
    assert (config.epochs, config.loss.lambda_in, config.loss.lambda_cross) == (64, 1 / 16, 1 / 16)
    assert config.model.name == "RN50"


def test_the_command_line_overrides_the_file():
    overrides = ["optim.lr=0.1", "data.val=None", "checkpoint.best=zero_shot/seen/top1", "model.vision={'width': 8}"]
    config = configs.load("configs/shapes.py:objective=clip", overrides)
    assert (config.optim.lr, config.data.val, config.checkpoint.best) == (0.1, None, "zero_shot/seen/top1")
    assert config.model.vision.width == 8 and config.loss.objective == "clip"
    given = ["optim={'lr': 0.1, 'rules': ()}", "eval.suite=('imagenet',)", "loss={'terms': {'clip': 1.0}}"]
    config, plain = configs.load("configs/cc3m.py", given), configs.load("configs/cc3m.py")
    assert config.optim.lr == 0.1 and config.loss.terms.to_dict() == {"clip": 1.0}
    assert (config.optim.weight_decay, config.loss.lambda_in) == (plain.optim.weight_decay, plain.loss.lambda_in)
    assert configs.override({"mesh": {"data": 2}}, ["mesh={'fsdp': 2}"]) == {"mesh": {"fsdp": 2}}
    config = configs.override({"model": {"name": "RN50", "vision": {"stem": 3}}}, ["model={'vision': {'width': 8}}"])
    assert config == {"model": {"name": "RN50", "vision": {"width": 8}}}  # another tower
    with pytest.raises(InputError, match=r"--config: .*README.md is no Python file"):
        configs.load("README.md")
    with pytest.raises(InputError, match="no file configs/shape.py"):
        configs.load("configs/shape.py")


def test_what_is_no_literal_is_text_and_a_file_without_get_config_is_named(tmp_path):
    deep = "[" * 10_000
    assert configs.override({}, ["a={[1]: 2}", f"b={deep}"]) == {"a": "{[1]: 2}", "b": deep}
    (tmp_path / "mine.py").write_text("lr = 1\n")
    with pytest.raises(InputError, match="mine.py has no get_config"):
        configs.load(str(tmp_path / "mine.py"))
    with pytest.raises(InputError, match="write --config.seed=VALUE"):
        configs.load("configs/shapes.py", ["seed"])


@pytest.mark.parametrize(
    "code, argument, message",
    [
        ("def get_config(:", "", r"SyntaxError: invalid syntax .*line 1"),
        ("lr = 1\nimport nothing_of_this_name", "", "line 2: ModuleNotFoundError: No module named 'nothing"),
        ("def get_config(lr):\n  return {'optim': {'lr': float(lr)}}", ":lr=x", "line 2: ValueError: could not"),
        ("def get_config(lr): pass", "", "TypeError: get_config.. missing 1 required .* 'lr'"),
        ("def get_config(): pass", "", r"get_config\(\)=None. Expected a group of keys"),
        ("import sys\nsys.exit(3)", "", "line 2: SystemExit: 3"),
        ("get_config = 3", "", r" has no get_config\(\)"),
    ],
)
def test_an_experiment_that_fails_says_where_in_one_line(tmp_path, monkeypatch, code, argument, message):
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--config.*mine.py.*{message}") as refused:
        configs.load(f"mine.py{argument}")
    assert "\n" not in str(refused.value)


def test_an_experiment_may_give_a_plain_dict(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(lr):\n  return {'optim': {'lr': float(lr)}}")
    assert configs.load(f"{tmp_path / 'mine.py'}:lr=0.5").optim.lr == 0.5


def test_differences_name_what_changed_and_allow_what_may():
    old = configs.complete({"batch_size": 4})
    stored = json.loads(configs.to_json(old))
    new = configs.complete({"batch_size": 8, "log_every": 1, "checkpoint": {"keep": 9}})
    assert configs.differences(stored, old.to_dict()) == []
    assert configs.differences(stored, new.to_dict()) == ["config.batch_size: 4 -> 8"]


def test_a_stored_configuration_without_newer_keys_means_what_it_meant():
    old = json.loads(configs.to_json(configs.complete({"optim": {"lr": 0.25}})))
    newer = {"optim": ("recipe", "schedule", "decay_steps"), "loss": ("ramp_epochs", "list_size")}
    for group, keys in newer.items():
        for key in keys:
            del old[group][key]
    config = configs.completed(old)
    assert (config.optim.lr, config.optim.recipe, config.optim.schedule) == (0.25, "standard", "cosine")
    assert config.optim.decay_steps is config.loss.ramp_epochs is config.loss.list_size is None
    assert configs.differences(config.to_dict(), configs.complete({"optim": {"lr": 0.25}}).to_dict()) == []


def test_objectives_and_terms_are_those_of_the_losses():
    assert tuple(OBJECTIVES) == config_keys.OBJECTIVES
    assert tuple(MATRICES) == config_keys.TERMS


@pytest.mark.parametrize("steps", [(3, 1), (0, 2), (5,)])
def test_steps_to_trace_are_a_first_and_a_last(steps):
    with pytest.raises(InputError, match=r"config.profile=.*. Expected \(first, last\)"):
        configs.complete({"profile": steps})
