"""The training step compiled ahead of time for TPU slices that nobody need own: python -m benchmarks.tpu_table OUT.

Each cell of the table (model, objective, sharding, topology, batch) is compiled by libtpu (pip install "jax[tpu]") in a
process of its own, a minute to some minutes of one core, and appended to OUT as one JSON line; cells that OUT has
already are passed over, so a stop costs one cell. In the end OUT is printed as a table.
"""

import argparse
import itertools
import json
import random
import re
import time
from pathlib import Path

from rankclip_jax import config as configs
from rankclip_jax.train import flops, plan
from rankclip_jax.train.targets import Target

MODELS = ("ViT-B/32", "ViT-B/16", "RN50")
OBJECTIVES = ("rankclip", "clip")
SHARDINGS = {"data": [], "fsdp": ["sharding=fsdp", "mesh={'data': 1, 'fsdp': -1}"]}
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x8", "v6e:16x16")
BATCHES = (4096, 8192, 16384, 32768)
DEPTH = 12  # layers of each transformer of MODELS


def cells() -> list[tuple]:
    """Every cell, those of the smallest and largest batch first; within these in an order drawn once, so that a table
    that was stopped early has something of everything."""
    wanted = list(itertools.product(BATCHES, SHARDINGS, OBJECTIVES, MODELS, TOPOLOGIES))
    random.Random(0).shuffle(wanted)
    return sorted(wanted, key=lambda cell: cell[0] not in (BATCHES[0], BATCHES[-1]))


def compile_cell(batch: int, sharding: str, objective: str, model: str, topology: str) -> dict:
    """What the compiler says of one cell: configs/cc3m.py at another batch, rematerialised, its layers scanned."""
    spec = f"configs/cc3m.py:objective={objective},model={model}"
    changes = [f"batch_size={batch}", "model.remat=True", "model.scan_layers=True", *SHARDINGS[sharding]]
    begin, target = time.monotonic(), plan.parse_target(topology)
    found = plan.compile_step(configs.load(spec, changes), target)
    if "error" not in found:
        found["step_seconds"] = step_seconds(spec, changes, target) + plan.sort_seconds(target, found)
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def step_seconds(spec: str, changes: list[str], target: Target) -> float:
    """The compiler's estimate of a step, without its collectives and its loss's sorts, which have none.

    It counts a scan's body once, so the towers are compiled unrolled, with one layer and with two, and the difference
    is taken DEPTH - 1 times: a ViT-B's two towers, or an RN50's text tower.
    """
    shallow = []
    for layers in (1, 2):
        towers = [f"model.text={{'layers': {layers}}}", "model.scan_layers=False"]
        if "ViT" in spec:
            towers.append(f"model.vision={{'layers': {layers}}}")
        shallow.append(plan.compile_step(configs.load(spec, [*changes, *towers]), target)["cost"]["optimal_seconds"])
    return shallow[0] + (DEPTH - 1) * (shallow[1] - shallow[0])


def row(cells: dict[tuple, dict]) -> str:
    """The numbers of the objectives' cells of one topology, model, sharding and batch, in the order of OBJECTIVES."""
    (batch, sharding, _, model, topology), _ = next(iter(cells.items()))
    target = plan.parse_target(topology)
    memory, tflops = flops.ACCELERATORS[target.kind]
    used, moved, rates, floors = [], [], [], []
    for found in cells.values():
        floors.append(batch / (found["flops"] / target.count / (tflops * 1e12)))
        if "error" in found:  # "... the total memory required for HLO temporaries (25.18G) exceeds ..."
            used.append(f"**{re.search(r'[0-9.]+(?=G)', found['error'])[0]}**")
            continue
        used.append(f"{(found['states'] + found['temporary']) / 2**30:.2f}")
        moved.append(f"{sum(size for _, size in found['collectives'].values()) / 2**20:,.0f}")
        rates.append(f"{batch / found['step_seconds']:,.0f}" if "step_seconds" in found else "-")
    columns = [f"{', '.join(used)} of {memory}", ", ".join(moved), ", ".join(rates), f"{max(floors):,.0f}"]
    return f"| {topology} | {model} | {sharding} | {batch:,} | {' | '.join(columns)} |"


def table(done: dict[tuple, dict]) -> str:
    """All that was compiled, one line for both objectives."""
    lines = [
        f"| topology | model | sharding | batch | GiB a chip: {', '.join(OBJECTIVES)} | MiB moved | images/s, the "
        "compiler's estimate | images/s at peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for topology, model, batch, sharding in itertools.product(TOPOLOGIES, MODELS, BATCHES, SHARDINGS):
        keys = [(batch, sharding, objective, model, topology) for objective in OBJECTIVES]
        if found := {key: done[key] for key in keys if key in done}:
            lines.append(row(found))
    return "\n".join(lines)


def main() -> None:
    """Compiles what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only-print", action="store_true", help="print what OUT has, compile nothing")
    flags = parser.parse_args()
    done = {}
    if flags.out.exists():
        done = {tuple(line["cell"]): line["found"] for line in map(json.loads, flags.out.read_text().splitlines())}
    for cell in [] if flags.only_print else cells():
        if cell not in done:
            done[cell] = compile_cell(*cell)
            with flags.out.open("a") as out:
                out.write(json.dumps({"cell": cell, "found": done[cell]}) + "\n")
            print(row({cell: done[cell]}), flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
