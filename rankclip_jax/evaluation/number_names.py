"""Which numbers the evaluations of opened sets will give, before any is made: what config.checkpoint.best may name."""

from ml_collections import ConfigDict

from rankclip_jax.evaluation.retrieval import TOP_K as RECALLS
from rankclip_jax.evaluation.run import Sets
from rankclip_jax.evaluation.zero_shot import TOP_K


def number_names(config: ConfigDict, sets: Sets) -> list[str]:
    """As tables.flat names them: "zero_shot/cifar10/top1". `config`: config.eval."""
    from rankclip_jax.figures.names import GEOMETRY  # matplotlib, which no step needs

    found = []
    for name, (_, (_, classes)) in sets.opened.get("zero_shot", {}).items():
        tops = [f"top{k}" for k in TOP_K if k <= len(classes.names)]
        found += [f"zero_shot/{name}/{key}" for key in (*tops, "mean_per_class")]
    for name, (_, pair) in sets.opened.get("retrieval", {}).items():
        many = {"image_to_text": len(pair.captions), "text_to_image": pair.source.size}
        found += [f"retrieval/{name}/{way}_r{k}" for way, count in many.items() for k in RECALLS if k <= count]
    for name in sets.opened.get("linear_probe", {}):
        found += [f"linear_probe/{name}/{key}" for key in ("top1", "mean_per_class", "l2")]
    for name in sets.opened.get("geometry", {}):
        # A validation alone has the gradients.
        found += [f"geometry/{name}/{key}" for key in GEOMETRY if key != "gradient_cosine"]
    robustness = config.robustness
    if robustness.reference in sets.opened.get("zero_shot", {}):
        for name in (name for name in robustness.shifted if name in sets.opened["zero_shot"]):
            effective = ["effective"] if robustness.baselines else []
            found += [f"robustness/{name}/{key}" for key in ("reference", "shifted", "drop", *effective)]
    return found
