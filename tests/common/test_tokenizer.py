import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import END, START, Tokenizer, clean

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizer"
CAPTIONS = ["a photo of a cat", "two dogs on a beach", "a cat and a dog"] * 20


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CAPTIONS, 400)


def test_layout_is_start_text_end_zeros(trained):
    (ids,) = trained(["a cat"], 16)
    end = ids.tolist().index(trained.eot_id)
    assert ids.dtype == np.int32 and ids.shape == (16,)
    assert ids[0] == trained._hf.token_to_id(START) and 1 < end < 15
    assert (ids[end + 1 :] == 0).all() and (ids[:end] != 0).all()
    assert trained.eot_id == trained._hf.token_to_id(END) == trained.vocab_size - 1


def test_a_long_caption_keeps_its_end_and_an_empty_one_has_both(trained):
    long, empty = trained(["cat " * 100, ""], 12)
    assert long[-1] == trained.eot_id and long[0] == empty[0]
    assert empty[1] == trained.eot_id and (empty[2:] == 0).all()


def test_threads_with_different_lengths_do_not_disturb_each_other(trained):
    def encode(length):
        return [trained(CAPTIONS, length) for _ in range(30)]

    with ThreadPoolExecutor(3) as pool:
        for length, several in zip((8, 16, 32), pool.map(encode, (8, 16, 32)), strict=True):
            assert all(np.array_equal(ids, trained(CAPTIONS, length)) for ids in several)


def test_lengths_count_what_a_long_context_would_hold(trained):
    texts = ["", "a cat", "two dogs on a beach " * 50, "&amp;", "🙂"]
    ends = [ids.tolist().index(trained.eot_id) for ids in trained(texts, 2000)]
    assert trained.lengths(texts).tolist() == [end + 1 for end in ends]
    assert trained.lengths([]).shape == (0,)


@pytest.mark.parametrize("unit", ["x", "a cat ", "日本語 ", "&amp;amp; ", "Ã©t ", " ", "\0"])
def test_the_start_of_a_very_long_caption_decides_its_tokens(trained, unit):
    text = unit * (300_000 // len(unit.encode()))
    uncut = trained._hf.encode(clean(text)).ids
    expected = [*uncut[:15], trained.eot_id] if len(uncut) > 16 else uncut + [0] * (16 - len(uncut))
    assert trained([text], 16)[0].tolist() == expected


def test_any_text_can_be_encoded(trained):
    for text in ("العربية", "🙂", "\0", "日本語", "x" * 100_000):
        assert trained._hf.decode(trained([text], 4096)[0].tolist()).strip()[:3] == clean(text)[:3]


def test_saved_and_loaded_gives_the_same_ids(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert np.array_equal(again(CAPTIONS, 16), trained(CAPTIONS, 16))


def test_cleaning_repairs_as_openai_does():
    assert clean(" fish &amp;amp; chips ") == "fish & chips"
    assert clean("CafÃ©") == "Café"


def test_wrong_paths_say_so(tmp_path):
    with pytest.raises(InputError, match="no file .*gone.json"):
        Tokenizer.load(str(tmp_path / "gone.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad.json is not a tokenizer.json"):
        Tokenizer.load(str(tmp_path / "bad.json"))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared CLIP tokenizer")
def test_clip_tokenizer_gives_openai_ids_on_all_reference_cases():
    tokenizer = Tokenizer.load(str(SHARED / "clip_tokenizer.json"))
    cases = json.loads((SHARED / "clip_tokenizer_cases.json").read_text())
    ids = tokenizer([case["text"] for case in cases], 77)
    wrong = [case["text"] for case, got in zip(cases, ids, strict=True) if got.tolist() != case["ids"]]
    assert len(cases) == 60 and not wrong
