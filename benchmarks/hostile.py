"""What other people's files can do: python -m benchmarks.hostile --seed 0 [--files 1000] [--minutes 20]

Good files of every kind are changed at random, and some are made to do harm. Each is read in a child process with
limits on time and memory. A file may be read, it may be refused in one line, and of data each row that is not read must
be counted. A traceback, a hang, a signal, too much memory or a row that vanishes breaks a promise: exit code 1. So does
a campaign for which --minutes were too few.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import select
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import mutations
from benchmarks.quick_compile import XLA_FLAGS
from rankclip_jax.common.errors import InputError

SECONDS, MEGABYTES = 60, 3000  # of one file; the memory is what comes on top of the imports
# The share of each kind among the changed files.
SHARES = {"picture": 30, "webdataset": 10, "tfrecord": 10, "parquet": 10, "csv": 6, "jsonl": 6}
MODELS = ("hf", "openai", "orbax", "pt")  # the layouts of weights
SHARES |= {"weights": 14, "tokenizer": 6, "workdir": 8}


# The readers: a path -> "read", or "counted", if some rows are bad or lost. InputError: refused.


def picture(path: Path) -> str:
    """By training's graph, by the one reader, and by prepare; each must read it or refuse it in one line."""
    import tensorflow as tf

    from input_pipeline import decode, encode
    from input_pipeline.bad_samples import reason_of_failure
    from rankclip_jax.common import pictures

    data, refused = path.read_bytes(), []
    if reason := reason_of_failure(lambda _: decode.decode(tf.constant(data)), 0):
        refused.append(reason)
    for read in (pictures.read, encode.encode):
        try:
            read(data)
        except InputError as error:
            refused.append(str(error))
    if refused:
        raise InputError(refused[0])
    return "read"


def data(kind: str) -> Callable[[Path], str]:
    """The reader of a format of config.data; every sample must come, or be bad, or lost."""

    def read(path: Path) -> str:
        from input_pipeline import decode, sources
        from input_pipeline.bad_samples import reason_of_failure
        from rankclip_jax import config as configs

        given = {"format": "csv" if kind == "jsonl" else kind, "cache_dir": str(path.parent / f"{path.stem}.index")}
        source = sources.open_source(configs.complete({"data": given}).data, str(path), image_side=8)
        bad = [row for row in range(source.size) if reason_of_failure(lambda row: _used(source, decode, row), row)]
        counted = len(bad) + sum(one.samples for one in source.lost)
        for row in bad:
            assert "\n" not in source.where(row)
        if path.parent.name == "changed" and source.size < _rows_in(kind, path):
            assert counted, f"{mutations.ROWS - source.size} rows vanished"
        return "counted" if counted else "read"

    return read


def _rows_in(kind: str, path: Path) -> int:
    """How many rows must come, or be counted. Zeros in place of members are the end of a tar to every reader."""
    if kind != "webdataset":
        return mutations.ROWS
    with contextlib.suppress(tarfile.TarError), tarfile.open(path, ignore_zeros=True) as tar:
        return min(mutations.ROWS, sum(name.endswith(".jpg") for name in tar.getnames()))
    return mutations.ROWS


def _used(source, decode, row):
    sample = source.read(row)
    decode.decode(sample["image"])


def weights(path: Path) -> str:
    """As `rankclip_jax.load` does."""
    from rankclip_jax.weights import pretrained

    alone = path / "model.pt"
    pretrained.read(alone if alone.exists() else path)
    return "read"


def tokenizer(path: Path) -> str:
    """A tokenizer.json, used on a text."""
    from rankclip_jax.common.tokenizer import Tokenizer

    Tokenizer.load(str(path))(["a text"], 16)
    return "read"


def workdir(path: Path) -> str:
    """Its report, and its model."""
    from rankclip_jax.report import page, runs

    run = runs.read_run(str(path))
    page.render([run])
    weights(path)
    return "counted" if run.unreadable else "read"


READERS: dict[str, Callable[[Path], str]] = {kind: data(kind) for kind in mutations.DATA}
READERS |= {"picture": picture, "weights": weights, "tokenizer": tokenizer, "workdir": workdir}


def _outcome(kind: str, path: Path) -> tuple[str, str]:
    """("read" | "counted" | "refused" | "broken", what was said)."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
            outcome, line = READERS[kind](path), ""
    except InputError as error:
        outcome, line = "refused", str(error)
    except BaseException as error:
        import traceback

        return "broken", "".join(traceback.format_exception(error))[-1500:]
    if "Traceback" in said.getvalue() or "\n" in line or len(line) > 1000:
        return "broken", said.getvalue()[-1500:] or line
    return outcome, line


class Child:
    """A process, forked from this one, that reads files one after the other."""

    def __init__(self, log: Path):
        (own_in, self._to), (self._from, own_out) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._to), os.close(self._from)
            noise = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(noise, 2)
            try:
                for line in os.fdopen(own_in):
                    kind, path = json.loads(line)
                    os.write(own_out, (json.dumps(_outcome(kind, Path(path))) + "\n").encode())
            finally:
                os._exit(0)
        os.close(own_in), os.close(own_out)
        self._begin = self._memory()

    def _memory(self) -> float:
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/status") as status:
            for line in status:
                if line.startswith("VmRSS"):
                    return int(line.split()[1]) / 1000
        return 0.0

    def read(self, kind: str, path: Path) -> tuple[str, str, float]:
        """(outcome, what was said, MB at most). After "broken" the process has ended."""
        os.write(self._to, (json.dumps([kind, str(path)]) + "\n").encode())
        begin, most, answer = time.monotonic(), 0.0, b""
        while not answer.endswith(b"\n"):
            if select.select([self._from], [], [], 0.02)[0]:
                part = os.read(self._from, 1 << 16)
                answer += part
                if not part:
                    _, status = os.waitpid(self.pid, 0)
                    return "broken", f"ended by {os.waitstatus_to_exitcode(status)} (a signal, if negative)", most
            most = max(most, self._memory() - self._begin)
            late = time.monotonic() - begin > SECONDS
            if late or most > MEGABYTES:
                self.end()
                return "broken", f"more than {SECONDS} s" if late else f"more than {MEGABYTES} MB", most
        outcome, said = json.loads(answer)
        if outcome == "broken":
            self.end()
        return outcome, said, most

    def end(self) -> None:
        """Kills it."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _import_all() -> None:
    """Imports alone, which take most of a child's time: neither JAX nor TensorFlow has a thread, so a fork is safe."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS, "TF_CPP_MIN_LOG_LEVEL": "3"}
    for module in ("input_pipeline.pipeline", "input_pipeline.encode", "rankclip_jax.report.page"):
        importlib.import_module(module)
    importlib.import_module("rankclip_jax.weights.export")


def _make(folder: Path, seed: int) -> None:
    """Writes what is good: data/KIND, run (a workdir), and the run's model as hf, openai and pt."""
    from safetensors.numpy import load_file

    from rankclip_jax.weights import export, pretrained
    from tests.support import made_models, torch_archive

    rng = np.random.default_rng(seed)
    for kind in mutations.DATA:
        mutations.write_data(kind, folder / "data" / kind, rng)
    sizes = dict(vision=dict(layers=1, width=64, heads=1), text=dict(layers=1, width=64, heads=1))
    made_models.make_workdir(folder / "run", made_models.VIT | sizes)
    model = pretrained.read(folder / "run")
    for layout in ("hf", "openai", "orbax"):
        export.write(model, folder / layout, layout)
    (folder / "pt").mkdir()
    torch_archive.write(folder / "pt/model.pt", load_file(next((folder / "openai").glob("*.safetensors"))))
    for path in (folder / "run", *(folder / name for name in MODELS)):
        assert READERS["workdir" if path.name == "run" else "weights"](path) == "read"


def _in_child(work: Callable[[], None]) -> None:
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(1)
    if os.waitpid(pid, 0)[1]:
        sys.exit("the good files could not be made")


def files(folder: Path, seed: int, count: int) -> Iterator[tuple[str, Path]]:
    """(reader, file) of all: those made to do harm, and `count` changed ones. Each is made when it is its turn."""
    yield from mutations.crafted(folder / "crafted")
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    good_pictures = mutations.pictures(numbers)
    _in_child(lambda: _make(folder, seed))
    good = {kind: folder / "data" / kind / name for kind, (name, _) in mutations.DATA.items()}
    good |= {"workdir": folder / "run", "tokenizer": folder / "run" / "tokenizer.json"}
    models = [folder / name for name in MODELS]
    total = sum(SHARES.values())
    for kind, share in SHARES.items():
        for i in range(max(1, count * share // total)):
            below = folder / "changed"
            shutil.rmtree(below, ignore_errors=True)
            below.mkdir()
            if kind == "picture":
                name, whole = rng.choice(list(good_pictures.items()))
                path = below / name
                path.write_bytes(mutations.changed(whole, rng))
            elif kind in ("weights", "workdir"):
                path = mutations.copied(models[i % len(models)] if kind == "weights" else good[kind], below / "model")
                inside = sorted(one for one in path.rglob("*") if one.is_file() and one.stat().st_size)
                one = rng.choice(inside)
                one.write_bytes(mutations.changed(one.read_bytes(), rng))
            else:
                for beside in good[kind].parent.glob("*.jpg"):
                    shutil.copy(beside, below)
                path = below / good[kind].name
                path.write_bytes(mutations.changed(good[kind].read_bytes(), rng))
            yield kind, path


def campaign(
    folder: Path, seed: int, count: int, end: float
) -> tuple[dict[str, Counter], dict[str, list[float]], list[str]]:
    """Outcomes by kind; the most seconds and MB by kind; what was broken, in words. Stops at time.monotonic() `end`."""
    _import_all()
    outcomes: dict[str, Counter] = {}
    most: dict[str, list[float]] = {}
    broken, child = [], None
    for number, (kind, path) in enumerate(files(folder, seed, count)):
        if time.monotonic() > end:
            broken.append(f"out of time after {number} files")
            break
        child = child or Child(folder / "children.log")
        begin = time.monotonic()
        outcome, said, memory = child.read(kind, path)
        outcomes.setdefault(kind, Counter())[outcome] += 1
        spent = most.setdefault(kind, [0.0, 0.0])
        most[kind] = [max(spent[0], time.monotonic() - begin), max(spent[1], memory)]
        if outcome == "broken":
            child = None
            kept = mutations.copied(path, folder.parent / f"{number}_{path.name}")
            broken.append(f"file {number}, {kind} {kept}: {said}")
            print(broken[-1], file=sys.stderr, flush=True)
    if child:
        child.end()
    return outcomes, most, broken


def main() -> None:
    """Prints the table, and writes it to --out; exit code 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=1000, help="changed files (1000)")
    parser.add_argument("--minutes", type=float, default=20, help="the most that it takes (20)")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options, begin = parser.parse_args(), time.monotonic()
    kept = Path(tempfile.mkdtemp(prefix="hostile."))
    with tempfile.TemporaryDirectory(dir=kept) as folder:
        outcomes, most, broken = campaign(Path(folder), options.seed, options.files, begin + 60 * options.minutes)
    names = ("read", "counted", "refused", "broken")
    lines = ["| kind | files | read | rows counted | refused | broken | longest | most memory |", "|---" * 8 + "|"]
    for kind, found in outcomes.items():
        numbers = " | ".join(str(found[name]) for name in names)
        lines.append(f"| {kind} | {found.total()} | {numbers} | {most[kind][0]:.1f} s | {most[kind][1]:,.0f} MB |")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    files, minutes = sum(found.total() for found in outcomes.values()), (time.monotonic() - begin) / 60
    print(f"\nseed {options.seed}, {files:,} files, {minutes:.0f} minutes, {len(broken)} broken")
    if not broken:
        shutil.rmtree(kept)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
