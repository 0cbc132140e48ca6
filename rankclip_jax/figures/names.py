"""What each number is called, and what its axis says: curves.png, the report and the notebook take it from here."""

from typing import NamedTuple


class Name(NamedTuple):
    """Of a number: its title, its unit or scale for an axis, and whether it is a share of 1, shown in per cent."""

    title: str
    axis: str
    share: bool = False


# What a training line holds, in the order of the report's charts.
TRAINING = {
    "loss": Name("Loss, all terms", "nats"),
    "clip": Name("CLIP term", "nats"),
    "siglip": Name("SigLIP term", "nats"),
    "rank_in_modal": Name("Ranking term, in-modal", "nats"),
    "rank_cross_modal": Name("Ranking term, cross-modal", "nats"),
    "cyclic_in_modal": Name("CyCLIP term, in-modal", "squared difference"),
    "cyclic_cross_modal": Name("CyCLIP term, cross-modal", "squared difference"),
    "rank_weight": Name("Weight of the ranking terms", "factor"),
    "logit_scale": Name("Logit scale", "factor"),
    "logit_bias": Name("Logit bias", "logits"),
    "learning_rate": Name("Learning rate", "rate"),
    "grad_norm": Name("Gradient norm", "L2 norm"),
    "images_per_second": Name("Training speed", "images/s"),
    "images_read_per_second": Name("Reading speed of one process", "images/s"),
    "data_wait": Name("Time spent waiting for data", "share of time", True),
    "padded_steps": Name("Batches whose captions did not fit their rows", "share of steps", True),
    "tflops_per_device": Name("Computing speed of one device", "TFLOP/s"),
    "mfu": Name("Use of the device (MFU)", "share of its peak", True),
}
GEOMETRY = {
    "spearman_in_modal": Name("Rank agreement, image-image with text-text", "Spearman"),
    "spearman_cross_modal": Name("Rank agreement, image-text with text-image", "Spearman"),
    "overlap_in_modal": Name("Shared among the 10 nearest, image-image with text-text", "share", True),
    "overlap_cross_modal": Name("Shared among the 10 nearest, image-text with text-image", "share", True),
    "gradient_cosine": Name("Do the gradients of the CLIP and ranking terms agree?", "cosine"),
    "similarity_positive": Name("Mean cosine of pairs", "cosine"),
    "similarity_negative": Name("Mean cosine of all others", "cosine"),
    "modality_gap": Name("Modality gap", "distance"),
    "alignment": Name("Alignment (lower: pairs are nearer)", "squared distance"),
    "uniformity_image": Name("Uniformity of images (lower: more even)", "log of a mean"),
    "uniformity_text": Name("Uniformity of texts (lower: more even)", "log of a mean"),
}
KINDS = {
    "zero_shot": "Zero-shot",
    "linear_probe": "Linear probe",
    "robustness": "Robustness",
    "retrieval": "Retrieval",
    "geometry": "Geometry",
}
_RESULTS = {
    **{f"top{k}": Name(f"top-{k}", "accuracy", True) for k in (1, 3, 5, 10)},
    "mean_per_class": Name("mean per class", "accuracy", True),
    **{f"image_to_text_r{k}": Name(f"image to text, R@{k}", "recall", True) for k in (1, 5, 10)},
    **{f"text_to_image_r{k}": Name(f"text to image, R@{k}", "recall", True) for k in (1, 5, 10)},
    "reference": Name("reference set", "accuracy", True),
    "shifted": Name("shifted set", "accuracy", True),
    "drop": Name("drop", "accuracy", True),
    "effective": Name("effective robustness", "accuracy", True),
    "l2": Name("L2 penalty", "weight"),
    "n": Name("images", "number"),
}


def result(key: str) -> Name:
    """Of a number of eval.json: "image_to_text_r1"."""
    return _RESULTS.get(key) or GEOMETRY.get(key) or Name(key.replace("_", " "), "value")


def split(key: str) -> tuple[str, str, str] | None:
    """ "zero_shot/coco/2017/top1" -> kind, set, number; None for what is not of an evaluation."""
    kind, _, rest = key.partition("/")
    name, _, number = rest.rpartition("/")
    return (kind, name, number) if kind in KINDS and name else None


def metric(key: str) -> Name:
    """Of any number of metrics.jsonl: "clip", "val/clip", "retrieval/scenes/image_to_text_r1"."""
    if parts := split(key):
        kind, name, number = parts
        found = result(number)
        kind = "" if kind == "geometry" else f"{KINDS[kind]} "
        return found._replace(title=f"{kind}{found.title}, {name}")
    plain = key.removeprefix("val/").removesuffix("/ema")
    found = TRAINING.get(plain) or result(plain)
    title = found.title[:1].upper() + found.title[1:]
    said = (", validation" if key.startswith("val/") else "") + (", averaged weights" if key.endswith("/ema") else "")
    return found._replace(title=title + said)
