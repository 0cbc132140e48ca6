"""Workers end with the process that started them, however that ends; and a cluster may lose nodes."""

import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rankclip_jax.common import tasks

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


class ShrinkingRay:
    """A cluster of 4 processors, and of 1 after the first look; a task is done when it is started."""

    exceptions = types.SimpleNamespace(RayTaskError=RuntimeError, RayError=OSError)

    def __init__(self):
        self.cpus = [4]

    def cluster_resources(self):
        return {"CPU": self.cpus.pop() if self.cpus else 1}

    nodes = staticmethod(lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    remote = staticmethod(lambda **_: lambda function: types.SimpleNamespace(remote=function))
    wait = staticmethod(lambda running: (running[:1], running[1:]))
    put = get = staticmethod(lambda value: value)


def test_a_cluster_that_loses_a_node_does_all_tasks(monkeypatch):
    monkeypatch.setattr(tasks, "_ray", lambda address: (ShrinkingRay(), False))
    assert list(tasks.run_by_ray(lambda task, threads: 10 * task + threads, range(12), address="")) == [
        10 * task + 1 for task in range(12)
    ]
