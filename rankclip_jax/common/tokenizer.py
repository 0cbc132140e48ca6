"""Captions to token ids by a Hugging Face `tokenizers` file: given, from the hub, or trained on the captions."""

import html
import json
from collections.abc import Iterable
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import write_whole

PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
# Characters that one token stands for at most. So much of a caption is looked at for each token of the context:
# repairing and splitting a caption of a megabyte, to keep 77 tokens of it, would hold up the batch for seconds.
_TOKEN_CHARACTERS = 128


def clean(text: str) -> str:
    """Repairs a caption as OpenAI's CLIP does before tokenising: ftfy, then HTML entities, twice over."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.strip()  # nothing to repair, and ftfy is slow
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


class Tokenizer:
    """Texts -> int32 ids (n, context_length): start, text, end, zeros; a long text keeps its end token.

    Threads may share one: training and evaluation batches do.

    Attributes:
      vocab_size: number of ids.
      start_id, eot_id: ids of the start token, and of the end-of-text token, at whose first place the text tower pools.
    """

    def __init__(self, hf: tokenizers.Tokenizer):
        # A file's own truncation and padding are settings of the shared object, which two threads with different
        # lengths would change under each other; the layout is made in __call__ instead, and faster.
        hf.no_truncation()
        hf.no_padding()
        self._hf = hf
        self.vocab_size = hf.get_vocab_size()
        start, end = hf.token_to_id(START), hf.token_to_id(END)
        if start is None or end is None:
            raise InputError(f"the tokenizer has no {START} or no {END} token; CLIP's text tower needs both")
        self.start_id, self.eot_id = start, end

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """Reads a tokenizer.json by path, or fetches it from the Hugging Face hub by its id.

        Raises:
          InputError: no such file or id, or not a tokenizer with start and end tokens.
        """
        if Path(path).is_file():
            try:
                return cls(tokenizers.Tokenizer.from_file(str(path)))
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            except Exception as error:  # tokenizers raises bare Exception on a file that it cannot read
                raise InputError(
                    f"{path} is not a tokenizer.json of Hugging Face tokenizers: {one_line(error)}"
                ) from None
        if path.endswith(".json") or path.startswith((".", "/")):
            raise InputError(f"tokenizer: no file {path}; give a tokenizer.json or a hub id")
        try:
            return cls(tokenizers.Tokenizer.from_pretrained(path))
        except Exception as error:  # whatever the hub client's version raises
            raise InputError(
                f"tokenizer: {path!r} is no file and could not be fetched from the hub ({one_line(error)})"
            ) from None

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
        start, end = hf.token_to_id(START), hf.token_to_id(END)
        hf.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
        )
        return cls(hf)

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
        ids_NxL = np.zeros((len(texts), context_length), np.int32)
        encodings = self._hf.encode_batch_fast([clean(text.strip()[:most]) for text in texts])
        for row, encoding in zip(ids_NxL, encodings, strict=True):
            ids = encoding.ids
            row[: len(ids)] = ids[:context_length]
            if len(ids) > context_length:
                row[-1] = self.eot_id
        return ids_NxL

    def lengths(self, texts: list[str]) -> np.ndarray:
        """Returns how many tokens each text has, start and end included: int32 (len(texts),)."""
        return np.array([len(e.ids) for e in self._hf.encode_batch_fast([clean(t) for t in texts])], np.int32)
