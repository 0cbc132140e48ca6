"""What the RankCLIP objective holds and moves at a large batch, read from compiled programs.

    python -m benchmarks.loss_scaling [--batches 4096 ...] [--list_sizes 2048] [--topologies v5e:4x4] [--devices 1]

--topologies compiles for real TPUs ahead of time, which needs libtpu (`pip install "jax[tpu]"`) but no TPU, and prints
the cycles of the loss; --devices compiles the largest batch for that many fake CPU devices. Each program is compiled in
a process of its own: the device count is fixed when JAX starts, and libtpu locks a file.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys

from rankclip_jax.train import targets
from rankclip_jax.train.hlo import CLOCKS, COLLECTIVE, Cycles, cycles, result_bytes
from rankclip_jax.train.targets import parse_target

WIDTH = 512


def collectives(hlo: str) -> list[tuple[str, int]]:
    """(kind, bytes of its result) of each collective in a compiled program."""
    return [(match["kind"], result_bytes(match)) for match in COLLECTIVE.finditer(hlo)]


def describe(devices, batch: int, options: dict) -> dict:
    """Compiles loss and gradients of the objective over the devices (one axis) and reads the program."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from rankclip_jax.losses import objective_loss

    mesh = Mesh(np.asarray(devices).ravel(), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    z = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    step = jax.jit(
        jax.value_and_grad(lambda *args: objective_loss(*args, mesh=mesh, **options)[0], (0, 1, 2)),
        out_shardings=(
            NamedSharding(mesh, PartitionSpec()),
            (rows, rows, NamedSharding(mesh, PartitionSpec())),
        ),
    )
    compiled = step.lower(z, z, scale).compile()
    hlo = compiled.as_text()
    return {
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "cycles": cycles(hlo)._asdict(),
        "collectives": collectives(hlo),
        "scatter_fusions": len(re.findall(r"= [^=]* fusion\(.*calls=%?all-reduce-scatter", hlo)),
    }


def _child(target: str, batch: int, options: dict) -> dict:
    environment = targets.environment("tpu")
    if target.isdigit():
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={target}"
    command = [sys.executable, "-m", "benchmarks.loss_scaling", "--child", target, str(batch), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def _run_child(target: str, batch: str, options: str):
    import jax

    devices = jax.devices() if target.isdigit() else targets.devices(parse_target(target))
    print(json.dumps(describe(list(devices), int(batch), json.loads(options)) | {"count": len(devices)}))


# Pairs a second of CLIP's step of ViT-B/32 at 32,768 pairs, texts padded, by the compiler without collectives
# (docs/scaling.md, python -m benchmarks.tpu_table).
CLIP_RATES = {"v5e:16x16": 269_033, "v5p:4x4x8": 380_991, "v6e:16x16": 645_999}


def cycles_row(topology: str, batch: int, name: str, got: dict, clip: float | None) -> str:
    """Cycles of a loss, its time, and what it takes beyond CLIP's `clip` seconds, as a share of CLIP's step."""
    start = f"| {topology} | {batch:,} | {name} |"
    if "error" in got:
        return f"{start} {got['error']} | | | | | |"
    found = Cycles(**got["cycles"])
    millions = " | ".join(f"{x / 1e6:.2f}" for x in (found.compiler, found.sort, found.gather + found.scatter))
    more = "" if clip is None else f"{100 * (seconds(topology, got) - clip) * CLIP_RATES[topology] / batch:.1f} %"
    return f"{start} {millions} | {1e3 * seconds(topology, got):.2f} | {more} | {got['temporary'] / 2**20:,.0f} |"


def seconds(topology: str, got: dict) -> float:
    """Of a core at its clock."""
    return sum(got["cycles"].values()) / (CLOCKS[parse_target(topology).kind] * 1e9)


def print_cycles(topologies: list[str], batches: list[int], list_sizes: list[int]) -> None:
    """The TPU table."""
    print("Million cycles of the loss on a core: the compiler's estimate; sorts, gathers and scatters by train/hlo.py.")
    print("Not in it: collectives, and a second pass over lists whose scores spread over more than 130.\n")
    print("| topology | B | loss | compiler | sorts | gathers, scatters | ms | more than CLIP's step | temporary MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    losses = {"RankCLIP, whole lists": {}}
    losses |= {f"RankCLIP, lists of {size:,}": {"list_size": size} for size in list_sizes}
    for topology, batch in itertools.product(topologies, batches):
        alone = _child(topology, batch, {"objective": "clip"})
        print(cycles_row(topology, batch, "CLIP", alone, None), flush=True)
        clip = seconds(topology, alone) if topology in CLIP_RATES and "error" not in alone else None
        for name, options in losses.items():
            print(cycles_row(topology, batch, name, _child(topology, batch, options), clip), flush=True)


def print_moved(names: list[str], batch: int) -> None:
    """The table of memory and collectives."""
    print(f"\nB = {batch:,}, D = {WIDTH}, float32, forward and backward of clip, in-modal and cross-modal\n")
    print("| target | devices | temporary MB a device | collectives a step |")
    print("|---|---|---|---|")
    for target in names:
        got = _child(target, batch, {})
        if "error" in got:
            print(f"| {target} | | {got['error']} | |")
            continue
        kinds = {}
        for kind, size in got["collectives"]:
            kinds.setdefault((kind, size), []).append(size)
        moved = ", ".join(
            f"{len(sizes)} {kind} of {size / 2**20:.3g} MB" if size > 1000 else f"{len(sizes)} {kind} of {size} B"
            for (kind, size), sizes in sorted(kinds.items())
        )
        name = f"CPU x {target}" if target.isdigit() else target
        if got["scatter_fusions"]:
            moved += f" (as {got['scatter_fusions']} fused all-reduce-scatter)"
        memory = got["temporary"] / 2**20
        print(f"| {name} | {got['count']} | {memory:,.0f} | {moved or 'none'} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[4096, 16384, 32768], help="of the table of cycles")
    parser.add_argument("--list_sizes", type=int, nargs="*", default=[2048], help="rows of it beside whole lists")
    parser.add_argument("--topologies", nargs="*", default=["v5e:16x16", "v5p:4x4x8", "v6e:16x16"])
    parser.add_argument("--devices", nargs="*", default=["1", "8", "64", "256"])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _run_child(*args.child)
    print_cycles(args.topologies, args.batches, args.list_sizes)
    if args.devices:
        print_moved([*args.devices, *args.topologies], max(args.batches))


if __name__ == "__main__":
    main()
