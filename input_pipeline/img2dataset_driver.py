"""Runs img2dataset, in whatever Python it is installed, with limits that it lacks; started by download.py as a file.

img2dataset's timeout is one for every packet: a host that sends a byte now and then holds a thread, and with it a
shard, for ever. And what a link leads to is read into memory whatever its size. Here each image has a time and a
size of its own. Its worker processes import this file too, so the limits hold there.

Arguments: JSON of img2dataset.download's arguments. Nothing of this project is imported.
"""

import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.request

TIMEOUTS, BYTES = 3, 100_000_000  # for one image: so many times img2dataset's timeout, and so much
_urlopen = urllib.request.urlopen


def _bounded(response, seconds):
    start, parts, size = time.monotonic(), [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"slower than {seconds} s for one image")
        if size > BYTES:
            raise ValueError(f"larger than {BYTES // 1_000_000} MB")
    if response.length:  # bytes that were announced and did not come; read() would say so itself
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _urlopen_with_limits(request, timeout):
    response = _urlopen(request, timeout=timeout)
    response.read = lambda: _bounded(response, TIMEOUTS * timeout)
    return response


urllib.request.urlopen = _urlopen_with_limits


def _end_with(parent):
    """Ends this process and its workers when the one that started it is gone: nobody would see what they do."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    from img2dataset import download

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    download(**json.loads(sys.argv[1]))
