"""The programs of a run's steps. The first is compiled while the state is made and the first batch is read."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from optax import GradientTransformation

from rankclip_jax.common import commands, packing
from rankclip_jax.common.packing import Packed
from rankclip_jax.parallel.mesh import batch_sharding, batch_shards
from rankclip_jax.train import step as steps
from rankclip_jax.train.schedule import patch_dropout_steps
from rankclip_jax.train.session import Session


class Program(NamedTuple):
    """Which program a step is. `packed`: its captions are; `whole`: no patches of its images are left out."""

    packed: bool
    whole: bool


class Programs:
    """The steps of a run, jitted (train/step.py): step(state, batch) -> (state, numbers)."""

    def __init__(self, session: Session, tx: GradientTransformation, *, total_steps: int, steps_per_epoch: int):
        length = dict(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        self._session, self._dropping = session, patch_dropout_steps(session.config.model.vision, total_steps)
        self._steps = {
            whole: steps.make_train_step(session.model, tx, session.config, session.mesh, **length, whole=whole)
            for whole in (False, True)
        }
        self._compiled: set[Program] = set()
        self._ahead: tuple[Program, float, Future] | None = None

    def of(self, step: int, batch: dict) -> Program:
        """The program of `step`, 1 for the first, on such a batch."""
        return Program(isinstance(batch["tokens"], Packed), step > self._dropping)

    def compile_ahead(self, step: int, state: steps.TrainState) -> None:
        """Begins to compile the program of `step`. `state`: shapes and shardings, as Fresh.abstract has them."""
        batch = batch_shapes(self._session)
        program = self.of(step, batch)
        print("compiling the step ...", flush=True)
        # Traced here, since two threads of Python only take turns; XLA leaves Python alone.
        with commands.uncollected():
            lowered = self._steps[program.whole].lower(state, batch)
        begin = time.monotonic()
        thread = ThreadPoolExecutor(1)
        self._ahead = program, begin, thread.submit(lambda: (lowered.compile(), time.monotonic())[1])
        thread.shutdown(wait=False)

    def is_new(self, program: Program) -> bool:
        return program not in self._compiled

    def compile(self, program: Program, state: steps.TrainState, batch: dict) -> None:
        """Returns when the program is there, which `run` then finds, and says how long that took."""
        if self._ahead and self._ahead[0] == program:
            _, begin, end = self._ahead
            seconds = end.result() - begin
        else:
            print("compiling the step ...", flush=True)
            begin = time.monotonic()
            self._steps[program.whole].lower(state, batch).compile()
            seconds = time.monotonic() - begin
        self._compiled.add(program)
        print(f"compiled in {seconds:.0f} s", flush=True)

    def run(
        self, program: Program, state: steps.TrainState, batch: dict
    ) -> tuple[steps.TrainState, dict[str, jax.Array]]:
        """Hands the step to the devices. The state given is donated."""
        return self._steps[program.whole](state, batch)


def batch_shapes(session: Session) -> dict:
    """The shapes, dtypes and shardings of a training batch, as the pipeline and train/packed_batches.py give it."""
    config, side, length = session.config, session.side, session.context_length
    where = batch_sharding(session.mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=where)

    canvas, views = session.canvas, 1 + config.data.two_views
    batch = {"tokens": array(np.int32, *(2,) * config.data.two_views, length)}
    if session.packs:
        shape = batch_shards(session.mesh) * config.accumulate, session.unit_captions
        packed = packing.pack(np.zeros((*shape, length), np.int32), np.ones(shape, int), session.unit_rows)
        batch["tokens"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), packed)
    if canvas:
        batch["image"] = array(np.uint8, canvas, canvas, 3)
        return batch | {"size": array(np.int32, 2), "windows": array(np.float32, views, 4)}
    return batch | {"image": array(np.uint8, views, side, side, 3)}
