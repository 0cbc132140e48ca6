"""Killed workers and their tasks; workers end with the process that started them; a cluster may lose nodes."""

import functools
import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rankclip_jax.common import tasks
from rankclip_jax.common.errors import InputError

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


def killed(task, threads):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_once(marker, task, threads):
    if task == 2 and not marker.exists():
        marker.touch()
        killed(task, threads)
    return 10 * task + threads


def test_a_task_whose_worker_was_killed_is_done_again(tmp_path):
    work = functools.partial(killed_once, tmp_path / "killed")
    assert sorted(tasks.run(work, range(5), workers=2, threads=3)) == [3, 13, 23, 33, 43]
    assert (tmp_path / "killed").exists()


def test_a_task_that_kills_every_worker_ends_the_run():
    with pytest.raises(InputError, match=r"a worker process was killed 4 times over the same task .*--workers"):
        list(tasks.run(killed, [0], workers=1, threads=1))


def fails(task, threads):
    raise InputError(f"task {task} cannot be done")


def test_an_error_of_a_task_is_the_runs():
    with pytest.raises(InputError, match="^task 7 cannot be done$"):
        list(tasks.run(fails, [7], workers=1, threads=1))


def test_without_ray_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"^Ray is not installed; install it: pip install -e '\.\[ray\]'$"):
        list(tasks.run_by_ray(killed, [0], address=""))


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
