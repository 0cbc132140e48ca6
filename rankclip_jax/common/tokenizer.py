"""Captions to token ids by a Hugging Face `tokenizers` file: given, from the hub, or trained on the captions."""

import html
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from rankclip_jax.common import hub, storage
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import write_whole
from rankclip_jax.common.foreign_files import beginning, read_json, refuse_stand_in

PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
SENTENCEPIECE = "spiece.model"  # of SigLIP's folders
NO_SENTENCEPIECE = (
    f"its tokenizer is {SENTENCEPIECE}, which is not read; convert it once, with transformers: "
    'T5Tokenizer.from_pretrained(FOLDER, extra_ids=0).backend_tokenizer.save("tokenizer.json"), and give that'
)
# End token -> padding of tokenizers without CLIP's start and end. SigLIP's (</s>) canonicalises texts: lower case, no
# ASCII punctuation, single spaces. SigLIP 2's (<eos>, which is Gemma's) has them in lower case.
_SIGLIP = {"</s>": "</s>", "<eos>": "<pad>"}
# As Python's lower(), which OpenAI's and SigLIP's code call, has it at the end of a word.
_LOWER = [normalizers.Replace(tokenizers.Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"), normalizers.Lowercase()]
_CANONICAL = [
    *_LOWER,
    normalizers.Replace(tokenizers.Regex(r"[!-/:-@\[-`{-~]"), ""),
    normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
    normalizers.Strip(),
]
# Characters that one token stands for at most. So much of a caption is looked at for each token of the context:
# repairing and splitting a caption of a megabyte, to keep 77 tokens of it, would hold up the batch for seconds.
_TOKEN_CHARACTERS = 128


def clean(text: str) -> str:
    """Repairs a caption as OpenAI's CLIP does before tokenising: ftfy, then HTML entities, twice over."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.strip()  # nothing to repair, and ftfy is slow
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


class Tokenizer:
    """Texts -> int32 ids (n, context_length): start, text, end, padding; a long text keeps its end token.

    One of CLIP's kind repairs texts (`clean`) and pads with zeros. One of SigLIP's has no start, and its texts are
    lower-cased and so on by its own normalizer, which tokenizer.json then has too.
    Threads may share one: training and evaluation batches do.

    Attributes:
      vocab_size: the highest id + 1.
      start_id, eot_id: ids of the start token (None: SigLIP's), and of the end-of-text token, at whose first place
        CLIP's text tower pools.
      pad_id: what follows the end.
    """

    def __init__(self, hf: tokenizers.Tokenizer):
        """Adds start and end around every text where `hf` does not. Raises InputError without an end token."""
        # A file's own truncation and padding are settings of the shared object, which two threads with different
        # lengths would change under each other; the layout is made in __call__ instead, and faster.
        hf.no_truncation()
        hf.no_padding()
        self._hf = hf
        ids = hf.get_vocab()
        self.vocab_size = max(ids.values(), default=-1) + 1
        siglips = [end for end, pad in _SIGLIP.items() if {end, pad} <= ids.keys()]
        if {START, END} <= ids.keys():
            self.start_id: int | None = ids[START]
            self.end, self.eot_id, self.pad_id = END, ids[END], 0
            self._as_clip(ids[START])
        elif siglips:
            self.start_id, self.end = None, siglips[0]
            self.eot_id, self.pad_id = ids[self.end], ids[_SIGLIP[self.end]]
            self._as_siglip()
        else:
            raise InputError(
                f"the tokenizer has no {START} or no {END} token (nor SigLIP's {' or '.join(_SIGLIP)}, with its "
                "padding); CLIP's text tower needs both"
            )

    def _as_clip(self, start: int) -> None:
        hf, end = self._hf, self.eot_id
        if end not in hf.encode("").ids:  # the tower would pool every text at its first token
            hf.post_processor = _start_and_end(start, end)
        text = hf.encode("a", add_special_tokens=False).ids
        if hf.encode("a").ids.index(end) < len(text):
            raise InputError(f"the tokenizer puts {END} before a text's end, and CLIP's text tower pools at the first")

    def _as_siglip(self) -> None:
        hf = self._hf
        first, own = _CANONICAL if self.end == "</s>" else _LOWER, hf.normalizer
        if _steps(own)[: len(first)] != _steps(normalizers.Sequence(first)):  # a stored one begins with it already
            hf.normalizer = normalizers.Sequence([*first, own] if own else first)
        ends = [(self.end, self.eot_id)]
        hf.post_processor = processors.TemplateProcessing(single=f"$A {self.end}", special_tokens=ends)

    def _cleaned(self, text: str, most: int | None = None) -> str:
        """At most so many characters, repaired for CLIP's kind."""
        return text[:most] if self.start_id is None else clean(text.strip()[:most])

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, a folder of one or of vocab.json and merges.txt, or a hub id's.

        Raises:
          InputError: no such file or id, or not a tokenizer with start and end tokens.
        """
        file = storage.fetched(str(path)) if storage.is_remote(path) else Path(os.path.expanduser(path))
        if not file.exists():
            if not hub.is_id(str(path)):
                raise InputError(f"tokenizer: no file {path}; give a tokenizer.json, its folder, or a hub id ORG/NAME")
            file = hub.fetch(str(path), _needed)
        if file.name in ("vocab.json", "merges.txt"):
            file = file.parent
        try:
            if file.is_dir() and "tokenizer.json" in _needed([found.name for found in file.iterdir()]):
                file = file / "tokenizer.json"
            return cls(_of_vocabulary(file) if file.is_dir() else _of_json(file))
        except InputError as error:
            raise InputError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from None
        except Exception as error:  # tokenizers raises bare Exception on a file that it cannot read
            kind = "tokenizer.json" if file.is_file() else "folder of a tokenizer"
            begins = beginning(file) if file.is_file() else ""
            raise InputError(f"{file} is not a {kind} of Hugging Face tokenizers{begins}: {one_line(error)}") from None

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE on lower-cased captions. Any text can be encoded; nothing is ever unknown."""
        hf = tokenizers.Tokenizer(models.BPE())
        hf.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        hf.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=[PAD, START],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        hf.train_from_iterator((clean(c) for c in captions), trainer)
        # Last, so that it has the highest id, as in OpenAI's vocabulary: code that pools at the highest id works.
        hf.add_special_tokens([END])
        return cls(hf)  # which adds both around every text

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer whose `to_json` this is."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json."""
        write_whole(path, self.to_json())

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return self._hf.get_vocab()

    def to_dict(self) -> dict:
        """The contents of tokenizer.json, without truncation and padding: their length is the model's."""
        return json.loads(self._hf.to_str()) | {"truncation": None, "padding": None}

    def __call__(self, texts: list[str], context_length: int) -> np.ndarray:
        """Returns int32 ids (len(texts), context_length)."""
        most = _TOKEN_CHARACTERS * context_length
        ids_NxL = np.full((len(texts), context_length), self.pad_id, np.int32)
        encodings = self._hf.encode_batch_fast([self._cleaned(text, most) for text in texts])
        for row, encoding in zip(ids_NxL, encodings, strict=True):
            ids = encoding.ids
            row[: len(ids)] = ids[:context_length]
            if len(ids) > context_length:
                row[-1] = self.eot_id
        return ids_NxL

    def lengths(self, texts: list[str]) -> np.ndarray:
        """Returns how many tokens each text has, start and end included: int32 (len(texts),)."""
        return np.array([len(e.ids) for e in self._hf.encode_batch_fast([self._cleaned(t) for t in texts])], np.int32)

    def highest_id(self) -> int:
        """The highest id of a text, unless that spells out an added token, such as <|image|>."""
        added = {token.content for token in self._hf.get_added_tokens_decoder().values()} - {START, self.end}
        return max(id for token, id in self.vocabulary().items() if token not in added)

    def within(self, size: int) -> "Tokenizer":
        """This one without the added tokens of ids from `size` on: what spells them in a text is ordinary text."""
        described = self.to_dict()
        added = described["added_tokens"]
        described["added_tokens"] = [token for token in added if token["id"] < size]
        return self if described["added_tokens"] == added else Tokenizer.from_json(json.dumps(described))


def files_of_tokenizer(names: Collection[str]) -> list[str]:
    """Those among a folder's files that make its tokenizer; empty if there are none."""
    if "tokenizer.json" in names:
        return ["tokenizer.json"]
    if {"vocab.json", "merges.txt"} <= set(names):
        return [name for name in ("vocab.json", "merges.txt", "added_tokens.json") if name in names]
    return []


def _steps(normalizer: normalizers.Normalizer | None) -> list:
    """A sequence of normalizers, as tokenizer.json has it."""
    return json.loads(normalizer.__getstate__()).get("normalizers", []) if normalizer else []


def _needed(names: Collection[str]) -> list[str]:
    if not (needed := files_of_tokenizer(names)):
        raise InputError(
            NO_SENTENCEPIECE
            if SENTENCEPIECE in names
            else "no tokenizer. Expected tokenizer.json, or vocab.json and merges.txt"
        )
    return needed


def _of_json(file: Path) -> tokenizers.Tokenizer:
    refuse_stand_in(file)
    return tokenizers.Tokenizer.from_file(str(file))


def _of_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE of vocab.json and merges.txt: CLIP's where words end in </w>, otherwise GPT-2's."""
    vocabulary = read_json(folder / "vocab.json")
    refuse_stand_in(folder / "merges.txt")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    if any(token.endswith("</w>") for token in vocabulary):
        hf = tokenizers.Tokenizer(models.BPE.from_file(*files, end_of_word_suffix="</w>", unk_token=END))
        blanks = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        hf.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, *_LOWER])
        words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
        split = pre_tokenizers.Split(tokenizers.Regex(words), behavior="removed", invert=True)
        hf.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        hf = tokenizers.Tokenizer(models.BPE.from_file(*files))
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    later = folder / "added_tokens.json"
    added = read_json(later) if later.exists() else {}
    hf.add_special_tokens([token for token in (START, END) if token in vocabulary])
    hf.add_special_tokens(sorted(added, key=lambda token: added[token]))
    if wrong := [token for token in added if hf.token_to_id(token) != added[token]]:
        raise InputError(f"{later}: {wrong[0]} has id {added[wrong[0]]}, which does not follow the vocabulary's")
    return hf


def _start_and_end(start: int, end: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)])
