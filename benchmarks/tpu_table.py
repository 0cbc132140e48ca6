"""The training step compiled ahead of time for TPU slices that nobody need own: python -m benchmarks.tpu_table OUT.

Each cell of the table (model, objective, sharding, topology, batch) is compiled by libtpu (pip install "jax[tpu]") in a
process of its own, half a minute to some minutes of one core, and appended to OUT as one JSON line; cells that OUT has
already are passed over, so a stop costs one cell. In the end OUT is printed as a table.
"""

import argparse
import itertools
import json
import random
import time
from pathlib import Path

from rankclip_jax import config as configs
from rankclip_jax import flops, plan

MODELS = ("ViT-B/32", "ViT-B/16", "RN50")
OBJECTIVES = ("rankclip", "clip")
SHARDINGS = {"data": [], "fsdp": ["sharding=fsdp", "mesh={'data': 1, 'fsdp': -1}"]}
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x8", "v6e:16x16")
BATCHES = (4096, 8192, 16384, 32768)


def cells() -> list[tuple]:
    """Every cell, those of the smallest and largest batch first; within these in an order drawn once, so that a table
    that was stopped early has something of everything."""
    wanted = list(itertools.product(BATCHES, SHARDINGS, OBJECTIVES, MODELS, TOPOLOGIES))
    random.Random(0).shuffle(wanted)
    return sorted(wanted, key=lambda cell: cell[0] not in (BATCHES[0], BATCHES[-1]))


def compile_cell(batch: int, sharding: str, objective: str, model: str, topology: str) -> dict:
    """What the compiler says of one cell: configs/cc3m.py at another batch, rematerialised, its layers scanned."""
    spec = f"configs/cc3m.py:objective={objective},model={model}"
    changes = [f"batch_size={batch}", "model.remat=True", "model.scan_layers=True"]
    config = configs.load(spec, changes + SHARDINGS[sharding])
    begin = time.monotonic()
    found = plan.compile_step(config, plan.parse_target(topology))
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def row(cell: list, found: dict) -> str:
    """A line of the table. The compiler's own estimate of time is left out: it counts the layers of a scan as one."""
    batch, sharding, objective, model, topology = cell
    target = plan.parse_target(topology)
    memory, tflops = flops.ACCELERATORS[target["kind"]]
    name = f"| {topology} | {model} | {objective} | {sharding} | {batch:,} |"
    if "error" in found:
        return f"{name} {found['error']} | | |"
    used = (found["states"] + found["temporary"]) / 2**30
    moved = sum(size for _, size in found["collectives"].values()) / 2**20
    bound = batch / (found["flops"] / target["count"] / (tflops * 1e12))
    return f"{name} {used:.2f} of {memory} | {moved:,.0f} | {bound:,.0f} |"


def main() -> None:
    """Compiles what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    flags = parser.parse_args()
    done = {}
    if flags.out.exists():
        done = {tuple(line["cell"]): line for line in map(json.loads, flags.out.read_text().splitlines())}
    for cell in cells():
        if cell in done:
            continue
        done[cell] = {"cell": cell, "found": compile_cell(*cell)}
        with flags.out.open("a") as out:
            out.write(json.dumps(done[cell]) + "\n")
        print(row(**done[cell]), flush=True)
    print("| topology | model | objective | sharding | batch | GiB a chip | MiB moved | images/s at peak |")
    print("|---|---|---|---|---|---|---|---|")
    for cell in cells():
        print(row(**done[cell]))


if __name__ == "__main__":
    main()
