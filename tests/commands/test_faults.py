"""The shortest fault campaign (benchmarks/faults.py): .ci/run has more of it, docs/reliability.md the whole table."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("SIGKILL at", "SIGTERM at", "full at the first save")


@pytest.mark.slow
def test_whatever_happens_to_a_run_it_ends_with_the_same_numbers():
    # In a separate process: it forks, which a process whose JAX is at work must not.
    command = [sys.executable, "-m", "benchmarks.faults", "--seed=1", "--kills=2", "--only", *CASES]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    killed, terminated, disk_full = done.stdout.splitlines()[2:-2]
    assert "2 kills" in killed and "all resumed with the same numbers" in killed
    assert "exit 75 with step" in terminated and terminated.endswith("resumed with the same numbers |")
    assert disk_full.endswith(("then same numbers |", "needs root |"))
