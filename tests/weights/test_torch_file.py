"""The PyTorch reader: what PyTorch wrote comes back bit for bit, and nothing in a file ever runs."""

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rankclip_jax.weights.formats import read
from rankclip_jax.weights.torch_file import read_torch_file
from tests.support import torch_archive

torch = pytest.importorskip("torch")


def _same(array, tensor):
    theirs = (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )
    assert array.dtype == theirs.dtype and array.shape == theirs.shape
    assert array.tobytes() == np.ascontiguousarray(theirs).tobytes()


def test_every_dtype_stride_and_view(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "float": base, "transposed": base.T, "column": base[:, 2], "tail": base[2:], "steps": base[::2, 1::3],
        "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "expanded": torch.ones(2).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)).detach(),
        **{str(t): torch.arange(5).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64,
           torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)},
    }  # fmt: skip
    torch.save(state, tmp_path / "a.pt")
    ours = read_torch_file(tmp_path / "a.pt")
    assert list(ours) == list(state)
    for name, tensor in state.items():
        _same(ours[name], tensor)


def test_a_sign_that_is_still_to_be_applied_is_not_left_out(tmp_path):
    torch.save({"w": torch._neg_view(torch.ones(3))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a tensor with neg still to be applied; save it resolved"):
        read_torch_file(tmp_path / "a.pt")


def test_the_tests_own_archive_is_torchs(tmp_path):
    state = {"scale": np.float32(3), "w": np.arange(6, dtype=np.float32).reshape(2, 3), "none": np.zeros((0, 4), "f4")}
    torch_archive.write(tmp_path / "a.pt", state)
    theirs = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(theirs) == list(state)
    for name, array in read_torch_file(tmp_path / "a.pt").items():
        _same(array, theirs[name])
        np.testing.assert_array_equal(array, state[name])


def test_parameters_in_a_training_checkpoint(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "name": "run",
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "a.pt")
    ours = read_torch_file(tmp_path / "a.pt")
    assert set(ours) == set(net.state_dict())
    for name, tensor in net.state_dict().items():
        _same(ours[name], tensor)
    # Parameters themselves, not only their data, are pickled by another function.
    torch.save(dict(net.named_parameters()), tmp_path / "b.pt")
    assert set(read_torch_file(tmp_path / "b.pt")) == {"0.weight", "0.bias", "1.weight", "1.bias"}


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5)}
MOMENTS = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"state_dict": STATE, "epoch": 3, "optimizer": MOMENTS},
        {"epoch": 3, "model_state_dict": STATE, "optimizer_state_dict": MOMENTS, "loss": torch.tensor(0.5)},
        {"model": STATE, "model_ema": {"a.weight": torch.zeros(2, 3)}, "optimizer": MOMENTS},
        {"model": {"state_dict": STATE}, "step": torch.tensor(7)},
        {"model": {"name": "ViT-B/32"}, "weights": STATE},
        {"module": STATE, "lr_scheduler": None},
        {"my_clip": STATE, "optimizer": MOMENTS},
        {"model": STATE, "args": argparse.Namespace(lr=0.1, out=Path("runs"), device=torch.device("cpu"))},
        {"model": STATE, "best": np.float64(0.7), "size": torch.Size([2, 3]), "dtype": torch.float32},
    ],
    ids=lambda checkpoint: "+".join(checkpoint),
)
def test_the_weights_are_found_under_the_names_that_trainers_give_them(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "a.pt")
    ours = read_torch_file(tmp_path / "a.pt")
    assert list(ours) == list(STATE)
    for name, tensor in STATE.items():
        _same(ours[name], tensor)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
def test_a_path_beside_the_weights_of_any_python_and_system(tmp_path, module, name):
    weights = _tensor_pickle()[:-1]  # {"w": tensor}, without the end
    path = f"X\x01\x00\x00\x00pc{module}\n{name}\n(X\x01\x00\x00\x00atRs.".encode()
    _archive(tmp_path / "a.pt", weights + path, **{"data/0": np.float32([1, 2]).tobytes(), "byteorder": "little"})
    np.testing.assert_array_equal(read_torch_file(tmp_path / "a.pt")["w"], np.float32([1, 2]))


def test_several_state_dicts_are_not_guessed_among(tmp_path):
    torch.save({"student": STATE, "teacher": STATE}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: several state dicts: student, teacher; save the one that you mean"):
        read_torch_file(tmp_path / "a.pt")
    nested = {}
    nested["model"] = nested  # a pickle can
    torch.save(nested, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="no state dict found, but a dict with keys model. Expected one under state_d"):
        read_torch_file(tmp_path / "b.pt")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_archive(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 4))
            self.scale = torch.nn.Parameter(torch.tensor(2.0))
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x, x, x)[0]) * self.scale

    net = Net()
    torch.jit.save(torch.jit.trace(net, torch.randn(3, 1, 8), check_trace=False), tmp_path / "a.pt")
    ours = read_torch_file(tmp_path / "a.pt")
    assert set(ours) == set(net.state_dict())
    for name, tensor in net.state_dict().items():
        _same(ours[name], tensor)


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _archive(path, data_pkl, **entries):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/data.pkl", data_pkl)
        for name, content in entries.items():
            z.writestr(f"a/{name}", content)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("where", [lambda x: x, lambda x: {"state_dict": {"w": x}}, lambda x: [("epoch", x)]])
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, protocol, where):
    marker = tmp_path / "ran"
    for function, arguments, name in [
        (os.system, (f"touch {marker}",), f"{os.name}.system"),
        (eval, (f"open({str(marker)!r}, 'w')",), "builtins.eval"),
        (torch.load, (str(marker),), "torch.serialization.load"),
    ]:
        buffer = io.BytesIO()
        pickle.Pickler(buffer, protocol).dump(where(_Call(function, *arguments)))
        _archive(tmp_path / "evil.pt", buffer.getvalue())
        expected = "__builtin__.eval" if name == "builtins.eval" and protocol < 3 else name
        with pytest.raises(ValueError, match=rf"evil\.pt: refused: its pickle asks for {expected},") as error:
            read(tmp_path / "evil.pt")
        assert "\n" not in str(error.value)
    assert not marker.exists()


def test_attributes_of_allowed_names_are_refused(tmp_path):
    # Protocol 4 can walk from an allowed class to its globals.
    data = b"\x80\x04\x8c\x0bcollections\x8c\x20OrderedDict.__init__.__globals__\x93."
    _archive(tmp_path / "evil.pt", data)
    with pytest.raises(ValueError, match=r"asks for collections.OrderedDict.__init__.__globals__"):
        read_torch_file(tmp_path / "evil.pt")


def _tensor_pickle(offset=0, shape=b"K\x02", stride=b"K\x01", numel=2, dtype=b"FloatStorage"):
    """{'w': tensor} as PyTorch writes it, with the numbers of our choice."""
    storage = b"((X\x07\x00\x00\x00storagectorch\n" + dtype + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK"
    storage += bytes([numel]) + b"tQK" + bytes([offset]) + b"(" + shape + b"t(" + stride + b"t\x89NtR"
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n" + storage + b"s."


@pytest.mark.parametrize(
    ("pickled", "entries", "message"),
    [
        (_tensor_pickle(offset=1), {"data/0": bytes(8)}, "extends beyond its storage"),
        (_tensor_pickle(shape=b"K\x03"), {"data/0": bytes(8)}, "extends beyond its storage"),
        (_tensor_pickle(stride=b"K\x02"), {"data/0": bytes(8)}, "extends beyond its storage"),
        (_tensor_pickle(stride=b"J\xff\xff\xff\xff"), {"data/0": bytes(8)}, "invalid description"),
        (_tensor_pickle(stride=b""), {"data/0": bytes(8)}, "invalid description"),
        (_tensor_pickle(numel=3), {"data/0": bytes(8)}, "8 bytes; expected 3 elements"),
        (_tensor_pickle(), {}, "truncated: a/data/0 is missing"),
        (_tensor_pickle(dtype=b"QInt8Storage"), {"data/0": bytes(8)}, "asks for torch.QInt8Storage"),
        (_tensor_pickle()[:-20], {"data/0": bytes(8)}, "pickle is damaged"),
        (_tensor_pickle(), {"data/0": bytes(8), "byteorder": "big"}, "big-endian"),
        (b"\x80\x02}X\x01\x00\x00\x00wK\x01s.", {}, "no state dict found, but a dict with keys w"),
        (b"\x80\x02K\x01.", {}, "no state dict"),
        (b"\x80\x02cos\nsystem\n.", {}, "asks for os.system"),
    ],
)  # fmt: skip
def test_damaged_and_crafted_archives(tmp_path, pickled, entries, message):
    _archive(tmp_path / "a.pt", pickled, **entries)
    with pytest.raises(ValueError, match=message) as error:
        read_torch_file(tmp_path / "a.pt")
    assert "\n" not in str(error.value) and "a.pt: " in str(error.value)


EMPTY_DICT_WITH = b"\x80\x02}%sK\x01s."  # {key: 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (EMPTY_DICT_WITH % (b")" + 2_000_000 * b"\x85"), "nests tuples too deeply"),
        (EMPTY_DICT_WITH % (b")" + 60 * b"2\x86"), "nests tuples too deeply"),  # ((x, x), (x, x)) ...: 2^60 to hash
        (
            EMPTY_DICT_WITH % (b")" + 60 * b"2\x86q\x000ctorch.jit._pickle\nbuild_intlist\nh\x00\x85R"),
            "nests tuples too deeply",
        ),  # the same through a function that gives back what it takes
        (b"\x80\x02}r\xff\xff\xff\x3f.", r"names place 1,073,741,823 after 2 operations"),
        (b"\x80\x02h\x05.", "pickle is damaged"),
        (b"\x80\x02}]" + 60 * b"2\x86" + b".", "nests tuples too deeply"),
        (b"\x80\x02(]" + 60 * b"q\x00]h\x00ah\x00a" + b"l.", "no state dict|damaged"),  # lists, which are not hashed
    ],
)
def test_pickles_made_to_exhaust_the_machine(tmp_path, data, message):
    _archive(tmp_path / "a.pt", data)
    with pytest.raises(ValueError, match=message) as error:
        read_torch_file(tmp_path / "a.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_archives_made_to_exhaust_the_machine(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", _tensor_pickle())
        z.writestr("a/data/0", bytes(8))
    with pytest.raises(ValueError, match=r"refused: a/data.pkl is compressed"):
        read_torch_file(tmp_path / "a.pt")
    shape, stride = b"J\x00\x00\x00\x70", b"K\x00"  # 7.5 GB of the same number
    _archive(tmp_path / "b.pt", _tensor_pickle(shape=shape, stride=stride), **{"data/0": bytes(8)})
    with pytest.raises(ValueError, match=r"refused: its tensors take 7,516,192,768 bytes, and the file has \d+$"):
        read_torch_file(tmp_path / "b.pt")


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_archive_is_read_or_refused_in_one_line(tmp_path, seed):
    torch.save({"state_dict": {f"w{i}": torch.randn(3, 4) for i in range(4)}, "epoch": 3}, tmp_path / "a.pt")
    whole, rng = (tmp_path / "a.pt").read_bytes(), np.random.default_rng(seed)
    for _ in range(100):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        (tmp_path / "b.pt").write_bytes(data)
        try:
            read_torch_file(tmp_path / "b.pt")
        except ValueError as error:
            assert "\n" not in str(error) and "b.pt: " in str(error)


def test_the_crafted_pickle_is_otherwise_valid(tmp_path):
    _archive(tmp_path / "a.pt", _tensor_pickle(), **{"data/0": np.float32([1, 2]).tobytes(), "byteorder": "little"})
    np.testing.assert_array_equal(read_torch_file(tmp_path / "a.pt")["w"], np.float32([1, 2]))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path, share):
    torch.save({"w": torch.randn(1000)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"a\.pt: .*truncated, or not a PyTorch archive"):
        read(tmp_path / "a.pt")


def test_flipped_bytes_are_noticed(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[len(data) // 2] ^= 255  # inside the tensor: the zip's checksum no longer fits
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.pt: .*CRC"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "begins"),
    [(b"\x89PNG\r\n\x1a\n" + bytes(50), ";"), (b"Entry not found", ", it begins with 'Entry not found';")],
)
def test_foreign_files(tmp_path, content, begins):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.pt is neither safetensors nor a PyTorch archive{begins}"):
        read(tmp_path / "a.pt")


def test_a_zip_and_an_old_format(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as z:
        z.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="a zip without data.pkl, so not a PyTorch archive"):
        read(tmp_path / "a.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"older than PyTorch 1\.6"):
        read(tmp_path / "old.pt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt: no such file"):
        read(tmp_path / "nothing.pt")
