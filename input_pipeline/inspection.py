"""Inspects a data set: prepare --inspect."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from input_pipeline import contact_sheet, overview
from input_pipeline.filtering import Filter
from input_pipeline.rows import captions_of
from input_pipeline.sources import Source
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import files, pictures
from rankclip_jax.common.ownership import Owned
from rankclip_jax.common.tokenizer import Tokenizer

_SHEET, _BAD = "contact_sheet.png", "bad_samples.jsonl"
_NAMED = 10  # bad rows that are printed


def inspect(
    source: Source,
    name: str,
    out_dir: Path,
    tokenizer: Tokenizer | None,
    sample: int | None,
    workers: int,
    context_length: int,
    wanted: Filter | None = None,
) -> None:
    """Prints statistics of `source`; writes contact_sheet.png of evenly spaced good rows, and bad_samples.jsonl.

    `sample`: the most rows to inspect; None: all. `wanted`: what it leaves out is counted and marked.
    """

    def read(row):
        return {key: value.numpy() for key, value in source.read(tf.constant(row, tf.int64)).items()}

    owned = Owned(out_dir, "prepare --inspect")
    owned.check([_SHEET, _BAD])
    seen = overview.survey(source, tokenizer=tokenizer, sample=sample, workers=workers)
    scores = wanted.scores if wanted else None
    if scores and len(seen.good_rows):
        cosines = scores.cosines[seen.good_rows]
        seen.measures["cosine"] = cosines[~np.isnan(cosines)].astype(np.float64)
    print(f"{name}\n" + overview.text(seen, lambda row: captions_of(read(row)), context_length))
    left_out = wanted.left_out(source, overview.sampled(source.size, sample), workers) if wanted else None
    if left_out:
        counts = left_out.counts(seen.good_rows)
        print(f"\nleft out by --min-score and --dedup: {sum(counts.values()):,} of {len(seen.good_rows):,} good rows")
        print("\n".join(overview.share(count, len(seen.good_rows), reason) for reason, count in counts.items()))
    bad = [{"row": None, "detail": "", **dataclasses.asdict(one)} for one in source.lost]
    for row, reason, detail in seen.bad_rows:
        bad.append({"row": row, "where": source.where(row), "reason": reason, "detail": detail})
    if bad:
        owned.claim([_BAD])
        files.write_whole(out_dir / _BAD, "".join(json.dumps(one) + "\n" for one in bad))
        print("\nbad rows")
        for one in bad[:_NAMED]:
            print(f"  {one['where']}: {one['detail'] and one['detail'] + '; '}{one['reason']}")
        more = f"and {len(bad) - _NAMED:,} more; " if len(bad) > _NAMED else ""
        print(f"  {more}all are in {out_dir / _BAD}")
    else:  # that of an earlier inspection
        owned.clear([_BAD])
    count = min(len(seen.good_rows), contact_sheet.EXAMPLES)
    if not count:
        owned.clear([_SHEET])
        return
    examples = []
    for place in np.linspace(0, len(seen.good_rows) - 1, count).astype(int):
        row = int(seen.good_rows[place])
        found = read(row)
        image = pictures.read(found["image"])
        notes = [f"row {row:,} · {image.width} x {image.height}"]
        notes += [f"cosine {scores.cosines[row]:.3f}"] if scores else []
        reason = left_out.reason(row) if left_out else None
        notes += [f"left out: {reason}"] if reason else []
        examples.append((image, captions_of(found)[0], "\n".join(notes)))
    owned.claim([_SHEET])
    path = out_dir / _SHEET
    with files.whole(path) as part:
        contact_sheet.draw(part, f"{name}: {count} of {source.size:,} rows", examples)
    print(f"\nexamples: {path}")
