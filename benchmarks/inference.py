"""Images and texts a second: rankclip_jax.load against transformers with PyTorch, on this machine.

    python -m benchmarks.inference [--model ViT-B/32] [--rounds 5] [--inputs texts]

Both sides hold the same random weights in float32 and get the same inputs, in turns within one process, one warm-up
first. `images` starts from PIL images of 400 x 300 pixels and includes resizing; `pixels` gives both what the view has
made, so only the model is timed; `texts` starts from strings and includes tokenising. Printed are the medians over the
rounds, and the median and range of the rounds' ratios. Needs torch and transformers (requirements-parity.txt).
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from PIL import Image

import rankclip_jax
from rankclip_jax import models
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.weights import export, pretrained
from rankclip_jax.weights import view as preprocess

BATCHES = (1, 32, 256)
WORDS = "a photo of the two small red dogs and cats on beach in winter with blue boats under clouds".split()


def make_model(name: str) -> pretrained.Pretrained:
    """Random weights of a preset, with a tokenizer trained on the benchmark's own captions."""
    tokenizer = Tokenizer.train(make_texts(2000, seed=1), 1000)
    config = models.configure(name, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id)
    network = models.CLIP(config)
    variables = jax.jit(network.init)(jax.random.key(0), *network.example_inputs())
    side = config.vision.image_size
    return pretrained.Pretrained(
        Path(name), config, jax.device_get(variables), preprocess.View(side, side), tokenizer
    )


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Captions of 5 to 14 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(5, 15))) for _ in range(count)]


def make_images(count: int) -> list[Image.Image]:
    """Smooth noise of 400 x 300 pixels."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 30, 40, 3), np.uint8)
    return [Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC) for pixels in small]


def rates(functions: dict, count: int, rounds: int) -> dict[str, list[float]]:
    """Items a second of every function, `rounds` times in turns, after one call each."""
    for function in functions.values():
        function()
    results = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(0.3)  # the other side's threads spin for a while before they sleep
            start = time.perf_counter()
            function()
            results[name].append(count / (time.perf_counter() - start))
    return results


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B/32", help="a preset with a vision transformer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inputs", nargs="+", default=["images", "pixels", "texts"])
    flags = parser.parse_args()
    source = make_model(flags.model)
    with tempfile.TemporaryDirectory() as folder:
        export.write(source, folder, "hf")
        ours = rankclip_jax.load(folder)
        theirs = transformers.CLIPModel.from_pretrained(folder).eval()
        processor = transformers.CLIPProcessor.from_pretrained(folder)

    def their_images(images):
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return torch.nn.functional.normalize(theirs.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def their_texts(texts):
        inputs = processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        return torch.nn.functional.normalize(theirs.get_text_features(**inputs).pooler_output, dim=-1)

    images, texts = make_images(max(BATCHES)), make_texts(max(BATCHES))
    with torch.inference_mode():
        difference = max(
            np.abs(ours.encode_image(images[:4]) - their_images(images[:4]).numpy()).max(),
            np.abs(ours.encode_text(texts[:4]) - their_texts(texts[:4]).numpy()).max(),
        )
    print(
        f"{flags.model}, float32, {jax.default_backend()} of {platform.machine()}, {torch.get_num_threads()} threads; "
        f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{flags.rounds} rounds; largest difference of an embedding {difference:.1e}\n"
    )
    print("| input | batch | rankclip_jax /s | transformers /s | ratio (range) |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for batch in BATCHES:
        views = [source.view(image) for image in images[:batch]]
        pixels = processor(images=images[:batch], return_tensors="pt")["pixel_values"]
        cases = {
            "images": (lambda b=batch: ours.encode_image(images[:b]), lambda b=batch: their_images(images[:b])),
            "pixels": (
                lambda v=views: ours.encode_views(v),
                lambda p=pixels: theirs.get_image_features(pixel_values=p),
            ),
            "texts": (lambda b=batch: ours.encode_text(texts[:b]), lambda b=batch: their_texts(texts[:b])),
        }
        for name in flags.inputs:
            our_call, their_call = cases[name]
            with torch.inference_mode():
                found = rates({"ours": our_call, "theirs": their_call}, batch, flags.rounds)
            ratios = np.divide(found["ours"], found["theirs"])
            print(
                f"| {name} | {batch} | {np.median(found['ours']):.1f} | {np.median(found['theirs']):.1f} "
                f"| {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
