"""Whether a long run leaks: python -m benchmarks.soak [--steps 2000] [--minutes 6] [--out table.md]

A small run with a checkpoint every 10 steps and at the end of every epoch, validation and zero-shot every tenth epoch,
and two bad samples in every epoch. Its memory, threads and open files are read from the system as it goes. The least of
each in the last quarter of the steps must not be above that of the second quarter, of the memory by 5 %: exit code 1
otherwise. The least, since saves come and go with their threads and files. When the minutes are over the run is
stopped, and judged by its steps, if they are half of those asked for.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import starts

GROWTH = 1.05  # of the memory, from the second quarter of the steps to the last; allocators round


def _flags(folder: Path, steps: int) -> list[str]:
    keys = ("epochs", "data.train", "data.val", "eval.zero_shot", "checkpoint")
    replaced = tuple(f"--config.{key}" for key in keys)
    usual = [flag for flag in starts.flags(folder, folder / "run") if not flag.startswith(replaced)]
    return [
        *usual,
        f"--config.data.train={folder / 'soak.csv'}",
        f"--config.data.val={folder / 'data.csv'}",
        f"--config.steps={steps}",
        "--config.checkpoint.every_steps=10",
        "--config.checkpoint.keep=2",
        "--config.eval.every_epochs=10",
        "--config.eval.zero_shot={'shapes':{'format':'shapes','path':'seen:40'}}",
    ]


def _write_data(folder: Path) -> None:
    """data.csv of benchmarks/starts.py, and the same with two bad samples."""
    starts.prepare(folder)
    (folder / "images" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    rows = (folder / "data.csv").read_text() + "images/bad.png,a broken picture\nimages/none.png,no picture\n"
    (folder / "soak.csv").write_text(rows)


def usage(pid: int) -> tuple[float, int, int]:
    """(MB in memory, threads, open files) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (int(re.search(rf"^{key}:\s+(\d+)", status, re.MULTILINE)[1]) for key in ("VmRSS", "Threads"))
    return memory / 1000, threads, len(os.listdir(f"/proc/{pid}/fd"))


def soak(folder: Path, steps: int, end: float) -> list[tuple[int, float, int, int]]:
    """Runs until time.monotonic() `end`; (step, MB, threads, open files), read about every 20th of the steps."""
    _write_data(folder)
    log, found, due = folder / "log", [], steps // 20
    with log.open("w") as out:
        command = [sys.executable, "-u", "-m", "rankclip_jax.train", *_flags(folder, steps)]
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        stopped = False
        while child.poll() is None:
            time.sleep(0.05)
            if not stopped and time.monotonic() > end:
                child.send_signal(signal.SIGTERM)  # it ends between two steps; the same command would resume
                stopped = True
            shown = re.findall(r"^step (\d+)/", log.read_text(), re.MULTILINE)
            if shown and int(shown[-1]) >= due:
                try:
                    found.append((int(shown[-1]), *usage(child.pid)))
                except (OSError, TypeError):  # it has just ended
                    break
                due = int(shown[-1]) + steps // 20
    finally:
        if child.poll() is None:
            child.kill()
    if child.wait() not in ((0, 75) if stopped else (0,)) or not found or found[-1][0] < steps / 2:
        sys.exit(f"the run failed, or was too slow: {log.read_text()[-2000:]}")
    named = (folder / "run" / "bad_samples.jsonl").read_text()
    assert "bad.png" in named and "none.png" in named
    return found


def main() -> None:
    """Prints the table, and writes it to --out; exit code 1 where something grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=6, help="the most that it trains (6)")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options, begin = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), options.steps, begin + 60 * options.minutes)
    lines = ["| step | memory, MB | threads | open files |", "|---|---|---|---|"]
    lines += [f"| {step} | {memory:,.0f} | {threads} | {files} |" for step, memory, threads, files in found]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    second, last = (
        [min(row[column] for row in found if low <= row[0] / found[-1][0] <= high) for column in (1, 2, 3)]
        for low, high in ((0.25, 0.5), (0.75, 1))
    )
    grown = last[0] > GROWTH * second[0] or last[1] > second[1] or last[2] > second[2]
    minutes = (time.monotonic() - begin) / 60
    judged = "GROWS" if grown else "flat"
    print(f"\nleast in the second quarter {second}, in the last {last}: {judged}; {minutes:.0f} minutes")
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()
