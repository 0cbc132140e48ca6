"""Cases of benchmarks/faults.py: moments at which a run is stopped, and two runs that share what they write."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import damage
from benchmarks.starts import STEPS, flags, outcome_of, short

if TYPE_CHECKING:
    from benchmarks.faults import Campaign

_EPOCH = 6  # steps


def before_call(owner: Any, name: str, act: Callable, when: Callable[..., bool] = lambda *args: True) -> None:
    """From now on act() runs before each call of owner.name whose arguments `when` accepts.

    Called in the process that is to stop: what watches it from outside comes too late on a loaded machine.
    """
    whole = getattr(owner, name)

    def both(*args, **kwargs):
        if when(*args):
            act()
        return whole(*args, **kwargs)

    setattr(owner, name, both)


def before_step_ends(step: int, act: Callable) -> None:
    """From now on act() runs after `step` was computed, before the run asks whether to stop."""
    from rankclip_jax.parallel.preemption import Notice

    before_call(Notice, "reached", act, lambda _, now: now == step)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _in_compilation(cache: Path) -> None:
    """A twentieth of a second after the compiler has the step. `cache`: an empty one, so that it must compile."""
    import jax

    from rankclip_jax.train.programs import Programs

    def asked(event: str, **_) -> None:
        if event.endswith("compile_requests_use_cache"):
            threading.Timer(0.05, _kill).start()

    jax.config.update("jax_compilation_cache_dir", str(cache))
    before_call(Programs, "compile_ahead", lambda: jax.monitoring.register_event_listener(asked))


def _in_first_save() -> None:
    """When it is written, and has not got its name."""

    def heard(event: str, args: tuple) -> None:
        if event == "os.rename" and "orbax-checkpoint-tmp" in str(args[0]):
            _kill()

    sys.addaudithook(heard)


def _in_evaluation() -> None:
    """In that of pictures, after an epoch."""
    from rankclip_jax.train.session import Session

    before_call(Session, "encode_images", _kill)


def _before_first_step() -> None:
    from rankclip_jax.train import opening

    before_call(opening, "open_batches", _interrupt)


def stopped_at_every_moment(campaign: "Campaign") -> str:
    """One run, evaluated after every epoch, that is stopped at each moment in turn; some times over with more kills."""
    shapes = "{'shapes':{'format':'shapes','path':'seen:40'}}"
    more = [f"--config.data.val={campaign.folder / 'data.csv'}", f"--config.eval.zero_shot={shapes}"]
    more.append("--config.eval.every_epochs=1")
    expected, times = campaign.expected_with(more), max(1, campaign.kills // 16)
    said = ""
    for _ in range(times):
        workdir = campaign.workdir()
        said = _stopped_at_every_moment(campaign, workdir, more)
        assert campaign.finished(workdir, more) == expected, f"{workdir}: other numbers"
    runs = f"{times} runs; the last one's" if times > 1 else "one run's"
    return f"{runs} {said}: resumed with the same numbers"


def _stopped_at_every_moment(campaign: "Campaign", workdir: Path, more: list[str]) -> str:
    def stop(before: Callable, code: int) -> str:
        start = campaign.start(workdir, more, before=before)
        assert (found := start.wait()) == code, (found, start.text()[-3000:])
        assert "Traceback" not in start.text(), start.text()[-3000:]
        return start.text()

    def in_epoch(epoch: int, act: Callable, code: int) -> int:
        step = campaign.random.randrange((epoch - 1) * _EPOCH + 2, epoch * _EPOCH)
        stop(lambda: before_step_ends(step, act), code)
        return step

    stop(_before_first_step, 130)
    said = stop(lambda: _in_compilation(campaign.folder / f"{workdir.name}.cache"), -9)
    assert "compiling the step" in said and "compiled in" not in said, said[-3000:]
    stop(_in_first_save, -9)
    assert not _steps_saved(workdir)
    killed = [in_epoch(1, _kill, -9)]
    said = stop(_in_evaluation, -9)
    assert re.search(rf"^step {_EPOCH}/", said, re.MULTILINE) and "after epoch" not in said, said[-3000:]
    once = in_epoch(2, _interrupt, 75)
    assert (workdir / "checkpoints" / str(once)).is_dir()
    twice = in_epoch(3, lambda: (_interrupt(), _interrupt()), 130)
    killed.append(in_epoch(4, _kill, -9))
    return f"kills in steps {killed[0]} and {killed[1]}, Ctrl-C in {once} (saved, exit 75), twice in {twice} (exit 130)"


def _steps_saved(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    return sum(path.name.isdigit() for path in folder.iterdir()) if folder.is_dir() else 0


def disk_full_at_first_save(campaign: "Campaign", size: str) -> str:
    """As a process of its own to its very end: Orbax's threads must not keep it."""
    with damage.small_disk(campaign.folder, size) as mounted:
        if mounted is None:
            return "left out: needs root"
        workdir = mounted / "run"
        command = [sys.executable, "-u", "-m", "rankclip_jax.train", *flags(campaign.folder, workdir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 1 and not _steps_saved(workdir), done.stdout[-2000:] + done.stderr[-2000:]
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
        shown = len(re.findall(r"^step \d+/", done.stdout, re.MULTILINE))
        assert shown < STEPS
        subprocess.run(["mount", "-o", "remount,size=64m", mounted], check=True)
        return f"exit 1 by step {shown}: `{short(lines[0])}`; then {campaign.resumes(workdir)}"


def index_of_two(campaign: "Campaign") -> str:
    """Two runs that index the same tar at once; one of them is killed, and one starts when all is written."""
    folder = campaign.folder / "tars"
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for path in sorted((campaign.folder / "images").iterdir()):
            text = folder / f"{path.stem}.txt"
            text.write_text(f"picture {path.stem}")
            tar.add(path, path.name), tar.add(text, text.name)
            text.unlink()
    more = ["--config.data.format=webdataset", f"--config.data.train={folder / '0.tar'}"]
    for path in folder.rglob(".rankclip_index*"):
        raise AssertionError(f"{path} is there before the runs")
    workdirs = [campaign.workdir() for _ in range(3)]
    starts = [campaign.start(workdir, more=more) for workdir in workdirs]
    written = lambda: any(path.name != "0.tar" for path in folder.iterdir())  # noqa: E731
    if starts[0].wait(written) is None:
        starts[0].send(signal.SIGKILL)
        assert starts[0].wait() == -9
    for start in starts[1:]:
        assert start.wait() == 0, start.text()[-3000:]
    outcomes = [outcome_of(workdir) for workdir in workdirs[1:]] + [campaign.finished(workdirs[0], more=more)]
    assert all(one == outcomes[0] for one in outcomes[1:]), "the runs have other numbers"
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".tmp"))]
    assert len(left) <= 1, left  # SIGKILL in the middle of a write leaves its hidden .part
    return f"both others, and the killed one started again, end with the same numbers; {len(left)} files left over"


def cases(c: "Campaign") -> list[tuple[str, Callable[[], str]]]:
    """(what is done, how it went) of every case."""
    every = (
        "stopped at every moment: Ctrl-C before the first step, once and twice between steps; "
        "SIGKILL in the compilation, the first save, the evaluation and between steps"
    )
    return [
        (every, lambda: stopped_at_every_moment(c)),
        ("disk full at the first save (a tmpfs of 600 kB)", lambda: disk_full_at_first_save(c, "600k")),
        ("three runs index the same tar at once, one is killed", lambda: index_of_two(c)),
    ]
