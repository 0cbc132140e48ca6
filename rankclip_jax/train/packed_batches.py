"""The training batches with their captions packed, or padded where those of any device do not fit: all processes alike.

The step is then another program, of the padded form, which is compiled when it is first needed. (A lax.cond in the one
program would need no agreement, and would have the memory of the padded form and twice the compilation in every run.)
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rankclip_jax.common.packing import Packed
from rankclip_jax.parallel.mesh import to_devices
from rankclip_jax.train.session import Session


class _Ahead(NamedTuple):
    batch: dict
    packed: Packed | None
    all_fit: jax.Array | None  # of many processes
    position: int | tuple[int, ...]
    read: int
    error: Exception | None


class PackedBatches:
    """Iterates over the batches of TrainBatches, whose "tokens" become Packed where config.model.pack_text is on.

    Of many processes each looks one batch ahead: the devices compute whether it fits all of them between two steps, so
    that nobody waits for the answer.

    Attributes:
      position, read: as TrainBatches has them, after the last returned batch.
    """

    def __init__(self, session: Session, batches: Any, count: int):
        """`count`: batches that will be asked for."""
        self.position, self.read = batches.position, batches.read
        self._session, self._batches, self._left = session, batches, count
        self._ahead: deque[_Ahead] = deque()
        self._agree = jax.jit(jnp.all) if session.process[1] > 1 and session.packs else None

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        while self._left and len(self._ahead) < (2 if self._agree else 1):
            self._ahead.append(self._read())
            self._left -= 1
        if not self._ahead:
            raise StopIteration
        batch, packed, all_fit, self.position, self.read, error = self._ahead.popleft()
        if error:
            raise error
        fits = packed is not None and (all_fit is None or bool(all_fit))
        return batch | {"tokens": packed} if fits else batch

    def _read(self) -> _Ahead:
        batch, packed, error = {}, None, None
        try:
            batch = next(self._batches)
            packed = self._session.pack(batch["tokens"], self._session.config.accumulate)
        except Exception as raised:  # raised where this batch is asked for: the step before is not to be lost
            error = raised
        all_fit = None
        if self._agree:
            mine = np.full(self._session.shards, packed is not None)
            all_fit = self._agree(to_devices({"fits": mine}, self._session.mesh)["fits"])
        return _Ahead(batch, packed, all_fit, self._batches.position, self._batches.read, error)
