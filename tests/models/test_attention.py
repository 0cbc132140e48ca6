"""Self-attention by cuDNN is ours, at odd lengths too, and is chosen by the devices that a step is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankclip_jax import models
from rankclip_jax.common.devices import Devices, devices_of
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config import complete
from rankclip_jax.models.attention import attend, attend_fused, choose_attention
from rankclip_jax.train import targets
from rankclip_jax.train.session import build_model
from tests.support.backends import H100, V5E

A100 = Devices("gpu", "NVIDIA A100-SXM4-40GB", 8.0, 8)
T4 = Devices("gpu", "Tesla T4", 7.5, 1)
MI300 = Devices("gpu", "AMD Instinct MI300X", None, 8)
CPU = Devices("cpu", "cpu", None, 2)


@pytest.mark.parametrize("length", [77, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7, 8, 197))])
@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_ours(length, causal):
    rng = np.random.default_rng(0)
    q, k, v, d_y = (jnp.asarray(rng.normal(size=(3, length, 32)), jnp.float32) for _ in range(4))

    def both(attention, **options):
        def forward_and_back(q, k, v, d_y):
            y, pull_back = jax.vjp(lambda *args: attention(*args, 4, causal, **options), q, k, v)
            return y, *pull_back(d_y)

        return jax.jit(forward_and_back)(q, k, v, d_y)

    for a, b in zip(both(attend), both(attend_fused, implementation="xla"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("length", [50, 65, 77, 197, 257])
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_takes_every_length_in_training(length, causal):
    """jax refuses odd ones while it traces, before any GPU is asked."""
    x = jax.ShapeDtypeStruct((2, length, 128), jnp.bfloat16)

    def loss(q, k, v):
        return attend_fused(q, k, v, 2, causal).astype(jnp.float32).sum()

    with targets.cudnn_assumed():
        assert [g.shape for g in jax.eval_shape(jax.grad(loss, (0, 1, 2)), x, x, x)] == [x.shape] * 3


@pytest.mark.parametrize(
    "devices, dtype, attention",
    [
        (H100, "bfloat16", "cudnn"),
        (A100, "bfloat16", "cudnn"),
        (H100, "float32", "xla"),
        (T4, "bfloat16", "xla"),
        (MI300, "bfloat16", "xla"),
        (V5E, "bfloat16", "xla"),
        (CPU, "bfloat16", "xla"),
    ],
)
@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14", "RN50"])
def test_auto(name, devices, dtype, attention):
    assert models.build(name, dtype=dtype, devices=devices).attention == attention
    assert models.build(name, dtype=dtype, devices=devices, attention="xla").attention == "xla"


@pytest.mark.parametrize(
    "devices, dtype, width, reason",
    [
        (H100, "float32", 64, "config.model.dtype is float32"),
        (T4, "bfloat16", 64, "Ampere .* Tesla T4 has compute capability 7.5"),
        (V5E, "bfloat16", 64, "needs an NVIDIA GPU, and this runs on tpu"),
        (MI300, "bfloat16", 64, "needs an NVIDIA GPU, and this runs on gpu"),
        (H100, "bfloat16", 60, "a multiple of 8 channels, at most 128, and one has 60"),
        (H100, "bfloat16", 256, "at most 128, and one has 256"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(devices, dtype, width, reason):
    config = models.configure("ViT-tiny", text=dict(width=2 * width, heads=2))
    assert choose_attention("auto", config, dtype, devices) == "xla"
    with pytest.raises(ValueError, match=f"attention='cudnn' is not possible: .*{reason}"):
        choose_attention("cudnn", config, dtype, devices)


def test_by_the_configuration():
    tokenizer = Tokenizer.train(["a red circle"], 64)
    config = complete({"model": {"name": "ViT-tiny", "dtype": "bfloat16", "attention": "cudnn"}})
    assert build_model(config, tokenizer, H100).attention == "cudnn"
    with pytest.raises(InputError, match="config.model: attention='cudnn' is not possible"):
        build_model(config, tokenizer, CPU)
    with pytest.raises(InputError, match="config.model.attention='flash'. Expected one of auto, xla, cudnn"):
        complete({"model": {"attention": "flash"}})


def test_the_record_of_this_machine():
    assert devices_of(jax.devices()) == Devices("cpu", "cpu", None, 8)
    assert [d.has_bfloat16 for d in (H100, A100, T4, V5E, CPU, MI300)] == [True, True, False, True, True, True]
