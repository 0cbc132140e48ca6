"""The tables, the figure and the csv files of docs/results.md, from the runs of its two studies.

    python docs/study_page.py runs/study_ranking runs/study_cifar10_noise    # takes the runs into the csv files first
    python docs/study_page.py                                                # from the csv files

Prints the tables and writes the figure. A test compares the page with them.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np

from rankclip_jax import config as configs
from rankclip_jax import figures
from rankclip_jax.study.arms import Arm, arms_of
from rankclip_jax.study.questions import answers
from rankclip_jax.study.statistics import Estimate, estimate, paired

DOCS = Path(__file__).parent
COLUMNS = {  # metric -> (heading, factor, digits)
    "zero_shot/seen": ("zero-shot, seen", 100, 1),
    "zero_shot/held_out": ("zero-shot, held out", 100, 1),
    "zero_shot/cifar10": ("zero-shot", 100, 1),
    "linear_probe/seen": ("linear probe", 100, 1),
    "linear_probe/cifar10": ("linear probe", 100, 1),
    "retrieval/ndcg10_image_to_text": ("nDCG@10", 100, 1),
    "retrieval/image_to_text_r1": ("R@1", 100, 1),
    "truth/image_image": ("truth, images", 100, 1),
    "truth/text_text": ("truth, texts", 100, 1),
    "truth/image_text": ("truth, image to text", 100, 1),
    "geometry/modality_gap": ("gap", 1, 2),
}
STUDIES = ("study_ranking", "study_cifar10_noise")  # of configs/, and the csv files


def take(workdir: str, name: str) -> None:
    """COLUMNS of WORKDIR/results.json as docs/NAME.csv."""
    runs = json.loads((Path(workdir) / "results.json").read_text())["runs"]
    columns = [key for key in COLUMNS if key in runs[0]["final"]]
    with open(DOCS / f"{name}.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["condition", "objective", "seed", *columns])
        for run in runs:
            values = [f"{run['final'][column]:.5f}" for column in columns]
            rows.writerow([run["condition"], run["objective"], run["seed"], *values])


def read(name: str) -> list[dict]:
    """The runs of docs/NAME.csv, as Study.run gives them."""
    with open(DOCS / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    own = ("condition", "objective", "seed")
    final = [{key: float(value) for key, value in row.items() if key not in own} for row in rows]
    return [{**row, "seed": int(row["seed"]), "final": found} for row, found in zip(rows, final, strict=True)]


def primary(name: str) -> list[str]:
    """The table of the contrasts; bold: found."""
    config, runs = configs.load(str(DOCS.parent / "configs" / f"{name}.py"), []), read(name)
    lines = ["| question | contrast | metric | difference | seeds | p | p, Holm |", "|---|---|---|---|---|---|---|"]
    for answer in answers(config.study.questions, arms_of(config), runs):
        heading, factor, digits = COLUMNS[answer.metric]
        shown = cell(answer.estimate, factor, digits, "+")
        shown = f"**{shown}**" if answer.holm < 0.05 else shown
        ps = " | ".join("< 0.0001" if p < 1e-4 else f"{p:.4f}" for p in (answer.p, answer.holm))
        lines.append(f"| {answer.question} | {answer.label} | {heading} | {shown} | {answer.estimate.n} | {ps} |")
    return lines


def cell(found: Estimate, factor: float, digits: int, sign: str = "") -> str:
    """Mean ± half width."""
    return f"{factor * found.mean:{sign}.{digits}f} ± {factor * found.half:.{digits}f}"


def of(runs: list[dict], arm: Arm, metric: str) -> dict[int, float]:
    """{seed: value}."""
    return {run["seed"]: run["final"][metric] for run in runs if (run["condition"], run["objective"]) == arm}


def means(name: str) -> list[str]:
    """The table of every arm's means."""
    runs = read(name)
    columns = list(runs[0]["final"])
    lines = [f"| arm | {' | '.join(COLUMNS[c][0] for c in columns)} |", f"|---|{'---|' * len(columns)}"]
    for arm in dict.fromkeys(Arm(run["condition"], run["objective"]) for run in runs):
        cells = [cell(estimate(list(of(runs, arm, c).values())), *COLUMNS[c][1:]) for c in columns]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def figure():
    """RankCLIP less CLIP against mismatched captions, pairs and the length of lists."""
    scenes, cifar = map(read, STUDIES)
    noise, pairs = {"clean": 0, "base": 20, "noisy": 40}, {"pairs_1k": 1024, "pairs_4k": 4096, "base": 16384}
    lists = {"lists_16": 16, "lists_64": 64, "rankclip": 128}

    def line(runs, arms, metric):
        found = [paired(of(runs, arm, metric), of(runs, Arm(arm.condition, "clip"), metric)) for arm in arms]
        return 100 * np.array([each.mean for each in found]), 100 * np.array([each.half for each in found])

    def worlds(at):
        arms = [Arm(condition, "rankclip") for condition in at]
        each = (("scenes", scenes, "zero_shot/seen"), ("CIFAR-10", cifar, "zero_shot/cifar10"))
        return {world: (list(at.values()), *line(runs, arms, metric)) for world, runs, metric in each}

    ranked = line(scenes, [Arm("base", name) for name in lists], "retrieval/ndcg10_image_to_text")
    return {
        "zero-shot, points, against mismatched captions, %": worlds(noise),
        "zero-shot, points, against pairs": worlds(pairs),
        "nDCG@10, points, against the length of lists": {"scenes": (list(lists.values()), *ranked)},
    }


def main() -> None:
    """The command line above."""
    for workdir, name in zip(sys.argv[1:], STUDIES, strict=False):
        take(workdir, name)
    for name in STUDIES:
        print("\n".join([*primary(name), "", *means(name), ""]))
    figures.bands(figure()).savefig(DOCS / "study_effects.png", format="png")


if __name__ == "__main__":
    main()
