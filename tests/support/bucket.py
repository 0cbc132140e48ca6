"""A bucket on the loopback: as much of Google Cloud Storage's JSON API as our clients use, every request counted.

  with Bucket(folder) as bucket:      # folder/a/b is the object a/b of a bucket of any name
      os.environ.update(bucket.environment)

or python -m tests.support.bucket FOLDER [--port 0] [--latency 0.05] [--faults 0.1] [--cert FILE KEY]: prints its port.
"""

import argparse
import contextlib
import http.server
import json
import random
import re
import socket
import ssl
import struct
import sys
import threading
import time
import urllib.parse
from pathlib import Path

FAULTS = ("reset", "503", "short", "late", "never")
_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)")
_REWRITE = re.compile(r"/storage/v1/b/[^/]+/o/(.+)/rewriteTo/b/([^/]+)/o/(.+)")


@contextlib.contextmanager
def served(folder, monkeypatch):
    """A Bucket of a new folder, which this process's clients use; what they keep is beside the folder."""
    folder.mkdir()
    with Bucket(folder) as bucket:
        for name, value in (bucket.environment | {"XDG_CACHE_HOME": str(folder.with_name("cache"))}).items():
            monkeypatch.setenv(name, value)
        yield bucket


class Bucket:
    """Serves a folder until the end of the block.

    Attributes:
      requests: (kind, name, bytes) of each: "read", "stat", "write", "delete"; ("list", prefix, objects in the answer);
        or ("fault", kind, 0).
      faults: share of the reads that fail, in the ways of FAULTS in turn.
      latency: seconds before each answer.
      late: seconds by which a "late" answer is.
      refused: HTTP status with which every request is answered; None: as it should be.
    """

    def __init__(self, folder, faults=0.0, latency=0.0, late=5.0, port=0, cert=None):
        self.folder, self.faults, self.latency, self.late, self.refused = Path(folder), faults, latency, late, None
        self.requests, self.lock, self.random = [], threading.Lock(), random.Random(0)
        self.ended, self._failed = threading.Event(), 0
        self._server = _Server(("127.0.0.1", port), type("Bound", (_Handler,), {"bucket": self}))
        if cert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*cert)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]

    @property
    def environment(self):
        return {
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{self.port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1",  # of an answer that never comes
        }

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def read_bytes(self, name=""):
        """Bytes that were read of objects whose name begins so."""
        with self.lock:
            return sum(size for kind, of, size in self.requests if kind == "read" and of.startswith(name))

    def note(self, kind, name, size=0):
        with self.lock:
            self.requests.append((kind, name, size))

    def next_fault(self):
        with self.lock:
            if self.random.random() >= self.faults:
                return None
            self._failed += 1
            return FAULTS[self._failed % len(FAULTS)]

    def path(self, name):
        return self.folder / (f"{name}.placeholder" if name.endswith("/") else name)

    def names(self):
        files = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return sorted(name.removesuffix(".placeholder") for name in files)

    def described(self, name, bucket):
        stat = self.path(name).stat()
        when = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stat.st_mtime)) + f".{stat.st_mtime_ns // 10**6 % 1000:03}Z"
        )
        generation = str(stat.st_mtime_ns // 1000)
        times = dict(timeCreated=when, updated=when, generation=generation, metageneration="1")
        return dict(kind="storage#object", bucket=bucket, name=name, size=str(stat.st_size), **times)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 512

    def handle_error(self, *_):  # clients that hang up
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body waits 40 ms for the answer to the head
    bucket: Bucket

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", headers=()):
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        self.send_response(code)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def start(self):
        """(path, its query), after the latency; None where all is refused."""
        self.bucket.ended.wait(self.bucket.latency)
        url = urllib.parse.urlsplit(self.path)
        if self.bucket.refused:
            self.body()
            self.answer(self.bucket.refused, {"error": {"code": self.bucket.refused, "message": "refused"}})
            return None, {}
        return url.path, {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while length := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def do_GET(self):
        path, query = self.start()
        if path is None:
            return
        one = _OBJECT.fullmatch(path)
        if one and query.get("alt") != "media":
            name = urllib.parse.unquote(one[2])
            self.bucket.note("stat", name)
            found = self.bucket.path(name).is_file()
            self.answer(200, self.bucket.described(name, one[1])) if found else self.answer(404, {})
        elif listed := re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", path):
            self.list(listed[1], query.get("prefix", ""), query.get("delimiter", ""))
        elif named := re.fullmatch(r"/storage/v1/b/([^/]+)(/storageLayout)?/?", path):
            space = {"enabled": False}
            self.answer(200, dict(kind="storage#bucket", name=named[1], location="US", hierarchicalNamespace=space))
        else:
            self.read(urllib.parse.unquote(one[2] if one else path.lstrip("/").partition("/")[2]))

    def do_HEAD(self):
        path, _ = self.start()
        if path is None:
            return
        file = self.bucket.path(urllib.parse.unquote(path.lstrip("/").partition("/")[2]))
        self.send_response(200 if file.is_file() else 404)
        self.send_header("Content-Length", str(file.stat().st_size if file.is_file() else 0))
        self.end_headers()

    def list(self, bucket, prefix, delimiter):
        items, folders = [], set()
        for name in self.bucket.names():
            if name.startswith(prefix):
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                folders.add(prefix + head + delimiter) if found else items.append(self.bucket.described(name, bucket))
        self.bucket.note("list", prefix, len(items))
        self.answer(200, dict(kind="storage#objects", items=items, prefixes=sorted(folders)))

    def read(self, name):
        path = self.bucket.path(name)
        if not path.is_file():
            return self.answer(404, {})
        size, asked = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(asked[1]), min(int(asked[2] or size - 1), size - 1)) if asked else (0, size - 1)
        if begin >= size and asked:
            return self.answer(416)
        fault = self.bucket.next_fault()
        if fault:
            self.bucket.note("fault", fault)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault == "503":
            return self.answer(503)
        if fault in ("late", "never"):
            self.bucket.ended.wait(self.bucket.late if fault == "late" else 600)
        with open(path, "rb") as file:
            file.seek(begin)
            body = file.read(end - begin + 1)
        if fault == "short":
            self.close_connection = True
        else:
            self.bucket.note("read", name, len(body))
        self.send_response(206 if asked else 200)
        headers = {"Content-Length": len(body), "x-goog-generation": self.bucket.described(name, "")["generation"]}
        for key, value in headers.items() | ({("Content-Range", f"bytes {begin}-{end}/{size}")} if asked else set()):
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "short" else body)

    def do_POST(self):
        path, query = self.start()
        if path is None:
            return
        body = self.body()
        if copy := _REWRITE.fullmatch(path):
            source, target = urllib.parse.unquote(copy[1]), urllib.parse.unquote(copy[3])
            if not self.bucket.path(source).is_file():
                return self.answer(404, {})
            made = self.store(target, copy[2], self.bucket.path(source).read_bytes())
            return self.answer(200, dict(kind="storage#rewriteResponse", done=True, resource=made))
        bucket = path.split("/b/")[-1].split("/")[0]
        if query.get("uploadType") == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            scheme = "https" if isinstance(self.connection, ssl.SSLSocket) else "http"
            where = f"{scheme}://{self.headers['Host']}/resumable/{bucket}/{urllib.parse.quote(name, safe='')}"
            return self.answer(200, headers=[("Location", where)])
        if query.get("uploadType") == "multipart":
            described, body = self.parts(body)
            return self.answer(200, self.store(json.loads(described)["name"], bucket, body))
        self.answer(200, self.store(query["name"], bucket, body))

    def parts(self, body):
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        first, second = (part.partition(b"\r\n\r\n")[2] for part in body.split(b"--" + boundary)[1:3])
        return first.removesuffix(b"\r\n"), second.removesuffix(b"\r\n")

    def do_PUT(self):
        path, _ = self.start()
        if path is None:
            return
        bucket, name = path.partition("/resumable/")[2].split("/", 1)
        self.answer(200, self.store(urllib.parse.unquote(name), bucket, self.body()))

    def do_DELETE(self):
        path, _ = self.start()
        if path is None:
            return
        name = urllib.parse.unquote(_OBJECT.fullmatch(path)[2])
        if not self.bucket.path(name).is_file():
            return self.answer(404, {})
        self.bucket.path(name).unlink()
        self.bucket.note("delete", name)
        self.answer(204)

    def store(self, name, bucket, body):
        path = self.bucket.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        self.bucket.note("write", name, len(body))
        return self.bucket.described(name, bucket)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--cert", nargs=2)
    with Bucket(**vars(parser.parse_args())) as bucket:
        print(bucket.port, flush=True)
        for _ in sys.stdin:  # "count": what was read since the last time
            with bucket.lock:
                sizes = [size for kind, _, size in bucket.requests if kind == "read"]
                print(json.dumps({"requests": len(bucket.requests), "bytes": sum(sizes)}), flush=True)
                bucket.requests.clear()


if __name__ == "__main__":
    main()
