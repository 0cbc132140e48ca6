"""Workers end with the process that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
