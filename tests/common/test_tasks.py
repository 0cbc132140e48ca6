"""Workers end with the process that started them, however that ends; and a cluster may lose nodes."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from rankclip_jax.common import tasks

REPO = Path(__file__).parents[2]
SCRIPT = """
import os, pathlib, signal, sys, time
from rankclip_jax.common import tasks

def work(folder, threads):
    pathlib.Path(folder, str(os.getpid())).touch()
    while True:
        time.sleep(1)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    list(tasks.run(work, [sys.argv[1]] * 2, workers=2, threads=1))
"""


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent(how, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "workers").mkdir()
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "workers"],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 300
    while len(workers := os.listdir(tmp_path / "workers")) < 2:
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    parent.send_signal(how)
    parent.wait(60)
    while not all(map(ended, workers)):
        assert time.monotonic() < until
        time.sleep(0.05)


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
