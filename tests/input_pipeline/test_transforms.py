"""Windows, the canvas, and the resize on the device against PIL and against the definition in float64."""

import io
import itertools

import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from input_pipeline import transforms
from input_pipeline.graph import mapped
from rankclip_jax.models import images


def picture(height, width, seed=0):
    """Smooth colours with sharp-edged discs: what photographs have, and what overshoots most when resized."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = 128 + 60 * np.sin(np.stack([x / 31, y / 23, (x + y) / 41], -1) + rng.uniform(0, 6, 3))
    for _ in range(25):
        r, cy, cx = rng.uniform(2, 40), rng.uniform(0, height), rng.uniform(0, width)
        pixels[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = rng.uniform(0, 255, 3)
    return np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(pixels, kind="JPEG", **options):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def pil_window(pixels, window, side):
    """PIL's two passes, the width first: PIL's own order in every version before 13, and in most cases since."""
    (top, left, height, width), (h, w) = (float(x) for x in window), pixels.shape[:2]
    narrow = Image.fromarray(pixels).resize((side, h), Image.Resampling.BICUBIC, box=(left, 0, min(left + width, w), h))
    return np.asarray(narrow.resize((side, side), Image.Resampling.BICUBIC, box=(0, top, side, min(top + height, h))))


def oracle(pixels, window, side):
    """The definition in float64: Keys' kernel with a = -0.5, stretched when shrinking, 8 bits between the passes."""

    def weights(begin, length, n):
        step = length / side
        x = np.abs(np.arange(n) + 0.5 - (begin + (np.arange(side)[:, None] + 0.5) * step)) / max(step, 1)
        kernel = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return kernel / kernel.sum(axis=1, keepdims=True)

    def grey_levels(x):
        return np.clip(np.floor(x + 0.5), 0, 255)

    top, left, height, width = window
    narrow = grey_levels(np.einsum("ow,hwc->hoc", weights(left, width, pixels.shape[1]), pixels.astype(float)))
    return grey_levels(np.einsum("oh,hwc->owc", weights(top, height, pixels.shape[0]), narrow))


def on_canvas(views, canvas):
    """A batch of what `transforms.view` returned, the canvas beyond the pictures filled with what must not be seen."""
    filled = np.full((len(views), canvas, canvas, 3), 77, np.uint8)
    for place, view in zip(filled, views, strict=True):
        height, width, _ = view["image"].shape
        place[:height, :width] = view["image"]
    return {"image": filled} | {key: np.stack([view[key] for view in views]) for key in ("size", "windows")}


def viewed(batch, side):
    """`images.views` as one program, of its own: jit keeps what it traced, whichever form that took."""
    return np.asarray(jax.jit(lambda batch: images.views(batch, side))(batch))


def through_device(pictures, windows, side, canvas, exact=False):
    """Pictures (encoded, or arrays), a window of each -> uint8 (n, side, side, 3)."""
    views = []
    for picture, window in zip(pictures, windows, strict=True):
        windows_of = lambda size, w=window: tf.constant([w], tf.float32)  # noqa: E731
        views.append(transforms.view(tf.constant(picture), windows_of, side=side, canvas=canvas, exact=exact))
    return viewed(on_canvas(views, canvas), side)[:, 0]


def random_windows(size, scale, seed, count=1):
    """Windows (count, 4) of one picture."""
    return transforms.windows(transforms.window_numbers(seed, count)[None], tf.constant([size]), scale)[0]


def difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int))


CASES = [
    ((60, 80), (0, 0, 60, 80)),  # all of it, shrunk by different factors
    ((60, 80), (3, 5, 40, 31)),
    ((60, 80), (0, 0, 24, 24)),  # as it is
    ((60, 80), (59, 79, 1, 1)),  # one pixel in the corner
    ((60, 80), (10.25, 0.5, 17.5, 79.5)),  # fractions, as evaluation has
    ((7, 5), (0, 0, 7, 5)),  # enlarged
    ((96, 96), (1, 2, 90, 93)),
    ((96, 90), (0, 0, 96, 4)),
    ((1, 1), (0, 0, 1, 1)),
]
SIZES, WINDOWS = zip(*CASES, strict=True)


# How the program multiplies: on CPUs and GPUs, and on TPUs.
FORMS = {"gathering": images._by_gathering, "products": images._by_products}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    monkeypatch.setattr(images, "_by_gathering", FORMS[request.param])  # the CPU's
    return request.param


@pytest.mark.parametrize("side", [24, pytest.param(7, marks=pytest.mark.slow)])
def test_the_device_resizes_as_pil(side, form):
    pictures = [make(*size) for size in SIZES for make in (picture, noise)]
    windows = [window for window in WINDOWS for _ in range(2)]
    for pixels, window, result in zip(pictures, windows, through_device(pictures, windows, side, 96), strict=True):
        expected = pil_window(pixels, window, side)
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(transforms.resize(tf.constant(pixels), window, side), expected)
        assert difference(result, oracle(pixels, window, side)).max() <= 1


RATIOS = [(8, 56), (48, 24), (23, 24), (25, 24), (37, 64), (57, 32), (61, 9)]
LARGE = [(32, 224), (64, 224), (448, 224), (223, 224), (225, 224), (408, 224), (101, 24), (96, 7)]
RATIOS += [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in LARGE]


@pytest.mark.parametrize("canvas, side", RATIOS)
def test_at_any_ratio_the_device_resizes_as_pil_does_in_one_call(canvas, side, form):
    """Exact ties, which PIL's fixed point decides, are frequent where the ratio is a small fraction: 2, 1/2, 1/7."""
    rng = np.random.default_rng(canvas)
    pixels = rng.choice(np.array([0, 1, 127, 128, 254, 255], np.uint8), (4, canvas, canvas, 3))
    pixels[1] = picture(canvas, canvas)
    # All of it; all again; a window of whole pixels; one of fractions, whose borders float32 has exactly.
    low = np.array([[0, 0], [0, 0], [canvas // 5, canvas // 3], [0.375, canvas / 8 + 0.25]])
    high = canvas - np.array([[0, 0], [0, 0], [1, 0], [canvas / 4 + 0.125, 0.5]])
    batch = {
        "image": pixels,
        "size": np.full((4, 2), canvas, np.int32),
        "windows": np.concatenate([low, high - low], 1).astype(np.float32)[:, None],
    }
    results = viewed(batch, side)[:, 0]
    for image, (top, left), (bottom, right), result in zip(pixels, low, high, results, strict=True):
        # Pillow takes the width first where the height does not lose more than twice as much: in squares.
        expected = Image.fromarray(image).resize(
            (side, side), Image.Resampling.BICUBIC, box=(left, top, right, bottom), reducing_gap=None
        )
        np.testing.assert_array_equal(result, expected)


def test_windows_that_float32_rounds_are_off_by_a_grey_level_at_most(form):
    rng = np.random.default_rng(0)
    windows = np.float32(np.concatenate([rng.uniform(0, 40, (24, 2)), rng.uniform(20, 56, (24, 2))], 1))
    pictures = [noise(96, 96, seed) for seed in range(24)]
    results = through_device(pictures, windows, 32, 96)
    off = difference(results, [pil_window(p, w, 32) for p, w in zip(pictures, windows, strict=True)])
    assert off.max() <= 1 and (off > 0).mean() < 3e-4


def test_what_lies_beyond_the_picture_is_never_seen():
    views = {"image": noise(40, 30), "size": np.int32([40, 30]), "windows": np.float32([[0, 0, 40, 30]])}
    batch = on_canvas([views], 96)
    other = np.full_like(batch["image"], 255)
    other[0, :40, :30] = views["image"]
    np.testing.assert_array_equal(viewed(batch, 24), viewed(batch | {"image": other}, 24))


def test_evaluation_sees_what_clips_image_processor_sees():
    CLIPImageProcessor = pytest.importorskip("transformers").CLIPImageProcessor
    side = 48
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_normalize=False, do_rescale=False
    )
    sizes = [(48, 48), (60, 90), (90, 60), (33, 170), (170, 33), (30, 20), (200, 70), (151, 225), (225, 151)]
    sizes += [(2, 900), (900, 1)]
    pictures = [make(*size) for size in sizes for make in (picture, noise)]
    windows = [transforms.centre_window(tf.constant(pixels.shape[:2]), side)[0].numpy() for pixels in pictures]
    fits, too_large = (through_device(pictures, windows, side, canvas, exact=True) for canvas in (232, 84))
    for pixels, *results in zip(pictures, fits, too_large, strict=True):
        expected = np.moveaxis(np.asarray(processor(Image.fromarray(pixels))["pixel_values"][0]), 0, -1)
        for result in results:
            assert difference(result, expected).max() <= 1
        windows_of = lambda size: transforms.centre_window(size, side)  # noqa: E731
        on_host = transforms.view(tf.constant(pixels), windows_of, side=side, canvas=None, exact=True)["image"]
        np.testing.assert_array_equal(on_host, expected)
    # Normalised too: one grey level is at most 1 / 255 / 0.26.
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    expected = np.moveaxis(np.asarray(processor(Image.fromarray(pictures[2]))["pixel_values"][0]), 0, -1)
    np.testing.assert_allclose(images.normalize(fits[2]), expected, atol=1.001 / 255 / min(images.STD))


@pytest.mark.parametrize("squash", ["bicubic", "bilinear"])
def test_evaluation_sees_what_siglips_image_processor_sees(squash):
    side, sent, expected = 48, {232: [], 84: []}, []
    sizes = [(48, 48), (60, 90), (33, 170), (170, 33), (30, 20), (200, 70), (151, 225), (2, 900), (900, 1)]
    options = dict(side=side, exact=True, squash=squash)
    for pixels in (make(*size) for size, make in zip(sizes, itertools.cycle((picture, noise)))):
        how = Image.Resampling[squash.upper()]  # as transformers' SiglipImageProcessor: tests/weights/test_siglip.py
        expected.append(np.asarray(Image.fromarray(pixels).resize((side, side), how)))
        on_host = transforms.view(tf.constant(pixels), transforms.whole_window, canvas=None, **options)["image"]
        np.testing.assert_array_equal(on_host, expected[-1])
        for canvas, views in sent.items():
            views.append(transforms.view(tf.constant(pixels), transforms.whole_window, canvas=canvas, **options))
    for canvas, views in sent.items():
        assert difference(viewed(on_canvas(views, canvas), side)[:, 0], expected).max() <= 1


def test_a_window_that_fits_is_cut_out_exactly_and_a_larger_one_is_close():
    pixels, side, canvas = picture(400, 600), 24, 48
    small = (101.0, 203.0, 30.0, 35.0)
    data = encoded(pixels, quality=92)
    decoded = np.asarray(Image.open(io.BytesIO(data)))
    windows = [(0.0, 0.0, 400.0, 530.0), (30.0, 40.0, 100.0, 80.0), (5.0, 500.0, 300.0, 60.0)]
    cut, *results = through_device([pixels, *[data] * 3], [small, *windows], side, canvas)
    np.testing.assert_array_equal(cut, pil_window(pixels, small, side))
    for window, result in zip(windows, results, strict=True):
        # The decoder's scaling and the average over areas blur a little: single pixels at edges move.
        away = difference(result, oracle(decoded, window, side))
        assert away.mean() < 4 and np.quantile(away, 0.99) < 40


@pytest.mark.parametrize("size, scale", [((300, 400), (0.3, 0.6)), ((97, 33), (0.08, 1.0)), ((40, 40), (0.9, 1.0))])
def test_random_windows_keep_scale_and_shape_and_lie_inside(size, scale):
    seeds = mapped(tf.data.Dataset.range(400), lambda i: random_windows(size, scale, tf.stack([7, i]))[0])
    top, left, height, width = np.stack(list(seeds.as_numpy_iterator())).T
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()
    for value in (top, left, height, width):
        np.testing.assert_array_equal(value, np.round(value))
    area, ratio = height * width / (size[0] * size[1]), np.log(width / height)
    fallback = (height == size[0]) | (width == size[1])  # the largest window of an allowed ratio may have less area
    rounding = 1 / height + 1 / width
    assert (area <= scale[1] * (1 + rounding)).all() and ((area >= scale[0] * (1 - rounding)) | fallback).all()
    assert (np.abs(ratio) <= np.log(4 / 3) + rounding).all()


def test_random_windows_are_distributed_as_torchvisions():
    """In a large square no draw of the area or the ratio is refused, so their laws are those they were drawn from."""
    draw = lambda i: random_windows((4000, 4000), (0.2, 0.5), tf.stack([3, i]), count=2)  # noqa: E731
    windows = np.stack(list(mapped(tf.data.Dataset.range(700), draw).as_numpy_iterator()))
    top, left, height, width = np.moveaxis(windows, -1, 0)
    for values, low, high in (
        (height * width / 4000**2, 0.2, 0.5),
        (np.log(width / height), np.log(3 / 4), np.log(4 / 3)),
        (top / (4000 - height), 0, 1),
        (left / (4000 - width), 0, 1),
    ):
        uniform = (values - low) / (high - low)
        for view in (0, 1):  # Kolmogorov-Smirnov: above 1.95 / sqrt(n) once in a thousand
            ordered = np.sort(uniform[:, view])
            assert np.abs(ordered - (np.arange(700) + 0.5) / 700).max() < 1.95 / np.sqrt(700)
        assert abs(np.corrcoef(uniform[:, 0], uniform[:, 1])[0, 1]) < 0.15  # the two views know nothing of each other


def test_random_windows_repeat_with_their_seed_and_fall_back_to_the_centre():
    first, again, other = (random_windows((90, 60), (0.1, 1.0), (1, k)).numpy() for k in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # 9 to 1: no window of nine tenths of the area has an allowed shape.
    np.testing.assert_array_equal(random_windows((10, 90), (0.9, 1.0), (0, 0)), [[0, 38, 10, 13]])
    np.testing.assert_array_equal(random_windows((90, 10), (0.9, 1.0), (0, 0)), [[38, 0, 13, 10]])


@pytest.mark.parametrize("seed", [(0, 0), (7, 3), (2**63 - 1, 2**40), (-1, 5)])
def test_the_numbers_of_windows_are_those_of_philox(seed):
    seed = tf.constant(seed, tf.int64)
    expected = tf.random.stateless_uniform((4, 2, 11), seed, alg="philox")
    np.testing.assert_array_equal(transforms.window_numbers(seed, 2), expected)


@pytest.mark.parametrize("count", [1, 2])
def test_windows_do_not_depend_on_the_batch_in_which_they_are_drawn(count):
    rng = np.random.default_rng(count)
    sizes = tf.constant(rng.integers(1, 500, (61, 2)), tf.int32)
    numbers = tf.stack([transforms.window_numbers((9, i), count) for i in range(61)])
    together = transforms.windows(numbers, sizes, (0.3, 1.0)).numpy()
    assert together.shape == (61, count, 4)
    for some in (1, 3, 16):
        parts = [slice(at, at + some) for at in range(0, 61, some)]
        apart = [transforms.windows(numbers[part], sizes[part], (0.3, 1.0)) for part in parts]
        np.testing.assert_array_equal(np.concatenate(apart), together)


def test_two_windows_of_one_picture_share_its_canvas():
    pixels, side, canvas = picture(300, 200), 24, 48
    for windows in ([(0, 0, 40, 30), (5, 8, 30, 33)], [(0, 0, 40, 30), (250, 160, 40, 40)]):
        windows_of = lambda size, w=windows: tf.constant(w, tf.float32)  # noqa: E731
        views = transforms.view(tf.constant(pixels), windows_of, side=side, canvas=canvas, exact=False)
        assert max(views["image"].shape[:2]) <= canvas
        result = viewed(on_canvas([views], canvas), side)[0]
        tolerance = 1 if windows[1][0] < 100 else 60  # far apart they are shrunk together
        for view, window in zip(result, windows, strict=True):
            assert np.quantile(difference(view, oracle(pixels, window, side)), 0.99) <= tolerance
    host = transforms.view(tf.constant(pixels), windows_of, side=side, canvas=None, exact=False)["image"]
    assert host.shape == (2, side, side, 3)


def test_colour_jitter_is_torchvisions_within_its_range():
    pixels = np.stack([picture(20, 30, seed) for seed in range(64)])
    none = images.color_jitter(jax.random.key(0), pixels, 0.0, 0.0, 0.0)
    np.testing.assert_allclose(none, pixels, atol=1e-3)
    bright = np.asarray(images.color_jitter(jax.random.key(1), pixels, 0.4, 0.0, 0.0))
    factors = bright.sum(axis=(1, 2, 3)) / pixels.sum(axis=(1, 2, 3))
    for image, result, factor in zip(pixels, bright, factors, strict=True):
        assert 0.55 < factor < 1.4 and (result <= 255).all()
        safe = image < 180  # never clipped
        scaled = image[safe] * (result[safe].sum() / max(1, image[safe].sum()))
        np.testing.assert_allclose(result[safe], scaled, atol=0.01)
    assert np.std(factors) > 0.1
    # Saturation keeps the luma (where nothing is clipped), contrast keeps the mean luma.
    luma = np.array([0.299, 0.587, 0.114])
    dull = (pixels // 3 + 85).astype(np.uint8)
    saturated = np.asarray(images.color_jitter(jax.random.key(2), dull, 0.0, 0.0, 0.3))
    np.testing.assert_allclose(saturated @ luma, dull @ luma, atol=0.02)
    contrast = np.asarray(images.color_jitter(jax.random.key(3), dull, 0.0, 0.3, 0.0))
    np.testing.assert_allclose((contrast @ luma).mean((1, 2)), (dull @ luma).mean((1, 2)), atol=0.05)
    assert np.std(saturated - dull) > 1 and np.std(contrast - dull) > 1
