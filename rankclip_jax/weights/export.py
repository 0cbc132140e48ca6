"""Exports a model: weights, preprocessing, tokenizer and a model card."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import write_whole
from rankclip_jax.common.metrics_file import read_metrics
from rankclip_jax.common.ownership import Owned, listed
from rankclip_jax.common.tokenizer import END, START
from rankclip_jax.models import ClipConfig, ResNetConfig
from rankclip_jax.weights import architecture, formats, orbax_folder
from rankclip_jax.weights import view as preprocess
from rankclip_jax.weights.pretrained import Pretrained

_WEIGHTS = {  # layout -> files
    "hf": ("config.json", "model.safetensors"),
    "openai": ("open_clip_config.json", "open_clip_model.safetensors"),
    "orbax": (orbax_folder.CONFIG, orbax_folder.UNFINISHED),
}
_TEXTS = ("tokenizer.json", "tokenizer_config.json")
LAYOUTS = tuple(_WEIGHTS)


def write(model: Pretrained, folder: str | Path, layout: str) -> None:
    """Writes `model` to a folder.

    Args:
      model: from `pretrained.read`.
      folder: created if needed; files of an earlier `write` are replaced.
      layout: "hf", for transformers; "openai", for open_clip and OpenAI's code; "orbax", for JAX.

    Raises:
      InputError: an unknown layout, a model that it does not support (Hugging Face and ResNets, open_clip and
        SigLIP), a file of the same name that `write` did not write, or an export in another layout is in the folder.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}. Expected one of {', '.join(LAYOUTS)}")
    if layout == "hf" and isinstance(model.config.vision, ResNetConfig):
        raise InputError(f"{model.path} has a ResNet, which Hugging Face's CLIP does not support; use --to openai")
    if layout == "openai" and model.view.resize != model.view.crop:
        sizes = f"resizes to {model.view.resize} and crops {model.view.crop}"
        raise InputError(f"{model.path} {sizes} pixels, for which open_clip has one size; use --to hf or orbax")
    if layout == "openai" and not model.config.text.causal:
        raise InputError(f"{model.path} is a SigLIP, whose towers open_clip has under other names; use --to hf")
    owned = Owned(folder, "convert")
    folder = owned.folder
    tokenizer = None if model.tokenizer is None else model.tokenizer.to_dict()
    owned.check(names := _names(layout, tokenizer is not None))
    there = listed(folder).get("convert", ())
    others = [name for other in LAYOUTS if other != layout for name in _WEIGHTS[other]]
    others = [name for name in others if name in there and (folder / name).exists()]
    if others:  # which a reader may take for this model
        raise InputError(f"{folder} has an export in another layout ({others[0]}); give another folder")
    text = card(model, layout)  # reads the run's metrics: before anything is written
    if layout == "orbax":  # Orbax deletes any folder in its way
        owned.clear([orbax_folder.UNFINISHED])
        owned.remove(orbax_folder.ARRAYS)
    owned.clear([name for name in _TEXTS if name not in names])  # of the model that was here before
    try:
        owned.claim(names)
        if layout == "hf":
            bos_id = model.tokenizer.start_id if model.tokenizer else None
            pad_id = model.tokenizer.pad_id if model.tokenizer else None
            formats.write_hf(folder, model.config, model.variables, bos_id, pad_id)
        elif layout == "openai":
            formats.write_openai(folder, model.config, model.variables)
            _complete_open_clip_config(folder / "open_clip_config.json", model.view, tokenizer is not None)
        else:
            orbax_folder.write_orbax(folder, model.config, model.variables)
            written = (file for file in (folder / orbax_folder.ARRAYS).rglob("*") if file.is_file())
            owned.wrote(file.relative_to(folder).as_posix() for file in written)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{model.path}: {error}") from None
    _write_json(folder / "preprocessor_config.json", preprocess.to_hugging_face(model.view))
    if tokenizer is not None:
        _write_json(folder / "tokenizer.json", tokenizer)
        described = _tokenizer_config(tokenizer, model.config.text.context_length, _special(model))
        _write_json(folder / "tokenizer_config.json", described)
    write_whole(folder / "README.md", text)


def _names(layout: str, tokenizer: bool) -> list[str]:
    return [*_WEIGHTS[layout], "preprocessor_config.json", *(_TEXTS if tokenizer else ()), "README.md"]


def _special(model: Pretrained) -> dict[str, str]:
    """Tokens by what transformers calls them. CLIP does not see what follows the first end-of-text, so padding with it
    changes nothing."""
    words = model.tokenizer
    assert words is not None
    of = {"eos_token": words.end, "unk_token": words.end, "pad_token": words.end}
    if words.start_id is not None:
        of["bos_token"] = START
    if not model.config.text.causal:  # whose padding is seen
        of["pad_token"] = next(token for token, id in words.vocabulary().items() if id == words.pad_id)
    if "<unk>" in words.vocabulary() and words.start_id is None:
        of["unk_token"] = "<unk>"
    return of


def _tokenizer_config(tokenizer: dict, context_length: int, special: dict[str, str]) -> dict:
    # transformers' CLIPTokenizer builds its own tokenizer from vocabulary and merges, and supports only OpenAI's kind.
    # The general class reads any other tokenizer.json as it is.
    bpe = tokenizer["model"]
    openai_kind = bpe.get("end_of_word_suffix") == "</w>" and END in bpe.get("vocab", {})
    return {
        "tokenizer_class": "CLIPTokenizer" if openai_kind else "PreTrainedTokenizerFast",
        **special,
        "model_max_length": context_length,
    }


def _complete_open_clip_config(path: Path, view: preprocess.View, has_tokenizer: bool) -> None:
    described = json.loads(path.read_text())
    described["preprocess_cfg"] = {
        "size": view.crop,
        "mode": "RGB",
        "mean": list(view.mean),
        "std": list(view.std),
        "interpolation": "bilinear" if view.squash == "bilinear" else "bicubic",
        "resize_mode": "shortest" if view.squash == "no" else "squash",
    }
    if has_tokenizer and "model_cfg" in described:
        # Any name makes open_clip read the tokenizer in this folder instead of OpenAI's.
        described["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "."
    _write_json(path, described)


_USE = {
    "hf": """from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")
inputs = processor(text=["a photo of a cat"], images=image, return_tensors="pt", padding=True, truncation=True)
z = model(**inputs)  # z.image_embeds, z.text_embeds, z.logits_per_image""",
    "openai": """import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
}
_OURS = """import rankclip_jax

model = rankclip_jax.load("FOLDER")
model.encode_image(image), model.encode_text(["a photo of a cat"])"""


_USE_SIGLIP = """from transformers import SiglipModel, SiglipProcessor

model, processor = SiglipModel.from_pretrained("FOLDER"), SiglipProcessor.from_pretrained("FOLDER")
how = dict(padding="max_length", truncation=True)  # the model was trained with this padding
inputs = processor(text=["a photo of a cat"], images=image, return_tensors="pt", **how)
z = model(**inputs)  # z.image_embeds, z.text_embeds, z.logits_per_image"""


def card(model: Pretrained, layout: str) -> str:
    """The model card (Markdown): architecture, training, results, use."""
    config = model.config
    vision, text = config.vision, config.text
    kind = "ResNet,"
    if not isinstance(vision, ResNetConfig):
        kind = f"vision transformer, patches of {vision.patch_size} pixels,"
    count = sum(x.size for x in jax.tree.leaves(model.variables["params"]))
    facts = {
        "parameters": f"{count:,}",
        "image tower": f"{kind} {vision.width} wide, images of {vision.image_size} pixels",
        "text tower": f"{text.layers} layers, {text.width} wide, {text.context_length} tokens of {text.vocab_size:,}",
        "embedding": f"{config.embed_dim} dimensions; activation {config.activation}",
    }
    trained = f", trained with {_OBJECTIVES[model.run.loss.objective]}" if model.run else ""
    alone = ours_alone(config, layout)
    library = "rankclip_jax" if alone else {"hf": "transformers", "openai": "open_clip"}[layout]
    lines = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, rankclip]",
        "---",
        "",
        f"# {model.path.resolve().name}",
        "",
        f"An image-text dual encoder{trained}.",
        "",
        *_table(("model", ""), facts.items()),
    ]
    if model.run:
        lines += ["## Training", "", *_table(("", ""), _training(model.run, model.step, model.averaged).items())]
        results = _results(model)
        if results:
            lines += [f"## Results at step {model.step}", "", *_table(("metric", "value"), results)]
    else:
        unknown = f"Converted from `{model.path.name}`, which has no information about its training."
        lines += [model.origin or unknown, ""]
    theirs = _USE_SIGLIP if config.siglip else _USE.get(layout, "")
    use = [_OURS] if alone else [theirs, _OURS]
    lines += ["## Use", ""]
    for code in use:
        lines += ["```python", code, "```", ""]
    if model.tokenizer is not None and model.tokenizer.start_id is not None and layout != "orbax":
        lines += [
            "Before training, HTML entities and broken Unicode in texts were repaired (ftfy, `html.unescape`). "
            "`rankclip_jax` does this automatically; with other libraries, do it yourself.",
            "",
        ]
    return "\n".join(lines)


def ours_alone(config: ClipConfig, layout: str) -> bool:
    """Whether only `rankclip_jax.load` can read the export: Orbax, or a ResNet that open_clip cannot describe."""
    return layout == "orbax" or (layout == "openai" and architecture.to_open_clip(config) is None)


_OBJECTIVES = {
    "clip": "CLIP's contrastive loss",
    "rankclip": "RankCLIP (arXiv 2404.09387)",
    "rank": "RankCLIP's ranking terms alone (arXiv 2404.09387)",
    "siglip": "SigLIP's sigmoid loss (arXiv 2303.15343)",
    "cyclip": "CyCLIP (arXiv 2205.14459)",
}


def _loss(loss: ConfigDict) -> str:
    parts = [] if loss.objective == "rank" else [{"siglip": "SigLIP", "cyclip": "CyCLIP"}.get(loss.objective, "CLIP")]
    if loss.objective in ("rankclip", "rank"):
        terms = f"{loss.lambda_in:g} in-modal + {loss.lambda_cross:g} cross-modal"
        parts.append(f"w ({terms}), schedule of w: {loss.schedule}")
    changed = {term: weight if isinstance(weight, float) else weight.weight for term, weight in loss.terms.items()}
    weights = ", ".join(f"{term} {weight:g}" for term, weight in changed.items())
    return " + ".join(parts) + (f"; weights of terms changed: {weights}" if weights else "")


def _data(data: ConfigDict) -> str:
    """Names alone, of files or of a mixture's parts: a path may reveal private information."""
    if isinstance(data.train, ConfigDict):
        return ", ".join(data.train)
    files = data.train if isinstance(data.train, tuple) else (data.train,)
    return ", ".join(Path(str(file)).name for file in files)


_OPTIMISERS = {"adamw": "AdamW", "lion": "Lion", "adafactor": "Adafactor", "muon": "Muon, AdamW for all but matrices"}


def _training(run: ConfigDict, step: int | None, averaged: bool) -> dict:
    weights = {"weights": f"averaged over the steps, config.optim.ema = {run.optim.ema:g}"} if averaged else {}
    adapters = {"adapters": f"LoRA of rank {run.optim.lora}, merged"} if run.optim.lora else {}
    return {
        "loss": _loss(run.loss),
        "data": f"{run.data.format}: {_data(run.data)}",
        "steps": f"{step:,} of {run.batch_size:,} samples",
        "optimiser": f"{_OPTIMISERS[run.optim.name]}, learning rate {run.optim.lr:g}, "
        f"weight decay {run.optim.weight_decay:g}, "
        f"{run.optim.warmup_steps:,} steps of warm-up, schedule: {run.optim.schedule}, recipe: {run.optim.recipe}",
        "computed in": run.model.dtype,
        "seed": run.seed,
    } | weights | adapters | ({"patch dropout": f"{dropout:g}"} if (dropout := run.model.vision.patch_dropout) else {})


def _results(model: Pretrained) -> list[tuple[str, str]]:
    """The evaluation written by training at the checkpoint's step; empty if there is none."""
    found: dict = {}
    for row in read_metrics(model.path):
        if row["step"] == model.step:
            numbers = {k: v for k, v in row.items() if "/" in k and isinstance(v, int | float)}
            found |= {k: v for k, v in numbers.items() if ("/ema/" in f"{k}/") == model.averaged}
    return [(name, f"{value:.4f}") for name, value in sorted(found.items())]


def _table(head: tuple[str, str], rows: Iterable[tuple]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows), ""]


def _write_json(path: Path, contents: dict) -> None:
    write_whole(path, json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
