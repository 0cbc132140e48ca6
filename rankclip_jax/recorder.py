"""The numbers of a run on their way out: read from the devices, shown, and written down."""

import math

import optax

from rankclip_jax import distributed, evaluation, flops, input_wait, metrics
from rankclip_jax import step as steps
from rankclip_jax.errors import InputError
from rankclip_jax.input_wait import InputWait
from rankclip_jax.run import Run

_ON_CONSOLE = ("loss", "clip", "rank_in_modal", "rank_cross_modal", "grad_norm", "logit_scale", "learning_rate")


class Recorder:
    """Reads metrics one step late, so that the accelerator never waits for the host, and writes them down."""

    def __init__(
        self, run: Run, rate: optax.Schedule, wait: InputWait, start: int, total_steps: int, steps_per_epoch: int
    ):
        self._run, self._rate, self.wait, self.steps_per_epoch = run, rate, wait, steps_per_epoch
        self._advised = False
        self._total = total_steps
        self._progress = metrics.Progress(start, total_steps, run.config.batch_size)
        self._pending = None
        views = 1 + run.config.data.two_views
        self._tflop = flops.step_flops(run.model.config, run.config.batch_size, views) / 1e12
        self.writers = [metrics.MetricsFile(run.workdir, start).write] if distributed.is_first() else []

    def take(self, step: int, numbers: dict) -> None:
        """Holds the numbers of `step` and writes those of the step before."""
        self.flush()
        self._pending = step, numbers

    def flush(self) -> None:
        """Reads what is held. Raises InputError when a number is not finite."""
        if self._pending is None:
            return
        (step, numbers), self._pending = self._pending, None
        loss, norm = float(numbers["loss"]), float(numbers["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"step {step}: loss {loss}, gradient norm {norm}; stopped. The last good checkpoint is kept in "
                f"{self._run.workdir}; try a lower config.optim.lr or set config.optim.grad_clip_norm=1.0"
            )
        if step % self._run.config.log_every and step not in (1, self._total):
            return
        numbers = {k: float(v) for k, v in numbers.items()} | {"learning_rate": float(self._rate(step - 1))}
        epoch = -(-step // self.steps_per_epoch)
        shown = {key: numbers[key] for key in _ON_CONSOLE if key in numbers}
        line, speed = self._progress.line(step, epoch, shown, *self.wait.take())
        print(line, flush=True)
        steps_per_second = speed["images_per_second"] / self._run.config.batch_size
        speed |= flops.utilisation(self._tflop * steps_per_second, self._run.devices)
        self._write(step, numbers | speed)
        if step > 1 and not self._advised and speed["data_wait"] > input_wait.WORTH_SAYING:
            self._advised = True
            print(input_wait.advice(speed["data_wait"], speed["images_read_per_second"], self._run.config.data.resize))

    def evaluate(self, step: int, state: steps.TrainState, kinds: tuple[str, ...]) -> dict[str, float]:
        """Runs the evaluations due, writes their numbers, prints tables; the time does not count in the rate."""
        if not kinds:
            return {}
        self.flush()
        paused = self._progress.pause()
        results = evaluation.evaluate(self._run.config.eval, self._run.encoder(state), kinds=kinds)
        numbers = evaluation.flat(results)
        if "zero_shot" in kinds:
            numbers |= self._run.validation(state)
        print(evaluation.text(results), end="", flush=True)
        if numbers:
            self._write(step, numbers)
        self._progress.resume(paused)
        return numbers

    def _write(self, step, numbers):
        for write in self.writers:
            write(step, numbers)
