"""Checkpoints of a run: the state and the place in the data, written in the background, the best one kept."""

from pathlib import Path

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
