"""What an algorithm is, and the few moves that all of them make with stacked pytrees."""

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
    """What passes from one round to the next.

    Attributes:
      trainable: the global model.
      server: what the server keeps beside it, such as the state of its optimizer; or ().
      population: what every client keeps from round to round, or (). Between rounds NumPy arrays
        [N, ...] on the host, one row a client; within a round the rows of the cohort, a list over
        its parts of [G, g, ...].
    """

    trainable: PyTree
    server: PyTree = ()
    population: PyTree = ()


class Client(NamedTuple):
    """How the clients of a round do their work; algorithms are written in terms of it.

    Attributes:
      init: `init(trainable) -> optimizer state`, [g, ...] each.
      update: `update(trainable, optimizer state, members, own=(), correct=None, see=None,
        frozen=None) -> (trainable, optimizer state, report)`, the local work of g clients side by
        side. `members` is a `Cohort` of g clients; `own` has a row for each. Every step takes the
        gradient of the loss at `see(y, own)` instead of y and for `frozen` instead of the task's,
        and hands `correct(gradient, y, x, own)` to the optimizer, x being where the client started.
        The report holds `loss`, `examples`, `finite` and `metrics`, each [g].
      total: `total(work, *inputs) -> (sums, rest)`: `work(*group) -> (sums, rest)` for one group
        after another, where sums are added up over all groups and devices and rest is [G, g, ...].
        Inputs and rest are lists over the parts of the cohort.
      gather: `gather(rest) -> [K, ...]`, of all groups, parts and devices, padding too; for algorithms
        that need every update at once.
      frozen: the task's.
      key: of the round, for what a server draws.
    """

    init: Callable
    update: Callable
    total: Callable
    gather: Callable
    frozen: PyTree
    key: jax.Array


class Traffic(NamedTuple):
    """Bytes that the clients of a round receive and send, all together, as `by_kind` names them."""

    down: Mapping[str, int] = {}
    up: Mapping[str, int] = {}


class Init(Protocol):
    """How an algorithm begins."""

    def __call__(
        self, trainable: PyTree, client_init: Callable[[PyTree], PyTree], client_count: int, /
    ) -> State:
        """The state before the first round, with the row of one client as `population`.

        Args:
          client_init: that of the clients' optimizer.
        """


class Turn(Protocol):
    """A round, as a pure function."""

    def __call__(self, state: State, cohort: list, client: Client, /) -> tuple[State, list[dict]]:
        """The state after it, and what `Client.total` leaves of the clients' reports.

        Args:
          cohort: `Cohort`s of [G, g, ...]: G groups one after another, g clients of a group side by
            side.
        """


class CountTraffic(Protocol):
    """What a round sends."""

    def __call__(
        self, trainable: PyTree, drawn: np.ndarray, answered: np.ndarray, round: int, /
    ) -> Traffic:
        """Bytes of those drawn and, among them, of those who answered (int arrays of clients)."""


class Algorithm(NamedTuple):
    """How many clients' updates become one: pure functions and the settings of the cohort.

    Attributes:
      work: who takes part in a round, and how much they do.
      turns: of one round; several take turns.
      optimizer: of the clients, where the algorithm holds for no other.
      model: `model(trainable, row) -> trainable` of the client with that row of the population;
        None where all clients have the global model.
      frozen: `frozen(state, frozen) -> frozen`: what the frozen part has become.
      sent: `sent(trainable, turn) -> pytree`, what of the model a client trains and sends in that turn;
        None where messages differ in size from client to client.
      needs: what the server must see of the updates: their weighted "sum" alone, all "updates" one by
        one, their "factors" (to multiply those of each client), or "nothing".
      tells: `tells(rounds)`, what the record of a round adds after so many; raises ConfigError for more
        rounds than the algorithm may take.
      simulated: why what it does holds in a simulation alone; "" where it can be deployed.
      secret: whether nobody else may know what the server draws; elsewhere than in a simulation it
        draws from randomness of its own then.
      bounded: `bounded(y, x) -> y`, what a client that trained x to y sends where it is on its own and
        need not show more; None for y itself. The server bounds what it is sent once more.
      messages: how what it sends is encoded; None where it is sent as it is.
      open_server: whether clients need what the server keeps beside the model to do their work; where
        they are elsewhere it is sent to them.
      name: the factory's, with the settings that matter to a resumed run; `one_object` gives it.
    """

    work: Work
    init: Init
    turns: tuple[Turn, ...]
    traffic: CountTraffic
    optimizer: optax.GradientTransformation | None = None
    model: Callable[[PyTree, PyTree], PyTree] | None = None
    frozen: Callable[[State, PyTree], PyTree] = lambda state, frozen: frozen
    sent: Callable[[PyTree, int], PyTree] | None = lambda trainable, turn: trainable
    needs: str = "sum"
    tells: Callable[[int], Mapping[str, Any]] = lambda rounds: {}
    simulated: str = ""
    secret: bool = False
    bounded: Callable[[PyTree, PyTree], PyTree] | None = None
    messages: "Messages | None" = None
    open_server: bool = True
    name: str = ""


class Messages(NamedTuple):
    """What an algorithm over encoded messages is made of, for whoever sends them.

    Attributes:
      inner: the algorithm, which knows nothing of them.
      up, down: a `compression.codec.Codec` each, or None.
    """

    inner: Algorithm
    up: Any
    down: Any


def one_object(make: Callable[P, Algorithm]) -> Callable[P, Algorithm]:
    """Has a factory return one object for equal settings, so that they share compiled programs, and
    names it after them.

    Settings are equal if they are so once defaults are filled in, lists are tuples, mappings are tuples
    of their items, and what is to be a float is one.
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
            work = Work(**settings.pop("work"))
            settings = {f.name: getattr(work, f.name) for f in fields(work)} | settings
        return cached(tuple((name, plain(name, value)) for name, value in settings.items()))

    return factory


def _name(factory: str, settings: Mapping[str, Any], work: Work) -> str:
    """`fed_prox(mu=0.01, local_steps=10, ...)`. Optimizers have no name; networks that of adapters."""
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
    """`size` copies along a new leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), tree)


def weighted_sum(p: jax.Array, tree: PyTree) -> PyTree:
    """Σ_k p_k x_k over the leading axis of every leaf."""
    return jax.tree.map(lambda x: jax.vmap(jnp.multiply)(p, x).sum(0).astype(x.dtype), tree)


def difference(y: PyTree, x: PyTree) -> PyTree:
    """y - x, in float32 at least, because many such terms are summed."""
    return jax.tree.map(lambda y, x: wide(y) - wide(x), y, x)


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32 at least."""
    return x.astype(wide_type(x))


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
    """The sum of several such counts."""
    total: Counter = Counter()
    for some in sizes:
        total.update(some)
    return dict(total)
