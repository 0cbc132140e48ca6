"""A Ray cluster of this machine, where Ray is installed."""

import contextlib

import pytest


@contextlib.contextmanager
def two_workers_of_ray(monkeypatch):
    """Ray with room for two tasks of one CPU."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: on a busy machine they would hardly run
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
