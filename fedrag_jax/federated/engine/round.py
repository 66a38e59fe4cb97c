"""A round as one program, compiled ahead of time and kept for every fit with the same shapes."""

import functools
import inspect
import typing
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import jax
import optax
from jax.sharding import Mesh, PartitionSpec

from fedrag_jax.clock import Clock
from fedrag_jax.federated.algorithm import State
from fedrag_jax.federated.engine.client import all_finite, local_update
from fedrag_jax.federated.engine.cohort import CLIENTS
from fedrag_jax.federated.engine.debug import debug_round
from fedrag_jax.federated.engine.memory import peak_bytes, warn_of_shortage
from fedrag_jax.federated.optimizers import join, split

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class RunAlone(Protocol[P, R]):
    """A function that runs a generator of rounds; the generator itself is `rounds`."""

    rounds: Callable[P, Generator["Round", "Ran", R]]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Returns the result of the generator."""


class Round(NamedTuple):
    """A round that a fit requests.

    Attributes:
      loss: the task's loss, hashable; equal losses share programs.
      turn: a turn of the algorithm.
      optimizer: the clients' optimizer.
      mesh: a mesh with an axis "clients", or None.
      arguments: `state, frozen, table, cohort, round, key`.
      left: number of remaining rounds of the fit, including this one; 0 for an extra round whose time
        is not remembered.
      name_of: names a row of the table in messages; if given, the round runs in Python, step by step.
      meanwhile: host work for later rounds, done while the devices are busy.
    """

    loss: Callable
    turn: Callable
    optimizer: optax.GradientTransformation
    mesh: Mesh | None
    arguments: tuple
    left: int = 1
    name_of: Callable[[int], str] | None = None
    meanwhile: Callable[[], Any] | None = None


class Ran(NamedTuple):
    """The result of a round.

    Attributes:
      state: the algorithm's state after the round.
      outcome: `(report, server_finite)`, the report as the turn gives it.
      seconds: without `compile_seconds`.
      peak_bytes: bytes of the program on a device.
      devices: number of devices used.
    """

    state: State
    outcome: tuple
    seconds: float
    compile_seconds: float
    peak_bytes: int = 0
    devices: int = 1


def run_round(asked: Round) -> Ran:
    """Runs one round by itself; `state` is donated."""
    clock, peak = Clock(), 0
    if asked.name_of is None:
        run = compile_round(asked)
        peak = peak_bytes(run.func)
        warn_of_shortage(run.func)
    else:
        about = asked.loss, asked.turn, asked.optimizer, asked.name_of
        run = functools.partial(debug_round, *about)
    compile_seconds = sum(clock.lap())
    left = run(*asked.arguments)  # returns when the devices begin
    if asked.meanwhile is not None:
        asked.meanwhile()
    state, outcome = jax.block_until_ready(left)
    devices = 1 if asked.mesh is None else asked.mesh.size
    return Ran(state, outcome, sum(clock.lap()), compile_seconds, peak, devices)


def run_alone(rounds: Callable[P, Generator[Round, Ran, R]]) -> RunAlone[P, R]:
    """Turns a generator of rounds into a function that runs each round when it is requested.

    The generator stays available as `rounds`, for running several together.
    """

    @functools.wraps(rounds)
    def fit(*args: P.args, **kwargs: P.kwargs) -> R:
        asking = rounds(*args, **kwargs)
        try:
            asked = next(asking)
            while True:
                asked = asking.send(run_round(asked))
        except StopIteration as done:
            return done.value

    alone: Any = fit
    alone.rounds = rounds
    # The signature shows the type that the generator returns at its end.
    signature = inspect.signature(rounds)
    *_, returned = typing.get_args(signature.return_annotation)
    alone.__signature__ = signature.replace(return_annotation=returned)
    return alone


def compile_round(asked: Round) -> Callable:
    """Compiles a round, or finds it compiled.

    Returns:
      `run(*arguments) -> (state, outcome)`; `state` is donated.
    """
    program, _ = Program.of(asked)
    return functools.partial(_compile(program)[0], split(asked.optimizer)[1])


def peak_alone(program: "Program") -> int:
    """`peak_bytes` of a round by itself."""
    return peak_bytes(_compile(program)[0])


def compile_seconds(program: "Program") -> float:
    """Returns the seconds of compilation, also if it was compiled for an earlier caller."""
    return _compile(program)[1]


class Program(NamedTuple):
    """Everything of a round except its numbers; hashable. Rounds of one program differ only in them.

    Attributes:
      fixed, structure: of the optimizer, as `split` gives them.
      tree: the structure of `(the optimizer's numbers, arguments)`.
      shapes: the shapes of their leaves.
    """

    loss: Callable
    turn: Callable
    mesh: Mesh | None
    fixed: tuple
    structure: Any
    tree: Any
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, asked: Round) -> tuple["Program", list]:
        """The program of a round, and its leaves."""
        fixed, numbers, structure = split(asked.optimizer)
        leaves, tree = jax.tree.flatten((numbers, asked.arguments))
        shapes = tuple(map(_shape, leaves))
        return cls(asked.loss, asked.turn, asked.mesh, fixed, structure, tree, shapes), leaves

    def run(self, numbers, state, frozen, table, cohort, round, key):
        """The round itself, to be traced."""
        optimizer = join(self.fixed, numbers, self.structure)
        axis, key = None if self.mesh is None else CLIENTS, jax.random.fold_in(key, round)
        client = local_update(self.loss, optimizer, frozen, table, key, axis)
        state, report = self.turn(state, cohort, client)
        return state, (report, all_finite((state.trainable, state.server)))


def trace_round(asked: Round) -> jax.stages.Traced:
    """The program that `compile_round` compiles; shapes will do for its arguments."""
    return _trace(Program.of(asked)[0])


@functools.lru_cache(maxsize=32)
def _compile(program: Program) -> tuple[Callable, float]:
    clock = Clock()
    compiled = _trace(program).lower().compile()
    return compiled, sum(clock.lap())


def _trace(program: Program) -> jax.stages.Traced:
    numbers, arguments = jax.tree.unflatten(program.tree, program.shapes)

    def placed(*inputs):
        # Each device does the groups dealt to it and, like the others, the server's part.
        one, each = PartitionSpec(), PartitionSpec(CLIENTS)
        state = State(one, one, each)
        shared = (
            program.run
            if program.mesh is None
            else jax.shard_map(
                program.run,
                mesh=program.mesh,
                in_specs=(one, state, one, one, each, one, one),
                out_specs=(state, (each, one)),
                axis_names={CLIENTS},
                check_vma=False,
            )
        )
        state, outcome = shared(*inputs)
        return jax.tree.map(_placed, state, arguments[0]), outcome  # the next round is this program

    return jax.jit(placed, donate_argnums=1).trace(numbers, *arguments)


def _placed(x, shape):
    return x if shape.sharding is None else jax.lax.with_sharding_constraint(x, shape.sharding)


def _shape(x) -> jax.ShapeDtypeStruct:
    """Shape, type and, where somebody chose it, place."""
    aval = jax.typeof(x)
    placed = isinstance(x, jax.ShapeDtypeStruct) or (isinstance(x, jax.Array) and x.committed)
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=x.sharding if placed else None
    )
