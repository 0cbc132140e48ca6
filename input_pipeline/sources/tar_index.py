"""The index of tars: where the members of each sample are. Names are not in it, to save memory: found again here."""

import contextlib
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.sources import tar_headers as headers
from input_pipeline.sources.index_places import Kind
from input_pipeline.sources.offset_index import Bytes, Scan
from input_pipeline.sources.source import Lost
from input_pipeline.sources.tar_samples import Pairing
from rankclip_jax.common import storage

LARGEST = 2**31 - 1  # bytes of a member in the index; larger members have this length too, and are bad samples
_BEFORE = 16 * headers.BLOCK  # bytes before a member: its header, and one with a name of the longest that Linux has


def kind(wanted: Mapping[str, tuple[str, ...]], optional: tuple[str, ...]) -> Kind:
    """Of samples with the `wanted` members, of which they may lack the `optional` ones."""
    name = f"tar samples {list(wanted.items())} {optional}"  # in the order of the members
    return Kind(name, len(wanted), 0, "<i4", functools.partial(_scan, wanted, optional))


def _scan(wanted: Mapping[str, tuple[str, ...]], optional: tuple[str, ...], data: Bytes, size: int, path: str) -> Scan:
    pairing, torn = Pairing(wanted, optional), None
    try:
        for name, begin, length in headers.members(data, size, path):
            pairing.add(name, begin, min(length, LARGEST))
    except headers.TornError as error:
        torn = error
    samples, apart = pairing.finish()
    begins, lengths = (
        np.array([of(sample) for sample in samples], np.int64).reshape(-1, len(wanted))
        for of in (lambda sample: sample.begins, lambda sample: sample.lengths)
    )
    lost = []
    if apart:
        names = " and ".join(name for name in wanted if name not in optional)
        reason = f"members of one key ({names}) are not adjacent; write the tar again with tar --sort=name"
        lost.append(Lost(path, reason, apart))
    if torn and torn.cut_off:
        lost.append(Lost(path, f"{torn}; everything after it is lost", 1))
    elif torn:
        estimate = max(1, round((size - torn.at) * len(samples) / torn.at)) if torn.at else 1
        lost.append(Lost(path, f"{torn}; the {size - torn.at:,} bytes from there are lost", estimate))
    return Scan(begins, lengths, tuple(lost))


def names_before(path: str, begins: Sequence[int]) -> dict[int, str]:
    """First byte of a member -> its name, of those that are still there: the headers alone are read, not the tar's."""
    found = {}
    for begin in begins:
        with contextlib.suppress(storage.MissingError):  # a store that fails ends the run
            name = headers.name_before(storage.read(path, max(0, begin - _BEFORE), begin))
            if name is not None:
                found[begin] = name
    return found
