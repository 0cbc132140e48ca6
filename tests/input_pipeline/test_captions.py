import itertools
import json

import numpy as np
import pytest

from input_pipeline.captions import augment, read_synonyms
from rankclip_jax.common.errors import InputError


def views(caption, synonyms=None, count=300):
    return [augment(caption, np.random.default_rng(seed), synonyms) for seed in range(count)]


def test_every_deletion_and_every_swap_comes_and_nothing_else():
    words = ["a", "cat", "sleeps", "here"]
    deleted = {" ".join(words[:i] + words[i + 1 :]) for i in range(4)}
    swapped = set()
    for i, j in itertools.combinations(range(4), 2):
        order = words.copy()
        order[i], order[j] = order[j], order[i]
        swapped.add(" ".join(order))
    assert set(views(" a cat\tsleeps  here\n")) == deleted | swapped


def test_edits_are_equally_likely():
    kinds = [len(view.split()) for view in views("one two three", {"two": ["a pair"]}, 3000)]
    counts = np.array([kinds.count(2), kinds.count(3), kinds.count(4)])  # deleted, swapped, replaced
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert counts.sum() == 3000 and chi_squared < 13.8  # 0.999 quantile with 2 degrees of freedom


def test_a_synonym_keeps_punctuation_and_capital():
    got = set(views('"Sofa," she said', {"sofa": ["couch", "settee"]}))
    assert {'"Couch," she said', '"Settee," she said'} <= got
    assert set(views("Sofa", {"sofa": ["couch"]})) == {"Couch"}


@pytest.mark.parametrize("caption", ["cat", "", " \t ", "🙂", "...", "\0"])
def test_what_cannot_be_edited_comes_back_as_it_is(caption):
    assert set(views(caption, {"dog": ["hound"]}, 20)) == {caption}


def test_no_caption_of_words_becomes_empty():
    for caption in ("a b", "العربية جميلة", "日本 語", "! ?", "x " * 50_000, "a" + "!" * 1_000_000 + " b"):
        assert all(view.strip() for view in views(caption, count=20))


def test_the_same_state_gives_the_same_view():
    assert views("a cat and a dog on a mat") == views("a cat and a dog on a mat")


def test_a_synonym_table_is_read_in_lower_case(tmp_path):
    path = tmp_path / "synonyms.json"
    path.write_text(json.dumps({"Sofa": ["couch"]}))
    assert read_synonyms(path) == {"sofa": ["couch"]}


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "cannot read the synonym table"),
        ('["sofa"]', "must hold a JSON object"),
        ('{"sofa": "couch"}', "'sofa' must have a list of words"),
        ('{"sofa": []}', "'sofa' must have a list of words"),
        ('{"sofa": [" "]}', "'sofa' must have a list of words"),
    ],
)
def test_wrong_tables_say_so(tmp_path, text, says):
    path = tmp_path / "synonyms.json"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_synonyms(path)


def test_a_missing_table_says_so(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the synonym table .*gone\.json: .*No such file"):
        read_synonyms(tmp_path / "gone.json")
