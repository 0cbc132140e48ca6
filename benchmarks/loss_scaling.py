"""What the RankCLIP objective holds and moves at a large batch, read from compiled programs.

    python -m benchmarks.loss_scaling [--batch 32768] [--devices 1 8 64 256] [--topologies v5e:4x4 ...]

--devices compiles for that many fake CPU devices; --topologies compiles for real TPUs ahead of time, which
needs libtpu (`pip install "jax[tpu]"`) but no TPU. Each program is compiled in a process of its own: the
device count is fixed when JAX starts, and libtpu locks a file.
"""

import argparse
import json
import os
import re
import subprocess
import sys

from rankclip_jax.train.hlo import COLLECTIVE, result_bytes

WIDTH = 512


def collectives(hlo: str) -> list[tuple[str, int]]:
    """(kind, bytes of its result) of each collective in a compiled program."""
    return [(match["kind"], result_bytes(match)) for match in COLLECTIVE.finditer(hlo)]


def describe(devices, batch: int) -> dict:
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
        jax.value_and_grad(lambda *args: objective_loss(*args, mesh=mesh)[0], (0, 1, 2)),
        out_shardings=(
            NamedSharding(mesh, PartitionSpec()),
            (rows, rows, NamedSharding(mesh, PartitionSpec())),
        ),
    )
    compiled = step.lower(z, z, scale).compile()
    hlo = compiled.as_text()
    return {
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": collectives(hlo),
        "scatter_fusions": len(re.findall(r"= [^=]* fusion\(.*calls=%?all-reduce-scatter", hlo)),
    }


def _child(target: str, batch: int) -> dict:
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")
    if target.isdigit():
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={target}"
    command = [sys.executable, "-m", "benchmarks.loss_scaling", "--child", target, "--batch", str(batch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def _run_child(target: str, batch: int):
    import jax

    if target.isdigit():
        devices = jax.devices()
    else:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    print(json.dumps(describe(list(devices), batch) | {"count": len(devices)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32768)
    parser.add_argument("--devices", nargs="*", default=["1", "8", "64", "256"])
    parser.add_argument("--topologies", nargs="*", default=["v5e:4x4", "v5e:16x16", "v5p:4x4x8"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _run_child(args.child, args.batch)
    print(f"B = {args.batch:,}, D = {WIDTH}, float32, forward and backward of clip, in-modal and cross-modal\n")
    print("| target | devices | temporary MB a device | collectives a step |")
    print("|---|---|---|---|")
    for target in (*args.devices, *args.topologies):
        got = _child(target, args.batch)
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


if __name__ == "__main__":
    main()
