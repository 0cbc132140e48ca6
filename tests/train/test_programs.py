"""The step that is compiled while the state is made is the step that runs."""

import logging

import jax
import numpy as np
import pytest

from rankclip_jax.parallel.mesh import to_devices
from rankclip_jax.train import loop, opening
from rankclip_jax.train.packed_batches import PackedBatches
from rankclip_jax.train.programs import batch_shapes
from tests.support.one_device import on_one_device
from tests.train.test_workdir import quick

VIT = ["model.name=ViT-tiny", "model.vision={'patch_size': 8, 'width': 32, 'layers': 1, 'heads': 2}"]


@pytest.mark.parametrize(
    "changes",
    [
        ["model.pack_text='off'"],
        ["model.pack_text='on'"],
        ["model.pack_text='off'", "data.two_views=True"],
        ["model.pack_text='on'", "data.two_views=True", "data.resize='host'"],
        ["model.pack_text='on'", "accumulate=2", "data.canvas=40", *VIT],
    ],
)
def test_batches_have_the_shapes_that_are_compiled_for(tmp_path, changes):
    config, data = opening.open_data(quick(*changes))
    session = opening.open_session(config, tmp_path, data, None, resumes=False)
    start = opening.Start(None, 0, 0, False)
    batch = next(PackedBatches(session, opening.open_batches(session, tmp_path, data, start), 1))

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype), x.sharding), tree)

    assert described(to_devices(batch, session.mesh)) == described(batch_shapes(session))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [[], ["sharding=fsdp", "mesh={'data': 2, 'fsdp': 4}"]])
def test_a_run_compiles_its_step_once_and_so_does_one_that_resumes(tmp_path, caplog, capsys, monkeypatch, fields):
    if not fields:
        on_one_device(monkeypatch)
    caplog.set_level(logging.DEBUG, "jax._src.dispatch")
    for epochs in (1, 2):
        changes = [*fields, f"epochs={epochs}", "optim.schedule='constant'", "optim.ema=0.9"]
        loop.train(quick("loss.objective='clip'", *changes), tmp_path)
        steps = [each for each in caplog.messages if "XLA compilation of jit(train_step)" in each]
        assert len(steps) == epochs
        assert capsys.readouterr().out.count("compiled in") == 1
