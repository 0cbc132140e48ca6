import math

import jax
import numpy as np
import pytest

from rankclip_jax.common.errors import InputError
from rankclip_jax.config import complete
from rankclip_jax.train.schedule import free_until, learning_rate

LR, WARMUP, DECAY, EPOCH = 2e-3, 10, 7, 6
KINDS = {
    "cosine": dict(),
    "constant": dict(schedule="constant"),
    "wsd": dict(schedule="wsd", decay_steps=DECAY),
    "released": dict(recipe="released"),
}


def config(kind, **fields):
    return complete({"optim": dict(lr=LR, warmup_steps=WARMUP) | KINDS[kind] | fields}).optim


def oracle(kind, u, total, warmup=WARMUP, epoch=EPOCH):
    """The rate of step u in float64."""
    if kind == "released":
        u += epoch
    if u < warmup:
        return LR * (u + 1) / warmup
    if kind == "constant" or (kind == "wsd" and u < total - DECAY):
        return LR
    if kind == "wsd":
        return LR * (total - u) / DECAY
    return LR / 2 * (1 + np.cos(np.pi * (u - warmup) / (total - warmup)))


def rates(kind, total, epoch=EPOCH, **fields):
    rate = learning_rate(config(kind, **fields), total, epoch)
    return np.array([rate(u) for u in range(total)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total, warmup", [(100, WARMUP), (100, 0), (100, 1), (17, WARMUP), (8, 1), (300, EPOCH)])
def test_every_rate_is_the_formulas(kind, total, warmup):
    expected = [oracle(kind, u, total, warmup) for u in range(total)]
    found = rates(kind, total, warmup_steps=warmup)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7 * LR)
    assert found.max() <= np.float32(LR)
    traced = jax.vmap(learning_rate(config(kind, warmup_steps=warmup), total, EPOCH))(np.arange(total))
    np.testing.assert_allclose(traced, expected, rtol=2e-6, atol=1e-7 * LR)


def test_the_ends():
    last = {kind: rates(kind, 100)[-1] for kind in KINDS}
    assert last["constant"] == np.float32(LR)
    assert last["wsd"] == pytest.approx(LR / DECAY)
    assert 0 < last["cosine"] == pytest.approx(LR / 2 * (1 + np.cos(np.pi * 89 / 90)), rel=1e-3)
    assert learning_rate(config("cosine"), 100)(100) == 0  # one step after the last
    assert rates("cosine", 100)[WARMUP - 1] == rates("cosine", 100)[WARMUP] == np.float32(LR)
    # 0 where the last epoch begins, and rising from there.
    assert rates("released", 100)[100 - EPOCH] == 0
    assert 0 < last["released"] == pytest.approx(LR / 2 * (1 - np.cos(np.pi * (EPOCH - 1) / 90)), rel=1e-3)


def test_the_released_code_has_no_warm_up_on_cc3m():
    total, epoch = 64 * 26_000, 26_000  # more steps in an epoch than the 10,000 of the warm-up
    rate = learning_rate(config("released", warmup_steps=10_000), total, epoch)
    assert 0.999 * LR < rate(0) == pytest.approx(oracle("released", 0, total, 10_000, epoch))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, EPOCH - 1, EPOCH, WARMUP])
@pytest.mark.parametrize("more", [1, 30])
def test_longer_runs_have_the_same_rates_as_long_as_they_are_free(kind, warmup, more):
    fields = dict(warmup_steps=warmup)
    free = free_until(config(kind, **fields), 50, EPOCH)
    short, long = rates(kind, 50, **fields), rates(kind, 50 + more, **fields)
    same = int(min(free, 50))
    np.testing.assert_array_equal(short[:same], long[:same])
    if kind == "constant":
        assert free == math.inf
    else:
        assert short[same] != long[same]


@pytest.mark.parametrize(
    "kind, total, message",
    [
        *[(kind, 10, "warmup_steps = 10 must be fewer than the run's 10 steps") for kind in KINDS],
        ("wsd", 16, r"config.optim.decay_steps = 7 leaves no room .* in the run's 16 steps. Expected at most 6"),
        ("released", 50, r"recipe=released takes the rates an epoch early, .* 50 steps in epochs of 50. Expected more"),
    ],
)
def test_a_run_too_short_is_refused(kind, total, message):
    with pytest.raises(InputError, match=message):
        learning_rate(config(kind), total, 50)
    if total == 16:
        assert rates(kind, 17)[WARMUP - 1 : WARMUP + 2] == pytest.approx([LR, LR, LR * 6 / 7])
