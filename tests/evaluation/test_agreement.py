"""An evaluation that fails in one process of two: both give it up together, and meet again at the next one."""

import json
import socket
import subprocess
import sys

SCRIPT = """
import json, pathlib, sys
from rankclip_jax import evaluation
from rankclip_jax.common.errors import InputError
from rankclip_jax.parallel import processes

index = int(sys.argv[2])
processes.start(sys.argv[1], 2, index)
read, missing = [], {}

def batches(fails_after):
    for i in range(3):
        if index == 1 and i == fails_after:
            raise InputError("row 7: its disk is gone")
        yield {"row": i}

for name, fails_after in (("whole", None), ("at once", 0), ("after two", 2), ("whole again", None)):
    with evaluation.one_set(name, missing):
        read.append(0)
        for batch in evaluation.agreed(batches(fails_after)):
            processes.of_all(batch["row"])  # a collective, as every step of a real evaluation has one
            read[-1] += 1
with evaluation.one_set("outside of a batch", missing):
    if index == 0:
        [][1]
pathlib.Path(sys.argv[3]).write_text(json.dumps([read, missing]))  # Gloo prints between our lines
"""


def test_a_set_that_fails_in_one_process_is_missing_in_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    results = [tmp_path / "0", tmp_path / "1"]
    started = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, address, str(i), str(path)], stderr=subprocess.PIPE)
        for i, path in enumerate(results)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], [error.decode()[-1500:] for _, error in said]
    (read_0, missing_0), (read_1, missing_1) = (json.loads(path.read_text()) for path in results)
    assert read_0 == read_1 == [3, 0, 2, 3]
    assert missing_0 == {
        "at once": "another process could not read its share of the set; its log says why",
        "after two": "another process could not read its share of the set; its log says why",
        "outside of a batch": "IndexError: list index out of range",
    }
    assert missing_1 == {
        "at once": "row 7: its disk is gone",
        "after two": "row 7: its disk is gone",
        "outside of a batch": "failed in process 0, whose log says why",
    }
    assert "process 1: at once: row 7: its disk is gone" in said[1][1].decode()
