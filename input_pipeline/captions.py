"""A second view of a caption, for in-modal training: a word dropped, two swapped, or one replaced by a synonym."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rankclip_jax.common.errors import InputError


def augment(caption: str, rng: np.random.Generator, synonyms: Mapping[str, Sequence[str]] | None = None) -> str:
    """One random edit of a caption; each edit that is possible is equally likely.

    Deletion and swapping of words are the random deletion and random swap of EDA (Wei and Zou, EMNLP 2019), once a
    caption; the table replaces a word as EDA's synonym replacement does with WordNet, which is not needed here.

    Args:
      caption: words separated by white space.
      rng: the only source of randomness; the same state gives the same view.
      synonyms: lower-case word -> words that may stand for it, as `read_synonyms` returns. Punctuation around
        the word and a capital at its start are kept.

    Returns:
      The edited caption, its words separated by single spaces. Words are never all deleted: a caption of one
      word that has no synonym, and one without words, come back as they are.
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
    """Reads a synonym table: a JSON object, each word with a list of the words that may stand for it.

    Raises:
      InputError: no such file, not JSON, or not such a table.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the synonym table {path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise InputError(f'{path} must hold a JSON object such as {{"sofa": ["couch"]}}')
    for word, others in table.items():
        if not (isinstance(others, list) and others and all(isinstance(o, str) and o.strip() for o in others)):
            raise InputError(f'{path}: {word!r} must have a list of words, such as "sofa": ["couch"]; got {others!r}')
    return {word.lower(): others for word, others in table.items()}
