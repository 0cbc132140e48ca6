"""How every command ends, and what it sets for its whole process before it starts.

  0    done
  1    wrong input, one line on stderr; the doctor: something is to be fixed
  2    wrong flags (argparse)
  75   a training was asked to stop: all is saved, and the same command resumes (EX_TEMPFAIL of sysexits.h)
  130  Ctrl-C, of a training the second: what is finished is kept (128 + SIGINT)
  141  what reads the output of the command has closed it, as head does (128 + SIGPIPE)
  143  a download got SIGTERM: as 130 (128 + SIGTERM); a training got it before its first step

What belongs to the whole process (signals, environment, hooks and filters, malloc, sys.stdout) is set by `main()` of a
command, or in a context that puts it back; never by importing a module or making an object.
"""

import contextlib
import ctypes
import errno
import faulthandler
import gc
import importlib
import io
import os
import select
import sys
from collections.abc import Iterator
from types import ModuleType

from rankclip_jax.common.errors import InputError, one_line

_FULL, _DENIED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EACCES, errno.EPERM, errno.EROFS)
# What the system refuses, and the user can put right -> what cannot be done, and how to put it right.
_REFUSED = dict.fromkeys((errno.EMFILE, errno.ENFILE), ("opened", "allow more: ulimit -n 8192"))
_REFUSED |= dict.fromkeys(_FULL, ("written", "make room, and start the same command again"))
_REFUSED |= dict.fromkeys(_DENIED, ("used", "give this user the permission, or give another path"))
_REFUSED |= dict.fromkeys((errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP), ("used", "give another path"))

_USUAL = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
_USUAL |= {"jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True, "jax_random_seed_offset": 0}
_USUAL |= {"jax_transfer_guard": "allow"}


def prog(module: str) -> str:
    """How the command was called, for its usage line: `rankclip WORD`, or as `python -m` does."""
    return sys.argv[0] if sys.argv[0].startswith("rankclip ") else f"python -m {module}"


@contextlib.contextmanager
def exit_codes(interrupted: str = "stopped") -> Iterator[None]:
    """Ends the process with 1 and a line for an InputError or what the system `refused`, with 130 and the line
    `interrupted` for Ctrl-C. A signal that no program survives is named: SIGBUS where a mapped file became shorter."""
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit("error: the current folder is gone; cd to one that is there")
    console = sys.stdout if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict" else None
    if console:  # which has not the letters of every name
        console.reconfigure(errors="backslashreplace")
    enabled = faulthandler.is_enabled() or sys.__stderr__ is None  # closed: 2 may be any file
    if not enabled:
        faulthandler.enable(2, all_threads=False)  # stderr, also where sys.stderr is no file
    try:
        yield
        print(end="", flush=True)
    except InputError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python prints at its end
        sys.exit(141)
    except Exception as error:
        if said := refused(error):
            sys.exit(f"error: {said}")
        raise
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    finally:
        if not enabled:
            faulthandler.disable()
        if console:
            console.reconfigure(errors="strict")


def _unread() -> bool:
    """Whether nobody reads any more what the command prints."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, AttributeError):  # no file, as where tests catch what is printed; or closed from the start
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def refused(error: Exception) -> InputError | None:
    """The line for what the system refused and the user can put right: a permission, a full disk, the memory of a
    device; None for others."""
    if type(error).__name__ == "JaxRuntimeError" and str(error).startswith("RESOURCE_EXHAUSTED"):
        return InputError(
            f"a device has too little memory ({one_line(error)}); give a smaller batch or model. In training, "
            "--config.accumulate=8 or --config.model.remat=True also take less, and --mode=plan says before how much"
        )
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    what, advice = _REFUSED[error.errno]
    return InputError(f"{error.filename or 'a file'} cannot be {what}: {error.strerror}; {advice}")


def quiet_tensorflow() -> None:
    """Keeps TensorFlow's greetings, oneDNN's among them, off the console: it only reads files. Before its import."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # JAX's import sets 1: a traceback for each bad picture
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python collects no garbage meanwhile: for imports, and for tracing a step.

    Collections would walk through half a million objects again and again, a tenth of the time to a first step.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def imported(*names: str) -> list[ModuleType]:
    """The modules, imported uncollected. Later collections pass over all that is there then."""
    with uncollected():
        modules = [importlib.import_module(name) for name in names]
        gc.freeze()
    return modules


def usual_numbers() -> None:
    """Puts JAX's settings of types and randomness, or that forbid what is usual, to their defaults, whatever
    JAX_ENABLE_X64 and the like say: a run must not depend on the shell it was started from, nor its checkpoints.

    JAX_DEFAULT_MATMUL_PRECISION stays the user's.
    """
    import jax  # as below

    for name, value in _USUAL.items():
        jax.config.update(name, value)


def keep_freed_memory() -> None:
    """Lets glibc reuse buffers of any size between steps, for a model on a CPU. Call it before JAX starts.

    Otherwise it returns them to the system, which clears their pages again in the next step: a third of the step's
    processor time, measured with the demo's models on two cores. Only the main thread's arena of malloc keeps them: so
    steps run in the thread that starts them. One arena for all threads would do, but they would wait for each other:
    steps and compilation of the demo took a fifth and a quarter longer.
    """
    import jax  # here alone: whoever imports this module may still set the variables that JAX reads at its import

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never
