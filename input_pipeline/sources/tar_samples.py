"""Which members of a tar are one sample.

WebDataset's rule: adjacent members whose names are equal up to the first dot; what follows is the extension. A member
whose extension the open sample already has begins a new one. Where that leaves an image without a caption, names are
split before the extension instead (`shot v2.0.jpg`, `shot v2.0.txt`).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

_ABSENT = -1


class Sample(NamedTuple):
    """First byte and length of each kind of member, -1 where there is none; lengths as tar_headers.members."""

    key: str
    begins: list[int]
    lengths: list[int]


class Pairing:
    """Takes a tar's members in order (`add`); `finish` gives its samples."""

    def __init__(self, wanted: Mapping[str, tuple[str, ...]], optional: tuple[str, ...] = ()):
        """`wanted`: kind -> extensions, the first that a sample has is used; `optional`: kinds that it may lack."""
        self._kinds = len(wanted)
        self._place = {ending: (i, rank) for i, of in enumerate(wanted.values()) for rank, ending in enumerate(of)}
        self._required = [i for i, name in enumerate(wanted) if name not in optional]
        self._endings = sorted((f".{ending}" for ending in self._place), key=len, reverse=True)
        self._samples: list[Sample] = []
        self._run: list[tuple[str, int, int]] = []  # members with the key of the last one
        self._key: str | None = None

    def add(self, name: str, begin: int, length: int) -> None:
        """A member; hidden files are none."""
        key = _at_first_dot(name)[0]
        if not key:
            return
        if key != self._key:
            self._end_run()
            self._key = key
        self._run.append((name, begin, length))

    def finish(self) -> tuple[list[Sample], int]:
        """(samples with at least one wanted member; number of samples left out, because they are torn apart)"""
        self._end_run()
        halves = defaultdict(list)
        for sample in self._samples:
            if not self._complete(sample):
                halves[sample.key].append(sample)
        # A key whose incomplete samples together have every kind.
        apart = {
            key
            for key, samples in halves.items()
            if all(any(sample.begins[i] >= 0 for sample in samples) for i in self._required)
        }
        if not apart:
            return self._samples, 0
        left_out = [sample for key in apart for sample in halves[key]]
        counts = [sum(sample.begins[i] >= 0 for sample in left_out) for i in self._required]
        return [sample for sample in self._samples if sample.key not in apart or self._complete(sample)], max(counts)

    def _complete(self, sample: Sample) -> bool:
        return all(sample.begins[i] >= 0 for i in self._required)

    def _end_run(self) -> None:
        run, self._run = self._run, []
        samples = self._grouped(run, _at_first_dot)
        if not all(map(self._complete, samples)) or self._has_more(run, samples):
            by_ending = self._grouped(run, self._at_ending)
            complete = [sum(map(self._complete, some)) for some in (samples, by_ending)]
            if not samples or complete[1] > complete[0]:
                samples = by_ending
        self._samples += samples

    def _has_more(self, run, samples):
        """Whether a member that none of the samples has could be one of the wanted."""
        used = {begin for sample in samples for begin in sample.begins}
        return any(begin not in used and name.lower().endswith(tuple(self._endings)) for name, begin, _ in run)

    def _grouped(self, run: list[tuple[str, int, int]], split: Callable[[str], tuple[str, str]]) -> list[Sample]:
        samples, key, seen, ranks = [], None, set(), []
        for name, begin, length in run:
            stem, ending = split(name)
            if stem != key or ending in seen:
                key, seen, ranks = stem, set(), [len(self._place)] * self._kinds
                samples.append(Sample(stem, [_ABSENT] * self._kinds, [_ABSENT] * self._kinds))
            seen.add(ending)
            i, rank = self._place.get(ending, (0, len(self._place)))
            if rank < ranks[i]:
                samples[-1].begins[i], samples[-1].lengths[i], ranks[i] = begin, length, rank
        return [sample for sample in samples if max(sample.begins) >= 0]

    def _at_ending(self, name: str) -> tuple[str, str]:
        lower = name.lower()
        ending = next((one for one in self._endings if lower.endswith(one)), "")
        return (name[: -len(ending)], ending[1:]) if ending else _at_first_dot(name)


def _at_first_dot(name: str) -> tuple[str, str]:
    """folder/00012.jpg -> folder/00012, jpg; an empty stem for hidden files."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem if stem else "", ending.lower()
