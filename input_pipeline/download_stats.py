"""What became of a list's URLs, from the _stats.json that img2dataset writes next to each finished shard."""

import json
import os
import re
from collections import Counter
from pathlib import Path

NAME = re.compile(r"\d{5,}_stats\.json")
# Patterns of img2dataset's messages, and a reason that many URLs share; None: the matched text.
_REASONS = (
    (r"X-Robots-Tag", "the site asks not to use it (X-Robots-Tag)"),
    (r"slower than \d+ s|larger than \d+ MB|not a public address|redirected to \w+", None),  # of img2dataset_driver.py
    (r"timed out|timeout", "no answer in time"),
    (r"HTTP Error \d+", None),
    (r"Name or service not known|No address associated|name resolution|nodename", "no such host any more"),
    (r"certificate|SSL|TLS|EOF occurred in violation", "no secure connection (certificate)"),
    (r"IncompleteRead|Remote end closed|Connection reset|Connection aborted", "the connection broke off"),
    (r"Connection refused|No route to host|Network is unreachable", "the host refuses connections"),
    (r"Image decoding error|not an image|cannot identify", "not an image, or a broken one"),
    (r"image too small|image area too large|aspect ratio", None),
)


class Finished:
    """The finished shards of a folder. Each _stats.json is read once: img2dataset writes it last.

    Attributes: urls, images: of the shards found so far.
    """

    def __init__(self, out_dir: Path):
        self._out_dir, self._known = out_dir, set[str]()
        self.urls = self.images = 0

    def new(self) -> dict[str, dict]:
        """The names of the tars of the shards that were finished since the last call, and their stats."""
        names = sorted(name for name in set(os.listdir(self._out_dir)) - self._known if NAME.fullmatch(name))
        found = {name: stats for name in names if (stats := read(self._out_dir / name)) is not None}
        self._known.update(found)
        self.urls += sum(stats["count"] for stats in found.values())
        self.images += sum(stats["successes"] for stats in found.values())
        return {name.removesuffix("_stats.json") + ".tar": stats for name, stats in found.items()}


def read(path: Path) -> dict | None:
    """The contents of one _stats.json; None if it is incomplete."""
    try:
        stats = json.loads(path.read_text())
        return stats if {"count", "successes", "status_dict"} <= stats.keys() else None
    except (ValueError, AttributeError, RecursionError):  # half of it is written
        return None


def count(out_dir: Path, total: int) -> Counter:
    """Counts of `total` URLs: "images", each reason for a loss, and "shards not finished"."""
    counts = Counter()
    for stats in Finished(out_dir).new().values():
        counts["images"] += stats["successes"]
        # img2dataset may fail on a sample before it counts the failure: such samples are only in its total.
        named = sum(stats["status_dict"].values())
        counts["lost without a reason"] += stats["count"] - named
        for message, number in stats["status_dict"].items():
            if message != "success":
                counts[reason(message)] += number
    counts["shards not finished"] = total - counts.total()
    return +counts


def reason(message: str) -> str:
    """The reason, which many URLs share, for an error message of img2dataset."""
    for pattern, words in _REASONS:
        found = re.search(pattern, message, re.IGNORECASE)
        if found:
            return words or (message.strip() if "HTTP Error" in message else found[0])
    return re.sub(r"\d{2,}|'[^']*'", "...", message.strip().splitlines()[0] if message.strip() else "no message")[:70]


def summary(counts: Counter, out_dir: Path, total: int) -> str:
    """A table of images and losses with their reasons, and the command that comes next."""
    size = sum(path.stat().st_size for path in out_dir.glob("*.tar") if path.stem.isdigit())
    images, share = counts["images"], counts["images"] / max(1, total)
    lines = [f"{images:,} of {total:,} URLs gave an image ({share:.1%}), {size / 1e6:,.1f} MB: {out_dir}"]
    lost = [(what, number) for what, number in counts.most_common() if what != "images"]
    lines += [f"{number:>10,}  {number / total:>6.1%}  {what}" for what, number in lost[:20]]
    if lost[20:]:
        lines.append(f"{sum(number for _, number in lost[20:]):>10,}  for {len(lost) - 20} other reasons")
    if counts["shards not finished"]:
        log = out_dir / "_download" / "img2dataset.log"
        lines.append(f"some shards are not finished: {log} says why, and the same command resumes with them")
    elif images:
        lines.append(f"train with: --config.data.format=webdataset '--config.data.train={out_dir}/*.tar'")
    return "\n".join(lines)
