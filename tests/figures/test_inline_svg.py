"""Drawings inside a page: their text is text, their ids are their own, the same figure gives the same bytes."""

import base64
import io
import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from rankclip_jax import figures


def jpeg(colour="red", side=64):
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()


def picture_query(*captions):
    return {"picture": jpeg(), "answers": [{"caption": caption, "right": i == 0} for i, caption in enumerate(captions)]}


def confusion(classes=("cat", "dog"), counts=((7, 3), (0, 10))):
    return figures.confusion({"": {"classes": np.array(classes), "confusion": np.array(counts)}})


def projection():
    points = np.random.default_rng(0).normal(size=(2, 5, 2))
    return figures.projection(*points, np.array([0.5, 0.2]))


DRAWINGS = {
    "chart": lambda: figures.chart([figures.Line([(1, 2.0), (2, 1.0)]), figures.Line([(1, 1.0), (2, 2.0)], 1, True)]),
    "confusion": confusion,
    "projection": projection,
    "cosines": lambda: figures.cosines(np.linspace(-1, 1, 61), np.eye(60, dtype=int)[50], np.arange(60)),
    "picture": lambda: figures.query(picture_query("a", "b")),
    "caption": lambda: figures.query({"caption": "a", "answers": [{"picture": jpeg(), "right": True}] * 2}),
}


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize("kind", DRAWINGS)
def test_it_stands_in_a_page_without_a_size_a_font_or_an_address(kind):
    svg = figures.svg(DRAWINGS[kind](), kind)
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and root.get("viewBox") and not {"width", "height"} & set(root.attrib)
    assert "http" not in svg and "xlink" not in svg and "font-family" not in svg and "<style" not in svg
    assert re.findall(r"url\((.)", svg).count("#") == svg.count("url(")
    assert "#000000" not in svg and "#ffffff;" not in svg  # the ink and the ground are the page's
    assert len(svg) < 25_000


@pytest.mark.parametrize("kind", DRAWINGS)
def test_the_same_figure_gives_the_same_text_and_another_name_other_ids(kind):
    draw = DRAWINGS[kind]
    first, again, other = (figures.svg(draw(), name) for name in ("a", "a", "b"))
    assert first == again
    ids, others = (re.findall(r' id="([^"]+)"', svg) for svg in (first, other))
    assert len(set(ids)) == len(ids) and not set(ids) & set(others)
    referred = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', first))
    assert referred == set(ids)


def test_words_are_text_as_they_stand():
    evil = '</svg><script>alert("&amp;")</script> $x$ and id="x"'
    svg = figures.svg(figures.query(picture_query(evil, "猫と犬", "one\0two\x0b\ud800three")), "a")
    found = " ".join(" ".join(texts(svg)).split())
    assert '1. </svg><script>alert("&amp;")</script> $x$ and id="x" ✓' in found
    assert "2. 猫と犬" in found and "3. one two three" in found
    assert "<script" not in svg


def test_long_words_are_cut_and_stay_inside():
    wide, chinese = "W" * 300, "猫" * 300
    svg = figures.svg(figures.query(picture_query(wide, chinese)), "a")
    lines = texts(svg)
    assert len(lines) == 4 and lines[1].endswith("… ✓") and lines[3].endswith("…")
    assert max(len(line) for line in lines[:2]) <= 42 and max(len(line) for line in lines[2:]) <= 22
    names = texts(figures.svg(confusion(("x" * 200, "costs $5 or $6")), "a"))
    assert "costs $5 or $6" in names and "x" * 23 + "…" in names


def test_a_letter_that_the_font_lacks_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.svg(confusion(("猫", "犬")), "a")


def test_points_have_labels():
    captions = ["a cat", "<b>", "c", "d", "e"]
    svg = figures.svg(projection(), "a", {"images": captions, "texts": captions[::-1]})
    titles = [use.findtext("title") for use in ElementTree.fromstring(svg).iter("use") if use.find("title") is not None]
    assert titles == captions + captions[::-1]
    with pytest.raises(ValueError, match="shorter"):
        figures.svg(projection(), "a", {"images": captions[:4]})


def images_in(svg):
    for kind, data in re.findall(r'href="data:image/(\w+);base64,([^"]+)"', svg):
        yield kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_are_small():
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=85)
    asked = {"picture": base64.b64encode(out.getvalue()).decode(), "answers": [{"caption": "a", "right": True}]}
    ((kind, image),) = images_in(figures.svg(figures.query(asked), "a"))
    assert kind == "jpeg" and max(image.size) <= 112


def test_a_matrix_keeps_its_colours_exactly():
    ((kind, image),) = images_in(figures.svg(confusion(counts=[[1, 3], [10, 30]]), "a"))
    assert kind == "png" and image.mode == "P"
    side = image.width
    for x, y, share in ((0, 0, 0.25), (1, 0, 0.75), (0, 1, 0.25), (1, 1, 0.75)):
        at = (side * (1 + 2 * x) // 4, side * (1 + 2 * y) // 4)
        assert image.convert("RGB").getpixel(at) == colormaps["Blues"](share**0.5, bytes=True)[:3]


def test_a_thousand_classes_fit():
    rng = np.random.default_rng(0)
    counts = 30 * np.eye(1000, dtype=int) + (rng.random((1000, 1000)) < 0.01)
    assert len(figures.svg(confusion([f"class {i}" for i in range(1000)], counts), "a")) < 300_000


def test_no_drawing_chooses_a_backend_for_the_process():
    repo = Path(__file__).parents[2]
    files = [path for room in ("rankclip_jax", "input_pipeline", "benchmarks") for path in (repo / room).rglob("*.py")]
    assert len(files) > 50
    assert not [path for path in files if re.search(r"pyplot|matplotlib\.use", path.read_text())]
