"""Checkpoints of a run: the state and the place in the data, written in the background, the best one kept."""

import contextlib
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep


class Checkpoints:
    """WORKDIR/checkpoints. A checkpoint appears under its name only when it is complete.

    Keeps the latest `config.keep`, and the one whose metric `config.best` is highest.
    """

    def __init__(self, workdir, config):
        self._best = config.best
        metric = (lambda metrics: metrics[config.best]) if config.best else None
        policies = [keep.LatestN(config.keep)]
        if config.best:
            policies.append(keep.BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            best_fn=metric, preservation_policy=keep.AnyPreservationPolicy(policies)
        )
        self._manager = ocp.CheckpointManager(Path(workdir).resolve() / "checkpoints", options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the best checkpoint by the metric `config.best`; without one, the newest."""
        return self._manager.best_step() if self._best else self.latest()

    def save(self, step: int, state, position: int, metrics: dict) -> None:
        """Starts to write; returns as soon as the state is copied, so that the next step may donate it."""
        if step == self.latest():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"position": position})
        )
        self._manager.save(step, args=items, metrics=metrics if self._best in metrics else None)

    def restore(self, step: int, abstract_state) -> tuple:
        """Returns (state, position). `abstract_state` says the shapes and shardings."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.data["position"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def read_variables(workdir, best: str | None) -> tuple[int, dict] | None:
    """(step, {"params", "batch_stats"} as NumPy arrays) of the best checkpoint by the metric `best`, or the newest.

    None without a complete checkpoint. Reads no optimiser state, writes nothing, and needs no device.
    """
    folder = Path(workdir).resolve() / "checkpoints"
    if not folder.is_dir():
        return None
    metric = (lambda metrics: metrics[best]) if best else None
    with _quiet():
        options = ocp.CheckpointManagerOptions(read_only=True, best_fn=metric)
        with ocp.CheckpointManager(folder, options=options) as manager:
            step = (manager.best_step() if best else None) or manager.latest_step()
        if step is None:
            return None
        return step, _read_arrays(folder / str(step) / "state", ("params", "batch_stats"))


def _read_arrays(folder: Path, names) -> dict:
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        wanted = {name: tree[name] for name in names if tree.get(name)}
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        return reader.restore(
            folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=numpy, partial_restore=True)
        )


@contextlib.contextmanager
def _quiet():
    # Orbax warns four times about what was asked for: to read only, and only a part.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
