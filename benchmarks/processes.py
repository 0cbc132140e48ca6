"""Whether many processes train as one does: python -m benchmarks.processes [--processes 1 2 4] [--devices 4]

Starts `python -m rankclip_jax.train` as that many real processes on this machine (CPU devices, Gloo collectives), all
with the same devices in total, and compares what each run leaves with the first: every number of metrics.jsonl, the
evaluation, and every array of the last checkpoint. Exit code 1 if anything differs by more than rounding.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.quick_compile import XLA_FLAGS
from rankclip_jax.common.metrics_file import OF_THE_MACHINE

# Gloo adds up the processes' gradients in another order than XLA those of its own devices.
RTOL_NUMBERS, ATOL_STATE = 1e-5, 1e-6
SMALL = [
    "--config=configs/shapes.py",
    "--config.batch_size=32",
    "--config.data.train=192",
    "--config.data.val=32",
    "--config.epochs=1",
    "--config.log_every=1",
    "--config.optim.warmup_steps=2",
    # Adam divides a gradient by its size, and makes a whole step of a zero one's rounding (a key's bias has no other).
    "--config.optim.eps=1e-3",
    "--config.model.image_size=16",
    "--config.model.vision={'layers':(1,1),'width':8,'stem':'small'}",
    "--config.model.text={'layers':1,'width':32,'heads':2}",
    "--config.checkpoint.every_steps=3",
    "--config.eval.diagnostics=True",
    "--config.eval.zero_shot={'held_out':{'format':'shapes','path':'held_out'}}",
    "--config.eval.retrieval={'scenes':{'format':'shapes','path':41}}",
    "--config.eval.geometry={}",
]


def train(workdir: Path, processes: int, devices: int, *flags: str) -> list[str]:
    """Trains in `processes` processes with `devices` CPU devices in total; returns what each printed.

    Raises:
      RuntimeError: one of them failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    xla = f"--xla_force_host_platform_device_count={devices // processes} {XLA_FLAGS}"
    env = os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "rankclip_jax.train", *SMALL, f"--workdir={workdir}", *flags]
    together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"] if processes > 1 else []
    started = [
        subprocess.Popen(
            [*command, *together, *([f"--process_id={i}"] if together else [])],
            env=env,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    output = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(output))
    return output


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest difference between two runs: of the numbers (relative), and of the state's arrays (absolute)."""
    rows, others = (
        [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()] for workdir in (one, other)
    )
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    numbers = [
        abs(row[key] - theirs[key]) / max(abs(row[key]), 1e-2)
        for row, theirs in zip(rows, others, strict=True)
        for key in row
        if key not in (*OF_THE_MACHINE, "counts")
    ]
    (step, state), (their_step, their_state) = (_last_state(workdir) for workdir in (one, other))
    assert step == their_step and state.keys() == their_state.keys()
    arrays = [float(np.max(np.abs(state[name] - their_state[name]))) for name in state]
    positions = [_positions(workdir, step) for workdir in (one, other)]
    assert sum(positions[0]) == sum(positions[1]), positions
    return {"numbers": max(numbers), "state": max(arrays)}


def _positions(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())["positions"]


def _last_state(workdir):
    import logging

    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax misses a file that only its own managers read
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    with ocp.PyTreeCheckpointer() as reader:
        folder = workdir / "checkpoints" / str(step) / "state"
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
        )
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return step, {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def main() -> None:
    """Prints a line for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--devices", type=int, default=4)
    options, flags = parser.parse_known_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        workdirs = [Path(folder) / str(count) for count in options.processes]
        print("| processes x devices | numbers, relative | state, absolute |\n|---|---|---|")
        for count, workdir in zip(options.processes, workdirs, strict=True):
            train(workdir, count, options.devices, *flags)
            found = differences(workdirs[0], workdir)
            failed |= found["numbers"] > RTOL_NUMBERS or found["state"] > ATOL_STATE
            row = f"| {count} x {options.devices // count} | {found['numbers']:.1e} | {found['state']:.1e} |"
            print(row, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
