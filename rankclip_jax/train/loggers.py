"""Where a run's settings, numbers and pictures also go, beside metrics.jsonl: what config.log names."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rankclip_jax.common import commands
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.parallel import processes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Logger(Protocol):
    """What the recorder asks of each."""

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Scalars by name."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """uint8 (H, W, 3) by name."""

    def close(self) -> None:
        """At the end of a start, also of one that failed."""


class TensorBoard:
    """Event files in the workdir: `tensorboard --logdir runs` shows them."""

    def __init__(self, workdir: Path, settings: Mapping[str, Any]):
        from clu import metric_writers

        self._events = metric_writers.SummaryWriter(str(workdir))
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        self._events.write_hparams(plain)
        self.numbers = self._events.write_scalars
        self.close = self._events.close

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """As of Logger."""
        self._events.write_images(step, {name: pixels_HxWx3[None] for name, pixels_HxWx3 in images.items()})
        self._events.flush()


class WeightsAndBiases:
    """A run of wandb, which a start that resumes continues. Its own variables hold: WANDB_PROJECT, WANDB_MODE ..."""

    def __init__(self, workdir: Path, settings: Mapping[str, Any], run_id: str):
        """Raises InputError where wandb cannot start, as without a key or a network."""
        import wandb  # type: ignore[import-not-found, unused-ignore]

        self._image = wandb.Image
        try:
            self._run = wandb.init(
                name=workdir.resolve().name, id=run_id, resume="allow", dir=str(workdir), config=dict(settings)
            )
        except Exception as error:  # of wandb's own kinds
            raise InputError(
                f"config.log names wandb, which did not start ({one_line(error)}); run `wandb login`, set "
                "WANDB_MODE=offline, or leave it out of config.log"
            ) from None

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """As of Logger."""
        self._run.log(dict(numbers), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """As of Logger."""
        self._run.log({name: self._image(pixels) for name, pixels in images.items()}, step=step)

    def close(self) -> None:
        """As of Logger."""
        self._run.finish()


def check(log: Sequence[str]) -> None:
    """Raises InputError where config.log names wandb, and it is not installed."""
    if "wandb" in log:
        found = importlib.util.find_spec("wandb")
        if found is None or found.origin is None:  # a folder of wandb's runs also looks like a package
            raise InputError("config.log names wandb, which is not installed; pip install wandb, or leave it out")


def imported(log: Sequence[str]) -> None:
    """Imports Keras, which clu's writers need: a second, best spent while XLA compiles the step."""
    if "tensorboard" in log and processes.is_first():
        commands.imported("clu.metric_writers")


def pixels(figure: "Figure") -> np.ndarray:
    """uint8 (H, W, 3) of a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from rankclip_jax.figures.words import any_script

    canvas = FigureCanvasAgg(figure)
    with any_script():
        canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
