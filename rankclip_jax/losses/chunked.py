"""The terms of the objective on a device's own rows, with their gradients, a chunk of rows at a time.

The similarities of a batch are four B x B matrices: image-image, text-text, image-text, text-image. None is
ever held whole: a device takes its own rows, a chunk at a time, and has the loss and the gradient of a chunk
before it starts the next. sharded.py gathers the columns and hands the gradient to JAX.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rankclip_jax.losses.spec import MATRICES, LossSpec
from rankclip_jax.losses.terms import row_terms

# Scores err by scale * eps, so at logit scale 100 anything below full float32 products (TF32, one or three
# bfloat16 passes) would break the 1e-5 that the loss promises. bfloat16 embeddings multiply exactly as is.
_PRECISION = lax.Precision.HIGHEST


def _scores(rows_RxD, all_BxD):
    return jnp.matmul(rows_RxD, all_BxD.mT, precision=_PRECISION, preferred_element_type=jnp.float32)


def _mix(grad_RxB, all_BxD, platform):
    # The gradient promises 1e-4. Three bfloat16 passes (HIGH on TPU) err by 4e-6 and halve the time of six; on
    # GPU HIGH means TF32, which errs by 3e-4. Norm-wise, on random matrices of 2,048 terms, emulated in NumPy.
    precision = lax.Precision.HIGH if platform == "tpu" else lax.Precision.HIGHEST
    return jnp.matmul(grad_RxB, all_BxD.astype(jnp.float32), precision=precision)


class Sums(NamedTuple):
    """What rows add up to: the terms' sums {term: scalar}, and gradients of their weighted sum.

    d_all: of all embeddings, images and texts, (B, D) each; scalars of 0 where no gradient is asked for.
    """

    terms: dict[str, jax.Array]
    d_all: tuple[jax.Array, ...]
    d_scale: jax.Array
    d_bias: jax.Array

    @classmethod
    def zero(cls, terms: Iterable[str], shape: tuple[int, ...]) -> "Sums":
        """Nothing yet; `shape` of each of d_all."""
        zero, zeros = jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32)
        return cls({term: zero for term in terms}, (zeros, zeros), zero, zero)


class Job(NamedTuple):
    """What is the same for all rows; `weights` are those of the terms that are computed."""

    scale: jax.Array
    bias: jax.Array
    weights: dict[str, jax.Array]
    spec: LossSpec
    platform: str
    with_grad: bool
    chunk: int | None


def _chunk_terms(rows, columns, labels_R, job):
    """Sums over one chunk of rows {term: scalar}; weighted gradients of the score matrices and of the bias."""
    rows, columns = dict(zip("it", rows, strict=True)), dict(zip("it", columns, strict=True))
    used = sorted({matrix for term in job.weights for matrix in MATRICES[term]})
    scores = {matrix: job.scale * _scores(rows[matrix[0]], columns[matrix[1]]) for matrix in used}
    shape = scores[used[0]].shape
    flat = {matrix: x.reshape(-1, shape[-1]) for matrix, x in scores.items()}
    sums, grads, d_bias = {}, {}, jnp.zeros((), jnp.float32)
    pairs = {term: tuple(flat[matrix] for matrix in MATRICES[term]) for term in job.weights}
    results = row_terms(pairs, job.bias, labels_R, job.spec, job.platform, job.with_grad)
    for term, weight in job.weights.items():
        result = results[term]
        sums[term] = result.loss
        d_bias += weight * result.grad_bias
        for matrix, grad in zip(MATRICES[term], (result.grad_a, result.grad_b), strict=True):
            if grad is not None:
                grads[matrix] = grads.get(matrix, 0.0) + weight * grad
    return sums, {matrix: grad.reshape(shape) for matrix, grad in grads.items()}, d_bias


def _add_chunk(before, rows, columns, labels_R, job):
    """-> (`before` with a chunk of rows added, gradients of the rows), (C, D) against (B, D) columns.

    With an axis of lists before these, (m, C, D) against (m, B, D), a list's rows have its own columns.
    """
    new, grads, new_d_bias = _chunk_terms(rows, columns, labels_R, job)
    sums = {name: before.terms[name] + new[name] for name in new}
    if not job.with_grad:
        return before._replace(terms=sums), None
    row, col = dict(zip("it", rows, strict=True)), dict(zip("it", columns, strict=True))
    d_rows = {a: jnp.zeros(x.shape, jnp.float32) for a, x in row.items()}
    d_all = dict(zip("it", before.d_all, strict=True))
    for (a, b), grad in grads.items():
        d_rows[a] += _mix(grad, col[b], job.platform)
        d_all[b] += job.scale * _mix(grad.mT, row[a], job.platform)
    # <row, d score / d row> summed is the gradient of the scale; it saves a pass over the scores.
    d_scale = before.d_scale + sum(jnp.sum(d_rows[a] * x.astype(jnp.float32)) for a, x in row.items())
    after = Sums(sums, (d_all["i"], d_all["t"]), d_scale, before.d_bias + new_d_bias)
    return after, (job.scale * d_rows["i"], job.scale * d_rows["t"])


def _chunk_size(rows: int, length: int, platform: str) -> int:
    """Rows at a time: half a million scores a matrix on CPU, near the cache; eight million on TPU, four on GPU, where
    all four lists are held at once.

    At least 64 rows, below which adding up the (B, D) gradients of the chunks costs more than they do; 128 on TPU,
    where the rows of a sort lie on the lanes.
    """
    scores = {"cpu": 1 << 19, "gpu": 1 << 22, "tpu": 1 << 23}[platform]
    return min(rows, max(128 if platform == "tpu" else 64, scores // length))


Pair = tuple[jax.Array, ...]  # of images and texts


def local_terms(rows: Pair, columns: Pair, first_row: jax.Array | int, job: Job) -> tuple[Sums, Pair | None]:
    """-> (Sums over rows (R, D) against columns (B, D), gradients of the rows); row 0's own item is first_row."""
    count, batch = rows[0].shape[0], columns[0].shape[0]
    chunk = min(count, job.chunk or _chunk_size(count, batch, job.platform))

    def one_chunk(before, first, *some):
        labels = first_row + first + jnp.arange(some[0].shape[0], dtype=jnp.int32)
        return _add_chunk(before, some, columns, labels, job)

    sums = Sums.zero(job.weights, columns[0].shape if job.with_grad else ())
    full = count // chunk
    split = full * chunk
    shaped = [x[:split].reshape(full, chunk, -1) for x in rows]
    sums, d_rows = lax.scan(
        lambda before, xs: one_chunk(before, *xs), sums, (jnp.arange(full, dtype=jnp.int32) * chunk, *shaped)
    )
    if job.with_grad:
        d_rows = tuple(d.reshape(split, -1) for d in d_rows)
    if split < count:
        sums, last = one_chunk(sums, split, *(x[split:] for x in rows))
        if job.with_grad:
            d_rows = tuple(jnp.concatenate(pair) for pair in zip(d_rows, last, strict=True))
    return sums, d_rows


def list_terms(
    rows: Pair, columns: Pair | None, first_row: jax.Array | int, length: int, job: Job
) -> tuple[Sums, Pair | None]:
    """As local_terms, where a row's list is the `length` columns of its own group.

    `columns` None: the rows are whole groups, their own columns, and their gradients are complete (d_all is empty). The
    rows are cut into blocks, each of one group; short groups make a chunk together.
    """
    count, width = rows[0].shape
    chunk = job.chunk or _chunk_size(count, length, job.platform)
    if columns is None and 2 * length <= min(chunk, count):
        return _short_lists(rows, length, chunk // length, job)
    all_columns, offset_of_rows = (rows, 0) if columns is None else (columns, first_row)
    block = math.gcd(count, length)

    def one_block(before, xs):
        first, *some = xs
        at = offset_of_rows + first
        start = at // length * length
        new, d_rows = local_terms(
            tuple(some),
            tuple(lax.dynamic_slice_in_dim(x, start, length) for x in all_columns),
            at - start,
            job,
        )
        d_all = tuple(
            lax.dynamic_update_slice_in_dim(d, lax.dynamic_slice_in_dim(d, start, length) + x, start, 0)
            if job.with_grad
            else d
            for d, x in zip(before.d_all, new.d_all, strict=True)
        )
        return jax.tree.map(jnp.add, before, new._replace(d_all=(0.0, 0.0)))._replace(d_all=d_all), d_rows

    sums = Sums.zero(job.weights, all_columns[0].shape if job.with_grad else ())
    firsts = jnp.arange(0, count, block, dtype=jnp.int32)
    sums, d_rows = lax.scan(one_block, sums, (firsts, *(x.reshape(-1, block, width) for x in rows)))
    if not job.with_grad:
        return sums, None
    d_rows = tuple(d.reshape(count, width) for d in d_rows)
    if columns is None:
        return sums._replace(d_all=()), tuple(map(jnp.add, sums.d_all, d_rows))
    return sums, d_rows


def _short_lists(rows, length, most, job):
    """list_terms of whole groups, at most `most` at a time."""
    count, width = rows[0].shape
    groups = count // length
    together = max(m for m in range(1, most + 1) if groups % m == 0)
    labels = jnp.tile(jnp.arange(length, dtype=jnp.int32), together)

    def some_groups(before, some):
        zeros = jnp.zeros(some[0].shape if job.with_grad else (), jnp.float32)
        after, d_rows = _add_chunk(before._replace(d_all=(zeros, zeros)), some, some, labels, job)
        return after._replace(d_all=()), tuple(map(jnp.add, after.d_all, d_rows)) if job.with_grad else None

    sums = Sums.zero(job.weights, ())._replace(d_all=())
    sums, d_rows = lax.scan(some_groups, sums, tuple(x.reshape(-1, together, length, width) for x in rows))
    return sums, tuple(d.reshape(count, width) for d in d_rows) if job.with_grad else None
