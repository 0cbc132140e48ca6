"""What fine-tuning recipes cost, reach and forget: python -m benchmarks.finetune FOLDER

FOLDER has CIFAR-10 with captions, as configs/cifar10.py describes it. A small ViT is trained on the drawn shapes, by
the tutorial's first step (docs/tutorials.md), and then fine-tuned by each recipe, which is one line of command, with
CLIP's loss and with RankCLIP's, by several seeds. Of each run: the time of a step (from the second line of its log on),
the memory of weights and moments, zero-shot accuracy on the new pictures, and on the shapes: what was forgotten.

Writes docs/finetuning.csv, a row for each run, and the table into docs/finetuning.md. Finished runs are kept in --work:
the same command resumes. After each run it says how long the others will take.
"""

import argparse
import csv
import io
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from rankclip_jax.common.files import write_whole
from rankclip_jax.common.metrics_file import read_metrics
from rankclip_jax.study.statistics import Estimate, estimate, paired

PAGES = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- benchmarks.finetune -->\n", "<!-- end -->\n"
# As the tutorial has them. A text tower from scratch, and adapters that start at zero, take a higher rate.
START = [
    "--config.optim.lr=1e-3",
    "--config.model.name=ViT-tiny",
    "--config.model.vision={'patch_size': 8, 'width': 96, 'layers': 4, 'heads': 2}",
    "--config.model.context_length=48",
]
LAST = (
    "[('resblocks_3/|text/.*resblocks_1/|ln_post|ln_final|visual/proj|text_projection|logit', {'freeze': False}), "
    "('.', {'freeze': True})]"
)
RECIPES = {
    "full": [],
    "last": [f"--config.optim.rules={LAST}"],
    "lora": ["--config.optim.lora=8", "--config.optim.lr=3e-3"],
    "lit": ["--config.optim.freeze=vision", "--config.init_towers=vision", "--config.optim.lr=1e-3"],
}
TITLES = {
    "full": "everything",
    "last": "last blocks, heads",
    "lora": "adapters (LoRA)",
    "lit": "a new text tower (LiT)",
}
LOSSES = ("clip", "rankclip")
COLUMNS = ("recipe", "loss", "seed", "trained", "step_ms", "states_mib", "new", "kept")


def train(*words: str) -> None:
    """`rankclip train` in this process, so that all is imported once; it joins no others, which JAX allows once."""
    from rankclip_jax.parallel import processes
    from rankclip_jax.train import __main__ as command

    with mock.patch.object(sys, "argv", ["rankclip train", *words]), mock.patch.object(processes, "start"):
        command.main()


def labels(folder: Path, work: Path, rows: int) -> str:
    """A table of the first `rows` labelled pictures, whose order is random."""
    with (folder / "labels.csv").open(newline="") as file:
        table = list(csv.DictReader(file))[:rows]
    out = io.StringIO()
    csv.writer(out).writerows([("image", "label"), *((folder / row["image"], row["label"]) for row in table)])
    write_whole(work / "labels.csv", out.getvalue())
    return f"--config.eval.zero_shot.cifar10.path={work / 'labels.csv'}"


def accuracies(workdir: Path) -> tuple[float, float]:
    """(new, kept): the last zero-shot accuracies on the new pictures and on the shapes, in percent."""
    last = [row for row in read_metrics(workdir) if "zero_shot/cifar10/top1" in row][-1]
    return 100 * last["zero_shot/cifar10/top1"], 100 * last["zero_shot/shapes/top1"]


def costs(workdir: Path) -> dict:
    """Of a run: trained parameters, MiB of weights and moments, and the median time of a step."""
    import jax

    from rankclip_jax import config as configs
    from rankclip_jax.common.tokenizer import Tokenizer
    from rankclip_jax.train import optim, rules
    from rankclip_jax.train import step as steps
    from rankclip_jax.train import workdir as workdirs
    from rankclip_jax.train.session import Session

    config = configs.complete(workdirs.stored_config(workdir).to_dict())
    session = Session(config, Tokenizer.load(str(workdir / "tokenizer.json")))
    tx = optim.make_optimizer(config.optim, config.steps)
    state = steps.Fresh(session.model, tx, 0, session.mesh, config.sharding, config.optim).abstract
    size = sum(x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves((state.params, state.opt_state)))
    rates = [row["images_per_second"] for row in read_metrics(workdir) if "images_per_second" in row][1:]
    each = 1000 * config.batch_size / statistics.median(rates) if rates else math.nan
    return {"trained": rules.count(config.optim, state.params), "states_mib": size / 2**20, "step_ms": each}


def measure(
    folder: Path, work: Path, *, steps: int, start_steps: int, seeds: int, rows: int
) -> tuple[tuple[float, float], list[dict]]:
    """Trains what is not yet trained. -> (accuracies of the starting model, a row of COLUMNS for each run)."""
    from rankclip_jax.train import evaluate

    work.mkdir(parents=True, exist_ok=True)
    start, experiment = work / "start", f"configs/finetune.py:dir={folder},start={work / 'start'}"
    length = [f"--config.steps={start_steps}", f"--config.optim.warmup_steps={min(50, start_steps // 4)}"]
    train("shapes", f"--workdir={start}", *START, *length, "--config.log=()")
    fewer = labels(folder, work, rows)
    sets = [f"eval.model={start}", fewer.removeprefix("--config.")]
    found = evaluate.evaluate(evaluate.settings(experiment, None, sets), None)["zero_shot"]
    before = 100 * found["cifar10"]["top1"], 100 * found["shapes"]["top1"]
    result: list[dict] = []
    began, total = time.monotonic(), seeds * len(RECIPES) * len(LOSSES)
    for seed in range(seeds):
        for recipe, own in RECIPES.items():
            for loss in LOSSES:
                workdir = work / f"{recipe}-{loss}-{seed}"
                run = [f"--config.steps={steps}", f"--config.seed={seed}", "--config.data.val=None", "--config.log=()"]
                train(f"{experiment},objective={loss}", f"--workdir={workdir}", *own, *run, fewer)
                new, kept = accuracies(workdir)
                row = {"recipe": recipe, "loss": loss, "seed": seed, "new": new, "kept": kept} | costs(workdir)
                result.append(row)
                left = (time.monotonic() - began) / len(result) * (total - len(result)) / 60
                shown = f"new {new:.1f} %, kept {kept:.1f} %"
                print(f"{recipe} {loss} seed {seed}: {shown}; {left:.1f} min left", flush=True)
    return before, result


def said(found: Estimate | None, form: str = "{:.1f}") -> str:
    """A mean and the half width of its 95 % interval."""
    if found is None:
        return ""
    return form.format(found.mean) + ("" if found.half is None else f" ± {found.half:.1f}")


def table(before: tuple[float, float], rows: Sequence[dict], about: str) -> str:
    """The table as Markdown, and what was measured."""

    def over(key: str, recipe: str, loss: str) -> dict[int, float]:
        return {row["seed"]: row[key] for row in rows if (row["recipe"], row["loss"]) == (recipe, loss)}

    lines = [
        "| trained | loss | parameters | ms a step | states, MiB | CIFAR-10, % | shapes, % |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        f"| the start | | | | | {before[0]:.1f} | {before[1]:.1f} |",
    ]
    for recipe in RECIPES:
        for loss in LOSSES:
            first = next(row for row in rows if (row["recipe"], row["loss"]) == (recipe, loss))
            each = statistics.median(over("step_ms", recipe, loss).values())
            new, kept = (said(estimate(list(over(key, recipe, loss).values()))) for key in ("new", "kept"))
            cost = [f"{first['trained']:,}", f"{each:.0f}", f"{first['states_mib']:.2f}"]
            lines.append(f"| {' | '.join([TITLES[recipe], loss, *cost, new, kept])} |")
    lines += ["", "RankCLIP's loss minus CLIP's, paired by seed, in points:", ""]
    lines += ["| trained | CIFAR-10 | shapes |", "| --- | ---: | ---: |"]
    for recipe in RECIPES:
        differences = (paired(over(key, recipe, "rankclip"), over(key, recipe, "clip")) for key in ("new", "kept"))
        lines.append(f"| {TITLES[recipe]} | {' | '.join(said(each, '{:+.1f}') for each in differences)} |")
    return "\n".join([about, "", *lines, ""])


def write(pages: Path, before: tuple[float, float], rows: Sequence[dict], about: str) -> None:
    """finetuning.csv, and the table between the marks in finetuning.md."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    forms = {"step_ms": "{:.1f}", "states_mib": "{:.3f}", "new": "{:.2f}", "kept": "{:.2f}"}
    writer.writerows({key: forms.get(key, "{}").format(row[key]) for key in COLUMNS} for row in rows)
    write_whole(pages / "finetuning.csv", out.getvalue())
    page = (pages / "finetuning.md").read_text()
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    write_whole(pages / "finetuning.md", head + BEGIN + table(before, rows, about) + END + tail)


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--pages", type=Path, default=PAGES, help="where finetuning.md is")
    parser.add_argument("--steps", type=int, default=100, help="of each fine-tuning")
    parser.add_argument("--start-steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000, help="labelled pictures that are evaluated")
    flags = parser.parse_args()
    folder, work = flags.folder.resolve(), flags.work.resolve()
    about = (
        f"`python -m benchmarks.finetune FOLDER`: {flags.start_steps} steps on shapes, then {flags.steps} on CIFAR-10 "
        f"with captions, {flags.rows:,} test pictures, {flags.seeds} seeds, {os.cpu_count()} CPU cores. "
        "Means with 95 % intervals (Student's t); [finetuning.csv](finetuning.csv) has each run."
    )
    sizes = dict(steps=flags.steps, start_steps=flags.start_steps, seeds=flags.seeds, rows=flags.rows)
    write(flags.pages, *measure(folder, work, **sizes), about)


if __name__ == "__main__":
    main()
