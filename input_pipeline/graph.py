"""Python functions as parts of TensorFlow's graph.

AutoGraph would rewrite the source of each, which takes half of a pipeline's start, and leaves files in the temporary
folder where a process is killed. Nothing here needs it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tasks import cores

as_written = tf.autograph.experimental.do_not_convert


# So many elements are computed at once: results that wait for an earlier one leave no processor idle. TensorFlow's own
# choice ends at the number of processors, and is 5 % slower.
_AT_ONCE = 2 * cores() + 4


def mapped(data: tf.data.Dataset, function: Callable, at_once: int = _AT_ONCE) -> tf.data.Dataset:
    """function(element) of each, in order, computed so many at once."""
    return data.map(as_written(function), num_parallel_calls=at_once, deterministic=True)


def iterated(data: tf.data.Dataset) -> Iterator:
    """The elements, as NumPy.

    Without TensorFlow's own choice of parallelism: it has a thread for each iterator, which an iterator's end may wait
    for, holding Python's lock, for seconds to minutes (RootDataset::Iterator of TensorFlow 2.21).
    """
    return data.with_options(no_model()).as_numpy_iterator()


def no_model() -> tf.data.Options:
    """Options without that thread."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def apart(branch: Callable) -> Callable:
    """`branch` as one operation: of a branch that is not taken, TensorFlow passes over every single one."""
    if tf.executing_eagerly():
        return branch
    return tf.function(branch, autograph=False, experimental_attributes={"_noinline": True})


def once(function: Callable) -> Callable:
    """`function` traced once in a process, though every set that is read has it in its graph."""
    traced = tf.function(function, autograph=False)

    @functools.wraps(function)
    def called(*inputs):
        return function(*inputs) if tf.executing_eagerly() else traced(*inputs)

    return called


def require(condition: tf.Tensor, message: str | tf.Tensor) -> None:
    """Makes the current row a bad one, with `message` as the reason, unless `condition` holds."""
    require_all((condition, message))


def require_all(*given: tuple[tf.Tensor, str | tf.Tensor]) -> None:
    """As `require`, of several: (condition, message). The reason is the first that does not hold."""
    if tf.executing_eagerly():
        for condition, message in given:
            tf.debugging.Assert(condition, [message])
    else:  # in a graph that makes a branch of each; and who wants the reason reads the row again, eagerly
        conditions, messages = zip(*given, strict=True)
        tf.raw_ops.Assert(condition=functools.reduce(tf.logical_and, conditions), data=messages)


def from_python(fetch: Callable[..., bytes], *inputs: tf.Tensor) -> tf.Tensor:
    """The bytes (string scalar) that `fetch` returns for the inputs' values; a bad row where it raises InputError.

    If the store is at fault and not the row, `Ahead.check` raises before the row counts as a bad one.
    """
    return all_from_python(lambda *values: [fetch(*values)], ((),), *inputs)[0]


def all_from_python(fetch: Callable[..., Sequence], shapes: Sequence[tuple], *inputs: tf.Tensor) -> list[tf.Tensor]:
    """As `from_python`, of several: `fetch` returns bytes (shape ()) or a list of them (shape (None,)) for each."""

    @as_written
    def fetched(*values):
        try:
            return [*(np.array(found, object) for found in fetch(*values)), b""]
        except InputError as error:  # raised here, it would print its traceback for every bad row
            nothing = [np.full([0] * len(shape), b"", object) for shape in shapes]
            return [*nothing, str(error)[:300].encode("utf-8", "replace")]

    *found, reason = tf.numpy_function(fetched, inputs, [tf.string] * (len(shapes) + 1))
    require(tf.strings.length(reason) == 0, reason)
    return [tf.ensure_shape(one, shape) for one, shape in zip(found, shapes, strict=True)]
