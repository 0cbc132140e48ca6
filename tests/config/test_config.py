import importlib
import json

import pytest

from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.config import keys as config_keys
from rankclip_jax.losses.spec import MATRICES, OBJECTIVES


def test_a_mistyped_key_names_the_nearest_valid_one():
    with pytest.raises(InputError, match=r"config\.optim\.learning_rat.*nearest key is config\.optim\.\w+"):
        configs.complete({"optim": {"learning_rat": 1.0}})
    with pytest.raises(InputError, match=r"config\.bach_size .*config\.batch_size"):
        configs.complete({"bach_size": 1})
    with pytest.raises(InputError, match=r"config\.eval\.zero_shot\.x\.clases .*\.classes"):
        configs.complete({"eval": {"zero_shot": {"x": {"clases": "c.json"}}}})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": "many"}, "config.batch_size must be a int"),
        ({"batch_size": 2.5}, "config.batch_size must be a int"),
        ({"model": 3}, "config.model is a group of keys"),
        ({"loss": {"objective": "siglip2"}}, "config.loss.objective must be one of clip, rankclip"),
        ({"loss": {"terms": {"clipp": 1.0}}}, "config.loss.terms.clipp does not exist; the terms are clip"),
        ({"loss": {"terms": {"clip": "1"}}}, "config.loss.terms.clip must be a float"),
        ({"loss": {"schedule": "linear"}}, "config.loss.schedule must be one of"),
        ({"model": {"dtype": "float16"}}, "config.model.dtype must be one of"),
    ],
)
def test_a_wrong_value_says_which_and_what_is_valid(wrong, message):
    with pytest.raises(InputError, match=message):
        configs.complete(wrong)


def test_given_values_replace_defaults_and_the_rest_stays():
    config = configs.complete({"optim": {"lr": 1}, "mesh": {"data": 2, "fsdp": 4}})
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.optim.b2 == config_keys.default_config().optim.b2
    assert config.mesh.to_dict() == {"data": 2, "fsdp": 4}


@pytest.mark.parametrize("name", ["shapes", "cifar10", "cc3m"])
def test_every_experiment_is_complete_and_takes_its_argument(name):
    module = importlib.import_module(f"configs.{name}")
    assert configs.complete(module.get_config()).loss.objective == "rankclip"
    assert configs.complete(module.get_config("objective=clip")).loss.objective == "clip"


def test_cc3m_has_the_published_hyperparameters():
    config = configs.complete(importlib.import_module("configs.cc3m").get_config("model=RN50"))
    assert (config.optim.b1, config.optim.b2, config.optim.eps) == (0.9, 0.999, 1e-8)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_steps) == (5e-4, 0.1, 10_000)
    assert (config.epochs, config.loss.lambda_in, config.loss.lambda_cross) == (64, 1 / 16, 1 / 16)
    assert config.model.name == "RN50"


def test_the_command_line_overrides_the_file():
    overrides = ["optim.lr=0.1", "data.val=None", "checkpoint.best=zero_shot/seen/top1", "model.vision={'width': 8}"]
    config = configs.load("configs/shapes.py:objective=clip", overrides)
    assert (config.optim.lr, config.data.val, config.checkpoint.best) == (0.1, None, "zero_shot/seen/top1")
    assert config.model.vision.width == 8 and config.loss.objective == "clip"
    with pytest.raises(InputError, match=r"--config: .*README.md is no Python file"):
        configs.load("README.md")
    with pytest.raises(InputError, match="no file configs/shape.py"):
        configs.load("configs/shape.py")
    with pytest.raises(InputError, match="write --config.seed=VALUE"):
        configs.load("configs/shapes.py", ["seed"])


def test_differences_name_what_changed_and_allow_what_may():
    old = configs.complete({"batch_size": 4})
    stored = json.loads(configs.to_json(old))
    new = configs.complete({"batch_size": 8, "log_every": 1, "checkpoint": {"keep": 9}})
    assert configs.differences(stored, old.to_dict()) == []
    assert configs.differences(stored, new.to_dict()) == ["config.batch_size: 4 -> 8"]


def test_objectives_and_terms_are_those_of_the_losses():
    assert tuple(OBJECTIVES) == config_keys.OBJECTIVES
    assert tuple(MATRICES) == config_keys.TERMS


@pytest.mark.parametrize("steps", [(3, 1), (0, 2), (5,)])
def test_steps_to_trace_are_a_first_and_a_last(steps):
    with pytest.raises(InputError, match=r"config.profile = .*: give \(first, last\)"):
        configs.complete({"profile": steps})
