"""Algorithms by name and options, for configs and the command line.

| name | algorithm |
|---|---|
| `fedavg`, `fedavgm`, `fedprox` | `fed_avg`, `fed_avg_m`, `fed_prox` |
| `fedadagrad`, `fedadam`, `fedyogi` | `fed_adagrad`, `fed_adam`, `fed_yogi` |
| `scaffold` | `scaffold`; its clients take steps of plain SGD |
| `dpfedavg` | `dp_fed_avg`, which samples clients by its own `rate` |
| `median`, `trimmed_mean`, `krum`, `multi_krum`, `norm_bounded`, `filtered` | `robust` with that rule |
| `fedit`, `ffa`, `rolora`, `flora`, `fedex`, `flexlora` | `fed_lora` with that rule |

`personal` creates the algorithms that leave a separate model with each client: `ditto`, `local_parts`,
`fine_tuned` and `fedsa`. A strategy trains one model, so it cannot use them.

All other algorithms also take these options:

| option | meaning |
|---|---|
| `weighting` | the weighting of `Work` |
| `up`, `down` | codecs for `compressed`, by the names of `compression.by_name` |
| `secure` | True for `secure` |
| `attack`, `attackers` | an attack of `attacks` for `attacked`, and the numbers of the attackers |
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.ditto import ditto
from fedrag_jax.federated.algorithms.dp_fed_avg import dp_fed_avg
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_avg_m import fed_avg_m
from fedrag_jax.federated.algorithms.fed_lora import RULES, fed_lora
from fedrag_jax.federated.algorithms.fed_opt import fed_adagrad, fed_adam, fed_yogi
from fedrag_jax.federated.algorithms.fed_prox import fed_prox
from fedrag_jax.federated.algorithms.fine_tuned import fine_tuned
from fedrag_jax.federated.algorithms.local_parts import local_parts
from fedrag_jax.federated.algorithms.robust import robust
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.algorithms.secure import secure as masked
from fedrag_jax.federated.attacks import attack_named, attacked
from fedrag_jax.federated.compression.by_name import codec
from fedrag_jax.federated.robust.coordinates import median, trimmed_mean
from fedrag_jax.federated.robust.krum import krum, multi_krum
from fedrag_jax.federated.robust.outliers import filtered, norm_bounded
from fedrag_jax.federated.robust.rule import Rule
from fedrag_jax.federated.work import Work
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.task import Task


def _by_rule(rule: Callable[..., Rule]) -> Callable[..., Algorithm]:
    """Returns a factory of `robust` with a rule and the rule's settings."""
    own, shared = inspect.signature(rule), inspect.signature(robust)

    def make(**options):
        settings = {name: options.pop(name) for name in own.parameters if name in options}
        return robust(rule(**settings), **options)

    told = *own.parameters.values(), shared.parameters["weighting"]
    vars(make)["__signature__"] = own.replace(parameters=told)
    return make


ROBUST_RULES = (median, trimmed_mean, krum, multi_krum, norm_bounded, filtered)
ROBUST = tuple(rule.__name__ for rule in ROBUST_RULES)
PERSONAL: dict[str, Callable[..., Algorithm]] = {
    "ditto": ditto,
    "local_parts": local_parts,
    "fine_tuned": fine_tuned,
    **{rule: functools.partial(fed_lora, rule) for rule, row in RULES.items() if row.private},
}
ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "fedavg": fed_avg,
    "fedavgm": fed_avg_m,
    "fedadagrad": fed_adagrad,
    "fedadam": fed_adam,
    "fedyogi": fed_yogi,
    "fedprox": fed_prox,
    "scaffold": scaffold,
    "dpfedavg": dp_fed_avg,
    **{rule.__name__: _by_rule(rule) for rule in ROBUST_RULES},
    **{rule: functools.partial(fed_lora, rule) for rule in RULES if rule not in PERSONAL},
}
OWN_STEPS = ("scaffold",)  # whose clients' optimizer comes with the algorithm
CHANGING_BASE = tuple(rule for rule, row in RULES.items() if row.changes_base)
# Options of the wrappers.
AROUND: dict[str, Any] = {"up": "", "down": "", "secure": False, "attack": "", "attackers": None}
# Arguments that are not options: the task, the learning rates or the budget sets them.
_GIVEN = ("server_optimizer", "client_learning_rate", "network", "part", "base", "work")


class Named(NamedTuple):
    """An algorithm chosen by name; the algorithm itself depends on the task.

    Attributes:
      name: one of `ALGORITHMS`.
      options: options from `options_of(name)`.
      network: the generator's network with its adapters, needed by the rules of `fed_lora`.
    """

    name: str = "fedavg"
    options: Mapping[str, Any] = {}
    network: Network | None = None

    def averaging(self, task: Task, rates: Mapping[str, float]) -> Callable[..., Algorithm]:
        """Returns the function from options of `Work` to the algorithm for a task.

        If a task trains no adapters, a rule for adapters is replaced by `fed_avg`.

        Args:
          rates: learning rate of each trained part, for the steps of SCAFFOLD.
        """
        around = {name: x for name, x in self.options.items() if name in AROUND}
        options = {name: x for name, x in self.options.items() if name not in AROUND}
        own = {"client_learning_rate": dict(rates)} if self.name in OWN_STEPS else {}
        make = functools.partial(ALGORITHMS[self.name], **own, **options)
        if self.name in RULES and "adapters" in task.trainable:
            make = functools.partial(ALGORITHMS[self.name], self.network, **options)
        elif self.name in RULES:
            shared = {name: x for name, x in options.items() if name == "weighting"}
            make = functools.partial(fed_avg, **shared)
        return lambda **work: surrounded(make(**work), **around)

    def changes_base(self, task: Task) -> bool:
        """Returns whether training a task changes the base to which its adapters are added."""
        return self.name in CHANGING_BASE and "adapters" in task.trainable


FED_AVG = Named()


def personal(name: str, **options) -> Algorithm:
    """Returns an algorithm that leaves a model with each client.

    Args:
      options: options of the factory and of `Work`; `fedsa` takes the generator's `network`.

    Raises:
      ConfigError: an unknown name, or an invalid option.
    """
    if name not in PERSONAL:
        raise ConfigError(f"no personal algorithm {name!r}; choose among {[*PERSONAL]}")
    return PERSONAL[name](**options)


def surrounded(
    algorithm: Algorithm,
    *,
    up: str = "",
    down: str = "",
    secure: bool = False,
    attack: str = "",
    attackers: Sequence[int] = (),
) -> Algorithm:
    """Returns the algorithm wrapped as the options of `AROUND` say."""
    made = compressed(algorithm, up=codec(up), down=codec(down))
    made = masked(made) if secure else made
    if bool(attack) != (len(attackers) > 0):
        raise ConfigError(
            f"give both an attack and attackers (numbers of clients), or neither; got {attack!r} and "
            f"{tuple(attackers)}"
        )
    return attacked(made, attack_named(attack), tuple(attackers)) if attack else made


def options_of(name: str) -> dict[str, Any]:
    """Returns the options of an algorithm and their defaults."""
    found = inspect.signature(ALGORITHMS[name]).parameters.values()
    own = {p.name: p.default for p in found if p.name not in _GIVEN}
    return {"weighting": Work.weighting} | own | AROUND


def check(name: str, options: Mapping[str, Any], where: str) -> None:
    """Refuses an invalid name or option.

    Args:
      where: where the name and the options were given, for messages.

    Raises:
      ConfigError: an unknown name or option, or an invalid value.
    """
    if name in PERSONAL:
        raise ConfigError(
            f"{where}: {name} leaves each client a model of its own, and a strategy tunes one system; "
            f"choose among {[*ALGORITHMS]}, or call `fit` with it, as `python -m experiments "
            "lora_aggregation` does"
        )
    if name not in ALGORITHMS:
        raise ConfigError(f"{where}: unknown algorithm {name!r}; choose among {[*ALGORITHMS]}")
    known = options_of(name)
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"{where}: unknown options {unknown} of {name}; choose among {[*known]}")
    for option, value in options.items():
        if not _is_like(value, known[option]):
            wanted = "a tuple" if known[option] is None else f"of the type of {known[option]!r}"
            raise ConfigError(f"{where}: {option} of {name} must be {wanted}, got {value!r}")
    around = {option: value for option, value in options.items() if option in AROUND}
    options = {option: value for option, value in options.items() if option not in AROUND}
    own = {"client_learning_rate": 1.0} if name in OWN_STEPS else {}
    try:
        # Rules need a network; the others tell now which values they refuse.
        made = _in_place_of(name, options) if name in RULES else ALGORITHMS[name](**own, **options)
        surrounded(made, **around)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _in_place_of(rule: str, options: Mapping[str, Any]) -> Algorithm:
    """Returns an algorithm that accepts the same wrappers as a rule for adapters."""
    needs = "sum" if RULES[rule].settle is None else "factors"
    made = fed_avg()._replace(name=rule, needs=needs)
    return made._replace(sent=None) if options.get("ranks") else made


def _is_like(value: Any, default: Any) -> bool:
    if default is None:
        return isinstance(value, (tuple, list))
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, type(default))
