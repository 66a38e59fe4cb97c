"""Rounds of several fits run together, in the way that is fastest here."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrag_jax.clock import Clock
from fedrag_jax.data.cache import recall, remember
from fedrag_jax.federated.engine.memory import peak_bytes
from fedrag_jax.federated.engine.round import (
    Program,
    Ran,
    Round,
    compile_seconds,
    peak_alone,
    run_round,
)

MEMORY = "sweeps.json"


class Way(NamedTuple):
    """The number of devices that fits are spread over, and of fits side by side on each.

    A device takes one stack of fits after the other. (1, 1) is a loop in Python over the program of a
    single fit; the others are one program.
    """

    devices: int
    side_by_side: int


LOOP = Way(1, 1)


def by_program(asked: Mapping[int, Round]) -> list[tuple[Program | None, list[int]]]:
    """Groups rounds by program; returns programs and the keys of their rounds.

    A round is alone (None) if its mesh or its arrays are already placed on devices, or if it runs in
    Python.
    """
    groups: dict[Program, list[int]] = {}
    apart = []
    for i, a in asked.items():
        program, _ = Program.of(a)
        placed = a.mesh is not None or any(s.sharding is not None for s in program.shapes)
        if placed or a.name_of is not None or jax.process_count() > 1:
            apart.append((None, [i]))
        else:
            groups.setdefault(program, []).append(i)
    return [*apart, *groups.items()]


class Scheduler:
    """Runs rounds of the fits of one sweep in the fastest way.

    Ways are tried one after another, each on a real round, as long as the possible saving exceeds the
    time of compilation. The fastest is stored in `sweeps.json` of the cache folder, by device, shapes
    and number of fits.
    """

    def __init__(self):
        self.tried: dict[tuple[Program, int], dict[Way, float]] = {}  # seconds of a round of all
        self.copies: dict[
            tuple, tuple
        ] = {}  # (array, its copy) by the id of the array and a device

    def run(self, program: Program | None, asked: Sequence[Round]) -> list[Ran]:
        """Runs rounds of one program; each result has an equal share of the time."""
        if program is None or len(asked) == 1:
            return [run_round(a) for a in asked]
        name, tried = _name(program, len(asked)), self.tried.setdefault((program, len(asked)), {})
        known, left = recall(MEMORY, name), min(a.left for a in asked)
        untried = [] if known or not left else [w for w in _ways(len(asked)) if w not in tried]
        way = Way(*known) if known else min(tried, key=tried.__getitem__, default=LOOP)
        if untried and (not tried or _pays(untried[0], program, tried, left)):
            way = untried[0]
        if way == LOOP:
            self.copies.clear()
            found = [run_round(a) for a in asked]
            seconds = sum(ran.seconds for ran in found)
        else:
            try:
                found = self._dealt(program, asked, way)
                seconds = sum(ran.seconds for ran in found)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                self.copies.clear()
                if known:
                    remember(MEMORY, name, LOOP)
                found, seconds = [run_round(a) for a in asked], float("inf")
        if way in untried:
            tried[way] = seconds
            if len(untried) == 1:
                remember(MEMORY, name, min(tried, key=tried.__getitem__))
        return found

    def _dealt(self, program: Program, asked: Sequence[Round], way: Way) -> list[Ran]:
        """Stacks of fits, dealt out over devices that work at the same time."""
        clock, width = Clock(), way.side_by_side
        devices = jax.local_devices()[: way.devices] if way.devices > 1 else [None]
        leaves = [Program.of(a)[1] for a in asked]
        same = tuple(all(x is xs[0] for x in xs) for xs in zip(*leaves, strict=True))
        results = []
        for number, start in enumerate(range(0, len(asked), width)):
            stack = leaves[start : start + width]
            by_leaf = list(zip(*stack, *stack[:1] * (width - len(stack)), strict=True))
            to = devices[number % len(devices)]
            one = [self._copy(xs[0], to) for xs, s in zip(by_leaf, same, strict=True) if s]
            each = [[_on(x, to) for x in xs] for xs, s in zip(by_leaf, same, strict=True) if not s]
            run = _compile(program, same, width, to)
            results += run(each, one)[: len(stack)]
        results = jax.block_until_ready(results)
        if way.devices > 1:  # so that they are tied to none
            results = jax.device_put(jax.device_get(results))
        lap = clock.lap()
        # Of one fit, however many are side by side.
        peak = peak_bytes(run) if width == 1 else peak_alone(program)
        took = lap.others / len(asked), lap.compiling / len(asked), peak, len(devices)
        return [Ran(*r, *took) for r in results]

    def _copy(self, x, device):
        """`x` on a device, kept there for the rounds to come."""
        if (id(x), device) not in self.copies:
            self.copies[id(x), device] = x, _on(x, device)  # x, lest its id be reused
        return self.copies[id(x), device][1]


def _on(x, device):
    # Numbers that are no JAX arrays go where the others are.
    return x if device is None or not isinstance(x, jax.Array) else jax.device_put(x, device)


def _pays(way: Way, program: Program, tried: dict[Way, float], left: int) -> bool:
    """Whether a third less time for the rounds left would be worth compiling for another way."""
    return left * min(tried.values()) / 3 > compile_seconds(program) * way.devices


def _ways(count: int) -> list[Way]:
    devices = min(jax.local_device_count(), count)
    return list(dict.fromkeys([LOOP, Way(devices, 1), Way(devices, -(-count // devices))]))


@functools.lru_cache(maxsize=64)
def _compile(program: Program, same: tuple[bool, ...], width: int, device):
    """`run(each, one) -> [(state, outcome), ...]` of `width` fits, on a device if one is named.

    Leaves that are the `same` are given once, the others as often as there are fits.
    """

    def single(each, one):
        own, shared = iter(each), iter(one)
        leaves = [next(shared if s else own) for s in same]
        numbers, arguments = jax.tree.unflatten(program.tree, leaves)
        return program.run(numbers, *arguments)

    def run(each, one):
        if width == 1:
            return [single([x for (x,) in each], one)]
        found = jax.vmap(single, (0, None), axis_size=width)([jnp.stack(xs) for xs in each], one)
        return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(width)]

    placed = None if device is None else jax.sharding.SingleDeviceSharding(device)
    shapes = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, weak_type=s.weak_type, sharding=placed)
        for s in program.shapes
    ]
    each = [[x] * width for x, s in zip(shapes, same, strict=True) if not s]
    one = [x for x, s in zip(shapes, same, strict=True) if s]
    return jax.jit(run).lower(each, one).compile()


def _name(program: Program, count: int) -> str:
    digest = hashlib.sha256(repr((program.tree, program.shapes)).encode()).hexdigest()[:16]
    device = f"{jax.devices()[0].device_kind} x{jax.local_device_count()}"
    return f"{device}, {count} x {type(program.loss).__name__}, {digest}"
