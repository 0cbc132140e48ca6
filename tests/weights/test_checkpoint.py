import asyncio
import errno
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import damage
from rankclip_jax.common import devices
from rankclip_jax.common.errors import InputError
from rankclip_jax.config import complete
from rankclip_jax.parallel import processes
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.weights import checkpoint, late_callbacks
from rankclip_jax.weights.fingerprint import fingerprints
from rankclip_jax.weights.saving import Checkpoints
from tests.support.small_files import small_files


def config(**fields):
    return complete({"checkpoint": fields}).checkpoint


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def abstract(tree, place=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place or x.sharding), tree)


def save(workdir, states, **fields):
    checkpoints = Checkpoints(workdir, config(**{"keep": 9} | fields))
    for step, state in states.items():
        checkpoints.save(step, state, 10 * step)
    checkpoints.close()


def state_of(step):
    return {"params": {"w": jnp.arange(4000.0).reshape(40, 100) * np.float32(0.1) + step}, "step": jnp.int32(step)}


def test_state_and_position_come_back_bit_for_bit_with_their_sharding(tmp_path):
    mesh = make_mesh({"data": 8})
    split = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    w = jnp.arange(32.0) * np.float32(0.1)
    state = {"w": jax.device_put(w, split), "step": jax.device_put(jnp.int32(7), everywhere)}
    checkpoints = Checkpoints(tmp_path, config())
    checkpoints.save(7, state, 123_456_789_012)
    checkpoints.close()
    restored = checkpoint.restore(tmp_path, config(), abstract(state))
    assert (restored.step, restored.positions, int(restored.state["step"])) == (7, [123_456_789_012], 7)
    np.testing.assert_array_equal(restored.state["w"], state["w"])
    assert restored.state["w"].sharding == split


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 2, "fsdp": 2}, {"data": 1, "fsdp": 8}])
def test_a_state_saved_on_eight_devices_is_restored_on_others(tmp_path, axes):
    eight = NamedSharding(make_mesh({"data": 8}), PartitionSpec("data"))
    state = jax.device_put({"w": jnp.arange(6400.0).reshape(64, 100)}, eight)
    save(tmp_path, {1: state})
    count = int(np.prod(list(axes.values())))
    mesh = make_mesh(axes, jax.devices()[:count])
    place = NamedSharding(mesh, PartitionSpec(None, None) if count == 1 else PartitionSpec("fsdp"))
    restored = checkpoint.restore(tmp_path, config(), abstract(state, place)).state
    assert restored["w"].sharding == place
    np.testing.assert_array_equal(restored["w"], state["w"])


def test_a_fingerprint_is_that_of_the_numbers_whatever_their_sharding():
    w = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    tree = {"a": w, "b": [w[:, 0].astype(jnp.bfloat16), np.int32(3), np.array([True, False])]}
    alone = fingerprints(tree)
    assert list(alone) == ["a", "b/0", "b/1", "b/2"] and len(set(alone.values())) == 4
    mesh = make_mesh({"data": 8})
    assert fingerprints({"a": jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "data")))})["a"] == alone["a"]
    swapped, flipped = w.copy(), w.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    flipped.view(np.uint32)[3, 3] ^= 1 << 31
    assert alone["a"] not in (fingerprints({"a": swapped})["a"], fingerprints({"a": flipped})["a"])
    assert fingerprints({"a": np.float32([0.0])}) != fingerprints({"a": np.float32([-0.0])})


def test_the_fingerprints_of_many_sharded_arrays_do_not_wait_for_each_other():
    split = NamedSharding(make_mesh({"data": 8}), PartitionSpec("data"))
    tree = {str(i): x for i, x in enumerate(np.random.default_rng(0).normal(size=(300, 768)))}
    assert fingerprints(jax.device_put(tree, split)) == fingerprints(jax.device_put(tree))


@pytest.mark.parametrize("kind", damage.KINDS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capfd, kind):
    save(tmp_path, {step: state_of(step) for step in (1, 2, 3)})
    damage.KINDS[kind](tmp_path / "checkpoints" / "3")
    restored = checkpoint.restore(tmp_path, config(), abstract(state_of(0)))
    assert restored.step == 2 and restored.positions == [20]
    np.testing.assert_array_equal(restored.state["params"]["w"], state_of(2)["params"]["w"])
    assert f"checkpoint {tmp_path / 'checkpoints' / '3'} is damaged and passed over: " in capfd.readouterr().err
    step, variables = checkpoint.read_variables(tmp_path, config())
    assert step == 2
    np.testing.assert_array_equal(variables["params"]["w"], state_of(2)["params"]["w"])
    # The run that resumes writes its own step 3; what was there keeps another name.
    checkpoints = Checkpoints(tmp_path, config(keep=9), start=2)
    checkpoints.save(3, state_of(3), 30)
    checkpoints.close()
    assert checkpoint.restore(tmp_path, config(), abstract(state_of(0))).step == 3
    assert (tmp_path / "checkpoints" / "damaged-3").is_dir() and saved_steps(tmp_path) == [1, 2, 3]


NOT_NOW = [
    ValueError("ABORTED: Error reading gs://b/0: All 32 retry attempts failed: refused [http_response_code='503']"),
    ValueError("PERMISSION_DENIED: Error reading gs://b/0: refused [http_response_code='403']"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes."),
    TimeoutError("The read operation timed out"),
    MemoryError(),
    PermissionError(13, "Permission denied"),
    type("ServiceUnavailable", (Exception,), {})("503 GET https://storage.googleapis.com/b/o"),
]


@pytest.mark.parametrize("what", ["arrays", "metadata"])
@pytest.mark.parametrize("error", NOT_NOW, ids=lambda error: type(error).__name__)
def test_what_cannot_be_read_now_is_no_damage(error, what, tmp_path, monkeypatch):
    save(tmp_path, {step: state_of(step) for step in (1, 2, 3)})

    def restore(*_, **__):
        raise Exception("Encountered error while reading array index: (slice(0, 40, 1),)") from error

    if what == "metadata":
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "metadata", restore)
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", restore)
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", restore)
    for read in (
        lambda: checkpoint.restore(tmp_path, config(), abstract(state_of(0))),
        lambda: checkpoint.read_variables(tmp_path, config()),
    ):
        with pytest.raises(InputError, match=r"checkpoint .*/3 cannot be read now \(.*start again to resume, or move"):
            read()
    assert saved_steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("part", ["", "data", "state"])
def test_a_folder_that_this_user_may_not_open_is_no_damage(part, tmp_path, monkeypatch):
    save(tmp_path, {step: state_of(step) for step in (1, 2, 3)})
    closed = tmp_path / "checkpoints" / "3" / part
    shutil.rmtree(closed)
    closed.mkdir(0)  # and root, as whom tests may run, is as others: to them it seems to hold nothing
    monkeypatch.setattr(os, "access", lambda path, _: os.stat(path).st_mode & 0o500 == 0o500)
    with pytest.raises(InputError, match=rf"cannot be read now \(PermissionError: .*{closed.name}'\)"):
        checkpoint.restore(tmp_path, config(), abstract(state_of(0)))


def test_a_bucket_that_refuses_is_no_run_without_checkpoints(bucket):
    bucket.refused = 403
    with pytest.raises(InputError, match="gs://mine/run/checkpoints: no permission in gs://mine"):
        checkpoint.restore("/tmp", config(folder="gs://mine/run/checkpoints"), abstract(state_of(0)))


def test_a_list_of_scores_that_cannot_be_read_is_not_forgotten(tmp_path):
    save(tmp_path, {1: state_of(1)})
    (tmp_path / "checkpoints" / "scores.json").mkdir()
    with pytest.raises(InputError, match=r"scores\.json cannot be read: .*[Ii]s a directory"):
        checkpoint.scores(checkpoint.folder_of(tmp_path, config()), "top1")


def test_weights_are_read_where_jax_may_not_use_the_cpu(tmp_path, monkeypatch):
    save(tmp_path, {1: state_of(1)})

    def local_devices(*_, **__):  # as with JAX_PLATFORMS=cuda
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    assert devices.host_device() is None and checkpoint.read_variables(tmp_path, config())[0] == 1


def test_of_many_processes_the_first_ones_number_decides_which_step_is_best(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, config(keep=1, best="top1")) as checkpoints:
        for step, mine, first in ((1, 0.5, "0.5"), (2, 0.6, "0.4"), (3, None, "0.3")):
            monkeypatch.setattr(processes, "from_first", lambda _, first=first: first)
            checkpoints.save(step, state_of(step), step)
            checkpoints.score(step, {} if mine is None else {"top1": mine})
    assert saved_steps(tmp_path) == [1, 3]
    assert json.loads((tmp_path / "checkpoints" / "scores.json").read_text())["top1"] == {"1": 0.5, "2": 0.4, "3": 0.3}


@pytest.mark.parametrize(("steps", "kept"), [((1, 3), [3]), ((1, 3, 5), [3, 5]), ((1, 3, 5, 6), [3, 6])])
def test_the_last_one_from_which_a_run_can_be_lengthened_is_kept(tmp_path, steps, kept):
    with Checkpoints(tmp_path, config(keep=1), free=4) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), step)
    assert saved_steps(tmp_path) == kept


def test_where_all_are_damaged_nothing_is_deleted(tmp_path):
    save(tmp_path, {step: state_of(step) for step in (1, 2)})
    damage.KINDS["one bit flipped in the largest file"](tmp_path / "checkpoints" / "1")
    damage.KINDS["empty folder"](tmp_path / "checkpoints" / "2")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"none of the 2 checkpoints in .* can be read .*; nothing was deleted"):
        checkpoint.restore(tmp_path, config(), abstract(state_of(0)))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_the_latest_the_best_and_every_so_many_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, config(keep=2, best="accuracy", keep_every=3))
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6), (5, 0.6), (6, None), (7, 0.1)):
        checkpoints.save(step, state_of(step), step)
        checkpoints.score(step, {} if accuracy is None else {"accuracy": accuracy, "n": 1})
    checkpoints.close()
    assert saved_steps(tmp_path) == [2, 3, 6, 7]
    assert checkpoint.restore(tmp_path, config(), abstract(state_of(0))).step == 7
    best = config(best="accuracy")
    variables = {"params": abstract(state_of(0)["params"])}
    assert checkpoint.restore_variables(tmp_path, best, variables).step == 2
    damage.KINDS["one bit flipped in the largest file"](tmp_path / "checkpoints" / "2")
    assert checkpoint.read_variables(tmp_path, best)[0] == 7
    assert checkpoint.restore_variables(tmp_path, best, variables).step == 7


@pytest.mark.parametrize("metric", ["val/clip", "val/siglip/ema", "val/rank_in_modal"])
def test_the_best_validation_loss_is_the_lowest(metric, tmp_path):
    checkpoints = Checkpoints(tmp_path, config(keep=1, best=metric))
    for step, loss in ((1, 0.5), (2, 0.4), (3, 0.9), (4, 0.7)):
        checkpoints.save(step, state_of(step), step)
        checkpoints.score(step, {metric: loss})
    checkpoints.close()
    assert saved_steps(tmp_path) == [2, 4]
    assert checkpoint.read_variables(tmp_path, config(best=metric))[0] == 2


def test_which_way_a_metric_is_better():
    for lower in ("val/alignment", "geometry/a/b/uniformity_text", "geometry/a/ema/alignment", "robustness/a/drop"):
        assert checkpoint.best_step({1: 0.5, 2: 0.4, 3: 0.4, 4: 0.6}, lower) == 3
    assert checkpoint.best_step({1: 0.5, 2: 0.4}, "val/spearman_in_modal") == 1
    assert checkpoint.best_step({1: 0.5, 2: 0.5}, "zero_shot/rank_1/top1") == 2
    assert checkpoint.best_step({}, "x") is None


def test_what_a_cut_off_save_left_is_cleared_away(tmp_path):
    save(tmp_path, {1: state_of(1)})
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    assert checkpoint.restore(tmp_path, config(), abstract(state_of(0))).step == 1
    checkpoints = Checkpoints(tmp_path, config(), start=1)
    checkpoints.save(2, state_of(2), 20)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_checkpoints_may_lie_elsewhere(tmp_path):
    elsewhere = str(tmp_path / "bucket" / "run")
    save(tmp_path / "run", {1: state_of(1)}, folder=elsewhere)
    assert [path.name for path in (tmp_path / "bucket" / "run").iterdir()] == ["1"]
    assert checkpoint.restore(tmp_path / "run", config(folder=elsewhere), abstract(state_of(0))).step == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(InputError, match=r"cannot save in .*checkpoints: .*The checkpoints before are as they were"):
        save(tmp_path, {1: state_of(1)})


def test_the_remedy_is_that_of_what_failed(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(ocp.CheckpointManager, "save", refused)
    with pytest.raises(InputError, match=r"Too many open files.*; allow more: ulimit -n 8192, and start again"):
        save(tmp_path, {1: state_of(1)})


def test_a_save_that_fails_in_the_background_is_one_line_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, config())
    with small_files(1000), pytest.raises(InputError, match=r"cannot save in .*checkpoints: File too large. The"):
        checkpoints.save(1, state_of(1), 10)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            checkpoints.check()
    with checkpoints:  # which does not wait for it again
        pass


def test_a_thread_that_never_ends_does_not_keep_a_process_whose_save_failed(tmp_path):
    script = (
        "import sys, threading\n"
        "from rankclip_jax.config import complete\n"
        "from rankclip_jax.weights import saving\n"
        "saving._PATIENCE = 0\n"
        "checkpoints = saving.Checkpoints(sys.argv[1], complete({}).checkpoint)\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "raise checkpoints._cannot_save(OSError('the disk'))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "the disk" in done.stderr


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path, config())
    state = {"w": jnp.ones(1_000_000)}
    checkpoints.save(1, state, 0)
    state = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    jax.block_until_ready(state)
    checkpoints.close()
    restored = checkpoint.restore(tmp_path, config(), {"w": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)})
    assert float(restored.state["w"].min()) == 1.0


@pytest.mark.parametrize("name", ["orbax_write", "other"])
def test_a_failed_write_says_nothing_of_its_own_later(name, caplog):
    async def write():
        raise OSError("the disk is full")

    write.__qualname__ = name
    loop = asyncio.new_event_loop()
    late_callbacks.quiet_tasks()
    task = loop.create_task(write())
    loop.run_until_complete(asyncio.wait([task]))
    del task
    gc.collect()
    loop.close()
    logging.getLogger("asyncio").removeFilter(late_callbacks._is_not_of_orbax)
    assert ["never retrieved" in record.getMessage() for record in caplog.records] == [True] * (name == "other")
