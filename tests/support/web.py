"""A web on the loopback: good images, and what else the web has."""

import io
import select
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


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
                self.connection.recv(1)  # until the other side hangs up
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
                if select.select([self.connection], [], [], 0.1)[0]:
                    return  # the other side hung up
        except OSError:
            pass  # the other side had enough

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64
