"""Memory traffic and communication of a compiled program, read from its text.

Each loop counts as often as it runs. XLA's own `cost_analysis` counts the body of a loop once, but a
round consists of loops over clients, steps and layers.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
# What only names or groups arrays, and what is counted where it begins or by what it calls.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "while", "conditional", "call", "opt-barrier", "iota", "async-start",
}  # fmt: skip
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')


class Instruction(NamedTuple):
    """One line of a computation: `%name = result opcode(operands), about`."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    about: str
    root: bool


class Sent(NamedTuple):
    """Collectives of one kind that a chip takes part in, in one run of the program."""

    count: int
    bytes: int


class Program:
    """A compiled program for one of its devices.

    Args:
      text: of `compiled.as_text()`.
      steps: how often loops run whose number of turns is not a constant: those over local steps, and
        those over tokens that are written.
    """

    def __init__(self, text: str, steps: int = 1):
        self._computations, self._entry = _parsed(text)
        self._results = {
            name: {i.name: i.result for i in some} for name, some in self._computations.items()
        }
        self._steps = steps
        self._runs = Counter()
        self._run(self._entry, 1)

    def collectives(self) -> dict[str, Sent]:
        """Returns collectives by kind. Bytes are a chip's input, for an all-gather its output."""
        count, size = Counter(), Counter()
        for name, instruction, times in self._executed():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                brought = sum(map(nbytes, self._operands(name, instruction)))
                whole = nbytes(instruction.result)
                if kind == "all-gather":
                    started = instruction.opcode.endswith("-start")
                    brought = whole - brought if started else whole
                count[kind] += times
                size[kind] += times * brought
        return {kind: Sent(count[kind], size[kind]) for kind in count}

    def gathered(self) -> list[str]:
        """Shapes of what all-gathers give, once for each in the text."""
        found = (
            i for _, i, _ in self._executed() if i.opcode in ("all-gather", "all-gather-start")
        )
        return [instruction.result for instruction in found]

    def moved(self) -> int:
        """Bytes read from a chip's memory and written to it. Of an array of which a slice is taken, the
        slice counts."""
        total = 0
        for name, instruction, times in self._executed():
            if name in self._fused or instruction.opcode in _FREE:
                continue
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            total += times * self._touched(name, instruction)
        return total

    def _touched(self, name: str, instruction: Instruction) -> int:
        shapes = self._operands(name, instruction)
        if instruction.opcode == "fusion":
            (inner,) = _CALLED.findall(instruction.about)[:1]
            read = sum(
                min(in_memory(shape), self._read(inner, i)) for i, shape in enumerate(shapes)
            )
            return read + self._written(inner, instruction.result)
        if instruction.opcode in ("dynamic-slice", "gather"):
            return 2 * in_memory(instruction.result)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * in_memory(shapes[1])
        if instruction.opcode.endswith("-start"):  # gives what it takes, and more
            return sum(map(in_memory, shapes)) + max(
                in_memory(instruction.result) - sum(map(in_memory, shapes)), 0
            )
        return sum(map(in_memory, shapes)) + in_memory(instruction.result)

    def _written(self, computation: str, result: str) -> int:
        """Returns the bytes that a fusion writes; only the slice if it updates a slice."""
        root = next(i for i in self._computations[computation] if i.root)
        if root.opcode == "dynamic-update-slice" and in_memory(result):
            return nbytes(self._results[computation][root.operands[1]])
        return in_memory(result)

    @functools.cache  # noqa: B019, a program does not outlive its analysis
    def _read(self, computation: str, number: int) -> float:
        """Bytes that a fused computation reads of one of its parameters."""
        inside = self._computations[computation]
        parameters = (i for i in inside if i.opcode == "parameter")
        name = next(i.name for i in parameters if i.about == str(number))
        total = 0.0
        for instruction in inside:
            for place, operand in enumerate(instruction.operands):
                if operand == name:
                    total += self._read_by(computation, instruction, place)
        return total

    def _read_by(self, computation: str, instruction: Instruction, place: int) -> float:
        if instruction.opcode in ("dynamic-slice", "gather", "slice") and place == 0:
            return nbytes(instruction.result)
        if instruction.opcode == "dynamic-update-slice" and place == 0:
            return 0.0
        if instruction.opcode == "fusion":
            (inner,) = _CALLED.findall(instruction.about)[:1]
            return self._read(inner, place)
        if instruction.opcode == "bitcast":
            users = (
                self._read_by(computation, user, at)
                for user in self._computations[computation]
                for at, operand in enumerate(user.operands)
                if operand == instruction.name
            )
            return math.inf if instruction.root else sum(users)
        return math.inf  # all of it

    def _operands(self, name: str, instruction: Instruction) -> list[str]:
        shapes = self._results[name]
        return [shapes[operand] for operand in instruction.operands if operand in shapes]

    def _executed(self) -> Iterator[tuple[str, Instruction, int]]:
        for name, times in self._runs.items():
            for instruction in self._computations[name]:
                yield name, instruction, times

    @functools.cached_property
    def _fused(self) -> set[str]:
        called = set()
        for _, instruction, _ in self._executed():
            if instruction.opcode not in ("while", "conditional", "call", "async-start"):
                called |= {*_CALLED.findall(instruction.about)}
        return called

    def _run(self, name: str, times: int) -> None:
        self._runs[name] += times
        for instruction in self._computations[name]:
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            turns = times
            if instruction.opcode == "while":
                turns *= self._turns(instruction)
            called = _CALLED.findall(instruction.about)
            for branches in _BRANCHES.findall(instruction.about):
                called += re.findall(r"%([\w.-]+)", branches)
            for other in called:
                if other in self._computations:
                    self._run(other, turns)

    def _turns(self, loop: Instruction) -> int:
        """Returns the number of turns of a loop: annotated, or the limit of its counter from zero."""
        if known := _TRIPS.search(loop.about):
            return int(known.group(1))
        (condition,) = re.findall(r"condition=%([\w.-]+)", loop.about)
        inside = {i.name: i for i in self._computations[condition]}
        root = next(i for i in inside.values() if i.root)
        if root.opcode == "compare" and "direction=LT" in root.about:
            limit = inside[root.operands[1]]
            if limit.opcode == "constant":
                return int(limit.about)
        return self._steps


def nbytes(shape: str) -> int:
    """Returns the bytes of a shape or tuple in HLO notation: `(f32[2,3]{1,0}, s4[8])`."""
    return sum(_size(*found) for found in _SHAPE.findall(shape))


def in_memory(shape: str) -> int:
    """Returns the bytes in the chip's main memory; memory close to the units is marked S(1)."""
    return sum(_size(*found) for found in _SHAPE.findall(shape) if "S(" not in found[2])


def _size(kind: str, dimensions: str, layout: str) -> int:
    if kind not in _BITS and not re.match(r"[sufc]\d|f\d", kind):
        return 0  # a token, an opaque
    bits = _BITS.get(kind) or int(re.match(r"[suf](\d+)", kind).group(1))
    sizes = [int(n.removeprefix("<=")) for n in dimensions.split(",") if n]
    return -(-math.prod(sizes) * bits // 8)


def _parsed(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations, entry, now = {}, "", None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%([\w.-]+) \(", line)):
            now = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif line == "}":
            now = None
        elif now is not None and (found := re.match(r"\s+(ROOT )?%([\w.-]+) = ", line)):
            now.append(_instruction(line[found.end() :], found.group(2), bool(found.group(1))))
    return computations, entry


def _instruction(rest: str, name: str, root: bool) -> Instruction:
    end = _closed(rest) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest[: rest.index("(")], rest[rest.index("(") :]
    end = _closed(rest)
    inside, about = rest[1 : end - 1], rest[end:].removeprefix(", ")
    if opcode in ("parameter", "constant"):
        return Instruction(name, result, opcode, (), inside, root)
    return Instruction(name, result, opcode, tuple(re.findall(r"%([\w.-]+)", inside)), about, root)


def _closed(text: str) -> int:
    """Behind the bracket that closes the first."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"no end of {text[:80]}")
