"""What a run survives: python -m benchmarks.faults --seed 0 [--kills 50] [--only WORD ...] [--minutes 60]

A small run is killed, terminated, starved of disk, robbed of its data, fed NaNs, and its checkpoints are damaged; each
time the same command is started again. Every case must end with the numbers of the uninterrupted run, bit for bit:
each line of metrics.jsonl, and the fingerprint of every array of the last checkpoint. If a start cannot resume, it
must say so in one line, and the next start, with the cause removed, must end with those numbers.

Each start is a separate process, forked from one that has imported the modules, which is most of a start's time.
Full and read-only disks need root (a tmpfs is mounted) and are skipped otherwise. What has not begun after --minutes
counts as broken. Do not edit the sources meanwhile.
"""

import argparse
import contextlib
import functools
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import damage, moments
from benchmarks.starts import STEPS, Start, flags, free_port, outcome_of, prepare, saves_begun, short


class Campaign:
    """The cases, each a method that returns how it went; they raise AssertionError where a promise is broken."""

    def __init__(self, folder: Path, seed: int, kills: int = 50):
        self.folder, self.random, self.kills, self._count = folder, random.Random(seed), kills, 0

    @functools.cached_property
    def expected(self) -> tuple:
        """What an uninterrupted run leaves."""
        return self.finished(self.workdir())

    @functools.cached_property
    def seconds(self) -> float:
        """Those of an uninterrupted run that finds its programs compiled."""
        expected, begin = self.expected, time.monotonic()
        assert any((self.folder / "jax_cache").glob("jit_train_step-*")), "JAX keeps no programs"
        assert self.finished(self.workdir()) == expected, "two uninterrupted runs differ"
        return time.monotonic() - begin

    @functools.cached_property
    def late(self) -> Path:
        """The workdir of a run that was stopped at step 20 of 24."""
        workdir = self.workdir()
        self.terminate(workdir, 20)
        return workdir

    def workdir(self) -> Path:
        self._count += 1
        return self.folder / f"run{self._count}"

    def start(self, workdir: Path, more: Sequence[str] = (), **options) -> Start:
        """`more`: flags in place of those of the same keys."""
        replaced = tuple(flag.partition("=")[0] + "=" for flag in more)
        usual = [flag for flag in flags(self.folder, workdir) if not flag.startswith(replaced)]
        return Start([*usual, *more], self.folder / f"{workdir.name}.log", **options)

    def expected_with(self, more: Sequence[str] = ()) -> tuple:
        """What a run with such flags leaves that nothing happened to."""
        return self.finished(self.workdir(), more) if more else self.expected

    def finished(self, workdir: Path, more: Sequence[str] = ()) -> tuple:
        """Runs to the end; what it leaves."""
        start = self.start(workdir, more)
        code = start.wait()
        assert code == 0, start.text()[-3000:]
        return outcome_of(workdir)

    def resumes(self, workdir: Path) -> str:
        """Starts again, and compares with the uninterrupted run."""
        assert self.finished(workdir) == self.expected, f"{workdir}: other numbers than the uninterrupted run's"
        return "same numbers"

    def copy(self) -> Path:
        return shutil.copytree(self.late, self.workdir())

    def terminate(self, workdir: Path, step: int) -> None:
        """SIGTERM while `step` is computed, which must be saved."""
        stop = functools.partial(signal.raise_signal, signal.SIGTERM)
        start = self.start(workdir, before=lambda: moments.before_step_ends(step, stop))
        assert start.wait() == 75, start.text()[-3000:]
        assert re.search(rf"^saved step {step} ", start.text(), re.MULTILINE), start.text()[-3000:]
        assert (workdir / "checkpoints" / str(step)).is_dir()

    def sigkill(self) -> str:
        killed, runs, phases, workdir = 0, 0, [], self.workdir()
        while killed < self.kills:
            start, saving = self.start(workdir), killed % 2 == 1
            if saving:  # as soon as a save has begun, or a little later
                after = self.random.randrange(1, 9)
                code = start.wait(functools.partial(saves_begun, workdir, set(), after))
                time.sleep(self.random.uniform(0, 0.03))
            else:
                moment = start.begin + self.random.uniform(0, self.seconds)
                code = start.wait(lambda moment=moment: time.monotonic() > moment)
            if code is None:
                start.send(signal.SIGKILL)
                code = start.wait()
                in_save = any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
            if code == -9:
                killed += 1
                shown = re.search(r"^step \d+/", start.text(), re.MULTILINE)
                phases.append("while saving" if in_save else "between steps" if shown else "before the first step")
                print(f"kill {killed} of {self.kills}: {phases[-1]}", file=sys.stderr, flush=True)
                continue
            assert code == 0, start.text()[-3000:]
            assert outcome_of(workdir) == self.expected, f"{workdir}: other numbers after {phases}"
            runs, workdir = runs + 1, self.workdir()
        self.resumes(workdir)
        found = ", ".join(f"{phases.count(phase)} {phase}" for phase in sorted(set(phases)))
        return f"{killed} kills ({found}) over {runs + 1} runs: all resumed with the same numbers"

    def sigterm(self) -> str:
        saved = sorted(self.random.sample(range(1, STEPS - 3), max(1, self.kills // 16)))
        for step in saved:
            workdir = self.workdir()
            self.terminate(workdir, step)
            self.resumes(workdir)
        return f"exit 75 with step {', '.join(map(str, saved))} saved; resumed with the same numbers"

    def limited_file_size(self) -> str:
        import resource

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

        workdir = self.copy()
        return f"{self._stops(workdir, before=limit)}; then {self.resumes(workdir)}"

    def _stops(self, workdir, **options) -> str:
        start = self.start(workdir, **options)
        code = start.wait()
        assert code == 1, (code, start.text()[-3000:])
        return f"`{short(start.error())}`"

    def disk_full(self) -> str:
        with damage.small_disk(self.folder, "8m") as mounted:
            if mounted is None:
                return "left out: needs root"
            workdir = shutil.copytree(self.late, mounted / "run")
            filler = mounted / "filler"
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as out:
                while True:
                    out.write(bytes(4096))
            before = set((workdir / "checkpoints").iterdir())
            said = self._stops(workdir)
            assert before <= set((workdir / "checkpoints").iterdir())
            filler.unlink()
            return f"{said}; then {self.resumes(workdir)}"

    def read_only(self) -> str:
        with damage.small_disk(self.folder, "8m") as mounted:
            if mounted is None:
                return "left out: needs root"
            workdir = shutil.copytree(self.late, mounted / "run")
            subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
            said = self._stops(workdir)
            subprocess.run(["mount", "-o", "remount,rw", mounted], check=True)
            return f"{said}; then {self.resumes(workdir)}"

    def workdir_below_a_file(self) -> str:
        (self.folder / "file").write_text("")
        return self._stops(self.folder / "file" / "run")

    def damaged_checkpoint(self, kind: str) -> str:
        workdir = self.copy()
        newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
        damage.KINDS[kind](workdir / "checkpoints" / str(newest))
        start = self.start(workdir)
        assert start.wait() == 0, start.text()[-3000:]
        assert re.search(rf"checkpoint .*/{newest} is damaged and passed over", start.text()), start.text()
        assert outcome_of(workdir) == self.expected and (workdir / "checkpoints" / f"damaged-{newest}").is_dir()
        went_on = re.search(r"resuming from step (\d+)", start.text())[1]
        return f"step {newest} named and skipped, resumed from {went_on}: same numbers"

    def all_checkpoints_damaged(self) -> str:
        workdir = self.copy()
        for path in (workdir / "checkpoints").iterdir():
            damage.KINDS[self.random.choice(list(damage.KINDS))](path)
        before = {str(path) for path in workdir.rglob("*")}
        said = self._stops(workdir)
        assert before <= {str(path) for path in workdir.rglob("*")}
        return f"{said}; nothing deleted"

    def damaged_file(self, name: str) -> str:
        workdir = self.copy()
        whole = (workdir / name).read_text()
        (workdir / name).write_text(whole[: len(whole) // 2])
        start = self.start(workdir)
        if start.wait() == 0:
            (numbers, checkpoint), (expected, same) = outcome_of(workdir), self.expected
            assert checkpoint == same and all(row in expected for row in numbers) and numbers[-1] == expected[-1]
            return f"resumed with the same state; the {len(expected) - len(numbers)} lines that were cut off stay lost"
        said = short(start.error())
        (workdir / name).write_text(whole)
        return f"`{said}`; then {self.resumes(workdir)}"

    def nan_gradient(self) -> str:
        workdir = self.workdir()
        said = self._stops(workdir, before=lambda: damage.nan_in_step(self.random.randrange(3, STEPS)))
        assert "gradient norm nan; stopped" in said, said
        return f"{said}; then {self.resumes(workdir)}"

    def data_vanishes(self) -> str:
        workdir, images, gone = self.workdir(), self.folder / "images", self.folder / "gone"
        said = self._stops(workdir, before=lambda: moments.before_step_ends(7, lambda: images.rename(gone)))
        gone.rename(images)
        assert "not one batch of good samples" in said, said
        return f"{said}; then {self.resumes(workdir)}"

    def pair(self, workdir: Path) -> list[Start]:
        """The same run as two processes with a device each."""
        together = [*flags(self.folder, workdir), f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
        logs = [self.folder / f"{workdir.name}.process{i}.log" for i in range(2)]
        return [Start([*together, f"--process_id={i}"], log) for i, log in enumerate(logs)]

    def _pair_finished(self, workdir):
        both = self.pair(workdir)
        for start in both:
            assert start.wait() == 0, start.text()[-3000:]
        return outcome_of(workdir)

    @functools.cache  # noqa: B019 -- there is one campaign
    def expected_of_pair(self) -> tuple:
        """What a pair leaves that nothing happened to."""
        return self._pair_finished(self.workdir())

    def one_of_two_killed(self, which: int) -> str:
        workdir = self.workdir()
        both = self.pair(workdir)
        at = self.random.randrange(4, STEPS - 4)
        assert both[0].wait(both[0].reached(at)) is None
        both[which].send(signal.SIGKILL)
        killed, other = time.monotonic(), both[1 - which]
        assert other.wait() == 1, other.text()[-3000:]
        said = [line for line in other.text().splitlines() if line.startswith("error: ")]
        assert len(said) == 1, other.text()[-3000:]
        seconds = time.monotonic() - killed
        assert both[which].wait() == -9
        assert self._pair_finished(workdir) == self.expected_of_pair()
        return f"after {seconds:.0f} s `{short(said[0])}`; then both resumed with the same numbers"

    def sigterm_to_one_of_two(self) -> str:
        workdir = self.workdir()
        both = self.pair(workdir)
        assert both[0].wait(both[0].reached(2)) is None
        both[1].send(signal.SIGTERM)
        codes = [start.wait() for start in both]
        assert codes in ([75, 75], [0, 0]), [start.text()[-3000:] for start in both]
        saved = re.search(r"saved step (\d+)", both[0].text())  # before the next start writes there
        assert self._pair_finished(workdir) == self.expected_of_pair()
        if codes == [0, 0]:
            return "both finished before they agreed on a step"
        return f"both exit 75 with step {saved[1]} saved; resumed with the same numbers"


def cases(campaign: Campaign) -> list[tuple[str, Callable[[], str]]]:
    """(what is done, how it went) of every case."""
    c = campaign
    return [
        (f"SIGKILL at {c.kills} random moments, every second one during a save", c.sigkill),
        ("SIGTERM at random steps", c.sigterm),
        *moments.cases(c),
        *((f"newest checkpoint: {kind}", lambda kind=kind: c.damaged_checkpoint(kind)) for kind in damage.KINDS),
        ("all checkpoints damaged", c.all_checkpoints_damaged),
        *(
            (f"{name} cut in half", lambda name=name: c.damaged_file(name))
            for name in ("config.json", "tokenizer.json", "metrics.jsonl")
        ),
        ("files limited to 60 kB (RLIMIT_FSIZE)", c.limited_file_size),
        ("disk full (a tmpfs of 8 MB)", c.disk_full),
        ("disk read-only (the same, remounted)", c.read_only),
        ("workdir below a file", c.workdir_below_a_file),
        ("a NaN in a gradient", c.nan_gradient),
        ("all pictures vanish at step 7", c.data_vanishes),
        ("process 1 of two killed", lambda: c.one_of_two_killed(1)),
        ("process 0 of two, the coordinator, killed", lambda: c.one_of_two_killed(0)),
        ("SIGTERM to process 1 of two", c.sigterm_to_one_of_two),
    ]


def main() -> None:
    """Prints the table, and writes it to --out as it grows; exit code 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name holds one of these words")
    parser.add_argument("--minutes", type=float, default=60, help="no case begins later (60)")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    broken, begin = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        campaign = Campaign(Path(folder), options.seed, options.kills)
        print(*(lines := ["| what was done | how it went |", "|---|---|"]), sep="\n")
        for name, case in cases(campaign):
            if any(words in name for words in options.only):
                try:
                    assert time.monotonic() < begin + 60 * options.minutes, "out of time"
                    how = case()
                except Exception as error:
                    how, broken = f"**BROKEN**: {' '.join(f'{type(error).__name__}: {error}'.split())}", broken + 1
                lines.append(f"| {name} | {how} |")
                print(lines[-1], flush=True)
                if options.out:
                    options.out.write_text("\n".join(lines) + "\n")
    minutes = (time.monotonic() - begin) / 60
    print(f"\nseed {options.seed}, {options.kills} kills, {minutes:.0f} minutes, {broken} broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
