"""Looks through a pickle before anything in it is carried out."""

import pickletools


class RefusedError(Exception):
    """What is wrong with a file of weights, without its name."""


_MOST_IN_A_TUPLE = 10_000  # values, those of tuples in it included
# What these make may hold what they take.
_KEEPS = {"FROZENSET", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}


def check_pickle(data: bytes) -> None:
    """Follows the pickle's operations before any is carried out, and knows of each value how much hashing it takes.

    Only tuples matter (and frozensets, which no tensor needs): Python hashes a key's tuples without limits of depth
    or time, and its C unpickler reserves memory for the highest place in the memo that is named.

    Raises:
      RefusedError: a tuple too deep or too large to be hashed, or a place in the memo beyond the number of operations.
    """
    stack: list[int] = []  # of each value the number of values that a hash of it visits; -1: a mark
    memo: dict[int, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if argument is None else argument
            if place > count:
                raise RefusedError(f"refused: its pickle names place {place:,} after {count:,} operations")
            memo[place] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken, before = [], opcode.stack_before
            if pickletools.stackslice in before or pickletools.markobject in before:
                while (top := stack.pop()) != -1:
                    taken.append(top)
                before = before[: before.index(pickletools.markobject)]
            taken += [stack.pop() for _ in before]
            hashed = 1 + (sum(taken) if "TUPLE" in name or name in _KEEPS else 0)
            if hashed > _MOST_IN_A_TUPLE:
                raise RefusedError("refused: its pickle nests tuples too deeply")
            stack += [-1 if kind is pickletools.markobject else hashed for kind in opcode.stack_after]
