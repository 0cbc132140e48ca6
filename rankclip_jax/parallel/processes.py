"""Many processes: where they find each other, how they agree, and how they stop when one of them dies.

Each process runs the same command. JAX's own runtime joins them (Cloud TPU, SLURM, Open MPI and Kubernetes tell it
where; anywhere else the flags do); everything that follows works with any number of them. Process 0 alone writes the
files of a run that are not checkpoints.
"""

import ctypes
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from rankclip_jax.common.errors import InputError, one_line

_RESUME = "The last checkpoint is kept: start all processes again to resume"


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes: a command's call, which must come before anything else asks JAX for devices.

    Without arguments: does what the cluster says, and nothing where there is none. Afterwards, until the process
    ends, those other than 0 print nothing but errors (sys.stdout is gone), and an abort by JAX's runtime (SIGABRT) is
    one line and exit code 1.

    Args:
      coordinator: HOST:PORT at which process 0 listens.

    Raises:
      InputError: only some of the three are given, or they do not fit together.
    """
    given = coordinator, num_processes, process_id
    if any(value is not None for value in given) and None in given:
        raise InputError("--coordinator, --num_processes and --process_id go together: give all three, or none")
    if coordinator is None and _alone(os.environ):
        return
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator={coordinator}: write HOST:PORT, the same for all processes")
    _speak_when_aborted("could not join the other processes within 5 minutes; are all of them started, and is "
                        f"{coordinator or 'the coordinator'} reachable from here?")  # fmt: skip
    try:
        with warnings.catch_warnings(action="ignore" if "JOB_COMPLETION_INDEX" not in os.environ else "default"):
            jax.distributed.initialize(*given)
    except ValueError as error:
        if coordinator is None:  # JAX's way to say that this is not a cluster
            _speak_when_aborted(None)
            return
        raise InputError(f"--coordinator, --num_processes, --process_id: {one_line(error)}") from None
    _speak_when_aborted(f"another process died; the log of that process says why. {_RESUME}")
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def _alone(env: Mapping[str, str]) -> bool:
    """Whether what looks like a cluster is one process, for which JAX would only take devices away."""
    in_job = "JOB_COMPLETION_INDEX" in env or "TPU_WORKER_HOSTNAMES" in env
    lone_pod = "KUBERNETES_SERVICE_HOST" in env and not in_job
    return lone_pod or "1" in (env.get("SLURM_NTASKS"), env.get("OMPI_COMM_WORLD_SIZE"))


def stop(error: Exception) -> None:
    """Ends this process of many with code 1 and one line about `error`, at once: the others then stop, too.

    A normal exit would wait for the others, who wait for this process in the middle of a step.
    """
    if isinstance(error, InputError):
        why = str(error)
    elif _of_a_peer(error):
        why = f"another process died ({one_line(error)}); the log of that process says why. {_RESUME}"
    else:
        traceback.print_exception(error)
        why = one_line(error, kind=True)
    sys.stdout.flush()
    print(f"error: {_who()}{why}", file=sys.stderr, flush=True)
    os._exit(1)


def _of_a_peer(error: BaseException) -> bool:
    signs = ("Gloo", "NCCL", "closed by peer", "coordination service", "heartbeat", "Barrier")
    return any(sign in str(error) for sign in signs)


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}: " if jax.process_count() > 1 else ""


_handler = None  # C keeps no reference to it


def _speak_when_aborted(message: str | None) -> None:
    """JAX's runtime aborts the process, from a thread of its own, when another one is gone: a line, and code 1.

    Python's signal handlers would never run then, and the callback that JAX has for this fails in jaxlib 0.10.
    """
    global _handler
    libc = ctypes.CDLL(None)
    if message is None:
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        return

    def last_words(_):
        os.write(2, f"error: {message}\n".encode())
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(last_words)
    libc.signal(signal.SIGABRT, handler)
    _handler = handler


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def from_first(make: Callable[[], str]) -> str:
    """The text that process 0 makes, on every process."""
    if jax.process_count() == 1:
        return make()
    data = np.frombuffer(make().encode() if is_first() else b"", np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = np.resize(data, length) if len(data) else np.zeros(length, np.uint8)
    return multihost_utils.broadcast_one_to_all(data).astype(np.uint8).tobytes().decode()


def of_all(value: int | Sequence[int]) -> list[int]:
    """A process's integer (0 <= value < 2^62), or as many from each, from every process in order."""
    values = [value] if isinstance(value, int) else list(value)
    if jax.process_count() == 1:
        return values
    halves = multihost_utils.process_allgather(np.array([[v >> 31, v & (2**31 - 1)] for v in values], np.int32))
    return [(int(high) << 31) + int(low) for high, low in halves.reshape(-1, 2)]
