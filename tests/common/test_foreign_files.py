import numpy as np
import pytest

from rankclip_jax.common.foreign_files import refuse_inflating
from rankclip_jax.inference import store
from rankclip_jax.weights import formats


def test_a_small_file_that_inflates_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "real.npz", a=rng.normal(size=10_000).astype(np.float32), b=np.zeros(9000))
    refuse_inflating(tmp_path / "real.npz")
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(10_000_000))
    message = r"bomb.npz.* has [\d,]+ bytes and would take 80,000,\d+ in memory; refused"
    for read in (refuse_inflating, formats.read, store.read):
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path / "bomb.npz")
        assert "\n" not in str(error.value)
