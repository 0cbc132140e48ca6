import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from input_pipeline import download, download_stats, url_list
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import at_work

REPO = Path(__file__).parents[2]


def listed(path, out, **columns):
    counts = url_list.normalise(path, out, columns.get("url"), columns.get("caption"))
    return counts, [(row["url"], row["caption"]) for row in pq.read_table(out).to_pylist()]


PAIRS = [("http://a/1.jpg", 'a "quoted cat'), ("https://b/2.jpg", "ünïcode, with comma 🙂")]


def test_lists_as_cc3m_and_cc12m_publish_them(tmp_path):
    (tmp_path / "cc3m.tsv").write_text("".join(f"{caption}\t{url}\n" for url, caption in PAIRS))
    (tmp_path / "cc12m.tsv").write_text("".join(f"{url}\t{caption}\r\n" for url, caption in PAIRS))
    (tmp_path / "cc3m.tsv.gz").write_bytes(gzip.compress((tmp_path / "cc3m.tsv").read_bytes()))
    for name in ("cc3m.tsv", "cc12m.tsv", "cc3m.tsv.gz"):
        assert listed(tmp_path / name, tmp_path / "out") == ((2, 0), PAIRS), name


def test_lists_with_a_header(tmp_path):
    (tmp_path / "a.csv").write_text(
        '\ufeffid,caption,link\n1,"a ""quoted cat",http://a/1.jpg\n2,"ünïcode, with comma 🙂",https://b/2.jpg\n'
    )
    (tmp_path / "b.tsv").write_text("TEXT\tURL\tid\n" + "".join(f"{c}\t{u}\t7\n" for u, c in PAIRS))
    (tmp_path / "c.tsv").write_text("about\tURL\tcaption\n" + "".join(f"{c}\t{u}\tother\n" for u, c in PAIRS))
    pq.write_table(
        pa.table({"n": [1, 2], "url": [p[0] for p in PAIRS], "text": [p[1] for p in PAIRS]}), tmp_path / "d.parquet"
    )
    for name, columns in (("a.csv", {}), ("b.tsv", {}), ("c.tsv", {"caption": "about"}), ("d.parquet", {})):
        assert listed(tmp_path / name, tmp_path / "out", **columns) == ((2, 0), PAIRS), name


LINES = "url\tcaption\r\n" + "".join(f"{url}\t{caption}\r\n" for url, caption in PAIRS)


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.tsv", LINES.encode("utf-16")),
        ("a.tsv.gz", gzip.compress(LINES.encode("utf-8-sig"))),
        ("a.txt", b"\xfe\xff" + LINES.partition("\n")[2].encode("utf-16-be")),
        ("a.csv", ('sep=;\nurl;caption\nhttp://a/1.jpg;"a ""quoted cat"\n' + ";".join(PAIRS[1]) + "\n").encode()),
        ("a.jsonl", "".join(json.dumps({"n": 1, "url": u, "TEXT": c}) + "\n" for u, c in PAIRS).encode("utf-8-sig")),
        ("a.json.gz", gzip.compress(json.dumps([{"caption": c, "link": u, "n": None} for u, c in PAIRS]).encode())),
        (
            "captions.json",
            json.dumps(
                {
                    "images": [{"id": i, "file_name": f"{i}.jpg", "coco_url": u} for i, (u, _) in enumerate(PAIRS)],
                    "annotations": [{"image_id": i, "caption": c} for i, (_, c) in enumerate(PAIRS)],
                }
            ).encode(),
        ),
    ],
)
def test_lists_as_any_table(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert listed(tmp_path / name, tmp_path / "out") == ((2, 0), PAIRS)


def test_captions_of_lists_may_be_several_or_of_another_encoding(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"url": "http://a/1", "caption": ["one ", "two"]}\n{"url": "http://a/2"}\n')
    assert listed(tmp_path / "a.jsonl", tmp_path / "out") == ((1, 1), [("http://a/1", "one\ntwo")])
    (tmp_path / "a.csv").write_text("http://a/1,une fen\xeatre\nhttp://a/2,a,b\n", encoding="latin-1")
    counts = url_list.normalise(tmp_path / "a.csv", tmp_path / "out", None, None, "latin-1")
    assert counts == (1, 1) and pq.read_table(tmp_path / "out").to_pylist()[0]["caption"] == "une fen\xeatre"
    pq.write_table(pa.table({"url": ["http://a/1"], "text": [["one", None, "two"]]}), tmp_path / "a.parquet")
    assert listed(tmp_path / "a.parquet", tmp_path / "out") == ((1, 0), [("http://a/1", "one\ntwo")])


def test_lines_without_a_url_or_a_caption_are_counted(tmp_path):
    lines = ["a cat\thttp://a/1.jpg", "\thttp://a/2.jpg", "no link\t", "one column", "", "a\u2028dog\tHTTP://a/3.jpg"]
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    expected = [("http://a/1.jpg", "a cat"), ("HTTP://a/3.jpg", "a\u2028dog")]
    assert listed(tmp_path / "list.tsv", tmp_path / "out") == ((2, 3), expected)  # an empty line is not a row


def test_lists_longer_than_a_chunk_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(url_list, "_ROWS", 7)
    (tmp_path / "list.tsv").write_text("".join(f"caption {i}\thttp://a/{i}.jpg\n" for i in range(2500)))
    counts, rows = listed(tmp_path / "list.tsv", tmp_path / "out")
    assert counts == (2500, 0) and rows == [(f"http://a/{i}.jpg", f"caption {i}") for i in range(2500)]


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.tsv", "", "is empty"),
        ("a.tsv", "one\ttwo\nthree\tfour\n", "no column of http.s. URLs"),
        (
            "a.csv",
            "url,x,y\nhttp://a/1,b,c\n",
            "which column has the captions; add --caption-column; its columns: url, x, y",
        ),
        ("a.tsv", "http://a/1.jpg\n", "which column has the captions"),
        ("a.csv", "page,photo,text\nhttp://a,http://b,c\n", "which column has the URLs; add --url-column; its"),
        (
            "a.csv",
            "caption,url\n\udcff,http://a/1\n",
            r"a.csv row 0: byte 0xff is not utf-8 .*download have --encoding",
        ),
        ("a.parquet", "no parquet", "cannot be read as Parquet"),
        ("a.csv", "PK\3\4", "is an Excel or zip file"),
        ("a.jsonl", "[1]\n", "is empty"),
        ("a.tsv.gz", "\x1f\udc8bno gzip", "not a complete .gz file"),
    ],
)
def test_wrong_lists_say_so(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=says):
        listed(tmp_path / name, tmp_path / "out")


def test_of_several_columns_of_urls_the_one_named_so_is_taken(tmp_path):
    rows = "language\tpage_url\timage_url\tcaption\nen\thttp://a/page\thttp://a/1.jpg\ta cat\n"  # WIT's
    (tmp_path / "a.tsv").write_text(rows)
    assert listed(tmp_path / "a.tsv", tmp_path / "out", caption="caption")[1] == [("http://a/1.jpg", "a cat")]
    found = listed(tmp_path / "a.tsv", tmp_path / "2", url="page_url", caption="caption")
    assert found[1] == [("http://a/page", "a cat")]


def test_columns_that_are_not_there_say_so(tmp_path):
    (tmp_path / "a.tsv").write_text("a cat\thttp://a/1.jpg\n")
    with pytest.raises(InputError, match=r"no column 'link'; its columns: 2 without names"):
        listed(tmp_path / "a.tsv", tmp_path / "out", url="link")
    with pytest.raises(InputError, match=r"no such file: .*gone\.tsv"):
        listed(tmp_path / "gone.tsv", tmp_path / "out")


@pytest.mark.parametrize(
    "message, words",
    [
        ("HTTP Error 404: Not Found", "HTTP Error 404: Not Found"),
        ("<urlopen error [Errno -2] Name or service not known>", "no such host any more"),
        ("<urlopen error timed out>", "no answer in time"),
        ("slower than 60 s for one image", "slower than 60 s"),
        ("<urlopen error not a public address (see --private)>", "not a public address"),
        ("IncompleteRead(0 bytes read, 400 more expected)", "the connection broke off"),
        ("<urlopen error [Errno 111] Connection refused>", "the host refuses connections"),
        ("Image decoding error", "not an image, or a broken one"),
        ("Use of image disallowed by X-Robots-Tag directive", "the site asks not to use it (X-Robots-Tag)"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] x>", "no secure connection (certificate)"),
        ("unknown url type: 'abc1'", "unknown url type: ..."),
        ("", "no message"),
    ],
)
def test_reasons_in_words_that_many_share(message, words):
    assert download_stats.reason(message) == words


def test_the_table_adds_up(tmp_path):
    dead = {"success": 60, "HTTP Error 404: Not Found": 30, "HTTP Error 410: Gone": 4, "<urlopen error timed out>": 5}
    for shard in range(2):
        stats = {"count": 100, "successes": 60, "status_dict": dead}
        (tmp_path / f"0000{shard}_stats.json").write_text(json.dumps(stats))
    (tmp_path / "00002_stats.json").write_text('{"count": 1')
    counts = download_stats.count(tmp_path, 250)
    assert counts == {
        "images": 120,
        "HTTP Error 404: Not Found": 60,
        "HTTP Error 410: Gone": 8,
        "no answer in time": 10,
        "lost without a reason": 2,
        "shards not finished": 50,
    }
    text = download_stats.summary(counts, tmp_path, 250)
    assert "120 of 250 URLs gave an image (48.0%)" in text and "60   24.0%  HTTP Error 404: Not Found" in text
    assert "the same command resumes" in text and "train with" not in text


def test_each_stats_file_is_read_once_when_it_is_whole(tmp_path, monkeypatch):
    def write(shard, images, torn=False):
        text = json.dumps({"count": 10, "successes": images, "status_dict": {"success": images}})
        (tmp_path / f"{shard:05d}_stats.json").write_text(text[: len(text) // (1 + torn)])

    read, whole = [], download_stats.read
    monkeypatch.setattr(download_stats, "read", lambda path: read.append(path.name) or whole(path))
    finished = download_stats.Finished(tmp_path)
    assert finished.new() == {} and (finished.urls, finished.images) == (0, 0)
    write(1, 7)
    write(0, 4)
    write(2, 9, torn=True)
    (tmp_path / "notes_stats.json").write_text("{}")
    assert list(finished.new()) == ["00000.tar", "00001.tar"]
    write(2, 9)
    assert list(finished.new()) == ["00002.tar"] and finished.new() == {}
    assert (finished.urls, finished.images) == (30, 20)
    assert read == [f"{shard:05d}_stats.json" for shard in (0, 1, 2, 2)]


def test_an_environment_that_has_img2dataset_is_used(tmp_path, monkeypatch):
    def environment(name, has_it):
        python = tmp_path / name / "bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\nexit {1 - has_it}\n")
        python.chmod(0o755)
        return python

    here = lambda found: monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: found)  # noqa: E731
    given, cached = environment("given", True), environment("cached", True)
    monkeypatch.setattr(download, "ENV", tmp_path / "cached")
    here("a spec")
    assert download.find_python(None) == Path(sys.executable) and download.find_python(tmp_path / "given") == given
    here(None)
    assert download.find_python(None) == cached
    environment("my env", False)
    for name in ("my env", "nothing"):
        with pytest.raises(InputError) as error:
            download.find_python(tmp_path / name)
        quoted = f"'{tmp_path}/my env'" if name == "my env" else f"{tmp_path}/nothing"
        assert str(error.value) == (
            f"no img2dataset in {tmp_path / name}; install it: "
            f"python3 -m venv {quoted} && {quoted}/bin/pip install 'img2dataset>=1.47,<2' standard-imghdr"
        )
    documented = (REPO / "docs/data.md").read_text()
    assert download.INSTALL.format("~/.cache/rankclip_jax/img2dataset").replace(" && ", "\n") in documented


def test_wrong_input_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["download", *map(str, arguments), "--env", str(tmp_path / "env")])
        with pytest.raises(SystemExit) as stop:
            download.main()
        return stop.value.code

    assert refused(tmp_path / "gone.tsv", tmp_path / "out") == f"error: {tmp_path}/gone.tsv: No such file or directory"
    (tmp_path / "list.tsv").write_text("a cat\thttp://a/1.jpg\n")
    assert refused(tmp_path / "list.tsv", "gs://mine/cc3m") == 2
    message = "OUT_DIR must be a local path; copy it to gs://mine/cc3m when it is complete"
    assert message in capsys.readouterr().err and not (tmp_path / "gs:").exists()
    assert "Not a directory" in refused(tmp_path / "list.tsv", tmp_path / "list.tsv/out")
    assert "no column 'x'" in refused(tmp_path / "list.tsv", tmp_path / "out", "--url-column", "x")
    for wrong in ("--quality=0", "--threads=0", "--retries=-1"):
        assert refused(tmp_path / "list.tsv", tmp_path / "out", wrong) == 2
    assert "no img2dataset in" in refused(tmp_path / "list.tsv", tmp_path / "out")
    with at_work(tmp_path / "out", "download", ""):
        second = refused(tmp_path / "list.tsv", tmp_path / "out")
    assert second == f"error: another download is at work in {tmp_path}/out; wait for its end, or give another OUT_DIR"
