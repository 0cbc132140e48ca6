import io
import sys
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from input_pipeline import contact_sheet, overview, prepare, sources
from rankclip_jax.common.pictures import NO_IMAGE
from rankclip_jax.common.tokenizer import Tokenizer

SIZES = [(30, 20), (20, 30), (100, 50), (16, 16)]


def encoded(size, kind="JPEG", level=0):
    out = io.BytesIO()
    Image.new("RGB", size, (level, 2 * level, 0)).save(out, kind)
    return out.getvalue()


def source_of(images, captions):
    images = tf.constant(images)
    captions = tf.ragged.constant(captions) if isinstance(captions[0], list) else tf.constant(captions)
    return sources.Source(
        images.shape[0], lambda row: {"image": images[row], "caption": captions[row]}, str, lambda: []
    )


def survey(source, **options):
    return overview.survey(source, **(dict(tokenizer=None, sample=None, workers=2) | options))


def test_numbers_are_those_of_the_rows():
    images = [encoded(SIZES[i % 4], "PNG" if i % 5 == 0 else "JPEG", i) for i in range(40)]
    captions = [f"caption {'x' * i} 🙂" for i in range(40)]
    seen = survey(source_of(images, captions))
    assert (seen.rows, seen.looked_at, seen.good_rows.tolist(), seen.bad) == (40, 40, list(range(40)), Counter())
    assert seen.kinds == {"PNG RGB": 8, "JPEG RGB": 32}
    width, height = np.array([SIZES[i % 4] for i in range(40)], float).T
    expected = {
        "width": width,
        "height": height,
        "shorter side": np.minimum(width, height),
        "aspect ratio": width / height,
        "kB an image": np.array([len(image) / 1000 for image in images]),
        "characters": np.array([len(caption) for caption in captions]),
        "words": np.array([2.0] + [3.0] * 39),  # the first is "caption  🙂"
    }
    assert seen.measures.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(seen.measures[name], values), name
    text = overview.text(seen, lambda row: (captions[row],))
    assert "40 rows: 40 good, 0 bad" in text and "20.0%  PNG RGB" in text
    (line,) = [line for line in text.splitlines() if line.startswith("shorter side")]
    values = np.minimum(width, height)
    numbers = [*np.percentile(values, (0, 5, 25, 50, 75, 95, 100)), values.mean()]
    assert [float(number) for number in line.split()[2:]] == pytest.approx(numbers, rel=0.005)


def test_bad_rows_are_counted_by_reason():
    images = [encoded((9, 9))] * 5 + [b"<html>", b"GIF89a", encoded((90, 90), level=3)[:-30]]
    seen = survey(source_of(images, ["a", "b", "c", "d", "e", "f", "g", "h"]))
    assert seen.bad == {"an HTML page": 1, NO_IMAGE: 1, "truncated image": 1}
    assert "8 rows: 5 good, 3 bad" in overview.text(seen, lambda row: ("a",))
    nothing = survey(source_of([b"x", b"y"], ["a", "b"]))
    assert overview.text(nothing, None).splitlines() == ["2 rows: 0 good, 2 bad", f"         2  100.0%  {NO_IMAGE}"]


def test_repetitions_are_counted_once_each():
    a, b, c = (encoded((9, 9), level=level) for level in (10, 20, 30))
    rows = [(a, "cat"), (b, "cat"), (a, "cat"), (c, "dog"), (a, "mouse"), (c, "dog"), (c, "dog")]
    seen = survey(source_of([image for image, _ in rows], [caption for _, caption in rows]))
    assert seen.repeated == {"images": 7 - 3, "captions": 7 - 3, "pairs": 7 - 4}
    assert [(row, count) for _, row, count in seen.frequent] == [(0, 3), (3, 3)]
    text = overview.text(seen, lambda row: (rows[row][1],))
    assert '42.9%  "cat"' in text and '42.9%  "dog"' in text and "mouse" not in text


def test_several_captions_of_an_image_count_each():
    images = [encoded((9, 9), level=level) for level in (1, 2)]
    captions = [["one", "two words", "one"], ["one"]]
    seen = survey(source_of(images, captions))
    assert seen.measures["words"].tolist() == [1, 2, 1, 1] and seen.measures["width"].tolist() == [9, 9]
    text = overview.text(seen, lambda row: tuple(captions[row]))
    assert "4 captions, 2 per image" in text and '75.0%  "one"' in text


def test_tokens_are_counted_as_clip_would_cut_them():
    captions = ["a cat", "a cat " * 60, "dog"]
    tokenizer = Tokenizer.train(captions, 300)
    seen = survey(source_of([encoded((9, 9), level=i) for i in range(3)], captions), tokenizer=tokenizer)
    assert seen.measures["tokens"].tolist() == tokenizer.lengths(captions).tolist()
    assert "1   33.3%  of more than 77 tokens" in overview.text(seen, lambda row: (captions[row],))


def test_a_sample_is_evenly_spread():
    images = [encoded((9, 9), level=i) for i in range(100)]
    seen = survey(source_of(images, [str(i) for i in range(100)]), sample=10)
    assert seen.looked_at == 10 and seen.good_rows.tolist() == list(range(0, 100, 10))
    assert "100 rows, 10 of them inspected" in overview.text(seen, lambda row: (str(row),))
    assert survey(source_of(images, [str(i) for i in range(100)]), sample=1000).looked_at == 100
    seen = survey(source_of(images, [str(i) for i in range(100)]), sample=30)
    assert seen.good_rows.tolist() == list(range(0, 100, 4))  # to the end, rather than exactly 30


def test_the_sheet_shows_the_pictures(tmp_path):
    examples = [
        (Image.new("RGB", (40, 20), (255, 0, 0)), r"a $x_1$ caption \frac 日本 🙂 " * 20, "row 0"),
        (Image.new("RGB", (2000, 3000), (0, 0, 255)), "", ""),
    ]
    contact_sheet.draw(tmp_path / "sheet.png", "title $ \\", examples)
    sheet_HxWx3 = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    red = (np.abs(sheet_HxWx3 - [255, 0, 0]).sum(-1) < 9).sum()
    blue = (np.abs(sheet_HxWx3 - [0, 0, 255]).sum(-1) < 9).sum()
    side = 190  # of a picture's box, 1.9 inches of 100 dots
    assert abs(red - side * side / 2) < 400 and abs(blue - side * side * 2 / 3) < 400


def test_the_command_prints_and_draws(captioned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", str(captioned), str(tmp_path / "look"), "--inspect"])
    prepare.main()
    out = capsys.readouterr().out
    assert "40 rows: 40 good, 0 bad" in out and f"examples: {tmp_path}/look/contact_sheet.png" in out
    assert Image.open(tmp_path / "look/contact_sheet.png").width > 1000
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == [".rankclip_jax", "contact_sheet.png"]


def test_nothing_good_draws_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.csv").write_text("image,caption\ngone.jpg,a cat\n")
    monkeypatch.setattr(sys, "argv", ["prepare", str(tmp_path / "bad.csv"), str(tmp_path), "--inspect"])
    prepare.main()
    assert "1 rows: 0 good, 1 bad" in capsys.readouterr().out and not (tmp_path / "contact_sheet.png").exists()


def test_what_an_earlier_inspection_left_goes_where_it_is_no_longer_so(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["prepare", str(tmp_path / "i.csv"), str(tmp_path / "look"), "--inspect"])
    left = []
    for image in ("gone.png", "a.png", "gone.png"):
        (tmp_path / "i.csv").write_text(f"image,caption\n{image},a cat\n")
        prepare.main()
        left.append(sorted(path.name for path in (tmp_path / "look").iterdir()))
    bad, good = [".rankclip_jax", "bad_samples.jsonl"], [".rankclip_jax", "contact_sheet.png"]
    assert left == [bad, good, bad]


def test_an_output_that_cannot_be_written_is_said(captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare", str(captioned), str(captioned / "x"), "--inspect"])
    with pytest.raises(SystemExit, match=r"^error: cannot write to .*data.csv/x: Not a directory$"):
        prepare.main()
