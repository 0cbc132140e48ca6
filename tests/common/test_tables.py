"""The one reader of tables: its two ways agree, with Python's csv as the oracle; bad rows have numbers and reasons."""

import csv
import gzip
import io
import json
import unicodedata

import numpy as np
import pytest

from rankclip_jax.common import delimited, tables
from rankclip_jax.common.errors import InputError


def read(path, text=None, written="utf-8", **options):
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode(written))
    table = tables.read_table(str(path), **options)
    rows = list(zip(table.images.to_pylist(), table.texts.to_pylist(), strict=True))
    return rows, table.numbers.tolist(), table.bad


PIECES = ["a", "b c", "\u2603", "\U0001f600", "", " ", ";", "x\ty", "it's"]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_pythons_csv_writes_is_read_back_in_both_ways(seed, end, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    everything = seed % 2 or end == "\r"  # else csv leaves line ends that are not its own unquoted
    pieces = [*PIECES, ",", '"', '""', "two\nlines", "\n", *(["\r"] if everything else [])]
    text = lambda: "".join(rng.choice(pieces, rng.integers(0, 4)))  # noqa: E731
    rows = [(f"{i}.png", text()) for i in range(rng.integers(1, 12))]
    out = io.StringIO()
    csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL if everything else csv.QUOTE_MINIMAL).writerows(
        [("image", "caption"), *rows]
    )
    expected = rows, list(range(len(rows))), []
    assert read(tmp_path / "a.csv", out.getvalue()) == expected
    assert read(tmp_path / "b.csv", out.getvalue(), "utf-16") == expected
    monkeypatch.setattr(delimited, "_regular", lambda *args: None)
    assert read(tmp_path / "a.csv") == expected


@pytest.mark.parametrize("seed", range(200))
def test_both_ways_agree_on_any_bytes(seed, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    alphabet = [b"a", b"b", b",", b",", b"\n", b"\n", b"\r\n", b" ", b"\t", b"\xc3\xa9", b'"', b'"a"', b'""', b"\xff"]
    body = b"".join(alphabet[i] for i in rng.integers(0, len(alphabet) - 4 * (seed % 2), rng.integers(1, 60)))
    path = tmp_path / ("a.tsv" if seed % 3 == 0 else "a.csv")
    separator = b"\t" if path.suffix == ".tsv" else b","
    path.write_bytes(separator.join([b"image", b"caption"]) + b"\n0.png" + separator + b"first\n" + body)
    found = read(path, encoding="utf-8")
    monkeypatch.setattr(delimited, "_regular", lambda *args: None)
    assert read(path, encoding="utf-8") == found
    numbers = sorted([*found[1], *(number for number, _ in found[2])])
    assert numbers == list(range(len(numbers)))  # no row vanishes


GOOD = [("0.png", "first")]


@pytest.mark.parametrize(
    "name, text, rows, bad",
    [
        (
            "a.csv",
            "image,caption\n0.png,first\n1.png\n\n2.png,a,b\n  \n",
            [0],
            {1: "wrong number of fields: 1", 2: "wrong number of fields: 3"},
        ),
        ("a.csv", 'image,caption\n0.png,first\n1.png,6" pipe\n', [0, 1], {}),
        ("a.csv", 'image,caption\n0.png,first\n1.png,"open\n2.png,x\n', [0, 2], {1: "a quotation mark"}),
        ("a.tsv", 'image\tcaption\n0.png\tfirst\n1.png\t"a ""b"" c"\n2.png\t"two\nlines"\n', [0, 1, 2], {}),
        ("a.csv", "image;caption\n0.png;first\n1.png;a, b\n", [0, 1], {}),
        ("a.csv", "sep=;\nimage;caption\n0.png;first\n1.png;a, b\n", [0, 1], {}),
        ("a.csv", "SEP=;\nimage;caption\n0.png;first\n1.png;a, b\n", [0, 1], {}),
        ("a.csv", "image|x|caption\n0.png||first\n", [0], {}),
        ("a.csv", 'image\tcaption\n0.png\tfirst\n1.png\tthe "end"\n', [0, 1], {}),
        ("a.csv", "file_name,text,\n0.png,first,\n1.png,x\n", [0, 1], {}),
        (
            "a.jsonl",
            '{"image": "0.png", "caption": "first"}\n{"image": 1\n\n{"caption": "x"}\n',
            [0],
            {1: "not valid JSON", 2: "no image"},
        ),
        ("a.json", '[{"image": "0.png", "caption": "first"}, 3]', [0], {1: "not an object"}),
        (
            "a.jsonl",
            '{"image": "0.png", "caption": "first"}\r\n{"image": "1.png", "caption": null}',
            [0],
            {1: "caption: not"},
        ),
        ("a.csv", 'image,caption\n0.png,first\n1.png,"last\n\n"', [0, 1], {}),
        ("A.TSV", "image\tcaption\n0.png\tfirst\n", [0], {}),
        ("A.JSON", '[{"image": "0.png", "caption": "first"}]', [0], {}),
        (
            "A.JSONL",
            '{"image": "0.png", "caption": "first"}\n{"image": "1.png", "caption": NaN}\n{"\\ud800": 1}\n',
            [0],
            {1: "caption: not a text: NaN", 2: "no image or file_name; its keys are: ?"},
        ),
        ("a.csv", "\nimage,caption\r0.png,first\r1.png,x", [0, 1], {}),
        # As spreadsheets write rows without a filled cell, beside the table and below it.
        ("a.csv", "image,caption,,\n0.png,first,,\n,,,\n1.png,x,,\n,,,\n , ,,\n", [0, 1], {}),
        (
            "a.csv",
            "id,image,caption\n7,0.png,first\n,,\n8,,x\n9, ,y\n10,1.png,\n",
            [0, 3],
            {1: "no image path", 2: "no image path"},
        ),
        (
            "a.jsonl",
            '{"image": "0.png", "caption": "first"}\n{"image": "", "caption": "x"}\n',
            [0],
            {1: "no image path"},
        ),
        ("a.csv", '"image", "caption"\n"0.png", "first"\n"1.png", "a, b"\n', [0, 1], {}),
    ],
)
def test_every_row_is_good_or_bad_by_its_number(name, text, rows, bad, tmp_path):
    found, numbers, reasons = read(tmp_path / name, text)
    assert found[0] == GOOD[0] and numbers == rows
    assert [(number, reason[: len(bad[number])]) for number, reason in reasons] == list(bad.items())
    assert read(tmp_path / f"{name}.gz", gzip.compress(text.encode())) == (found, numbers, reasons)
    assert read(tmp_path / name, text, "utf-16") == (found, numbers, reasons)


@pytest.mark.parametrize(
    "given, expected",
    [
        (["plain", '"a red, round thing"', '"a 5"" disc"'], ["plain", "a red, round thing", 'a 5" disc']),  # Excel's
        (["plain", '"a red, round thing"'], ["plain", "a red, round thing"]),
        (["a, b", '"a red, round thing"'], None),  # Excel would have quoted the first
        (["plain", '"so it is"'], None),
        (['the "end"', '"a red, round thing"'], None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_tsv_is_quoted_where_a_program_quoted_it(given, expected, encoding, tmp_path):
    lines = [f"{i}.png\t{text}\r\n" for i, text in enumerate(given)]
    rows, _, bad = read(tmp_path / "a.tsv", "image\tcaption\r\n" + "".join(lines), encoding)
    assert [text for _, text in rows] == (expected or given) and not bad


@pytest.mark.parametrize("text", ["η γάτα κάθεται στο τραπέζι", "музе́й щено́к", "mèo ngồi trên bàn ghế"])
def test_accents_of_their_own_are_no_other_script(text, tmp_path):
    text = unicodedata.normalize("NFD", text)
    assert read(tmp_path / "a.csv", f"image,caption\n0.png,{text}\n")[0] == [("0.png", text)]


def test_addresses_of_local_files_are_their_paths(tmp_path):
    text = "image,caption\na.png,x\nfile:///d/b%20c.png,x\nFILE://localhost/d/e.png,x\nfiles/file://f,x\ngs://g/h%20i,x\n"
    (tmp_path / "a.csv").write_text(text)
    images = tables.read_table(str(tmp_path / "a.csv")).images.to_pylist()
    assert images == ["a.png", "/d/b c.png", "/d/e.png", "files/file://f", "gs://g/h%20i"]


def test_a_thousand_ragged_rows_are_one_short_reason(tmp_path):
    found, _, bad = read(tmp_path / "a.csv", "image,caption\n0.png,first\n" + "1.png,a,b\n" * 1000)
    assert found == GOOD and [number for number, _ in bad] == list(range(1, 1001)) and len({why for _, why in bad}) == 1


def test_cocos_captions_find_their_folder(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "5.jpg").write_bytes(b"")
    images = [{"id": id, "file_name": f"{id}.jpg"} for id in (4, 5, 6)]  # 4.jpg is not there
    captions = [(4, "gone"), (5, "one"), (7, "lost"), (5, "two")]
    coco = {"images": images, "annotations": [{"image_id": image, "caption": text} for image, text in captions]}
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(coco))
    table = tables.read_table(str(path))
    assert table.images.to_pylist() == ["4.jpg", "5.jpg"] and table.texts.to_pylist() == [["gone"], ["one", "two"]]
    assert (tmp_path / "val2017").samefile(table.folder)
    assert [number for number, _ in table.bad] == [2, 3]


def test_damaged_annotations_and_images_of_coco_are_bad_rows(tmp_path):
    right = {"image_id": 5, "caption": "one"}
    annotations = [3, "caption", {"caption": "x", "image_id": [1]}, right]
    images = [7, {"id": [], "file_name": "6.jpg"}, {"id": 5, "file_name": "5.jpg"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    table = tables.read_table(str(path))
    assert table.images.to_pylist() == ["5.jpg"] and table.texts.to_pylist() == ["one"]
    assert [number for number, _ in table.bad] == [0, 1, 3, 4, 5] and "not an annotation: 3" in table.bad[2][1]


@pytest.mark.parametrize("depth", [900, 5_000, 100_000])  # which of them is too deep, and for what, depends on Python
def test_lists_in_lists_are_one_bad_row(depth, tmp_path):
    deep = '{"image": "a", "m": ' + "[" * depth + "]" * depth + "}"
    path = tmp_path / "a.jsonl"
    path.write_text(f'{deep}\n{{"image": "b", "m": {{"c": "x"}}}}\n')
    table = tables.read_table(str(path), text_keys=["m:c"])
    assert table.images.to_pylist() == ["b"] and [row for row, _ in table.bad] == [0]
    reasons = "m:c: lists nested too deeply", "m:c: not a text: [[[", "not valid JSON: nested too deeply"
    assert table.bad[0][1].startswith(reasons)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.json", b'{"images": [], "annotations": 3}', "expected COCO's captions"),
        ("a.csv", b"PK\3\4 and so on", "is an Excel or zip file"),
        ("a.csv", "image,caption\n".encode("utf-16-le"), "looks like UTF-16 without a mark"),
        ("a.csv", b"\xff\xfei\0m\0a", "is not utf-16-le at byte"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"image,caption\n", "has no rows below its header"),
        ("a.csv", b"image,caption\n0.png\n", "has no good rows: row 0: wrong number of fields: 1"),
        (
            "a.csv",
            b"picture,caption\n0.png,x\n",
            r"has no column 'image' or 'file_name'; its columns are: picture, caption",
        ),
        ("a.csv", b"image,caption,caption \n0.png,x,y\n", "has 2 columns 'caption'; rename all but one"),
        ("a.csv.gz", b"\x1f\x8b\x08 torn", "not a complete .gz file"),
        ("a.json", b"{", "is not valid JSON"),
    ],
)
def test_what_is_no_table_is_called_what_it_is(name, data, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(tmp_path / name, data)
