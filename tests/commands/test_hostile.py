"""A short hostile campaign (benchmarks/hostile.py, whose table is in docs/reliability.md), and what it notices."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.slow
def test_other_peoples_files_are_read_counted_or_refused_in_one_line():
    # In a separate process: it forks, which a process whose JAX is at work must not.
    command = [sys.executable, "-m", "benchmarks.hostile", "--seed=1", "--files=60"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:-2]]
    assert sum(int(row[1]) for row in rows) > 80 and all(row[5] == "0" for row in rows)


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("print('Traceback (most recent call last)', file=sys.stderr)", "Traceback"),
        ("refuse('two\\nlines')", "two"),
        ("os.kill(os.getpid(), 11)", "ended by -11"),
        ("sys.exit(3)", "SystemExit"),
        ("all(True for _ in iter(int, 1))", "more than 1 s"),
        ("[bytearray(1 << 24) for _ in range(100)]", "more than 300 MB"),
    ],
)
def test_what_breaks_a_promise_is_noticed(reader, said):
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from benchmarks import hostile\n"
        "hostile.SECONDS, hostile.MEGABYTES = 1, 300\n"
        "def refuse(line): raise hostile.InputError(line)\n"
        f"hostile.READERS['planted'] = lambda path: {reader} or 'read'\n"
        "print(hostile.Child(Path(os.devnull)).read('planted', Path('file')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("('broken', ") and said in done.stdout, done.stdout + done.stderr
