"""Second views of captions for in-modal training: a word deleted, two swapped, or one replaced by a synonym."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rankclip_jax.common.errors import InputError


def augment(caption: str, rng: np.random.Generator, synonyms: Mapping[str, Sequence[str]] | None = None) -> str:
    """Applies one random edit to a caption. All possible edits are equally likely.

    Deletion and swap are those of EDA (Wei and Zou, EMNLP 2019), applied once per caption. Replacement corresponds to
    EDA's synonym replacement, with a table instead of WordNet.

    Args:
      caption: words separated by white space.
      rng: the only source of randomness; the same state gives the same view.
      synonyms: lower-case word -> its synonyms, as from `read_synonyms`. Punctuation around the word and an initial
        capital are kept.

    Returns:
      The edited caption with single spaces between words. A caption without words, or of one word without a synonym, is
      returned unchanged.
    """
    words = caption.split()
    replaceable = [i for i, word in enumerate(words) if synonyms and _parts(word)[1].lower() in synonyms]
    edits = ["delete", "swap"] if len(words) > 1 else []
    edits += ["replace"] if replaceable else []
    if not edits:
        return caption
    match edits[rng.integers(len(edits))]:
        case "delete":
            del words[rng.integers(len(words))]
        case "swap":
            i, j = rng.choice(len(words), 2, replace=False)
            words[i], words[j] = words[j], words[i]
        case "replace":
            i = replaceable[rng.integers(len(replaceable))]
            words[i] = _replaced(words[i], synonyms, rng)
    return " ".join(words)


def _parts(word):
    """Leading punctuation, the word itself, trailing punctuation."""
    letters = [i for i, character in enumerate(word) if character.isalnum()]
    begin, end = (letters[0], letters[-1] + 1) if letters else (0, 0)
    return word[:begin], word[begin:end], word[end:]


def _replaced(word, synonyms, rng):
    before, core, after = _parts(word)
    choices = synonyms[core.lower()]
    choice = choices[rng.integers(len(choices))]
    return before + (choice[:1].upper() + choice[1:] if core[:1].isupper() else choice) + after


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Reads a synonym table: a JSON object of word -> list of synonyms.

    Raises:
      InputError: no such file, invalid JSON, or not such a table.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the synonym table {path}: {error}") from None
    if not isinstance(table, dict):
        raise InputError(f'{path} must hold a JSON object such as {{"sofa": ["couch"]}}')
    for word, others in table.items():
        if not (isinstance(others, list) and others and all(isinstance(o, str) and o.strip() for o in others)):
            raise InputError(f'{path}: {word!r} must have a list of words, such as "sofa": ["couch"]; got {others!r}')
    return {word.lower(): others for word, others in table.items()}
