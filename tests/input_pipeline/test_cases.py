"""Each case of tests/support/cases.py by its name, with what it gives; and one table, one tar through every reader."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import contact_sheet, labelled, pipeline, prepare, sources
from input_pipeline.bad_samples import BadSamples
from input_pipeline.rows import read_rows
from rankclip_jax.common.errors import InputError
from rankclip_jax.config import complete, eval_set
from rankclip_jax.evaluation.prompts import prompts_of
from rankclip_jax.inference.pictures import open_pictures
from rankclip_jax.study.data import read_pairs
from tests.support import cases


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    cases.tables(folder / "tables")
    cases.tars(folder / "tars")
    cases.folders(folder)
    return folder


def data(kind, path, **keys):
    return complete({"data": dict(format=kind, train=str(path), **keys)}).data


def read(spec):
    """({number of the picture: captions}, {row or file: why it is bad}) of a training source."""
    source = sources.open_source(spec, spec.train, image_side=8)
    rows = list(read_rows(source, range(source.size)))
    known = {cases.jpeg(i): i for i in range(60)}
    bad = {source.where(row.number).split(":")[0].split("/")[-1]: row.reason for row in rows if row.reason}
    bad |= {one.where.split("/")[-1]: one.reason for one in source.lost}
    return [(known[row.image], row.captions) for row in rows if not row.reason], bad


def things(count, text="a thing number {}", rows=None):
    return [(i, (text.format(i),)) for i in (rows or range(count))]


COMMAS = "wrong number of fields: 3, and the header has 2; a text with ',' in it needs quotation marks"
STRAY = [(i, ({7: '"we are open', 33: 'the "end" of the road'}.get(i, f"a thing number {i}"),)) for i in range(60)]
ALONE = "no caption: no member ends in .txt or .caption or .txt.gz or .caption.gz"
LINES = [(i, (f"a thing {i}", f"thing number {i}", "one thing")) for i in range(40)]
PAIRS = [
    ("bom_crlf.csv", {}, things(60), {}),
    ("blank_in_header.csv", {}, things(60), {}),
    ("semicolon.csv", {"delimiter": ";"}, things(60), {}),
    ("semicolon.csv", {}, things(60), {}),
    ("latin1.csv", {"encoding": "latin-1"}, things(60, "une fen\xeatre n\xb0 {}"), {}),
    ("gb18030.csv", {"encoding": "gb18030"}, things(60, "\u4e00\u53ea\u732b {}"), {}),
    ("utf16.csv", {}, things(60), {}),
    (
        "one_bad_byte.csv",
        {"encoding": "utf-8"},
        things(60, rows=[i for i in range(60) if i != 41]),
        {"one_bad_byte.csv row 41": "byte 0xff is not utf-8"},
    ),
    ("stray_quotes.tsv", {}, STRAY, {}),
    (
        "unquoted_commas.csv",
        {},
        things(60, "a thing {}", [i for i in range(60) if i % 3]),
        {f"unquoted_commas.csv row {i}": COMMAS for i in range(0, 60, 3)},
    ),
    ("one_field_more.csv", {}, things(60), {}),
    ("newline_last.csv", {}, things(60, "a thing {}\n"), {}),
    ("metadata.jsonl", {}, things(60, "a thing {}"), {}),
    ("some_dots.tar", {}, things(40), {}),
    ("all_dots.tar", {}, things(40), {}),
    ("doubled.tar", {}, things(40), {}),
    (
        "two_pictures_one_text.tar",
        {},
        things(40, rows=range(20, 40)),
        {f"two_pictures_one_text.tar key {i:05d}": ALONE for i in range(20)},
    ),
    ("caption_in_json.tar", {"caption_key": "json:caption"}, things(40, "a thing {}"), {}),
    ("three_lines.tar", {"captions_per_line": True}, LINES, {}),
]


@pytest.mark.parametrize("name, keys, pairs, bad", PAIRS)
def test_pairs(made, name, keys, pairs, bad, capsys):
    kind, folder = ("webdataset", "tars") if name.endswith(".tar") else ("csv", "tables")
    assert read(data(kind, made / folder / name, **keys)) == (pairs, bad)
    guessed = name == "semicolon.csv" and not keys
    assert ("its columns are separated by ';', not by ','" in capsys.readouterr().err) == guessed


@pytest.mark.parametrize(
    "name, keys, message",
    [
        ("latin1.csv", {}, r"latin1.csv row 0: byte 0xea is not utf-8 .*set config.data.encoding"),
        ("gb18030.csv", {}, r"gb18030.csv row 0: .*byte.* 0x.*set config.data.encoding"),
        ("one_bad_byte.csv", {}, r"one_bad_byte.csv row 41: byte 0xff is not utf-8 .*set config.data.encoding"),
        (
            "not_adjacent.tar",
            {},
            r"not_adjacent.tar has no sample: members of one key .* not adjacent.*tar --sort=name",
        ),
        ("caption_in_json.tar", {"caption_key": "json"}, r"Expected for example json:caption"),
        ("caption_in_json.tar", {}, r"caption_key=json:FIELD"),
    ],
)
def test_what_is_refused_names_the_cause(made, name, keys, message):
    kind, folder = ("webdataset", "tars") if name.endswith(".tar") else ("csv", "tables")
    with pytest.raises(InputError, match=message) as error:
        read(data(kind, made / folder / name, **keys))
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("typed", ["\\t", "tab", "\t"])
def test_a_tab_as_typed_in_a_shell(typed):
    assert complete({"data": {"format": "csv", "delimiter": typed}}).data.delimiter == "\t"


def zero_shot(**fields):
    spec = eval_set("zero_shot", fields)
    return spec, labelled.open_labelled(spec, image_side=8)


def test_labels_by_name(made):
    _, found = zero_shot(path=str(made / "tables/labels_by_name.csv"), label_key="group")
    assert found.names == ["face", "flag", "food"]
    assert found.source.labels.tolist() == [[1, 2, 0][i % 3] for i in range(60)]


def test_labels_from_1_are_told(made, capsys):
    _, found = zero_shot(path=str(made / "tables/labels_from_1.csv"), classes=str(made / "tables/ten_classes.json"))
    assert found.source.labels.tolist() == [i % 9 + 1 for i in range(60)]
    assert "labels_from_1.csv: no row has class 0, the classes are 1 to 9" in capsys.readouterr().err


def test_numbered_folders_are_in_order_with_every_readable_ending(made):
    _, found = zero_shot(format="folder", path=str(made / "numbered"))
    assert found.names == [str(i) for i in range(1, 11)] and found.source.size == 30
    assert found.source.labels.tolist() == np.repeat(range(10), 3).tolist()


def test_numbers_without_names_say_what_is_assumed(made, tmp_path, capsys):
    prompts_of("mine", *zero_shot(format="folder", path=str(made / "numbered")))
    assert "mine: the classes are numbers, used in prompts as they are; name them in" in capsys.readouterr().out
    (tmp_path / "labels.csv").write_text("image,label\n" + "".join(f"{i}.png,{i}\n" for i in range(10)))
    fields = {"path": str(tmp_path / "labels.csv"), "label_key": "label", "protocol": "openai"}
    assert prompts_of("stl10", *zero_shot(**fields)).names[6] == "horse"
    assert "stl10: the labels are numbers without names; 0 is taken for 'airplane'" in capsys.readouterr().out
    fields["classes"] = str(made / "tables/ten_classes.json")
    assert prompts_of("stl10", *zero_shot(**fields)).names == json.loads(Path(fields["classes"]).read_text())
    assert capsys.readouterr().out == ""


def test_a_validation_set_smaller_than_a_batch_is_padded(made):
    spec = data("csv", made / "tables/five.csv")
    source = sources.open_source(spec, spec.train, image_side=8)
    (batch,) = pipeline.eval_batches(source, batch_size=8, image_side=8)
    assert batch["mask"].tolist() == [True] * 5 + [False] * 3
    assert batch["caption"][:5] == [f"a thing number {i}" for i in range(5)]


def test_a_thousand_bad_rows_are_a_short_line(tmp_path, capsys):
    cases.images(tmp_path, 1)
    lines = ["image,caption", "images/0000.jpg,a thing", *["images/0000.jpg,a, thing"] * 1000]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    spec = data("csv", tmp_path / "a.csv")
    source = sources.open_source(spec, spec.train, image_side=8)
    bad = BadSamples(source, tmp_path / "bad.jsonl")
    said = capsys.readouterr().err
    assert said == f"bad samples skipped: about 1,000 samples of {tmp_path}/a.csv row 1 and 999 more: {COMMAS}\n"
    assert bad.summary() == f"1,000 unusable samples skipped: 1,000 {COMMAS}"
    written = [json.loads(line)["where"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert written == [f"{tmp_path}/a.csv row {i}" for i in range(1, 1001)]
    BadSamples(source, tmp_path / "bad.jsonl")  # a resumed run lists them once
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1000
    with pytest.raises(InputError, match=r"^1000 of about 1001 samples are lost, more than config.data.max_bad_fra"):
        BadSamples(source, max_fraction=0.1)


def test_a_row_that_is_bad_in_every_epoch_is_looked_at_once(made, tmp_path):
    asked, spec = [], data("csv", made / "tables/five.csv")
    source = sources.open_source(spec, spec.train, image_side=8)
    source = dataclasses.replace(source, where=lambda row: asked.append(f"where {row}") or f"row {row}")
    bad = BadSamples(source, tmp_path / "bad.jsonl")

    def sample(position):
        asked.append(f"read {int(position)}")
        raise InputError("broken")

    for epoch in range(3):  # positions of rows 1 and 3
        bad.check(3, [5 * epoch + 1, 5 * epoch + 3], lambda position: position % 5, sample)
    assert asked == ["read 1", "where 1", "read 3", "where 3"]
    assert bad.seen == 15 and bad.count == 6 and bad.reasons == {"broken": 2}
    assert [json.loads(line)["row"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [1, 3]


def test_prepare_lists_the_rows_that_it_could_not_reach(made, tmp_path, monkeypatch):
    table, out = made / "tables/unquoted_commas.csv", tmp_path / "out"
    for _ in range(2):  # the second run resumes
        monkeypatch.setattr(sys, "argv", ["prepare", str(table), str(out), "--config.data.max_bad_fraction=1"])
        prepare.main()
        lines = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
        assert [line["where"] for line in lines] == [f"{table} row {i}" for i in range(0, 60, 3)]


def test_leftovers_are_no_classes(made):
    assert zero_shot(format="folder", path=str(made / "with_leftovers"))[1].names == ["cat", "dog"]


def test_wordnet_folders_get_imagenets_names(made, tmp_path, capsys):
    prompts = prompts_of("mine", *zero_shot(format="folder", path=str(made / "imagenet/val")))
    assert prompts.names == ["tench", "goldfish", "toilet paper"] and len(prompts.templates) == 80
    assert "3 of ImageNet's 1,000 classes have pictures; ranked among 3" in capsys.readouterr().out
    (tmp_path / "n15075141").mkdir()
    cases.picture(0).save(tmp_path / "n15075141" / "0.png")
    assert prompts_of("mine", *zero_shot(format="folder", path=str(tmp_path))).names == ["toilet paper"]
    (tmp_path / "n00000001").mkdir()  # not one of the 1,000
    names = prompts_of("mine", *zero_shot(format="folder", path=str(tmp_path))).names
    assert names == ["n00000001", "n15075141"]
    assert "mine: the labels are WordNet ids, not all of ImageNet's 1,000" in capsys.readouterr().out


# One table, one tar through every path that reads them.


def readers(kind, path, keys, kinds_of_eval):
    """name of the reader -> [(file of the picture, or its bytes; caption or None)]"""
    spec = data(kind, path, **keys)
    source = sources.open_source(spec, spec.train, image_side=8)
    good = [row for row in read_rows(source, range(source.size)) if not row.reason]
    found = {"training": [(row.image, row.captions[0]) for row in good]}
    opened = open_pictures(str(path), encoding=keys.get("encoding"), delimiter=keys.get("delimiter", ","))
    found["embed"] = [(opened.image(i), None) for i in range(opened.size)]
    if not source.lost:
        found["study"] = [(None, c) for c in read_pairs(spec, spec.train, side=8, canvas=32, split="train").captions]
    for name in kinds_of_eval:
        captioned = labelled.open_captioned(eval_set(name, dict(path=str(path), **keys)), image_side=8)
        images = [row.image for row in read_rows(captioned.source, range(captioned.source.size))]
        found[name] = [(images[i], text) for i, text in zip(captioned.image_of_text, captioned.captions, strict=True)]
    return found


def bytes_of(image):
    if image is None or isinstance(image, bytes):
        return image
    return image.read_bytes() if isinstance(image, Path) else image.fp.getvalue()


# One of each kind of table; the training's reader has them all in test_pairs.
QUICK = ("semicolon.csv", "latin1.csv", "one_bad_byte.csv", "unquoted_commas.csv", "newline_last.csv", "metadata.jsonl")
TABLES = [
    pytest.param(name, keys, pairs, marks=() if name in QUICK and "delimiter" not in keys else pytest.mark.slow)
    for name, keys, pairs, _ in PAIRS
    if not name.endswith(".tar")
]


@pytest.mark.parametrize("name, keys, pairs", TABLES)
def test_one_table_through_every_reader(made, name, keys, pairs, tmp_path, monkeypatch, capsys):
    path = made / "tables" / name
    for reader, rows in readers("csv", path, keys, ("retrieval", "geometry")).items():
        if (name, reader) == ("one_bad_byte.csv", "embed"):  # the byte is in the caption, which embed does not read
            rows.pop(41)
        for (image, text), (i, texts) in zip(rows, pairs, strict=True):
            assert image is None or bytes_of(image) == cases.jpeg(i), reader
            assert text is None or text.strip() == texts[0].strip(), reader
    flags = [f"--config.data.{key}={value}" for key, value in keys.items()]
    assert f"60 rows: {len(pairs)} good, {60 - len(pairs)} bad" in inspected(path, tmp_path, flags, monkeypatch, capsys)


def inspected(path, folder, flags, monkeypatch, capsys):
    monkeypatch.setattr(contact_sheet, "EXAMPLES", 1)  # drawing them takes longer than all the readers
    monkeypatch.setattr(sys, "argv", ["prepare", str(path), str(folder / "look"), "--inspect", *flags])
    capsys.readouterr()
    prepare.main()
    return capsys.readouterr().out


def test_one_tar_through_every_reader(made, tmp_path, monkeypatch, capsys):
    path = made / "tars" / "some_dots.tar"
    for reader, rows in readers("webdataset", path, {}, ()).items():
        assert len(rows) == 40
        for i, (image, text) in enumerate(rows):
            assert image is None or bytes_of(image) == cases.jpeg(i), reader
            assert text is None or text == f"a thing number {i}", reader
    assert "40 rows: 40 good, 0 bad" in inspected(path, tmp_path, [], monkeypatch, capsys)
    root = tmp_path / "set"  # the same pairs as a published set
    (root / "test").mkdir(parents=True)
    (root / "test" / "0.tar").write_bytes(path.read_bytes())
    (root / "test" / "nshards.txt").write_text("1")
    found = labelled.open_captioned(eval_set("retrieval", dict(format="clip_benchmark", path=str(root))), image_side=8)
    assert [row.image for row in read_rows(found.source, range(40))] == [cases.jpeg(i) for i in range(40)]
    assert found.captions == [f"a thing number {i}" for i in range(40)]


def test_inspect_names_bad_rows_and_lists_them(made, tmp_path, monkeypatch, capsys):
    out = inspected(made / "tables/unquoted_commas.csv", tmp_path, [], monkeypatch, capsys)
    assert "60 rows: 40 good, 20 bad" in out and f"unquoted_commas.csv row 3: {COMMAS}" in out
    lines = (tmp_path / "look" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"].split()[-1] for line in lines] == [str(i) for i in range(0, 60, 3)]
