"""The built-in demo set: scenes of one coloured shape, drawn on the fly, each with a caption.

A scene is a pure function of (split, index): no file, no state. Captions name colour and shape, and sometimes size,
position and background in varied wording. So captions share different amounts of meaning, which a ranking loss can
learn from. The `HELD_OUT` colour-shape pairs never appear in training; each of their colours and shapes does.
"""

from typing import NamedTuple

import numpy as np

COLOURS = dict(
    red=(214, 40, 40),
    green=(46, 160, 67),
    blue=(36, 84, 220),
    yellow=(246, 214, 40),
    purple=(140, 60, 180),
    orange=(245, 130, 32),
    white=(250, 250, 250),
    black=(16, 16, 16),
)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "crescent")
BACKGROUNDS = dict(grey=(128, 128, 128), pink=(240, 170, 185), teal=(70, 150, 150), brown=(120, 85, 60))
SIZES = dict(small=(0.22, 0.28), large=(0.34, 0.42))  # radius as a share of the image's side
_SIZE_WORDS = dict(small=("small", "little", "tiny"), large=("large", "big", "huge"))
_COLUMNS, _ROWS = ("left", "middle", "right"), ("top", "middle", "bottom")

PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = [(c, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, c in enumerate(COLOURS)]  # each colour once, each shape once
SEEN = [pair for pair in PAIRS if pair not in HELD_OUT]
CLASS_NAMES = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for colour, shape in PAIRS]
TEMPLATES = ["{}", "a picture of {}", "there is {}", "a drawing of {}"]
# Training scenes show the seen pairs. The two labelled sets have separate scenes.
SPLITS = dict(train=(0, SEEN), val=(1, SEEN), seen=(2, SEEN), held_out=(3, HELD_OUT))


class Scene(NamedTuple):
    """What there is to see; x, y and radius are shares of the image's side."""

    colour: str
    shape: str
    size: str
    background: str
    row: str
    column: str
    radius: float
    x: float
    y: float
    tilt: float

    @property
    def place(self) -> str:
        """Such as "top left"; the centre is "middle"."""
        return "middle" if self.row == self.column else f"{self.row} {self.column}"


def scene(split: str, index: int) -> tuple[Scene, np.random.Generator]:
    """The scene, and the generator that draws its caption next."""
    stream, pairs = SPLITS[split]
    rng = np.random.Generator(np.random.Philox(key=[stream, index]))
    colour, shape = _pick(rng, pairs) if split in ("train", "val") else pairs[index % len(pairs)]
    background = _pick(rng, tuple(BACKGROUNDS))
    size = _pick(rng, tuple(SIZES))
    radius = rng.uniform(*SIZES[size])
    x, y = rng.uniform(radius, 1 - radius, size=2)
    row, column = _ROWS[int(3 * y)], _COLUMNS[int(3 * x)]
    return Scene(colour, shape, size, background, row, column, radius, x, y, rng.uniform(-0.15, 0.15)), rng


def caption(split: str, index: int) -> str:
    """The caption of a scene, without drawing it."""
    seen, rng = scene(split, index)
    return _caption(rng, seen)


def draw(split: str, index: int, side: int) -> tuple[np.ndarray, str, int]:
    """Draws one scene.

    Args:
      split: a key of SPLITS.
      index: any number from 0; the same index gives the same scene.
      side: height and width of the image in pixels.

    Returns:
      image (side, side, 3) uint8, caption, and the label (index into CLASS_NAMES).
    """
    seen, rng = scene(split, index)
    return paint(seen, side), _caption(rng, seen), PAIRS.index((seen.colour, seen.shape))


def _pick(rng, items):
    return items[rng.integers(len(items))]


def paint(scene: Scene, side: int) -> np.ndarray:
    """The image, uint8 (side, side, 3)."""
    radius, x, y, tilt = scene.radius, scene.x, scene.y, scene.tilt
    centres = (np.arange(side) + 0.5) / side
    u, v = np.meshgrid((centres - x) / radius, (y - centres) / radius)
    u, v = u * np.cos(tilt) - v * np.sin(tilt), u * np.sin(tilt) + v * np.cos(tilt)
    # The distance is in radii. Coverage rises from 0 to 1 over one pixel, which smooths the edge.
    coverage = np.clip(0.5 - _distance(scene.shape, u, v) * radius * side, 0, 1)[..., None]
    mixed = coverage * np.array(COLOURS[scene.colour]) + (1 - coverage) * np.array(BACKGROUNDS[scene.background])
    return np.round(mixed).astype(np.uint8)


def _distance(shape, u, v):
    """Signed distance to the outline of a shape of radius 1 (negative inside, v pointing up)."""
    au, av, r = np.abs(u), np.abs(v), np.hypot(u, v)
    match shape:
        case "circle":
            return r - 0.9
        case "square":
            return np.maximum(au, av) - 0.75
        case "triangle":
            return np.maximum(au * np.sqrt(0.75) + v * 0.5, -v) - 0.48
        case "diamond":
            return (au * 1.5 + av) / np.hypot(1.5, 1) - 0.55
        case "cross":
            return np.minimum(np.maximum(au - 0.22, av - 0.9), np.maximum(av - 0.22, au - 0.9))
        case "star":
            # Fold the plane onto half a point of the star, where the outline is one straight line.
            fifth = 2 * np.pi / 5
            angle = np.abs((np.arctan2(u, v) + fifth / 2) % fifth - fifth / 2)
            tip, notch = np.array([0.0, 1.0]), 0.42 * np.array([np.sin(fifth / 2), np.cos(fifth / 2)])
            dx, dy = (notch - tip) / np.hypot(*(notch - tip))
            return -dy * (r * np.sin(angle) - tip[0]) + dx * (r * np.cos(angle) - tip[1])
        case "ring":
            return np.abs(r - 0.7) - 0.2
        case "crescent":
            return np.maximum(r - 0.9, 0.8 - np.hypot(u - 0.5, v))
    raise ValueError(shape)


def _caption(rng, seen):
    noun = f"{seen.colour} {seen.shape}"
    if rng.random() < 0.5:
        noun = f"{_pick(rng, _SIZE_WORDS[seen.size])} {noun}"
    text = _pick(rng, TEMPLATES).format(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}")
    if rng.random() < 0.5:
        text += f" in the {seen.place}"
    if rng.random() < 0.5:
        text += _pick(rng, (" on {}", " on a {} background", " against {}")).format(seen.background)
    return text
