"""What a compiled program moves between devices, read from its text."""

import math
import re

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
_CONSTANT = re.compile(r"s32\[\]\S* constant\(([0-9]+)\)")


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of their results)} in one run of a compiled program on a device, loops counted.

    Those of a loop that ends when a value says so, and not after a number of rounds, are counted once.
    """
    bodies = {match[1]: match[2] for match in _COMPUTATION.finditer(_COMMENT.sub("", hlo))}
    times = dict.fromkeys(bodies, 1)
    for name in reversed(bodies):  # a computation stands before those that call it
        for called in _CALLED.findall(bodies[name]):
            times[called] = times[name]
        for loop in _LOOP.finditer(bodies[name]):
            times[loop["body"]] = times[name] * _rounds(loop, bodies.get(loop["condition"], ""))
    found = {}
    for name, text in bodies.items():
        for match in COLLECTIVE.finditer(text):
            count, total = found.get(match["kind"], (0, 0))
            found[match["kind"]] = count + times[name], total + times[name] * result_bytes(match)
    return found


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
    """The elements of a tuple as HLO writes it, "(f32[8]{0}, (f32[2,3], u32[]))" -> two; one where it is no tuple."""
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
