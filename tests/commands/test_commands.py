"""Every command ends the same way: wrong input one line and 1, Ctrl-C 130; other errors keep their traceback."""

import ast
import gc
import importlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rankclip_jax
from input_pipeline import download, prepare
from rankclip_jax import config as configs
from rankclip_jax import convert, doctor, embed
from rankclip_jax.common import commands
from rankclip_jax.common.cache import user_cache
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.progress import progress
from rankclip_jax.parallel import compilation_cache, preemption, processes
from rankclip_jax.report import runs
from rankclip_jax.train import loop
from rankclip_jax.weights import export, pretrained

REPO = Path(__file__).parents[2]
# Module, flags, and what it calls first of all that can go wrong.
COMMANDS = {
    "rankclip_jax.train.__main__": (["--config", "x.py"], (configs, "load")),
    "rankclip_jax.study.__main__": (["--config", "x.py"], (configs, "load")),
    "rankclip_jax.report.__main__": (["x"], (runs, "read_run")),
    "rankclip_jax.train.mix": (["x", "y", "--out", "z"], (pretrained, "read")),
    "rankclip_jax.convert": (["x", "y", "--to", "hf"], (pretrained, "read")),
    "rankclip_jax.embed": (["x", "y", "--out", "z.npz"], (rankclip_jax, "load")),
    "rankclip_jax.doctor": ([], (doctor, "findings")),
    "input_pipeline.prepare": (["x.csv", "y"], (prepare, "guess_format")),
    "input_pipeline.download": (["x.csv", "y"], (download, "download")),
}


def test_all_commands_are_here():
    def has_main(path):
        return "main" in [getattr(node, "name", "") for node in ast.parse(path.read_text()).body]

    paths = [*(REPO / "rankclip_jax").rglob("*.py"), *(REPO / "input_pipeline").rglob("*.py")]
    found = {".".join(path.relative_to(REPO).with_suffix("").parts) for path in paths if has_main(path)}
    assert found == {*COMMANDS, "rankclip_jax.cli"}  # which starts them


@pytest.fixture(params=COMMANDS)
def run(request, monkeypatch, tmp_path):
    """Runs a command whose first step raises what it is given; returns its exit code."""
    flags, (where, what) = COMMANDS[request.param]
    main = importlib.import_module(request.param).main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(where, what, fail, raising=False)
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    return run


def test_wrong_input(run):
    assert run(InputError("x.csv row 3: no caption; write one")) == "error: x.csv row 3: no caption; write one"


def test_an_interrupt(run, capsys):
    assert run(KeyboardInterrupt()) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped")


def test_what_nobody_expected_is_shown(run):
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())


@pytest.mark.parametrize("code", [0, 1, 2, preemption.EXIT_CODE, 143])
def test_a_code_of_its_own_stays(code):
    with pytest.raises(SystemExit) as stop, commands.exit_codes():
        sys.exit(code)
    assert stop.value.code == code and str(code) in commands.__doc__


@pytest.mark.parametrize("prints", ["print('x' * 100_000)", "print('x')", "print('x', flush=True)"])
def test_whoever_reads_the_output_may_stop(prints):
    script = f"from rankclip_jax.common import commands\nwith commands.exit_codes():\n    input(); {prints}"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as child:
        child.stdout.close()
        child.stdin.write(b"\n")
        child.stdin.close()
        assert child.stderr.read() == b"" and child.wait() == 141
    assert "141" in commands.__doc__


def test_an_output_that_is_closed_from_the_start_changes_nothing():
    script = "from rankclip_jax.common import commands\nwith commands.exit_codes(): print(1)"
    done = subprocess.run(f"{sys.executable} -c '{script}' >&-", shell=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_signal_that_ends_a_command_is_named():
    """SIGBUS: of a mapped tar that became shorter, or whose disk failed."""
    lines = (
        "import faulthandler, os, signal",
        "from rankclip_jax.common.commands import exit_codes",
        "with exit_codes():",
        "    assert faulthandler.is_enabled()",
        "assert not faulthandler.is_enabled()",
        "with exit_codes():",
        "    os.kill(os.getpid(), signal.SIGBUS)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS and done.stderr.startswith("Fatal Python error: Bus error\n")


def test_a_folder_that_is_gone_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match="^error: the current folder is gone; cd to one that is there$"):
        with commands.exit_codes():
            raise AssertionError("not reached")


def test_letters_that_the_console_lacks_end_no_command():
    script = "from rankclip_jax.common import commands\nwith commands.exit_codes(): print('\\u732b')"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u732b\n", "")


def test_a_closed_stderr_shows_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress("embed", 3) as bar:
        bar.update(3)


def test_the_shells_settings_for_jax_change_no_numbers():
    key = jax.random.key_data(jax.random.key(3)).tolist()
    for name, value in (("jax_enable_x64", True), ("jax_numpy_rank_promotion", "raise"), ("jax_random_seed_offset", 7)):
        before = getattr(jax.config, name)
        jax.config.update(name, value)
        try:
            commands.usual_numbers()
            assert jax.random.key_data(jax.random.key(3)).tolist() == key
            assert jnp.ones(3, float).dtype == jnp.float32 and (jnp.ones(3) + jnp.ones((2, 3))).shape == (2, 3)
        finally:
            jax.config.update(name, before)


def test_a_cache_is_found_also_without_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert user_cache() == Path("/some/where")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path.home() / ".cache"

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert user_cache() == tmp_path / f"cache-{os.getuid()}"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "cache-12345").mkdir()  # another user's
    assert user_cache() == tmp_path / f"cache-12345-{os.getpid()}"


def test_another_broken_pipe_is_shown():
    with pytest.raises(BrokenPipeError), commands.exit_codes():
        raise BrokenPipeError


def test_a_command_that_is_done_returns(capsys):
    with commands.exit_codes("never said"):
        pass
    assert capsys.readouterr() == ("", "")


def test_tensorflow_is_quiet_unless_somebody_wants_to_hear_it(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TF_CPP_MIN_LOG_LEVEL": "0"})
    commands.quiet_tensorflow()
    assert os.environ == {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_ENABLE_ONEDNN_OPTS": "0"}


@pytest.mark.parametrize("imported", ["", "import jax; "])
def test_tensorflow_is_quiet_also_where_jax_was_imported_before(imported):
    script = f"import os; {imported}from rankclip_jax.common import commands; commands.quiet_tensorflow(); "
    env = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-c", f"{script}print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"]
    assert subprocess.run(command, env=env, capture_output=True, text=True).stdout == "2\n"


def test_whoever_imports_the_commands_may_still_set_what_jax_reads_at_its_import():
    script = "import sys, rankclip_jax.common.commands; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_training_imports_what_its_steps_need():
    script = (
        "import sys\n"
        "import rankclip_jax.train.__main__\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    found = set(done.stdout.split())
    assert "jax" in found, done.stderr
    assert not found & {"tensorflow", "clu", "matplotlib", "scipy.optimize", "scipy.stats", "torch", "transformers"}


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_by_the_thread_of_the_steps():
    script = (
        "import ctypes, resource\n"
        "import jax\n"
        "import jax.numpy as jnp\n"
        "from rankclip_jax.common import commands\n"
        "commands.keep_freed_memory()\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "def fill(size):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    pointer = libc.malloc(ctypes.c_size_t(size))\n"
        "    ctypes.memset(pointer, 1, 10**8)\n"
        "    libc.free(pointer)\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "faults = []\n"
        "for size in (10**8, 10**8, 3 * 10**9, 3 * 10**9): fill(size)\n"
        "print(*faults)\n"
        "step = jax.jit(lambda x: jnp.sort(jnp.sin(jnp.arange(3e6) * x)))\n"  # would return at once in another thread
        "print(step(1.0).is_ready(), step(2.0).is_ready())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    faults, ready = done.stdout.splitlines()
    faults = list(map(int, faults.split()))
    # The pages are made for the first buffer of a size, and are there for the second.
    assert max(faults[1], faults[3]) < faults[0] / 10 and ready == "True True", done.stdout


@pytest.mark.parametrize(
    "error, line",
    [
        (FileNotFoundError(2, "No such file or directory", "a/z.npz"), "error: a/z.npz: No such file or directory"),
        (OSError("no room"), "error: no room"),
        (OSError(), "error: OSError"),
    ],
)
def test_what_the_system_refuses_while_embedding(error, line, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(rankclip_jax, "load", fail, raising=False)
    monkeypatch.setattr(sys, "argv", ["embed", "x", "y", "--out", "z.npz"])
    with pytest.raises(SystemExit) as stop:
        embed.main()
    assert stop.value.code == line


def test_what_the_system_refuses_while_converting(monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "y/model.safetensors")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(pretrained, "read", lambda *_, **__: None)
    monkeypatch.setattr(export, "write", fail)
    monkeypatch.setattr(sys, "argv", ["convert", "x", "y", "--to", "hf"])
    with pytest.raises(SystemExit) as stop:
        convert.main()
    assert stop.value.code == "error: cannot write y: No space left on device"
    monkeypatch.setattr(pretrained, "read", denied)
    with pytest.raises(SystemExit) as stop:
        convert.main()
    assert stop.value.code.startswith("error: x cannot be used: Permission denied; ")


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(13, "Permission denied", "0.tar"), "0.tar cannot be used: Permission denied; give this user the "),
        (OSError(20, "Not a directory", "a/b"), "a/b cannot be used: Not a directory; give another path"),
        (OSError(28, "No space left on device"), "a file cannot be written: No space left on device; make room, and "),
    ],
)
def test_what_the_system_refuses_a_command_or_a_training(error, line, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stop, commands.exit_codes():
        raise error
    assert stop.value.code.startswith(f"error: {line}")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loop, "train", fail)
    monkeypatch.setattr(processes, "start", lambda *_: None)
    monkeypatch.setattr(compilation_cache, "enable", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["train", "shapes", "--workdir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("rankclip_jax.train.__main__").main()
    assert stop.value.code.startswith(f"error: {line}")


def test_too_little_memory_of_a_device_is_one_line():
    exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\n buffers ...\n")
    with pytest.raises(SystemExit) as stop, commands.exit_codes():
        raise exhausted
    line = "error: a device has too little memory (RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes. buffers ...); "
    assert stop.value.code.startswith(line) and "\n" not in stop.value.code
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), commands.exit_codes():
        raise jax.errors.JaxRuntimeError("INTERNAL: no fault of the user")


@pytest.mark.parametrize("given, used", [(None, "cpu"), ("", "cpu"), ("cuda,cpu", "cuda,cpu")])
def test_converting_takes_no_accelerator_unless_told_to(given, used, monkeypatch):
    def fail(*_, **__):
        raise InputError(str(jax.config.jax_platforms))

    monkeypatch.setattr(pretrained, "read", fail)
    monkeypatch.setattr(sys, "argv", ["convert", "x", "y", "--to", "hf"])
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", given)
        with pytest.raises(SystemExit, match=f"error: {used}"):
            convert.main()
    finally:
        jax.config.update("jax_platforms", before)


def test_tracing_uncollected_leaves_the_collector_as_it_was():
    """What is garbage meanwhile, such as the arrays of an earlier run, is found afterwards."""
    frozen = gc.get_freeze_count()
    with commands.uncollected():
        assert not gc.isenabled()
        with commands.uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() <= frozen  # fewer where a frozen object has gone
