"""Tasks of many workers: processes of this machine, or Ray's. A task whose worker was killed is done again."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from rankclip_jax.common.errors import InputError, one_line

T = TypeVar("T")
R = TypeVar("R")
_PASSED = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS", "JAX_PLATFORMS")  # to the workers
TRIES = 4  # of a task whose worker is killed; Ray's own number
RAY_HELP = "run the tasks on the Ray cluster at ADDRESS, or of this machine, or one that is started here"


def cores() -> int:
    """The processors that this process may use: of a shared machine often fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(work: Callable[[T, int], R], tasks: Iterable[T], *, workers: int, threads: int) -> Generator[R]:
    """Yields work(task, threads) of all tasks, as they are finished, by processes of this machine.

    Args:
      work: picklable.

    Raises:
      InputError: as `work`; or workers were killed TRIES times over the same task.
    """
    left, killed, unfinished = enumerate(tasks), Counter(), dict[int, T]()
    while True:
        running: dict[Future, int] = {}
        with _processes(workers) as pool:
            try:
                for number, task in unfinished.items():
                    running[pool.submit(work, task, threads)] = number
                while True:
                    for number, task in itertools.islice(left, workers - len(running)):
                        unfinished[number] = task
                        running[pool.submit(work, task, threads)] = number
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        del unfinished[running.pop(future)]
                        yield result
            except BrokenProcessPool:
                killed.update(list(unfinished))
                if max(killed.values()) >= TRIES:
                    raise InputError(
                        f"a worker process was killed {TRIES} times over the same task (for its memory?); give fewer "
                        "--workers, and start the same command again: what is finished is kept"
                    ) from None


@contextlib.contextmanager
def _processes(workers):
    """A pool whose processes end at once at the end of the block, and when this process is killed."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (reader,))
    try:
        yield pool
    finally:
        writer.close()
        reader.close()
        pool.shutdown(cancel_futures=True)


def _begin(alive: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive):
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)


def run_by_ray(
    work: Callable[[T, int], R], tasks: Iterable[T], *, address: str, threads: int | None = None, gpu: bool = False
) -> Generator[R]:
    """As `run`, by Ray.

    Args:
      address: of the cluster; "": that of RAY_ADDRESS or of this machine; if none is running, one is started.
      threads: processors of each task; None: as many as the smallest node has, at most 8.
      gpu: each task has a GPU, where the cluster has some.

    Raises:
      InputError: as `work`; there is no Ray, or no cluster; or the workers of a task were killed TRIES times.
    """
    ray, started = _ray(address)
    running: list[Any] = []
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        threads = threads or max(1, min([8, *(int(node["CPU"]) for node in nodes)]))
        gpus = int(gpu and any(node.get("GPU") for node in nodes))
        remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=TRIES - 1)(_call)
        shared, left = ray.put((work, os.getcwd())), iter(tasks)
        while True:
            most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
            more = max(0, most - len(running))  # below 0 where a node went
            running += [remote.remote(shared, task, threads) for task in itertools.islice(left, more)]
            if not running:
                return
            (done, *_), running = ray.wait(running)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                then = "start the same command again: what is finished is kept"
                raise InputError(f"Ray gave a task up: {one_line(error)}; {then}") from None
            yield result
    finally:
        for task in running:
            ray.cancel(task, force=True)
        if started:
            ray.shutdown()


def _call(shared, task, threads):
    work, folder = shared
    with contextlib.suppress(OSError):  # elsewhere, paths must be absolute
        os.chdir(folder)
    return work(task, threads)


def _ray(address: str) -> tuple[Any, bool]:
    """(the module, connected; whether it was not before)"""
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError:
        raise InputError("Ray is not installed; install it: pip install -e '.[ray]'") from None
    if ray.is_initialized():
        return ray, False
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    try:
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address or None, runtime_env={"env_vars": passed}, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {address or 'this machine'}: {one_line(error)}") from None
    return ray, True
