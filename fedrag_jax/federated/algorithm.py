"""The type `Algorithm`, and operations on stacked pytrees that all algorithms share."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, ParamSpec, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.work import Work
from fedrag_jax.models.layers import wide_type

PyTree = Any
P = ParamSpec("P")


class State(NamedTuple):
    """The state passed from one round to the next.

    Attributes:
      trainable: the global model.
      server: other state of the server, such as that of its optimizer; or ().
      population: the state that every client keeps between rounds, or (). Between rounds it is NumPy
        arrays [N, ...] on the host, one row per client; within a round it is the rows of the cohort,
        a list over its parts of [G, g, ...].
    """

    trainable: PyTree
    server: PyTree = ()
    population: PyTree = ()


class Client(NamedTuple):
    """The work of the clients in a round; algorithms are written in terms of it.

    Attributes:
      init: `init(trainable) -> optimizer state`, [g, ...] each.
      update: `update(trainable, optimizer state, members, own=(), correct=None, see=None,
        frozen=None) -> (trainable, optimizer state, report)`, the local work of g clients side by
        side. `members` is a `Cohort` of g clients; `own` has a row for each. Every step takes the
        gradient of the loss at `see(y, own)` instead of y, and with `frozen` instead of the task's
        frozen part. It passes `correct(gradient, y, x, own)` to the optimizer, where x is the client's
        starting point. The report holds `loss`, `examples`, `finite` and `metrics`, each [g].
      total: `total(work, *inputs) -> (sums, rest)`: calls `work(*group) -> (sums, rest)` for one group
        after another. Sums are added over all groups and devices; rest is [G, g, ...]. Inputs and rest
        are lists over the parts of the cohort.
      gather: `gather(rest) -> [K, ...]`: stacks all groups, parts and devices, including padding; for
        algorithms that need every update at once.
      frozen: the frozen part of the task.
      key: random key of the round, for draws of the server.
    """

    init: Callable
    update: Callable
    total: Callable
    gather: Callable
    frozen: PyTree
    key: jax.Array


class Traffic(NamedTuple):
    """Total bytes that the clients of a round receive and send, by the names of `by_kind`."""

    down: Mapping[str, int] = {}
    up: Mapping[str, int] = {}


class Init(Protocol):
    """Creates the state before the first round."""

    def __call__(
        self, trainable: PyTree, client_init: Callable[[PyTree], PyTree], client_count: int, /
    ) -> State:
        """Returns the state before the first round, with the row of one client as `population`.

        Args:
          client_init: the `init` of the clients' optimizer.
        """


class Turn(Protocol):
    """A round, as a pure function."""

    def __call__(self, state: State, cohort: list, client: Client, /) -> tuple[State, list[dict]]:
        """Returns the state after the round, and the clients' reports as `Client.total` returns them.

        Args:
          cohort: a list of `Cohort`s of [G, g, ...]: G groups one after another, g clients of a group
            side by side.
        """


class CountTraffic(Protocol):
    """Counts the bytes of a round."""

    def __call__(
        self, trainable: PyTree, drawn: np.ndarray, answered: np.ndarray, round: int, /
    ) -> Traffic:
        """Returns the bytes of the sampled clients and of those that answered (int arrays of
        clients)."""


class Algorithm(NamedTuple):
    """The rule that combines clients' updates: pure functions and the settings of the cohort.

    Attributes:
      work: which clients take part in a round, and how much work they do.
      turns: the function of one round, or several that alternate.
      optimizer: the clients' optimizer, if the algorithm requires a particular one.
      model: `model(trainable, row) -> trainable`: the model of the client with that row of the
        population; None if all clients use the global model.
      frozen: `frozen(state, frozen) -> frozen`: the frozen part after changes by the algorithm.
      changes_base: whether there are such changes, without which the trained part is no whole model.
      sent: `sent(trainable, turn) -> pytree`: the part of the model that a client trains and sends in
        that turn; None if messages differ in size between clients.
      needs: the information that the server needs: only the weighted "sum" of updates, a sum that is
        "masked" already, all "updates" one by one, their "factors" (to multiply those of each client),
        or "nothing".
      record_fields: `record_fields(rounds)`: fields added to the record after that many rounds;
        raises ConfigError for more rounds than the algorithm allows.
      simulated: the reason why the algorithm works only in simulation; "" if it can be deployed.
      secret: whether the server's random draws must be known to nobody else; in a deployment the server
        then draws from randomness of its own.
      bounded: `bounded(y, x) -> y`: the model that a deployed client sends after training x to y, if it
        need not show more; None for y itself. The server bounds what it receives once more.
      messages: how messages are encoded; None if they are sent unencoded.
      open_server: whether clients need the server's state in addition to the model; in a deployment it
        is then sent to them.
      name: the factory's name with the settings that matter to a resumed run; set by `one_object` and
        by wrappers such as `compressed`.
    """

    work: Work
    init: Init
    turns: tuple[Turn, ...]
    traffic: CountTraffic
    optimizer: optax.GradientTransformation | None = None
    model: Callable[[PyTree, PyTree], PyTree] | None = None
    frozen: Callable[[State, PyTree], PyTree] = lambda state, frozen: frozen
    changes_base: bool = False
    sent: Callable[[PyTree, int], PyTree] | None = lambda trainable, turn: trainable
    needs: str = "sum"
    record_fields: Callable[[int], Mapping[str, Any]] = lambda rounds: {}
    simulated: str = ""
    secret: bool = False
    bounded: Callable[[PyTree, PyTree], PyTree] | None = None
    messages: "Messages | None" = None
    open_server: bool = True
    name: str = ""


class Messages(NamedTuple):
    """The parts of an algorithm over encoded messages, for the code that sends them.

    Attributes:
      inner: the algorithm, which knows nothing of them.
      up, down: a `compression.codec.Codec` each, or None.
    """

    inner: Algorithm
    up: Any
    down: Any


def one_object(make: Callable[P, Algorithm]) -> Callable[P, Algorithm]:
    """Decorator: a factory returns the same object for equal settings, named after them, so that they
    share compiled programs.

    Settings are compared after defaults are filled in, lists and mappings are converted to tuples, and
    numbers are converted to float where the parameter is a float.
    """
    signature = inspect.signature(make)
    of_settings: Callable[..., Algorithm] = make

    @functools.cache
    def cached(settings):
        made = of_settings(**dict(settings))
        return made._replace(name=_name(make.__name__, dict(settings), made.work))

    def plain(name, value):
        if isinstance(value, Mapping):
            return tuple(value.items())
        if isinstance(value, list):
            return tuple(value)
        known = signature.parameters.get(name)
        return float(value) if isinstance(getattr(known, "default", None), float) else value

    @functools.wraps(make)
    def factory(*args: P.args, **kwargs: P.kwargs) -> Algorithm:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = dict(bound.arguments)
        if "work" in settings:
            # A factory may have a default of its own for a setting of the work.
            of_work = {f.name: settings[f.name] for f in fields(Work) if f.name in settings}
            work = Work(**settings.pop("work"), **of_work)
            settings = {f.name: getattr(work, f.name) for f in fields(work)} | settings
        return cached(tuple((name, plain(name, value)) for name, value in settings.items()))

    return factory


def _name(factory: str, settings: Mapping[str, Any], work: Work) -> str:
    """Returns, for example, `fed_prox(mu=0.01, local_steps=10, ...)`. Optimizers are left out; a
    network is named by its adapters."""
    of_work = {f.name for f in fields(work)}
    own = {name: value for name, value in settings.items() if name not in of_work}
    own = {name: getattr(value, "lora", value) for name, value in own.items()}
    optimizers = optax.GradientTransformation, optax.GradientTransformationExtraArgs
    told = [f"{n}={value}" for n, value in own.items() if not isinstance(value, optimizers)]
    return f"{factory}({', '.join([*told, str(work)])})"


def positive(algorithm: str, **numbers: float) -> None:
    """Refuses numbers that are not above zero."""
    for name, value in numbers.items():
        if not value > 0:
            raise ConfigError(f"{algorithm}: {name} must be > 0, got {value}")


def require_momentum(algorithm: str, **numbers: float) -> None:
    """Refuses numbers outside [0, 1)."""
    for name, value in numbers.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{algorithm}: {name} must be in [0, 1), got {value}")


def stack(tree: PyTree, size: int) -> PyTree:
    """Stacks `size` copies along a new leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), tree)


def weighted_sum(p: jax.Array, tree: PyTree) -> PyTree:
    """Σ_k p_k x_k over the leading axis of every leaf."""
    return jax.tree.map(lambda x: jax.vmap(jnp.multiply)(p, x).sum(0).astype(x.dtype), tree)


def difference(y: PyTree, x: PyTree) -> PyTree:
    """y - x, in float32 at least, because many such terms are summed."""
    return jax.tree.map(lambda y, x: wide(y) - wide(x), y, x)


def plus(x: PyTree, change: PyTree) -> PyTree:
    """x + change, in the types of x."""
    return jax.tree.map(lambda x, u: (wide(x) + u).astype(x.dtype), x, change)


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32 at least."""
    return x.astype(wide_type(x))


def normal_like(key: jax.Array, tree: PyTree) -> PyTree:
    """Standard normal numbers in the shapes and types of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(by_kind(tree).values())


def by_kind(tree: PyTree) -> dict[str, int]:
    """Bytes of the leaves of each part, by type: `{"adapters float32": 8192}`."""
    parts = tree if isinstance(tree, Mapping) else {"model": tree}
    found: Counter = Counter()
    for name, tree in parts.items():
        for x in jax.tree.leaves(tree):
            kind = jnp.result_type(x)
            found[f"{name} {kind.name}"] += int(np.size(x)) * kind.itemsize
    return dict(found)


def added(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Returns the sum of several counts of `by_kind`."""
    total: Counter = Counter()
    for some in sizes:
        total.update(some)
    return dict(total)
