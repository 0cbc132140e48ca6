"""Runs img2dataset, in the Python that has it, with additional limits; download.py starts this file as a script.

img2dataset's timeout applies to each packet: a host that sends a byte now and then blocks a thread, and with it a
shard, forever. It also reads responses of any size into memory. This driver limits the time and the size of each
image. The worker processes import this file too, so the limits also apply there.

Argument: JSON of img2dataset.download's arguments. Nothing of this project is imported.
"""

import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.request

TIMEOUTS, BYTES = 3, 100_000_000  # per image: time as a multiple of img2dataset's timeout, and size
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
    if response.length:  # announced bytes are missing, as read() would report
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _urlopen_with_limits(request, timeout):
    response = _urlopen(request, timeout=timeout)
    response.read = lambda: _bounded(response, TIMEOUTS * timeout)
    return response


urllib.request.urlopen = _urlopen_with_limits


def _end_with(parent):
    """Ends this process and its workers when the process that started it has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    from img2dataset import download

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    download(**json.loads(sys.argv[1]))
