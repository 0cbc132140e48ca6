"""Addresses and paths of common/storage that are unusual or wrong."""

import http.server
import re
import threading

import pytest

from rankclip_jax import convert, embed
from rankclip_jax.common import files, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.storage import place
from rankclip_jax.report import __main__ as report
from rankclip_jax.study import __main__ as study


@pytest.fixture
def server():
    """Answers HEAD for every path but /none with the path's length, and with the date that its query names."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            path, _, date = self.path.partition("?")
            self.send_response(200)
            if path != "/none":
                self.send_header("Content-Length", str(len(path)))
            if date:
                self.send_header("Last-Modified", date)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    "path, sent", [("/a b.jpg", "/a%20b.jpg"), ("/ä.jpg", "/%C3%A4.jpg"), ("/a%20b.jpg", "/a%20b.jpg")]
)
def test_an_address_may_have_blanks_and_letters_of_any_script(server, path, sent):
    (found,) = storage.stat([server + path])
    assert (found.path, found.size) == (server + path, len(sent))


def test_what_a_server_says_of_its_time_and_length_may_be_anything(server):
    assert storage.stat([f"{server}/a?yesterday"])[0].time == 0
    with pytest.raises(InputError, match="the server does not say how long it is"):
        storage.stat([f"{server}/none"])
    with pytest.raises(InputError, match="not a valid address"):
        storage.stat(["http://[bad/x"])


def test_what_fetches_pictures_from_many_sites_is_named_where_one_cannot_be_reached():
    says = lambda path: str(place.explained(path, ValueError("ABORTED: no such host")))  # noqa: E731
    assert re.search(r"^http://h/a.png cannot be reached: ABORTED: .*input_pipeline.download first$", says("http://h/a.png"))
    assert says("gs://h/a.png") == "gs://h/a.png cannot be reached: ABORTED: no such host"


@pytest.mark.parametrize(
    "command, words",
    [
        (convert, ["run", "gs://b/out"]),
        (embed, ["run", "photos", "--out", "s3://b/e.npz"]),
        (embed, ["run", "photos", "--search", "a", "--png", "gs://b/m.png"]),
        (report, ["run", "--out", "gs://b/r.html"]),
        (study, ["--config", "study_shapes", "--workdir", "gs://b/study"]),
    ],
)
def test_what_writes_local_files_alone_refuses_a_bucket_and_makes_no_folder_of_its_name(
    command, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["command", *words])
    with pytest.raises(SystemExit, match="must be a local path; copy it to ..://b/"):
        command.main()
    assert not list(tmp_path.iterdir())


def test_a_name_of_the_longest_length_in_any_script(tmp_path):
    for name in ("字" * 85, "a" * 255):
        files.write_whole(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
