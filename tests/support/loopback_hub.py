"""A Hugging Face hub on the loopback: what huggingface_hub asks of the real one, and a log of it."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = hashlib.sha1(b"a commit").hexdigest()


class LoopbackHub:
    """`repos`: id -> the folder with its files. `denied`: id -> (status, X-Error-Code) in place of any answer.
    `denied_files`: the same where a file is asked for. `asked`: (method, path) of all requests."""

    def __init__(self):
        self.repos: dict[str, Path] = {}
        self.denied: dict[str, tuple[int, str]] = {}
        self.denied_files: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, str]] = []

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were fetched."""
        paths = [path for method, path in self.asked if method == "GET" and "/resolve/" in path]
        return sorted(path.partition(f"/resolve/{COMMIT}/")[2] for path in paths)


@contextlib.contextmanager
def loopback_hub(monkeypatch, cache):
    """The hub that huggingface_hub asks in this process, with an empty cache at `cache`."""
    from huggingface_hub import constants

    hub = LoopbackHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path))
            parts = path.strip("/").split("/")
            parts = parts[2:] if parts[:2] == ["api", "models"] else parts
            repo, rest = "/".join(parts[:2]), parts[2:]
            denied = hub.denied.get(repo) or (hub.denied_files.get(repo) if rest[:1] == ["resolve"] else None)
            if denied or repo not in hub.repos:
                status, code = denied or (404, "RepoNotFound")
                return self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
            folder = hub.repos[repo]
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            names = [file.relative_to(folder).as_posix() for file in files]
            if rest[:1] == ["resolve"]:
                data = (folder / "/".join(rest[2:])).read_bytes()
                etag = hashlib.sha1(data).hexdigest()
                return self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            if rest[:1] == ["tree"]:
                found = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in zip(names, (file.read_bytes() for file in files), strict=True)
                ]
            else:
                found = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def answer(self, status, data, headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
