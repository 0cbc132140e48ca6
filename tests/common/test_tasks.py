"""Workers end with the process that started them, however that ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SCRIPT = """
import signal, socket, sys
from rankclip_jax.common import tasks

def work(port, threads):
    socket.create_connection(("127.0.0.1", port)).recv(1)  # nothing ever comes

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    list(tasks.run(work, [int(sys.argv[1])] * 2, workers=2, threads=1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent(how, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(300)
        parent = subprocess.Popen(
            [sys.executable, tmp_path / "script.py", str(server.getsockname()[1])],
            env=os.environ | {"PYTHONPATH": str(REPO)},
            stderr=subprocess.DEVNULL,
        )
        workers = [server.accept()[0] for _ in range(2)]
    parent.send_signal(how)
    parent.wait(60)
    for worker in workers:
        worker.settimeout(300)
        assert worker.recv(1) == b""  # its end closes the connection
        worker.close()
