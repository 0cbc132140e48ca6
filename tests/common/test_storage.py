"""Addresses and paths of common/storage that are unusual or wrong."""

import http.server
import re
import threading

import pytest
import tensorstore

from rankclip_jax import convert, embed
from rankclip_jax.common import files, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.storage import place
from rankclip_jax.report import __main__ as report
from rankclip_jax.study import __main__ as study


@pytest.fixture
def server():
    """Answers HEAD for every path but /none with the path's length, and with the date that its query names.

    GET is answered with what was asked for; /gone with 410, /long with 414, /no with 403.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            path, _, date = self.path.partition("?")
            self.send_response(200)
            if path != "/none":
                self.send_header("Content-Length", str(len(path)))
            if date:
                self.send_header("Last-Modified", date)
            self.end_headers()

        def do_GET(self):
            asked = self.path.encode()
            self.send_response({b"/gone": 410, b"/long": 414, b"/no": 403}.get(asked, 200))
            self.send_header("Content-Length", str(len(asked)))
            self.end_headers()
            self.wfile.write(asked)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 512

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    "path, sent",
    [("/a b.jpg", "/a%20b.jpg"), ("/ä.jpg", "/%C3%A4.jpg"), ("/a%20b.jpg", "/a%20b.jpg"), ("/a%2Fb%E9", "/a%2Fb%E9")],
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


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http:///a.jpg",
        "http://exa mple.com/a.jpg",
        "http://exa\0mple.com/a.jpg",
        "http://mine\\a.jpg",
        "http://mine:abc/a.jpg",
        "http://mine:99999/a.jpg",
        "http://mine..example/a.jpg",
        "http://[::1/a.jpg",
        "http://mine/a.jpg?\ud800",
        "http://mine/" + "a" * 9_000_000,
    ],
    ids=lambda address: ascii(address[:40]),
)
def test_an_address_that_cannot_be_is_refused_without_a_request(address):
    with pytest.raises(storage.NoPlaceError, match="not a valid address") as refused:
        storage.read(address)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "address, root",
    [
        ("HTTP://mine/a.jpg", "mine"),
        ("https://bücher.example:81/a.jpg", "xn--bcher-kva.example:81"),
        ("http://[::1]:81/a.jpg#part", "[::1]:81"),
        ("http://a user:word@mine/a.jpg", "a%20user:word@mine"),
    ],
)
def test_a_host_is_written_as_the_network_names_it(address, root):
    assert place.place_of(address)[1:] == (root, "/a.jpg", "")
    assert storage.is_http(address) and not storage.is_http("https_pictures/a.jpg")


def test_a_server_is_asked_for_the_address_as_it_is_written(server):
    for path in (
        "/v0/b/shop/o/images%2F1.jpg?alt=media&token=%2F",
        "/images%2Fa%E9.jpg",
        "/images%2Fa/b%E9/c%20d.jpg",
        "/a%E9.jpg",
        "/%21%24%26%27%28%29%2A%2B%2C%3A%3B%3D.jpg",
        "/!$&'()*+,:;=-._~.jpg",
        "/a%252Fb%25.jpg",
        "/a%3Fb%23c%40d%5B.jpg",
        "/a%2Bb//c.jpg",
        "/a//b.jpg",
        "/a%2Fb/",
        "/%00.jpg",
    ):
        assert storage.read(server + path).decode() == path
    quoted = {
        "": "/",
        "?a=b": "/?a=b",
        "/ü%2F ü.jpg#part": "/%C3%BC%2F%20%C3%BC.jpg",
        "/100%.jpg": "/100%25.jpg",
        "/a|b\\c.jpg": "/a%7Cb%5Cc.jpg",
    }
    assert {path: storage.read(server + path).decode() for path in quoted} == quoted


def test_one_odd_address_ends_no_other_read(server):
    ahead = storage.ReadAhead()
    assert ahead.take(f"{server}/a.jpg?t=a b&u=ü%20+[1]") == b"/a.jpg?t=a%20b&u=%C3%BC%20+[1]"
    for path, error in (("/gone", storage.MissingError), ("/long", storage.NoPlaceError)):
        with pytest.raises(error):
            ahead.take(server + path)
    assert ahead.take(f"{server}/a.jpg") == b"/a.jpg" and ahead.failed is None
    with pytest.raises(InputError, match="cannot be reached: .*403"):
        ahead.take(f"{server}/no")
    with pytest.raises(InputError, match="cannot be reached: .*403"):
        ahead.take(f"{server}/a.jpg")


def test_addresses_with_queries_of_their_own_share_one_context_and_leave_few_stores_open(server, monkeypatch):
    made, real = [], tensorstore.Context
    monkeypatch.setattr(tensorstore, "Context", lambda *options: made.append(options) or real(*options))
    ahead, addresses = storage.ReadAhead(), [f"/a.jpg?signature={number}" for number in range(300)]
    for address in addresses:
        ahead.start(server + address)
    assert [ahead.take(server + address).decode() for address in addresses] == addresses
    assert len(made) <= 1 and place._opened.cache_info().currsize <= 128


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
