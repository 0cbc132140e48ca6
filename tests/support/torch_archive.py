"""A state dict as torch.save writes it, without torch."""

import struct
import zipfile
from pathlib import Path

import numpy as np


def write(path: Path, state: dict[str, np.ndarray]) -> None:
    """Writes float32 arrays; tests/weights/test_torch_file.py reads them back with torch."""
    text = lambda it: b"X" + struct.pack("<I", len(it)) + it.encode()  # noqa: E731
    numbers = lambda *all: b"".join(b"J" + struct.pack("<i", it) for it in all)  # noqa: E731
    items = b""
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, array) in enumerate(state.items()):
            array = np.ascontiguousarray(array, np.float32)
            strides = (step // array.itemsize for step in array.strides)
            items += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
            items += text("storage") + b"ctorch\nFloatStorage\n" + text(str(i)) + text("cpu") + numbers(array.size)
            items += b"tQ" + numbers(0) + b"(" + numbers(*array.shape) + b"t(" + numbers(*strides) + b"t\x89NtRs"
            archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/data.pkl", b"\x80\x02}" + items + b".")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
