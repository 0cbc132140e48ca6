"""OUT.md of OUT.json: the report of benchmarks/gpu.py."""

import statistics
from collections.abc import Iterator

from benchmarks import ranking_loss, train_step

HOW = {
    "agreement": """Five training steps (AdamW, batch 32) of models with two layers, from one state and with the same
batches, on the GPU and on the CPU of the same process: the largest relative difference of a step's loss and gradient
norm. Float32 products in full (no TF32). cuDNN attention alone: the difference of its output and of its gradients, of
their norm.""",
    "checkpoint": """A tiny state after one step, saved and restored by `rankclip_jax.weights.checkpoint`: bits, type
and place of every array.""",
    "loss": """The four lists of RankCLIP, forward and backward, from embeddings on the device (D = 512) to their
gradients, float32 (no TF32). Each contender is a process. Medians of {rounds} rounds in turns; a turn is as many calls
as fill {turn:g} s. Memory: the peak of the allocator, compilation included.""",
    "training": """Forward, backward and AdamW on made pictures and texts, bfloat16 (on a CPU float32). Each contender
is a process. Medians of {rounds} rounds in turns of {steps} steps. transformers computes CLIP's loss. MFU:
`rankclip_jax.train.flops` by the data sheet's dense bfloat16 peak. Memory: the peak of the allocator, compilation
included.""",
}


def agreement(rows: list[dict]) -> Iterator[str]:
    """A line a case: each error, its tolerance in brackets."""
    yield "| case | against | largest difference (tolerance) | |\n|---|---|---|---|"
    for row in rows:
        if "left_out" in row:
            yield f"| {row['case']} | | left out: {row['left_out']} | |"
            continue
        errors = row.get("errors", {})
        numbers = [f"{key} {float(x):.1e} ({row['tolerance'][key]:.0e})" for key, x in errors.items()]
        result = "ok" if row["ok"] else "**FAILED**"
        yield f"| {row['case']} | {row['against']} | {', '.join(numbers) or row['error']} | {result} |"


def checkpoint(rows: list[dict]) -> Iterator[str]:
    """What was compared, and which arrays differ."""
    for row in rows:
        result = f"**FAILED**: {', '.join(row['different'])} differ" if row["different"] else "all are equal"
        yield f"{row['arrays']} arrays, {row['bytes']:,} bytes: {result}."


def loss_headline(row: dict) -> str | None:
    """Our time and memory as a multiple of each other contender's; None where there is nothing to compare."""
    got = {name: x for name, x in row.get("found", {}).items() if not isinstance(x, str)}
    ours = got.pop("ours", None)
    if not ours or not got:
        return None
    ratios = []
    for name, theirs in got.items():
        seconds = statistics.median(ours["seconds"]) / statistics.median(theirs["seconds"])
        memory = f" and {ours['mb'] / theirs['mb']:.2g} times its memory" if theirs["mb"] > 0 else ""
        ratios.append(f"{seconds:.2g} times {name}'s time{memory}")
    return f"**B = {row['batch']:,}: ours takes {'; '.join(ratios)}.**"


def loss(rows: list[dict]) -> Iterator[str]:
    """The headline of the largest batch at which there was another contender; a line a batch."""
    if headlines := list(filter(None, map(loss_headline, rows))):
        yield f"{headlines[-1]}\n"
    names = next((list(row["found"]) for row in rows if "found" in row), [])
    yield f"| B | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
    for row in rows:
        if "left_out" in row:
            yield f"| {row['batch']:,} | {row['left_out']} |{' |' * (len(names) - 1)}"
            continue
        apart = "" if len(row["turns"]) < 2 else f" (in turns: {'; then '.join(map(', '.join, row['turns']))})"
        yield f"| {row['batch']:,}{apart} | {' | '.join(map(ranking_loss.cell, row['found'].values()))} |"


def training_headline(row: dict) -> str | None:
    """RankCLIP's step as a multiple of the other contenders'; None where there is nothing to compare."""
    seconds = {numbers["step"]: numbers["seconds"] for numbers in row.get("numbers", ())}
    ours = seconds.pop("rankclip", None)
    if not ours or not seconds:
        return None
    ratios = [f"{ours / x:.2f} times {'CLIP' if step == 'clip' else step}" for step, x in seconds.items()]
    return f"**{row['model']}, batch {row['batch']:,}: the time of RankCLIP's step is {'; '.join(ratios)}.**"


def training(rows: list[dict]) -> Iterator[str]:
    """A headline, a table and what was left out, a model."""
    for row in rows:
        name = f"{row['model']}, batch {row['batch']:,}"
        if "left_out" in row:
            yield f"{name}: {row['left_out']}.\n"
            continue
        yield f"{training_headline(row) or name}\n"
        yield "\n".join(train_step.table(row["numbers"])) + "\n"
        yield from (f"Left out: {step}, {got['error']}.\n" for step, got in row["found"].items() if "error" in got)


LINES = {"agreement": agreement, "checkpoint": checkpoint, "loss": loss, "training": training}


def markdown(report: dict) -> str:
    """The whole report."""
    header = report["header"]
    lines = [f"# rankclip_jax on {header['device']}\n", *(f"- {key}: {value}" for key, value in header.items())]
    if report["small"]:
        lines.append("\n**A rehearsal with tiny sizes: the times mean nothing, and a CPU agrees with itself.**")
    for name, section in report["sections"].items():
        seconds = f" ({section['seconds']:.0f} s)" if "seconds" in section else ""
        lines += [f"\n## {name.capitalize()}{seconds}\n", HOW[name].format(**report["sizes"]) + "\n"]
        lines += LINES[name](section["rows"])
        if "error" in section:
            lines.append(f"\n**This section failed: {section['error']}**")
    return "\n".join(lines) + "\n"
