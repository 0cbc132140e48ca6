"""Class names and prompts: counts, order, duplicates, and the traps of TFDS's class orders."""

import collections

import numpy as np
import pytest

from rankclip_jax.common.errors import InputError
from rankclip_jax.evaluation import prompts, suite
from rankclip_jax.evaluation.zero_shot import DEFAULT_TEMPLATES

COUNTS = {
    "caltech101": (102, 34), "cifar10": (10, 18), "cifar100": (100, 18), "dtd": (47, 8), "fgvc_aircraft": (100, 2),
    "oxford_flowers102": (102, 1), "food101": (101, 1), "gtsrb": (43, 3), "imagenet": (1000, 80),
    "oxford_iiit_pet": (37, 1), "rendered_sst2": (2, 1), "stanford_cars": (196, 8), "stl10": (10, 2), "svhn": (10, 6),
    "imagenet_sketch": (1000, 80), "imagenet_v2": (1000, 80), "imagenet_a": (200, 80), "imagenet_r": (200, 80),
}  # fmt: skip


def table(name):
    sets = prompts.load_protocol("openai")["sets"]
    return sets[sets[name].get("same_as", name)]["classes"]


@pytest.mark.parametrize("name", suite.SETS)
def test_every_set_of_the_paper_has_its_classes_and_prompts(name):
    found = prompts.from_protocol("openai", name, list(table(name)))
    assert (len(found.names), len(found.templates)) == COUNTS[name]
    assert all(template.count("{}") == 1 for template in found.templates)
    assert all(text == text.strip() and text for text in found.names)
    twice = {n for n, count in collections.Counter(found.names).items() if count > 1}
    # OpenAI's ImageNet list itself has two names twice, for different WordNet ids.
    assert twice == ({"missile", "sunglasses"} if len(found.names) == 1000 else set())


def test_imagenet_a_and_r_leave_out_eight_hundred_classes():
    wnids = list(table("imagenet"))
    for name, first in (("imagenet_a", "n01498041"), ("imagenet_r", "n01443537")):
        found = prompts.from_protocol("openai", name, wnids)
        kept = found.class_of_label >= 0
        assert kept.sum() == 200 and found.keys[0] == first
        assert [wnids[i] for i in np.flatnonzero(kept)] == found.keys
        np.testing.assert_array_equal(found.class_of_label[kept], np.arange(200))
        # A folder a class has just the 200.
        assert prompts.from_protocol("openai", name, found.keys).names == found.names


@pytest.mark.parametrize(
    "set_name, label, name",
    [
        ("food101", 16, "cheesecake"), ("food101", 17, "cheese plate"),  # TFDS swaps the two
        ("caltech101", 4, "background"), ("caltech101", 37, "off-center face"), ("caltech101", 38, "centered face"),
        ("oxford_iiit_pet", 1, "American Bulldog"), ("oxford_iiit_pet", 33, "Sphynx"),
        ("oxford_flowers102", 101, "blackberry lily"), ("imagenet", 0, "tench"), ("imagenet", 134, "crane bird"),
        ("imagenet", 999, "toilet paper"), ("svhn", 0, "zero"), ("gtsrb", 14, "stop"), ("cifar10", 1, "automobile"),
    ],
)  # fmt: skip
def test_names_at_places_that_are_easily_wrong(set_name, label, name):
    numbered = [str(i) for i in range(len(table(set_name)))]
    assert prompts.from_protocol("openai", set_name, numbered).names[label] == name


@pytest.mark.parametrize(
    "labels, said",
    [
        (["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"], None),
        (list("0123456789"), "0 is taken for 'airplane' and 9 for 'truck', the order of TFDS"),
        ([f"{i:03}" for i in range(10)], "list the names in it: classes=FILE.json"),
    ],
)
def test_an_order_that_is_assumed_is_told(labels, said):
    found = prompts.assumed_order("openai", "stl10", labels)
    assert found is None if said is None else said in found


def test_numbers_that_are_the_names_assume_nothing():
    for name, count in (("svhn", 10), ("gtsrb", 43)):
        assert prompts.assumed_order("openai", name, [f"{i:05}" for i in range(count)]) is None


def test_names_follow_the_sources_order_whatever_it_is():
    names = list(table("food101"))[::-1]
    assert prompts.from_protocol("openai", "food101", names).names == [table("food101")[name] for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, published in suite.SETS.items() if published.tfds])
def test_the_tables_are_in_the_order_of_the_tfds_builders(name, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    label = tfds.builder(suite.SETS[name].tfds.split(":")[0], data_dir=str(tmp_path)).info.features["label"]
    assert label.num_classes == len(table(name))
    # CIFAR, STL10 and SVHN say numbers until they are prepared.
    assert label.names in (list(table(name)), [str(i) for i in range(label.num_classes)])


def test_simple_has_openais_names_and_one_prompt():
    found = prompts.from_protocol("simple", "imagenet_a", list(table("imagenet")))
    assert found.templates == ["a photo of a {}."] and found.names[0] == "stingray"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("opanai", "dtd", ["a"]), r"unknown protocol 'opanai'. Expected one of openai, simple"),
        (("openai", "mnist", ["a"]), r"has no set 'mnist'. Expected one of caltech101"),
        (("openai", "dtd", ["banded", "bandeded"]), r"has no class 'bandeded' in dtd. Expected one of banded"),
        (("openai", "dtd", ["0", "1", "2"]), r"dtd has 3 numbered classes, but protocol 'openai' names 47"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        prompts.from_protocol(*arguments)


def test_a_prompt_without_a_place_for_the_name_is_refused():
    with pytest.raises(InputError, match=r"'a photo' has no {} for the class name"):
        prompts.plain(["cat"], ["a photo"])


def test_the_prompt_of_whoever_gives_none_is_that_of_the_simple_protocol():
    assert prompts.plain(["cat"]).templates == list(DEFAULT_TEMPLATES) == ["a photo of a {}."]
    assert prompts.load_protocol("simple")["templates"] == list(DEFAULT_TEMPLATES)
