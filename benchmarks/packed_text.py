"""A step on captions as long as CC3M's, packed and padded, beside transformers.CLIPModel.

    python -m benchmarks.packed_text [--model ViT-B/32] [--batches 8 32] [--rounds 5]

All take turns, each in a process of its own, as in benchmarks/train_step.py: forward, backward and AdamW, CLIP's loss.
transformers is compiled, its texts padded to 77 tokens and to the longest of the batch. The lengths and their source:
benchmarks/train_contenders.py. Ours include the host's packing.
"""

import argparse
import statistics

from benchmarks.train_contenders import PYTORCH
from benchmarks.train_step import measure

PACKED = "clip | packed"
CONTENDERS = (PACKED, "clip | padded", f"{PYTORCH[1]} | padded", f"{PYTORCH[1]} | padded to the longest")


def table(batch: int, rows: int, found: dict) -> list[str]:
    """The medians as lines of Markdown."""
    lines = [f"| batch {batch}, packed in {rows} rows | images/s | seconds (range) | time, packed = 1 |"]
    lines.append("|---|---|---|---|")
    base = statistics.median(found[PACKED]["seconds"])
    for contender, result in found.items():
        if "error" in result:
            lines.append(f"| {contender.replace(' | ', ', ')} | {result['error']} | | |")
            continue
        times = result["seconds"]
        seconds, spread = statistics.median(times), f"{min(times):.3g} to {max(times):.3g}"
        name, ratio = contender.replace(" | ", ", "), seconds / base
        lines.append(f"| {name} | {batch / seconds:.3g} | {seconds:.3g} ({spread}) | {ratio:.2f} |")
    return lines


def main() -> None:
    """Prints a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    for batch in flags.batches:
        facts, found = measure(flags.model, CONTENDERS, batch, flags.rounds)
        print("\n".join(table(batch, facts["rows"], found)), flush=True)


if __name__ == "__main__":
    main()
