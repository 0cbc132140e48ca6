"""The report of a study: results.json, results.md and pictures, from the runs alone."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rankclip_jax import figures
from rankclip_jax.common.files import whole, write_whole
from rankclip_jax.common.ownership import Owned
from rankclip_jax.study.arms import Arm, arms_of
from rankclip_jax.study.questions import Answer, answers
from rankclip_jax.study.statistics import Estimate, estimate, paired

FILES = ("results.json", "results.md", "curves.png", "dynamics.png", "answers.png")
# Shares, shown in per cent; everything else as it is.
_PERCENT = ("zero_shot/", "retrieval/", "linear_probe/", "truth/")
_TABLES = {
    "What the models can do": ("zero_shot/", "linear_probe/", "retrieval/"),
    "Rank correlation with the truth, per cent": ("truth/",),
    "How the embeddings of validation pairs lie": ("geometry/spearman", "geometry/overlap", "geometry/modality_gap",
                                                   "geometry/alignment", "geometry/uniformity"),
    "Gradients of the terms at the end": ("gradient/",),
}  # fmt: skip
_LEFT_OUT = ("_r5", "_cyclic_in_modal", "_cyclic_cross_modal")  # in results.json
_DYNAMICS = {
    "gradient/cosine_clip_in_modal": "cosine of gradients: CLIP, in-modal",
    "gradient/cosine_clip_cross_modal": "cosine of gradients: CLIP, cross-modal",
    "gradient/cosine_in_modal_cross_modal": "cosine of gradients: in-modal, cross-modal",
    "geometry/spearman_in_modal": "rank agreement, in-modal",
    "geometry/spearman_cross_modal": "rank agreement, cross-modal",
    "geometry/modality_gap": "modality gap",
    "geometry/alignment": "alignment (lower is closer)",
    "geometry/uniformity_image": "uniformity, images (lower is more even)",
    "geometry/uniformity_text": "uniformity, texts",
}


def write(workdir: Path, config: ConfigDict, runs: list[dict]) -> str:
    """Writes FILES into `workdir`; returns the tables. `runs`: as Study.run gives them.

    results.json: {"answers": one per contrast, "results": as `summarise`, for each condition, "runs": `runs`}; without
    conditions, "results" is that of the one.
    """
    baseline, arms = config.study.baseline, arms_of(config)
    found = answers(config.study.questions, arms, runs)
    results = {}
    for condition in dict.fromkeys(arm.condition for arm in arms):
        names = [arm.objective for arm in arms if arm.condition == condition]
        names.sort(key=lambda name: name != baseline)
        results[condition] = summarise(names, [r for r in runs if r["condition"] == condition])
    Owned(workdir, "study").claim(FILES)
    everything = {"answers": _json(found), "results": results.get("", results), "runs": runs}
    write_whole(workdir / "results.json", json.dumps(everything, indent=1))
    text = _INTRODUCTION.format(baseline) + _answered(found)
    for condition, summary in results.items():
        text += (f"\n## {condition}\n" if condition else "") + markdown(summary)
    write_whole(workdir / "results.md", text)
    tops = {k: k.split("/")[1] + ", top-1 %" for k in _keys(runs) if k.startswith("zero_shot")}
    _draw(workdir / "curves.png", runs, tops)
    _draw(workdir / "dynamics.png", runs, {k: title for k, title in _DYNAMICS.items() if k in runs[0]["final"]})
    if found:
        panels = {}
        for answer in found:
            scale, _ = _scale(answer.metric)
            label = f"{answer.question}: {answer.metric.replace('/', ' ').replace('_', ' ')}"
            mean, half = scale * answer.estimate.mean, scale * (answer.estimate.half or 0)
            panels.setdefault(label, {})[answer.label] = mean, half
        with whole(workdir / "answers.png") as part:
            figures.intervals(panels).savefig(part, format="png")
    return text


_INTRODUCTION = (
    "Mean and 95 % confidence interval over the seeds (t distribution); differences from {} under the same condition, "
    "paired by seed, bold where their interval excludes 0.\n"
)


def _answered(found: list[Answer]) -> str:
    if not found:
        return ""
    lines = ["", "| question | contrast | metric | difference | seeds | p | p, Holm |", "|---|---|---|---|---|---|---|"]
    for answer in found:
        cell = _cell(answer.metric, answer.estimate._asdict(), signed=True)
        ps = ["" if p is None else f"{p:.3g}" for p in (answer.p, answer.holm)]
        lines.append(_row([answer.question, answer.label, answer.metric, cell, str(answer.estimate.n), *ps]))
    return "\n".join(lines) + "\n"


def _json(found):
    return [answer._asdict() | {"estimate": answer.estimate._asdict()} for answer in found]


def _keys(runs):
    return list(runs[0]["final"])


def summarise(names: list[str], runs: list[dict]) -> dict:
    """{objective: {"lr", "seeds", "seconds", "metrics": {metric: {"mean", "half", "n"}}, "difference": the same}}.

    "difference" is paired by seed, against the first of `names`.
    """
    values = {
        name: {key: {r["seed"]: r["final"][key] for r in runs if r["objective"] == name} for key in _keys(runs)}
        for name in names
    }
    result = {}
    for name in names:
        own = [r for r in runs if r["objective"] == name]
        differences = {key: paired(values[name][key], values[names[0]][key]) for key in values[name]}
        result[name] = {
            "lr": own[0]["lr"],
            "seeds": [r["seed"] for r in own],
            "seconds": float(np.mean([r["seconds"] for r in own])),
            "metrics": {key: estimate(list(v.values()))._asdict() for key, v in values[name].items()},
            "difference": {} if name == names[0] else {k: d._asdict() for k, d in differences.items() if d is not None},
        }
    return result


def markdown(results: dict) -> str:
    """Tables of means and of paired differences with the first objective, by kind of metric."""
    first, *others = results
    lines = [
        "",
        _row(["objective", "seeds", "rate", "seconds a run"]),
        "|---|---|---|---|",
        *(_row([n, str(len(r["seeds"])), f"{r['lr']:g}", f"{r['seconds']:.0f}"]) for n, r in results.items()),
    ]
    for title, kinds in _TABLES.items():
        keys = [k for k in results[first]["metrics"] if k.startswith(kinds) and not k.endswith(_LEFT_OUT)]
        if keys:
            lines += ["", f"{title}:", "", _row(["objective", *map(_title, keys)]), "|---" * (len(keys) + 1) + "|"]
            lines += [_row([name, *(_cell(k, row["metrics"][k]) for k in keys)]) for name, row in results.items()]
            for name in others:
                found = results[name]["difference"]
                cells = [_cell(k, found[k], signed=True) if k in found else "" for k in keys]
                lines.append(_row([f"{name} - {first}", *cells]))
    return "\n".join(lines) + "\n"


def _row(cells):
    return "| " + " | ".join(cells) + " |"


def _title(key: str) -> str:
    kind, name = key.split("/")
    name = name.replace("_", " ").replace("image to text r", "i2t R@").replace("text to image r", "t2i R@")
    return {"zero_shot": f"zero-shot {name} %", "linear_probe": f"probe {name} %"}.get(
        kind, name + (" %" if kind == "retrieval" else "")
    )


def _cell(key: str, numbers: dict, signed: bool = False) -> str:
    found = Estimate(**numbers)
    scale, digits = _scale(key)
    text = f"{scale * found.mean:{'+' if signed else ''}.{digits}f}"
    text += "" if found.half is None else f" ± {scale * found.half:.{digits}f}"
    return f"**{text}**" if signed and found.half is not None and abs(found.mean) > found.half else text


def _scale(key: str) -> tuple[int, int]:
    """What a metric is multiplied by to be shown, and its digits."""
    return (100, 1) if key.startswith(_PERCENT) else (1, 3)


def _draw(path: Path, runs: list[dict], titles: dict[str, str]) -> None:
    """A panel a metric over the steps: a line an objective (mean), a band (95 % interval)."""
    names = dict.fromkeys(_name(r) for r in runs)
    panels = {title: {name: _band(key, name, runs) for name in names} for key, title in titles.items()}
    with whole(path) as part:
        figures.bands(panels).savefig(part, format="png")


def _name(run):
    return str(Arm(run["condition"], run["objective"]))


def _band(key, name, runs):
    """(steps, means, half intervals) of a metric over an objective's seeds."""
    scale, _ = _scale(key)
    curves = [[p for p in r["curve"] if key in p] for r in runs if _name(r) == name]
    found = [estimate([scale * p[key] for p in points]) for points in zip(*curves, strict=True)]
    half = np.array([f.half or 0 for f in found])
    return [p["step"] for p in curves[0]], np.array([f.mean for f in found]), half
