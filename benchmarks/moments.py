"""Cases of benchmarks/faults.py: moments at which a run is stopped, and two runs that share what they write."""

import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import damage
from benchmarks.starts import STEPS, Start, flags, outcome_of, saves_begun, short

if TYPE_CHECKING:
    from benchmarks.faults import Campaign

_EPOCH = 6  # steps


def _said(start: Start, words: str) -> Callable[[], bool]:
    return lambda: bool(re.search(f"^{words}", start.text(), re.MULTILINE))


def _with_val(campaign: "Campaign") -> list[str]:
    """Changes to the flags of a run that is also evaluated after every epoch."""
    shapes = "{'shapes':{'format':'shapes','path':'seen:40'}}"
    return [f"--config.data.val={campaign.folder / 'data.csv'}", f"--config.eval.zero_shot={shapes}"]


def killed(campaign: "Campaign", moment: str) -> str:
    """SIGKILL at a moment, some times in one run; it must end with the numbers of the undisturbed one."""
    options = {"more": _with_val(campaign)} if moment == "evaluation" else {}
    expected = campaign.expected_with(**options)
    workdir, hits = campaign.workdir(), 0
    times = max(1, campaign.kills // 16)
    for count in range(times):
        start = campaign.start(workdir, **options)
        match moment:
            case "compilation":
                until, missed = _said(start, "compiling the step"), _said(start, "compiled in")
            case "first save":
                seen: set[str] = set()
                until, missed = (lambda seen=seen: saves_begun(workdir, seen, 1)), (lambda: _steps_saved(workdir) > 0)
            case "evaluation":
                end = _EPOCH * (1 + count % 3)
                until, missed = start.reached(end), _said(start, f"after epoch {end // _EPOCH}")
            case _:
                step = campaign.random.randrange(2, STEPS - 1)
                until, missed = start.reached(step), (lambda: False)
        code = start.wait(until)
        if code is not None:  # it was over before: an evaluation that an earlier start has finished
            assert code == 0, start.text()[-3000:]
            break
        start.send(signal.SIGKILL)
        assert start.wait() == -9
        hits += not missed()
    found = campaign.finished(workdir, **options)
    assert found == expected, f"{workdir}: other numbers"
    assert hits, f"none of {times} kills fell into the {moment}"
    return f"{hits} kill{'s' * (hits > 1)}: resumed with the same numbers"


def _steps_saved(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    return sum(path.name.isdigit() for path in folder.iterdir()) if folder.is_dir() else 0


def interrupted(campaign: "Campaign") -> str:
    """Ctrl-C once, twice, and before the first step."""
    workdir = campaign.workdir()
    start = campaign.start(workdir)
    assert start.wait(_said(start, "training a tokenizer|chosen")) is None
    start.send(signal.SIGINT)
    before = start.wait()
    assert before in (75, 130) and "Traceback" not in start.text(), start.text()[-3000:]
    saved = campaign.terminate(workdir, campaign.random.randrange(2, STEPS - 4), signal.SIGINT)
    start = campaign.start(workdir)
    assert start.wait(start.reached(saved + 1)) is None
    start.send(signal.SIGINT)
    assert start.wait(_said(start, "saving this step|saved step")) is None
    start.send(signal.SIGINT)
    twice = start.wait()
    assert twice in (75, 130) and "Traceback" not in start.text(), start.text()[-3000:]
    return (
        f"before the first step exit {before}; once exit 75 with step {saved} saved; twice exit {twice}; "
        f"then {campaign.resumes(workdir)}"
    )


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
    return f"both others, and the killed one started again, end with the same numbers; {len(left)} files left over"


def cases(c: "Campaign") -> list[tuple[str, Callable[[], str]]]:
    """(what is done, how it went) of every case."""
    moments = ("compilation", "first save", "evaluation")
    return [
        ("SIGKILL between steps", lambda: killed(c, "steps")),
        *((f"SIGKILL in the {moment}", lambda moment=moment: killed(c, moment)) for moment in moments),
        ("Ctrl-C", lambda: interrupted(c)),
        ("disk full at the first save (a tmpfs of 600 kB)", lambda: disk_full_at_first_save(c, "600k")),
        ("three runs index the same tar at once, one is killed", lambda: index_of_two(c)),
    ]
