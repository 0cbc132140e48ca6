"""Scenes whose captions say more or less, in words that vary, and how alike two scenes truly are.

What a ranking loss is meant to learn: that a red circle is nearer to a crimson disc than to a red star. The scenes are
those of shapes.py; only the captions differ.
"""

from collections.abc import Callable

import numpy as np

from input_pipeline.shapes import SPLITS, Scene, scene

SYNONYMS = dict(
    red=("red", "crimson", "scarlet"),
    green=("green", "emerald"),
    blue=("blue", "azure", "navy"),
    yellow=("yellow", "golden"),
    purple=("purple", "violet"),
    orange=("orange", "tangerine"),
    white=("white", "snowy"),
    black=("black", "dark"),
    circle=("circle", "disc"),
    square=("square", "box"),
    triangle=("triangle", "wedge"),
    diamond=("diamond", "rhombus"),
    cross=("cross", "plus"),
    star=("star", "asterisk"),
    ring=("ring", "hoop"),
    crescent=("crescent", "moon"),
    small=("small", "little", "tiny"),
    large=("large", "big", "huge"),
)
_OPENINGS = ("", "a picture of ", "there is ", "a drawing of ")
ATTRIBUTES = ("colour", "shape", "size", "background", "row", "column")


def caption(split: str, index: int) -> str:
    """A third each: the colour alone, colour and shape, everything; any of its synonyms for each word."""
    seen, _ = scene(split, index)
    rng = np.random.Generator(np.random.Philox(key=[16 + SPLITS[split][0], index]))
    word = lambda name: rng.choice(SYNONYMS[name])  # noqa: E731
    says = rng.integers(3)
    if says == 0:
        text = f"something {word(seen.colour)}"
    elif says == 1:
        text = _a(f"{word(seen.colour)} {word(seen.shape)}")
    else:
        text = _everything(seen, word)
    return rng.choice(_OPENINGS) + text


def statement(split: str, index: int) -> str:
    """All that `truth` compares, each by its plain word."""
    return _everything(scene(split, index)[0], lambda name: name)


def _everything(seen: Scene, word: Callable[[str], str]) -> str:
    noun = _a(f"{word(seen.size)} {word(seen.colour)} {word(seen.shape)}")
    return f"{noun} in the {seen.place} on a {seen.background} background"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def truth(split: str, count: int) -> np.ndarray:
    """Share of ATTRIBUTES that two scenes have in common, float32 (count, count)."""
    named = np.array([[getattr(scene(split, i)[0], name) for name in ATTRIBUTES] for i in range(count)])
    return (named[:, None] == named[None]).mean(axis=2, dtype=np.float32)
