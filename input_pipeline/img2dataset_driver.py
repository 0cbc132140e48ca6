"""Runs img2dataset, in the Python that has it, with additional limits; download.py starts this file as a script.

img2dataset's timeout applies to each packet: a host that sends a byte now and then, of its headers or of the image,
blocks a thread, and with it a shard, forever. It also reads responses of any size into memory, and follows redirects to
ftp and into the network of this machine. This driver limits the time and the size of each image, and where it may come
from. The limits travel with the tasks, as the text of this file, so they apply in every worker process, also on other
machines.

Argument: JSON of img2dataset.download's arguments. Nothing of this project is imported.
"""

import http.client
import importlib
import io
import ipaddress
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUTS, BYTES = 3, 100_000_000  # per image: time as a multiple of img2dataset's timeout, and size
PRIVATE = "RANKCLIP_DOWNLOAD_PRIVATE"  # set: hosts without a public address may be asked
_now = threading.local()  # of the image that a thread waits for: its `end`, and the `seconds` until then


class _InTime(io.RawIOBase):
    """What comes from a socket, as long as there is time."""

    def __init__(self, raw) -> None:
        self._raw = raw

    def readable(self):
        return True

    def readinto(self, buffer):
        if time.monotonic() > _now.end:
            raise TimeoutError(f"slower than {_now.seconds} s for one image")
        return self._raw.readinto(buffer)

    def close(self):
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock, *args, **options) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_InTime(self.fp.detach()))


class _Public:
    """A connection to a public address, checked when it is made: a name may lead anywhere."""

    response_class = _Response

    def connect(self):
        super().connect()
        address = ipaddress.ip_address(self.sock.getpeername()[0].partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        proxies = {urlsplit(proxy).hostname for proxy in urllib.request.getproxies().values()}
        if not address.is_global and self.host not in proxies and PRIVATE not in os.environ:
            self.close()
            raise urllib.error.URLError("not a public address (see --private)")


class _Http(_Public, http.client.HTTPConnection):
    pass


class _Https(_Public, http.client.HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_Http, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_Https, request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, fp, code, msg, headers, newurl):
        if not newurl.lower().startswith(("http://", "https://")):
            raise urllib.error.URLError(f"redirected to {newurl.partition(':')[0]}")
        return super().redirect_request(request, fp, code, msg, headers, newurl)


def _opener():
    opener = urllib.request.OpenerDirector()  # without ftp, file and data
    for handler in (
        urllib.request.ProxyHandler,
        _HttpHandler,
        _HttpsHandler,
        _Redirects,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _bounded(response):
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > BYTES:
            raise ValueError(f"larger than {BYTES // 1_000_000} MB")
    if response.length:  # announced bytes are missing, as read() would report
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _urlopen_with_limits(request, timeout):
    _now.seconds = TIMEOUTS * timeout
    _now.end = time.monotonic() + _now.seconds  # of the headers, of redirects and of the image together
    response = _opener().open(request, timeout=timeout)
    response.read = lambda: _bounded(response)
    return response


_urlopen_with_limits.limits = True
urllib.request.urlopen = _urlopen_with_limits


def _end_with(parent):
    """Ends this process and its workers when the process that started it has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


class Limited:
    """An img2dataset.downloader.Downloader that sets the limits in its process first."""

    def __init__(self, downloader, limits: str, private: bool) -> None:
        self.downloader, self.limits, self.private = downloader, limits, private

    def __call__(self, task) -> tuple:
        """(whether it worked, what was done), as the downloader."""
        import os
        import urllib.request

        if not hasattr(urllib.request.urlopen, "limits"):
            if self.private:
                os.environ["RANKCLIP_DOWNLOAD_PRIVATE"] = "1"
            exec(self.limits, {"__name__": "limits"})
        return self.downloader(task)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    arguments = json.loads(sys.argv[1])
    main = importlib.import_module("img2dataset.main")  # which the package hides behind a function of this name
    make = main.Downloader
    if arguments["distributor"] == "ray":
        import ray

        ray.init(None if "RAY_ADDRESS" in os.environ else "local", num_cpus=arguments["processes_count"])
    limits = Path(__file__).read_text(encoding="utf-8")
    main.Downloader = lambda *given, **named: Limited(make(*given, **named), limits, PRIVATE in os.environ)
    main.download(**arguments)
