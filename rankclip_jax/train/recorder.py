"""The numbers of a run on their way out: read from accelerators one step late, shown, and written down."""

import contextlib
import functools
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import optax

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.metrics_file import MetricsFile, read_metrics
from rankclip_jax.common.trees import flatten
from rankclip_jax.parallel import processes
from rankclip_jax.train import flops, input_wait, loggers
from rankclip_jax.train.session import Session

_ON_CONSOLE = ("loss", "clip")  # a line has 80 columns; metrics.jsonl and the loggers have all numbers


class Recorder:
    """Holds the numbers of each step until the next, so that an accelerator never waits for the host.

    Used as a context: it opens metrics.jsonl and what config.log names in the first process, and closes them.
    """

    def __init__(
        self,
        session: Session,
        workdir: Path,
        rate: optax.Schedule,
        waited: Callable[[], tuple[float, int]],
        *,
        start: int,
        total_steps: int,
        parameters: int,
    ):
        """`waited`: as InputWait.take; `start`: steps done before; `parameters`: of the model, for the report."""
        self._config, self._devices, self._workdir = session.config, session.devices, workdir
        self._rate, self._waited, self._advised = rate, waited, False
        self._start, self._total, self._parameters = start, total_steps, parameters
        self._pace = Pace(start, total_steps, self._config.batch_size)
        self._step_tflop = functools.cache(session.step_tflop)
        self._packs, self._steps, self._padded, self._tflop = session.packs, 0, 0, 0.0  # since the last line
        self._metrics: MetricsFile | None = None
        self._loggers: list[loggers.Logger] = []
        self._opened = contextlib.ExitStack()
        self._pending: tuple[int, dict] | None = None

    def __enter__(self) -> "Recorder":
        if processes.is_first():
            about = dict(device=str(self._devices), parameters=self._parameters, steps=self._total)
            wandb = {"wandb": self._wandb_id()} if "wandb" in self._config.log else {}
            # Before the loggers: of a full disk it says so in one line.
            self._metrics = MetricsFile(self._workdir, self._start, about | wandb)
            self._opened.callback(self._metrics.close)
            settings = flatten(self._config.to_dict())
            for name in self._config.log:
                if name == "tensorboard":
                    self._loggers.append(loggers.TensorBoard(self._workdir, settings))
                else:
                    self._loggers.append(loggers.WeightsAndBiases(self._workdir, settings, wandb["wandb"]))
                self._opened.callback(self._loggers[-1].close)
        return self

    def _wandb_id(self) -> str:
        """That of the starts before, as their first lines have it; or a new one."""
        starts = [row.get("start", {}) for row in read_metrics(self._workdir) if row["step"] <= self._start]
        found = [start["wandb"] for start in starts if "wandb" in start]
        return found[-1] if found else secrets.token_hex(4)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._opened.close()
        except Exception as own:
            if error is None:
                raise
            # What came first is told, and decides whether a save is waited for.
            print(f"a logger of config.log did not close: {one_line(own)}", file=sys.stderr)

    def take(self, step: int, numbers: dict, packed: bool = False, whole: bool = False) -> None:
        """Records the numbers of the step before, and holds those of `step`; a CPU's, at once. Raises as `flush`.

        `packed`, `whole`: whether its captions were packed, and its images whole.
        """
        self.flush()
        self._pending = step, numbers
        self._steps, self._padded = self._steps + 1, self._padded + (not packed)
        self._tflop += self._step_tflop(packed, whole)
        if self._devices.platform == "cpu":  # it computes in this thread (commands.keep_freed_memory): nothing waits
            self.flush()

    def flush(self) -> None:
        """Records what is held. Raises InputError when a number is not finite."""
        if self._pending is None:
            return
        (step, numbers), self._pending = self._pending, None
        loss, norm = float(numbers["loss"]), float(numbers["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"step {step}: loss {loss}, gradient norm {norm}; stopped. The last good checkpoint is kept in "
                f"{self._workdir}; try a lower config.optim.lr or set config.optim.grad_clip_norm=1.0"
            )
        if step % self._config.log_every and step not in (1, self._total):
            return
        numbers = {k: float(v) for k, v in numbers.items()} | {"learning_rate": float(self._rate(step - 1))}
        shown = {key: numbers[key] for key in _ON_CONSOLE if key in numbers}
        line, speed = self._pace.line(step, shown, *self._waited())
        print(line, flush=True)
        steps_per_second = speed["images_per_second"] / self._config.batch_size
        if self._packs:
            speed["padded_steps"] = round(self._padded / max(self._steps, 1), 4)
        speed |= flops.utilisation(self._tflop / max(self._steps, 1) * steps_per_second, self._devices)
        self._steps, self._padded, self._tflop = 0, 0, 0.0
        self.write(step, numbers | speed)
        if step > 1 and not self._advised and speed["data_wait"] > input_wait.WORTH_SAYING:
            self._advised = True
            print(input_wait.advice(speed["data_wait"], speed["images_read_per_second"], self._config.data.resize))

    def write(self, step: int, numbers: dict[str, float], **of_evaluation: Mapping) -> None:
        """Writes numbers down at once, and in metrics.jsonl alone what is given of an evaluation and not empty.

        Args:
          of_evaluation: `counts`, as evaluation.counts gives them; `failed`: set -> why it could not be evaluated.
        """
        line = numbers | {name: dict(found) for name, found in of_evaluation.items() if found}
        if self._metrics and line:
            self._metrics.write(step, line)
        for logger in self._loggers if numbers else ():
            logger.numbers(step, numbers)

    @property
    def shows(self) -> bool:
        """Whether somebody takes pictures, in this process."""
        return bool(self._loggers)

    def show(self, step: int, found: Mapping[str, Mapping]) -> None:
        """Draws examples and galleries, by set, as evaluation.evaluate gives them in `shown`."""
        if not found:
            return
        from rankclip_jax import figures  # matplotlib, which no step needs

        images = {}
        for name, content in found.items():
            kind, _, of = name.partition("/")
            drawing = figures.gallery(content) if kind == "retrieval" else figures.examples(content)
            images[f"{'gallery' if kind == 'retrieval' else 'examples'}/{of}"] = loggers.pixels(drawing)
        for logger in self._loggers:
            logger.images(step, images)

    def paused(self) -> contextlib.AbstractContextManager:
        """What happens inside, an evaluation or a compilation, does not count in the rate."""
        return self._pace.paused()


class Pace:
    """Console lines with the rate and the time left."""

    def __init__(self, step: int, total_steps: int, batch_size: int):
        self._total, self._batch = total_steps, batch_size
        self._step, self._time = step, time.monotonic()

    def line(self, step: int, numbers: dict, waited: float, read: int) -> tuple[str, dict[str, float]]:
        """Returns the line for `step`, and the speed since the last one.

        Args:
          waited: seconds in which the devices had no data.
          read: samples that this process read, whether usable or not.
        """
        now = time.monotonic()
        seconds = max(now - self._time, 1e-9)
        rate = (step - self._step) / seconds
        self._step, self._time = step, now
        days, seconds_left = divmod(int((self._total - step) / max(rate, 1e-9)), 86400)
        left = (f"{days} d " if days else "") + time.strftime("%H:%M:%S", time.gmtime(seconds_left))
        shown = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        speed = {
            "images_per_second": round(rate * self._batch, 1),
            "images_read_per_second": round(read / seconds, 1),
            "data_wait": round(min(waited / seconds, 1.0), 4),
        }
        images = f"{speed['images_per_second']:.0f} images/s"
        waits = f" (waits for data {100 * speed['data_wait']:.0f} %)" if speed["data_wait"] >= 0.01 else ""
        return f"step {step}/{self._total}  {shown}  {images}{waits}  {left} left", speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count in the rate."""
        begin = time.monotonic()
        yield
        self._time += time.monotonic() - begin
