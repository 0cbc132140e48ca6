"""Images per second per core: this pipeline, the PyTorch way, and the bare JPEG decode that limits both.

python -m benchmarks.input_pipeline [--size 400x300] [--rounds 5] ...

The pictures are made here, so that anyone gets the same: "dead leaves" (discs of random colour that hide one another,
with radii from a power law; their edges and spectra are close to photographs', see Lee, Mumford and Huang, IJCV 2001)
with a texture of amplitude 1/frequency, as JPEGs of quality 90 with halved chroma. The contenders take turns in one
process, round by round, so that a machine whose speed drifts slows all of them. PyTorch's loader has its own processes.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import torch
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import cpu_only, decode, pipeline, sources, transforms
from rankclip_jax.common import commands
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.models.images import MEAN, STD

BATCH = 64


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3) with a photograph's statistics (see above)."""
    canvas = np.tile(rng.normal(118, 45) + rng.normal(0, 15, 3), (height, width, 1))
    y, x = np.ogrid[:height, :width]
    for radius in np.sort(np.clip(8 * (1 + rng.pareto(2.0, 150)), 8, height / 2))[::-1]:
        cy, cx = rng.uniform(-radius, height + radius), rng.uniform(-radius, width + radius)
        rows = slice(max(0, int(cy - radius)), max(0, int(cy + radius) + 1))
        columns = slice(max(0, int(cx - radius)), max(0, int(cx + radius) + 1))
        inside = (y[rows] - cy) ** 2 + (x[:, columns] - cx) ** 2 < radius**2
        canvas[rows, columns][inside] = rng.normal(118, 45) + rng.normal(0, 15, 3)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency
    texture = np.fft.irfft2(spectrum, (height, width))
    return np.clip(canvas + 7 * (texture / texture.std())[..., None], 0, 255).astype(np.uint8)


def make_set(folder: Path, count: int, width: int, height: int) -> Path:
    """Writes `count` JPEGs and a csv of them with captions; returns the csv."""
    lines = ["image,caption"]
    for i in range(count):
        Image.fromarray(photograph(np.random.default_rng(i), height, width)).save(folder / f"{i}.jpg", quality=90)
        lines.append(f"{i}.jpg,a photograph of number {i} among many others")
    (folder / "set.csv").write_text("\n".join(lines) + "\n")
    return folder / "set.csv"


def ours(path: Path, side: int, canvas: int | None):
    """Batches as training takes them, tokens included."""
    spec = ConfigDict(dict(format="csv", image_key="image", caption_key="caption", delimiter=","))
    source = sources.open_source(spec, path, image_side=side)
    tokenizer = Tokenizer.train(source.captions(), 600)
    options = dict(batch_size=BATCH, image_side=side, context_length=32, crop_scale=(0.5, 1.0), seed=0)
    return pipeline.TrainBatches(source, tokenizer, canvas=canvas, **options)


def one_window(numbers, size, scale):
    """In place of transforms.windows: nothing is made of the random numbers."""
    return tf.tile(tf.constant([[[8.0, 8.0, 200.0, 200.0]]]), [tf.shape(size)[0], 1, 1])


def decoded_only(image, *_, **__):
    """In place of transforms.training_view: the decoder without checks, as of pictures that all fit the canvas."""
    pixels = tf.ensure_shape(decode.jpeg(image), (None, None, 3))
    return {"image": pixels, "size": tf.shape(pixels)[:2], "windows": tf.zeros((1, 4))}


def ours_without(name: str, instead, path: Path, side: int, canvas: int):
    """`ours`, with a function of transforms.py replaced: what it costs is the difference."""
    with mock.patch.object(transforms, name, instead):  # while the graph is made
        return ours(path, side, canvas)


def bare_decode(path: Path):
    """The decoder alone on bytes in memory, twice as many at a time as there are cores; the pixels are thrown away."""
    data = tf.constant([file.read_bytes() for file in sorted(path.parent.glob("*.jpg"))])
    rows = tf.data.Dataset.range(len(data)).repeat()
    pixels = rows.map(lambda i: decode.jpeg(data[i])[0, 0], num_parallel_calls=2 * os.cpu_count(), deterministic=True)
    return iter(pixels.batch(BATCH).prefetch(2))


class PilDataset(torch.utils.data.Dataset):
    """As image-text training scripts in PyTorch do: PIL, random resized crop (bicubic), float tensor, normalised."""

    def __init__(self, files: list[str], side: int):
        self.files, self.side = files, side
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))

    def __len__(self):
        return 1 << 30  # endless, so that the workers stay

    def __getitem__(self, i):
        image = Image.open(self.files[i % len(self.files)]).convert("RGB")
        width, height = image.size
        x, y, *uniform = np.random.default_rng(i).random(22)
        for area, ratio in zip(uniform[::2], uniform[1::2], strict=True):
            area, ratio = width * height * (0.5 + 0.5 * area), (4 / 3) ** (2 * ratio - 1)
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if w <= width and h <= height:
                break
        else:
            w, h = min(width, round(height * 4 / 3)), height
        left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
        crop = image.crop((left, top, left + w, top + h)).resize((self.side, self.side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
        return (pixels.float().div(255) - self.mean) / self.std


def pytorch(path: Path, side: int, workers: int):
    """An iterator over batches of a DataLoader, and the process ids of its workers."""
    files = [str(file) for file in sorted(path.parent.glob("*.jpg"))]
    loader = torch.utils.data.DataLoader(
        PilDataset(files, side), batch_size=BATCH, num_workers=workers, multiprocessing_context="spawn"
    )
    iterator = iter(loader)
    return iterator, [worker.pid for worker in iterator._workers]


def cpu_seconds(pids: list[int]) -> float:
    """Processor time of this process and of `pids` so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ticks = sum(
        sum(int(x) for x in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]) for pid in pids
    )
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Prints each round, then a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="400x300", help="width x height of the pictures")
    parser.add_argument("--side", type=int, default=224, help="of the model's input")
    parser.add_argument("--canvas", type=int, default=408)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--images", type=int, default=1280, help="measured a contender and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of PyTorch's DataLoader")
    parser.add_argument("--steps", action="store_true", help="not the others, but ours without parts: what they cost")
    flags = parser.parse_args()
    commands.keep_freed_memory()  # as training does
    cpu_only()
    width, height = (int(x) for x in flags.size.split("x"))
    cores = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        path = make_set(Path(folder), flags.pictures, width, height)
        size = np.mean([file.stat().st_size for file in Path(folder).glob("*.jpg")])
        print(f"{flags.pictures} JPEGs of {width} x {height}, {size / 1000:.1f} kB each; {cores} cores", flush=True)
        device = path, flags.side, flags.canvas
        contenders = {"bare decode": (bare_decode(path), []), "ours, device": (ours(*device), [])}
        if flags.steps:
            contenders["one window"] = ours_without("windows", one_window, *device), []
            contenders["decode alone"] = ours_without("training_view", decoded_only, *device), []
        else:
            contenders["ours, host"] = ours(path, flags.side, None), []
            contenders["PyTorch"] = pytorch(path, flags.side, flags.workers)
        measured = {name: [] for name in contenders}
        for round_number in range(flags.rounds):
            for name, (batches, workers) in contenders.items():
                time.sleep(2)  # until the one before has fetched ahead all that it will
                for _ in range(2 * flags.workers + 2):  # what this one has fetched ahead
                    next(batches)
                begin, cpu = time.perf_counter(), cpu_seconds(workers)
                for _ in range(flags.images // BATCH):
                    next(batches)
                count = flags.images // BATCH * BATCH
                wall, cpu = time.perf_counter() - begin, cpu_seconds(workers) - cpu
                measured[name].append((count / wall / cores, 1000 * cpu / count))
                print(f"round {round_number + 1}  {name:13} {count / wall / cores:7.0f} images/s a core", flush=True)
    medians = {name: np.median(rows, axis=0) for name, rows in measured.items()}
    print(f"\n{'':14}{'images/s a core':>16}{'x PyTorch':>11}{'% of bare decode':>18}{'processor ms an image':>23}")
    for name, (rate, cpu) in medians.items():
        share = 100 * rate / medians["bare decode"][0]
        times = "" if flags.steps else f"{rate / medians['PyTorch'][0]:.2f}"
        print(f"{name:14}{rate:16.0f}{times:>11}{share:18.0f}{cpu:23.2f}")
    contenders.clear()  # ends the workers


if __name__ == "__main__":
    main()
