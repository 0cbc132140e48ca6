import numpy as np
import pytest

from input_pipeline import shapes


def test_a_scene_is_a_function_of_its_index():
    first, again, other = (shapes.draw("train", i, 32) for i in (7, 7, 8))
    assert np.array_equal(first[0], again[0]) and first[1:] == again[1:]
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[0], shapes.draw("val", 7, 32)[0])


def test_held_out_pairs_never_appear_in_training_but_their_words_do():
    held_out = {f"{colour} {shape}" for colour, shape in shapes.HELD_OUT}
    captions = [shapes.draw(split, i, 8)[1] for split in ("train", "val") for i in range(3000)]
    assert not any(pair in caption for caption in captions for pair in held_out)
    for colour, shape in shapes.HELD_OUT:
        assert any(colour in caption for caption in captions)
        assert any(shape in caption for caption in captions)
    assert len(shapes.HELD_OUT) == len(set(shapes.HELD_OUT)) == 8
    assert len({shape for _, shape in shapes.HELD_OUT}) == 8


@pytest.mark.parametrize("split, pairs", [("seen", shapes.SEEN), ("held_out", shapes.HELD_OUT)])
def test_labelled_sets_hold_every_class_equally_often(split, pairs):
    labels = [shapes.draw(split, i, 8)[2] for i in range(3 * len(pairs))]
    expected = [shapes.PAIRS.index(pair) for pair in pairs]
    assert sorted(labels) == sorted(3 * expected)


def test_the_picture_shows_what_the_caption_says():
    for index in range(200):
        image, caption, label = shapes.draw("train", index, 64)
        colour, shape = shapes.PAIRS[label]
        assert f"{colour} {shape}" in caption
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        share = (image == shapes.COLOURS[colour]).all(axis=-1).mean()
        assert 0.01 < share < 0.55, (caption, share)
        if " left" in caption or " right" in caption:
            columns = np.nonzero((image == shapes.COLOURS[colour]).all(axis=-1))[1]
            assert (columns.mean() < 32) == (" left" in caption)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_shape_is_drawn_near_its_own_area(shape):
    # Areas of the outlines in units of the radius squared, from plane geometry.
    fifth = np.pi / 5
    areas = {
        "circle": np.pi * 0.9**2,
        "square": 1.5**2,
        "triangle": 3 * np.sqrt(3) * 0.48**2,
        "diamond": 2 * (0.55 * np.hypot(1.5, 1)) * (0.55 * np.hypot(1.5, 1) / 1.5),
        "cross": 2 * (0.44 * 1.8) - 0.44**2,
        "star": 10 * 0.5 * 1.0 * 0.42 * np.sin(fifth),
        "ring": np.pi * (0.9**2 - 0.5**2),
    }
    u, v = np.meshgrid(np.linspace(-1.2, 1.2, 1201), np.linspace(-1.2, 1.2, 1201))
    area = (shapes._distance(shape, u, v) < 0).mean() * 2.4**2
    if shape == "crescent":
        # The disc of radius 0.9 less its lens with a disc of radius 0.8 at distance 0.5.
        r, s, d = 0.9, 0.8, 0.5
        a = np.arccos((d * d + r * r - s * s) / (2 * d * r))
        b = np.arccos((d * d + s * s - r * r) / (2 * d * s))
        lens = r * r * (a - np.sin(2 * a) / 2) + s * s * (b - np.sin(2 * b) / 2)
        areas["crescent"] = np.pi * r * r - lens
    assert area == pytest.approx(areas[shape], rel=0.01)
