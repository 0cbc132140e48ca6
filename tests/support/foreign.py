"""Files of somebody else, and what a folder holds."""

import os

from rankclip_jax.common.ownership import INDEX

# Of somebody else, with the names and endings that our commands use.
FOREIGN = (
    "mine.tar", "00000.tar", "00000.parquet", "00001.tar", "urls.parquet", "00000_stats.json", "x_stats.json",
    "00000.tfrecord.part", "notes.part", "config.json.part", "metrics.part", "manifest.json", "bad_samples.jsonl",
    "tokenizer.json", "contact_sheet.png", "_tmp/0.feather", "_tmp/precious", "_download/notes.txt",
    "config.json", "metrics.jsonl", "eval.json", "eval/zero_shot_seen.npz", "curves.png", "train.log", "profile/trace",
    "checkpoints/1000/model.pt", "checkpoints/5.orbax-checkpoint-tmp/x", "checkpoints/my.orbax-checkpoint-tmp-7/x",
    "results.json", "results.md", "dynamics.png", "runs/other.json", "search/other.json",
    "report.html", "README.md", "model.safetensors", "open_clip_config.json", "open_clip_model.safetensors",
    "preprocessor_config.json", "rankclip_jax.json", "variables/x", "variables.orbax-checkpoint-tmp/x",
    "photos.npz.parts/0.npz", "photos.npz.bad_samples.jsonl", "photos.npz.unfinished", "about.json",
    "bin/python", "lib/x", "pyvenv.cfg",
)  # fmt: skip


def fill(folder, names=FOREIGN):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = '{"name": "of a web site"}' if name.endswith(".json") else f"the only copy of {name}"
        (folder / name).write_text(text)
    return folder


def contents(folder):
    """What is below a folder: name -> bytes, the target of a link, or None for a folder; without an index of shards."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(INDEX):  # which has the shards' times
            found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found
