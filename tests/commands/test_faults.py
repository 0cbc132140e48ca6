"""A short fault campaign (benchmarks/faults.py, whose full table is in docs/reliability.md)."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("SIGKILL at", "SIGTERM at", "every moment", "first save", "index", "NaN", "vanish")


@pytest.mark.slow
def test_whatever_happens_to_a_run_it_ends_with_the_same_numbers():
    # In a separate process: it forks, which a process whose JAX is at work must not.
    command = [sys.executable, "-m", "benchmarks.faults", "--seed=1", "--kills=2", "--only", *CASES]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    killed, terminated, stopped, disk_full, index, nan, vanished = done.stdout.splitlines()[2:-2]
    assert "2 kills" in killed and "all resumed with the same numbers" in killed
    assert "exit 75 with step" in terminated and terminated.endswith("resumed with the same numbers |")
    assert stopped.endswith("resumed with the same numbers |")
    assert disk_full.endswith(("then same numbers |", "needs root |"))
    # SIGKILL in the middle of a write leaves its hidden .part.
    assert index.endswith(("end with the same numbers; 0 files left over |", "same numbers; 1 files left over |"))
    assert "gradient norm nan; stopped" in nan and nan.endswith("then same numbers |")
    assert "not one batch of good samples" in vanished and vanished.endswith("then same numbers |")
