import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from input_pipeline import download, download_stats, url_list
from rankclip_jax.common.errors import InputError

REPO = Path(__file__).parents[2]
DRIVER = REPO / "input_pipeline/img2dataset_driver.py"


def picture(size, seed, kind="JPEG"):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


SMALL = {f"/small/{i}.jpg": picture((60, 40), i) for i in range(6)}
LARGE = {f"/large/{i}.jpg": picture((640, 480), i) for i in range(3)}
PNG = picture((60, 40), 9, "PNG")


ASKED = Counter()


class Web(BaseHTTPRequestHandler):
    """Good images, and what else the web has."""

    def do_GET(self):
        ASKED[self.path] += 1
        good = (SMALL | LARGE | {"/drawing.png": PNG}).get(self.path)
        half = SMALL["/small/0.jpg"][:400]
        match self.path.strip("/").split("/")[0]:
            case _ if good is not None:
                self.answer(good)
            case "page":
                self.answer(b"<!DOCTYPE html><html><body>This image has moved.</body></html>")
            case "half":
                self.answer(half)
            case "cut":
                self.answer(half, length=2 * len(half))
            case "mute":
                time.sleep(5)
            case "slow":
                self.drip(b"x" * 1000)
            case "slow-header":
                self.drip(b"HTTP/1.0 200 OK\r\nX-Long: " + b"x" * 1000, header=False)
            case "to":
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
            case "noai":
                self.answer(good or SMALL["/small/1.jpg"], header=("X-Robots-Tag", "noai"))
            case _:
                self.send_error(404)

    def answer(self, data, length=None, header=None):
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(data)))
        if header:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(data)

    def drip(self, data, header=True):
        if header:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
        try:
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass  # the other side had enough

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64


@pytest.fixture(scope="module")
def web():
    server = Server(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


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
    lines = ["a cat\thttp://a/1.jpg", "\thttp://a/2.jpg", "no link\t", "one column", "", "a\u2028dog\thttp://a/3.jpg"]
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    expected = [("http://a/1.jpg", "a cat"), ("http://a/3.jpg", "a\u2028dog")]
    assert listed(tmp_path / "list.tsv", tmp_path / "out") == ((2, 3), expected)  # an empty line is no row


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


def fetch_with_limits(url, timeout, private=True):
    """What the driver's urlopen makes of an answer, in a process of its own."""
    env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    env |= {"RANKCLIP_DOWNLOAD_PRIVATE": "1"} if private else {}
    script = (
        "import runpy, sys, urllib.request; runpy.run_path(sys.argv[1], run_name='worker')\n"
        "print(len(urllib.request.urlopen(sys.argv[2], timeout=float(sys.argv[3])).read()))"
    )
    command = [sys.executable, "-c", script, DRIVER, url, str(timeout)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_an_answer_is_bounded_in_time_and_must_be_whole(web):
    assert int(fetch_with_limits(f"{web}/large/0.jpg", 5).stdout) == len(LARGE["/large/0.jpg"])
    assert "TimeoutError: slower than 0.75 s" in fetch_with_limits(f"{web}/slow", 0.25).stderr
    assert "slower than 0.75 s" in fetch_with_limits(f"{web}/slow-header", 0.25).stderr
    assert "slower than 0.75 s" in fetch_with_limits(f"{web}/to/{web}/slow-header", 0.25).stderr
    assert "IncompleteRead" in fetch_with_limits(f"{web}/cut", 5).stderr
    assert "timed out" in fetch_with_limits(f"{web}/mute", 0.2).stderr


def test_only_public_hosts_are_asked_and_only_by_http(web):
    picture = f"{web}/small/0.jpg"
    assert int(fetch_with_limits(f"{web}/to/{picture}", 5).stdout) == len(SMALL["/small/0.jpg"])
    for url in (picture, picture.replace("127.0.0.1", "localhost")):
        ASKED.clear()
        assert "not a public address" in fetch_with_limits(url, 5, private=False).stderr and not ASKED
    assert "redirected to ftp" in fetch_with_limits(f"{web}/to/ftp://127.0.0.1/x.jpg", 5).stderr
    assert "HTTP Error 302" in fetch_with_limits(f"{web}/to/file:///etc/hostname", 5).stderr
    assert "unknown url type: ftp" in fetch_with_limits("ftp://127.0.0.1/x.jpg", 5).stderr


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


def test_wrong_input_is_said_in_one_line(tmp_path, monkeypatch):
    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["download", *map(str, arguments), "--env", str(tmp_path / "env")])
        with pytest.raises(SystemExit) as stop:
            download.main()
        return stop.value.code

    assert refused(tmp_path / "gone.tsv", tmp_path / "out") == f"error: {tmp_path}/gone.tsv: No such file or directory"
    (tmp_path / "list.tsv").write_text("a cat\thttp://a/1.jpg\n")
    assert "Not a directory" in refused(tmp_path / "list.tsv", tmp_path / "list.tsv/out")
    assert "no column 'x'" in refused(tmp_path / "list.tsv", tmp_path / "out", "--url-column", "x")
    assert refused(tmp_path / "list.tsv", tmp_path / "out", "--quality", "0") == 2
    assert "no img2dataset in" in refused(tmp_path / "list.tsv", tmp_path / "out")


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """An environment that has img2dataset: the user's, or one made as the documents say."""
    try:
        download.find_python(download.ENV)
        return download.ENV
    except InputError:
        folder = tmp_path_factory.mktemp("env")
    made = subprocess.run(download.INSTALL.format(folder), shell=True, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs img2dataset: {made.stderr[-300:]}")
    return folder


@pytest.mark.slow
def test_what_can_be_had_is_there_and_what_not_is_counted_by_reason(web, env, tmp_path):
    good = [*SMALL, *LARGE, "/drawing.png"]
    bad = ["/dead/1.jpg", "/dead/2.jpg", "/page/x", "/half/x", "/cut/x", "/mute/x", "/slow/x", "/noai/x"]
    bad += ["/slow-header/x", "/to/ftp://127.0.0.1/x.jpg"]
    urls = [web + path for path in [*good, *bad]]
    urls += ["http://127.0.0.1:1/refused.jpg", "http://no-such-host.invalid/x.jpg"]
    (tmp_path / "list.tsv").write_text("".join(f'a "{i}\t{url}\n' for i, url in enumerate(urls)))
    options = download._flags().parse_args([str(tmp_path / "list.tsv"), str(tmp_path / "out")])
    vars(options).update(shard_size=10, short_side=120, processes=1, threads=20, timeout=2, retries=0, env=env)
    options.private = True
    counts, total = download.download(options.urls, options.out_dir, options)
    assert total == len(urls) == counts.total()
    assert counts == {
        "images": len(good),
        "HTTP Error 404: Not Found": 2,
        "not an image, or a broken one": 2,  # the page and the half
        "the connection broke off": 1,
        "no answer in time": 1,
        "slower than 6 s": 2,
        "redirected to ftp": 1,
        "the site asks not to use it (X-Robots-Tag)": 1,
        "the host refuses connections": 1,
        "no such host any more": 1,
    }
    found = {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
    images = {found[f"{key}.txt"].decode(): found[f"{key}.jpg"] for key in {name.split(".")[0] for name in found}}
    assert sorted(images) == sorted(f'a "{i}' for i in range(len(good)))
    for i, path in enumerate(good):
        image = Image.open(io.BytesIO(images[f'a "{i}']))
        assert image.size == ((160, 120) if path in LARGE else (60, 40))
        if path in SMALL:
            assert images[f'a "{i}'] == SMALL[path]

    # The second shard is lost in the middle of writing: only its URLs are asked for again.
    (tmp_path / "out/00001_stats.json").unlink()
    (tmp_path / "out/00001.tar").write_bytes(b"torn")
    before = ASKED.copy()
    assert download.download(options.urls, options.out_dir, options) == (counts, total)
    assert {path for path in ASKED - before} == set(bad)
    with pytest.raises(InputError, match="was downloaded with another --short-side; give another folder"):
        options.short_side = 99
        download.download(options.urls, options.out_dir, options)
