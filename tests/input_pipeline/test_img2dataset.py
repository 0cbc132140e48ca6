"""Downloads by img2dataset itself, from a web on the loopback."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from PIL import Image

from input_pipeline import download, sources  # noqa: F401 (TensorFlow, before the clock of a download starts)
from rankclip_jax.common.errors import InputError
from tests.support.foreign import contents, fill
from tests.support.web import ASKED, LARGE, SMALL, Server, Web

DRIVER = Path(__file__).parents[2] / "input_pipeline/img2dataset_driver.py"


@pytest.fixture(scope="module")
def web():
    server = Server(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """An environment that has img2dataset: the user's, or one made as the documents say."""
    try:
        download.find_python(download.ENV)
        return download.ENV
    except InputError:
        folder = tmp_path_factory.mktemp("env")
    # Of a hundred packages a few modules are imported: these are compiled when they are, and kept for the other starts.
    quick = os.environ | {"PIP_COMPILE": "0"}
    made = subprocess.run(download.INSTALL.format(folder), shell=True, capture_output=True, text=True, env=quick)
    if made.returncode:
        pytest.skip(f"needs img2dataset: {made.stderr[-300:]}")
    return folder


@pytest.fixture(autouse=True)
def compiled_modules_are_kept(monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


@pytest.mark.slow
def test_what_can_be_had_is_there_and_what_not_is_counted_by_reason(web, env, tmp_path):
    """With two workers; and what is lost is fetched again, beside the files of others."""
    good = [*SMALL, *LARGE, "/drawing.png"]
    bad = ["/dead/1.jpg", "/dead/2.jpg", "/page/x", "/half/x", "/cut/x", "/mute/x", "/slow/x", "/noai/x"]
    bad += ["/slow-header/x", "/to/ftp://127.0.0.1/x.jpg"]
    urls = [web + path for path in [*good, *bad]]
    urls += ["http://127.0.0.1:1/refused.jpg", "http://no-such-host.invalid/x.jpg"]
    (tmp_path / "list.tsv").write_text("".join(f'a "{i}\t{url}\n' for i, url in enumerate(urls)))
    options = download._flags().parse_args([str(tmp_path / "list.tsv"), str(tmp_path / "out")])
    vars(options).update(shard_size=10, short_side=120, processes=2, threads=20, timeout=2, retries=0, env=env)
    options.private = True
    before = contents(fill(tmp_path / "theirs", ["mine.tar"]))
    with pytest.raises(InputError, match="holds files that download did not write"):
        download.download(options.urls, tmp_path / "theirs", options)
    assert contents(tmp_path / "theirs") == before
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

    # The second shard is lost in the middle of writing: only its URLs are asked for again, and all else stays.
    mine = ["mine.tar", "x.parquet", "_download/notes.txt"]
    before = contents(fill(options.out_dir, mine))
    (tmp_path / "out/00001_stats.json").unlink()
    (tmp_path / "out/00001.tar").write_bytes(b"torn")
    asked, options.processes = ASKED.copy(), 1
    assert download.download(options.urls, options.out_dir, options) == (counts, total)
    assert {path for path in ASKED - asked} == set(bad)
    after = contents(options.out_dir)
    assert after.keys() == before.keys() and all(after[name] == before[name] for name in (*mine, "00000.tar"))
    with pytest.raises(InputError, match="was downloaded with another --short-side; give another folder"):
        options.short_side = 99
        download.download(options.urls, options.out_dir, options)


@pytest.mark.slow
@pytest.mark.parametrize("distributor", ["multiprocessing", "ray", "pyspark"])
def test_limits_hold_in_the_workers_of_every_distributor(distributor, web, env, tmp_path):
    try:
        download.check_distributor(download.find_python(env), distributor)
    except InputError as error:
        pytest.skip(str(error))
    if distributor == "pyspark" and not shutil.which("java"):
        pytest.skip("needs java")
    urls = [*(f"{web}{path}" for path in SMALL), f"{web}/slow/x", f"{web}/to/ftp://127.0.0.1/x.jpg"]
    (tmp_path / "list.tsv").write_text("".join(f"picture {i}\t{url}\n" for i, url in enumerate(urls)))
    options = download._flags().parse_args([str(tmp_path / "list.tsv"), str(tmp_path / "out")])
    vars(options).update(shard_size=3, processes=2, threads=4, timeout=4, retries=0, env=env, distributor=distributor)
    if distributor == "multiprocessing":  # the test above has the limits of its workers
        options.processes = 1
    else:
        options.private = True
        counts, _ = download.download(options.urls, options.out_dir, options)
        assert counts == {"images": len(SMALL), "slower than 12 s": 1, "redirected to ftp": 1}
    options.private, options.out_dir = False, tmp_path / "public"
    ASKED.clear()
    assert download.download(options.urls, options.out_dir, options)[0] == {"not a public address": len(urls)}
    assert not ASKED


def test_a_distributor_that_is_not_there_is_named(tmp_path):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(InputError, match=f"^{python} has no ray; install it: {python} -m pip install ray$"):
        download.check_distributor(python, "ray")
