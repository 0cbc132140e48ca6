"""What a compiled program moves between devices, and what a TPU takes for it, read from its text."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
COLLECTIVE = re.compile(
    r"= (?P<type>\(*[a-z0-9]+\[[^=]*?) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
_COSTLY = re.compile(r" (sort|all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_COMMENT = re.compile(r"/\*.*?\*/")  # /*index=5*/, in tuples of more than five
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\n((?:.*\n)*?)\}", re.MULTILINE)
_CALLED = re.compile(r"(?:calls|to_apply|called_computations=\{)=?%?([\w.-]+)")
_LOOP = re.compile(r" while\(.*condition=%?(?P<condition>[\w.-]+), body=%?(?P<body>[\w.-]+)(?P<rest>.*)")
_TRIPS = re.compile(r"known_trip_count[^0-9]*([0-9]+)")
_ARRAY = re.compile(r"%?([\w.-]+) = [a-z0-9]+\[([0-9,]*)\]")
_ESTIMATE = re.compile(r'"estimated_cycles":"([0-9]+)"')
_SORT = re.compile(r"= (\(?[a-z0-9]+\[([0-9,]*)\].*?) sort\(.*?dimensions=\{([0-9]+)\}")
_BY_ELEMENT = re.compile(r" (gather|scatter)\(%?[\w.-]+, %?([\w.-]+)[,)].*?index_vector_dim=([0-9]+)")
_CONSTANT = re.compile(r"s32\[\]\S* constant\(([0-9]+)\)")


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of their results)} in one run of a compiled program on a device, loops counted.

    Those of a loop that ends when a value says so, and not after a number of rounds, are counted once.
    """
    bodies, times = _computations(hlo)
    found = {}
    for name, text in bodies.items():
        for match in COLLECTIVE.finditer(text):
            count, total = found.get(match["kind"], (0, 0))
            found[match["kind"]] = count + times[name], total + times[name] * result_bytes(match)
    return found


def _computations(hlo: str) -> tuple[dict[str, str], dict[str, int]]:
    """{name of a computation: its text}, {name: how often it runs}."""
    bodies = {match[1]: match[2] for match in _COMPUTATION.finditer(_COMMENT.sub("", hlo))}
    times = dict.fromkeys(bodies, 1)
    for name in reversed(bodies):  # a computation stands before those that call it
        for called in _CALLED.findall(bodies[name]):
            times[called] = times[name]
        for loop in _LOOP.finditer(bodies[name]):
            times[loop["body"]] = times[name] * _rounds(loop, bodies.get(loop["condition"], ""))
    return bodies, times


# Cycles of a TPU core that its compiler does not say, read from the machine code that libtpu made for v5e (128 lists of
# 32,768): a sort of two arrays there takes 0.44 cycles an element and one of three 0.57, in the 120 stages of a
# bitonic network; a gather goes element by element, 13 to 15 cycles each, a scatter 7. Assumed: other lengths take
# their own number of stages, other chips the same cycles. Not in it: what arrays outside of the core's memory add.
SORT_CYCLES = {"a stage": 0.44 / 120 - 2 * (0.57 - 0.44) / 120, "a stage and array": (0.57 - 0.44) / 120}
ELEMENT_CYCLES = {"gather": 14.0, "scatter": 7.0}
# GHz of the core: the data sheet's peak over the operations of its matrix units in a cycle.
CLOCKS = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}


class Cycles(NamedTuple):
    """Of a compiled TPU program on one core; loops that end when a value says so are counted once.

    compiler: the sum of the compiler's estimates, which have nothing for sorts, gathers, scatters and collectives.
    sort, gather, scatter: by SORT_CYCLES and ELEMENT_CYCLES.
    """

    compiler: float
    sort: float
    gather: float
    scatter: float


def cycles(hlo: str) -> Cycles:
    """What a program's text says, of libtpu at level O1."""
    bodies, times = _computations(hlo)
    found = dict.fromkeys(Cycles._fields, 0.0)
    estimated = set()  # computations whose time is in the estimate of who calls them
    for name in reversed(bodies):
        shapes = {match[1]: _sizes(match[2]) for match in _ARRAY.finditer(bodies[name])}
        for line in bodies[name].splitlines():
            known = _ESTIMATE.search(line)
            if known or name in estimated:
                estimated.update(_CALLED.findall(line))
                found["compiler"] += times[name] * float(known[1] if known else 0)
            elif match := _SORT.search(line):
                found["sort"] += times[name] * sort_cycles(_sizes(match[2]), match[1].count("["), int(match[3]))
            elif match := _BY_ELEMENT.search(line):
                indices = shapes[match[2]]
                vector = indices[int(match[3])] if int(match[3]) < len(indices) else 1
                found[match[1]] += times[name] * ELEMENT_CYCLES[match[1]] * math.prod(indices) / vector
    return Cycles(**found)


def sort_cycles(shape: Sequence[int], arrays: int, dimension: int = -1) -> float:
    """Cycles of a sort of `arrays` arrays of this shape along a dimension."""
    doublings = math.ceil(math.log2(max(2, shape[dimension])))
    stages = doublings * (doublings + 1) / 2
    return math.prod(shape) * stages * (SORT_CYCLES["a stage"] + arrays * SORT_CYCLES["a stage and array"])


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def unpriced(hlo: str) -> set[str]:
    """Kinds of operations to which the TPU's compiler gives no time, though they take some: sorts, and collectives.

    A program that has one is slower than its `optimal_seconds`, which counts them as nothing or, at XLA's usual
    level, as -1 s each.
    """
    lines = [line for line in hlo.splitlines() if "estimated_cycles" not in line or '"estimated_cycles":"-' in line]
    return {match[1] for line in lines for match in _COSTLY.finditer(line)}


def _rounds(loop: re.Match, condition: str) -> int:
    """CPU and GPU programs say how often a loop runs; for TPU it is the one constant that its counter is held to."""
    known, constants = _TRIPS.search(loop["rest"]), _CONSTANT.findall(condition)
    if known:
        return int(known[1])
    return int(constants[0]) if len(constants) == 1 and "direction=LT" in condition else 1


def result_bytes(match: re.Match) -> int:
    """Bytes of what a match of COLLECTIVE gives: several arrays where XLA joined several into one."""
    kind, parts = match["type"], _top_level(match["type"])
    # The start of an asynchronous one has its operands first, the results second, and perhaps counters after these.
    if match["start"] and match["kind"] != "all-reduce" and len(parts) > 1:
        kind = parts[1]
    sizes = []
    for dtype, shape in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", kind):
        sizes.append(BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size))
    return sum(sizes)


def _top_level(text: str) -> list[str]:
    """The elements of a tuple as HLO writes it: two of "(f32[8]{0}, (f32[2,3], u32[]))"; one if it is not a tuple."""
    if not text.startswith("("):
        return [text]
    parts, depth = [""], 0
    for character in text[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts
