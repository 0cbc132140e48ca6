import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rankclip_jax import sharding
from rankclip_jax.checkpoint import Checkpoints
from rankclip_jax.config import complete


def config(**fields):
    return complete({"checkpoint": fields}).checkpoint


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_state_and_position_come_back_bit_for_bit_with_their_sharding(tmp_path):
    mesh = sharding.make_mesh({"data": 8})
    split = NamedSharding(mesh, PartitionSpec("data"))
    state = {"w": jax.device_put(jnp.arange(32.0) * np.float32(0.1), split), "step": jnp.int32(7)}
    checkpoints = Checkpoints(tmp_path, config())
    checkpoints.save(7, state, 123_456_789_012, {})
    checkpoints.close()
    again = Checkpoints(tmp_path, config())
    assert again.latest() == again.best() == 7
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored, position = again.restore(7, abstract)
    assert position == 123_456_789_012 and int(restored["step"]) == 7
    np.testing.assert_array_equal(restored["w"], state["w"])
    assert restored["w"].sharding == split


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, config(keep=2, best="accuracy"))
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6), (5, None)):
        checkpoints.save(step, {"w": jnp.zeros(2)}, step, {} if accuracy is None else {"accuracy": accuracy, "n": 1})
    checkpoints.close()
    assert saved_steps(tmp_path) == [2, 4, 5]
    again = Checkpoints(tmp_path, config(keep=2, best="accuracy"))
    assert (again.latest(), again.best()) == (5, 2)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path, config())
    state = {"w": jnp.ones(1_000_000)}
    checkpoints.save(1, state, 0, {})
    state = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    jax.block_until_ready(state)
    checkpoints.close()
    restored, _ = Checkpoints(tmp_path, config()).restore(1, {"w": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)})
    assert float(restored["w"].min()) == 1.0
