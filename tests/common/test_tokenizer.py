import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

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


def byte_level(specials=(START, END)):
    """A tokenizer of GPT-2's kind, which adds nothing around a text."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=[*specials], initial_alphabet=alphabet)
    hf.train_from_iterator(CAPTIONS, trainer)
    return hf


@pytest.mark.parametrize("processor", [None, processors.ByteLevel(trim_offsets=False)])
def test_start_and_end_are_added_where_a_file_adds_none(tmp_path, processor):
    hf = byte_level()
    if processor:
        hf.post_processor = processor
    hf.save(str(tmp_path / "tokenizer.json"))
    plain = [hf.encode(text).ids for text in CAPTIONS[:3]]
    assert not any(hf.token_to_id(END) in ids for ids in plain)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    rows = tokenizer(CAPTIONS[:3], 12).tolist()
    for row, ids in zip(rows, plain, strict=True):
        assert row == [0, *ids, 1] + [0] * (10 - len(ids))
    assert Tokenizer.from_json(tokenizer.to_json())(CAPTIONS[:3], 12).tolist() == rows  # as a workdir keeps it
    assert tokenizer(["cat " * 50], 12)[0, -1] == tokenizer.eot_id == 1


def template(single):
    ids = {token: byte_level().token_to_id(token) for token in (START, END)}
    return processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))


def test_a_file_that_adds_the_end_alone_stays_as_it_is_and_one_that_puts_it_first_is_refused(tmp_path):
    hf = byte_level()
    hf.post_processor = template(f"$A {END}")
    assert Tokenizer(hf)(["cat"], 8)[0, 0] != hf.token_to_id(START)
    hf.post_processor = template(f"{END} $A {END}")
    hf.save(str(tmp_path / "a.json"))
    with pytest.raises(InputError, match=r"a\.json: the tokenizer puts <\|endoftext\|> before a text's end"):
        Tokenizer.load(tmp_path / "a.json")


@pytest.mark.parametrize("specials", [(END,), (START,), ()])
def test_a_vocabulary_without_start_or_end_is_refused(tmp_path, specials):
    byte_level(specials).save(str(tmp_path / "gpt2.json"))
    with pytest.raises(InputError, match=r"^\S+gpt2\.json: the tokenizer has no .* needs both$"):
        Tokenizer.load(tmp_path / "gpt2.json")


def test_a_folder_of_vocabulary_and_merges_as_gpt2s(tmp_path):
    hf = byte_level()
    hf.model.save(str(tmp_path))
    expected = Tokenizer(hf)([*CAPTIONS[:3], "A  Caption's", "日本"], 24)
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        assert np.array_equal(Tokenizer.load(path)([*CAPTIONS[:3], "A  Caption's", "日本"], 24), expected)


def test_tokens_that_were_added_later_are_in_a_file_of_their_own(tmp_path):
    hf = byte_level(())
    hf.model.save(str(tmp_path))
    size = hf.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({END: size + 1, START: size}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.start_id, tokenizer.eot_id, tokenizer.vocab_size) == (size, size + 1, size + 2)
    (tmp_path / "added_tokens.json").write_text(json.dumps({END: size + 2, START: size}))
    with pytest.raises(InputError, match=rf"added_tokens.json: <.endoftext.> has id {size + 2}, which does not follow"):
        Tokenizer.load(tmp_path)


def test_a_folder_of_vocabulary_and_merges_as_clips(tmp_path):
    """Words end in </w>: as transformers' CLIPTokenizer."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(33, 127)]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, START, END])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = Tokenizer.load(tmp_path)
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")])
    for text in ["a CAT", "two  cats' toys", "it's 42!?", "", "<|endoftext|>"]:
        ids = theirs(text).input_ids
        assert tokenizer([text], 30)[0].tolist() == ids + [0] * (30 - len(ids))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared CLIP tokenizer")
def test_clips_vocabulary_and_merges_give_openais_ids_on_all_reference_cases(tmp_path):
    tokenizers.Tokenizer.from_file(str(SHARED / "clip_tokenizer.json")).model.save(str(tmp_path))
    cases = json.loads((SHARED / "clip_tokenizer_cases.json").read_text())
    ids = Tokenizer.load(tmp_path)([case["text"] for case in cases], 77)
    assert ids.tolist() == [case["ids"] for case in cases]


@pytest.mark.parametrize("names", [(), ("vocab.json",), ("merges.txt",)])
def test_a_folder_without_a_whole_tokenizer_says_what_it_needs(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="no tokenizer. Expected tokenizer.json, or vocab.json and merges.txt$"):
        Tokenizer.load(tmp_path)


def test_ids_with_gaps_are_counted_to_the_highest():
    hf = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 3, START: 5, END: 9}, merges=[]))
    assert Tokenizer(hf).vocab_size == 10
    assert Tokenizer(hf)(["ab"], 6).tolist() == [[5, 0, 3, 9, 0, 0]]


def test_added_tokens_from_an_id_on_are_left_out_and_spelled(trained):
    hf = tokenizers.Tokenizer.from_str(trained.to_json())
    hf.add_special_tokens(["<|image|>", "<|video|>"])
    more, size = Tokenizer(hf), trained.vocab_size
    assert (more.vocab_size, more.highest_id()) == (size + 2, trained.eot_id)
    assert more(["a <|video|>"], 16).max() == size + 1
    assert more.within(size + 1)(["a <|video|>"], 16).max() == trained.eot_id
    assert np.array_equal(more.within(size)(["a <|image|>"], 30), trained(["a <|image|>"], 30))
