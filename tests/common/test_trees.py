"""One name for each leaf of a tree, and one dotted key for each value of a configuration."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict

from rankclip_jax.common.trees import by_name, flatten, nested, path_name

TREE = {"visual": {"conv1": {"kernel": 1, "bias": 2}}, "logit_scale": 3, "layers": [4, (5, {"x": 6})]}


def test_a_leaf_is_named_by_its_way():
    names = ["layers/0", "layers/1/0", "layers/1/1/x", "logit_scale", "visual/conv1/bias", "visual/conv1/kernel"]
    assert by_name(TREE) == dict(zip(names, [4, 5, 6, 3, 2, 1], strict=True))
    assert list(by_name(TREE)) == names  # the order of the leaves
    assert by_name({"a": None, "b": {}}) == {}
    state = TrainState(step=7, apply_fn=None, params={"w": 8}, tx=None, opt_state=())
    assert by_name(state) == {"step": 7, "params/w": 8}  # attributes as keys
    assert {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(TREE)} == set(names)


def test_names_become_the_tree_again():
    tree = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert nested(by_name(tree)) == tree
    named = {"x/y/z": 1, "x/y/w": 2, "v": 3}
    assert nested(named) == unflatten_dict(named, sep="/")
    assert nested({}) == {}


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"a": 1},
        {"a": {"b": {"c": None, "d": [1, {"e": 2}]}}, "f": (), "g": False},
        {"a": {}, "b": {"c": {}}},
        {"optim": {"lr": 1e-3}, "mesh": {"data": -1}},
    ],
)
def test_dotted_keys_are_flax_own(groups):
    assert flatten(groups) == flatten_dict(groups, sep=".")


def test_values_that_are_no_groups_stay_as_they_are():
    array = np.arange(3)
    assert flatten({"a": {"b": array}})["a.b"] is array


def test_a_configuration_is_flattened_without_jax():
    script = "import sys; sys.modules['jax'] = None; from rankclip_jax import config; print(len(config.complete({})))"
    script += "; print(config.differences({'a': {'b': 1}}, {'a': {'b': 2}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert "['config.a.b: 1 -> 2']" in done.stdout, done.stderr
