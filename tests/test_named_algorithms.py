"""Algorithms by name: chosen in a config, by a regime, and the same as by hand."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from small import own_folder, small
from test_fed_lora import CLIENTS, NETWORK, chain_task
from tiny import random_adapters
from toys import EXAMPLES, assert_equal, linear_task

from experiments import loading
from experiments.lab import Lab, compute_cell
from experiments.rates import SEARCHES
from experiments.reporting.figures import regime_name
from experiments.search import Trials
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.federated.algorithms.by_name import ALGORITHMS, Named
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.dp_fed_avg import dp_fed_avg
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_avg_m import fed_avg_m
from fedrag_jax.federated.algorithms.fed_lora import RULES, fed_lora
from fedrag_jax.federated.algorithms.fed_opt import fed_adagrad, fed_adam, fed_yogi
from fedrag_jax.federated.algorithms.fed_prox import fed_prox
from fedrag_jax.federated.algorithms.robust import robust
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.compression.quantisation import quantised
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.robust.coordinates import median, trimmed_mean
from fedrag_jax.federated.robust.krum import krum, multi_krum
from fedrag_jax.federated.robust.outliers import filtered, norm_bounded
from fedrag_jax.models.lora import adapted_kernels
from fedrag_jax.strategies.objectives import OBJECTIVES
from fedrag_jax.strategies.regimes import Budget, adamw, parse, rate_names, with_algorithm
from fedrag_jax.strategies.tuner import Tuner

# Options as a config has them, and the algorithm as one would write it down.
BY_HAND = {
    "fedavg": ({"weighting": "uniform"}, functools.partial(fed_avg, weighting="uniform")),
    "fedavgm": ({"momentum": 0.5}, functools.partial(fed_avg_m, momentum=0.5)),
    "fedadagrad": ({"learning_rate": 0.1}, functools.partial(fed_adagrad, learning_rate=0.1)),
    "fedadam": ({"tau": 0.01, "b1": 0.5}, functools.partial(fed_adam, tau=0.01, b1=0.5)),
    "fedyogi": ({}, fed_yogi),
    "fedprox": ({"mu": 1}, functools.partial(fed_prox, mu=1.0)),
    "scaffold": ({"server_learning_rate": 0.5}, None),
    "flexlora": ({"ranks": (1, 2, 3)}, None),
    "dpfedavg": ({"clip": 0.5}, functools.partial(dp_fed_avg, clip=0.5)),
    "median": (
        {"up": "int8"},
        lambda **work: compressed(robust(median(), **work), up=quantised(8)),
    ),
    "trimmed_mean": ({"byzantine": 0}, functools.partial(robust, trimmed_mean(byzantine=0))),
    "krum": ({"byzantine": 0}, functools.partial(robust, krum(byzantine=0))),
    "multi_krum": ({"byzantine": 0}, functools.partial(robust, multi_krum(byzantine=0))),
    "norm_bounded": ({"bound": 0.1}, functools.partial(robust, norm_bounded(bound=0.1))),
    "filtered": ({}, functools.partial(robust, filtered())),
} | {rule: ({}, None) for rule in ("fedit", "ffa", "rolora", "flora", "fedex")}


def by_hand(name, network, rates):
    """The factory of the algorithm, with its options."""
    options, make = BY_HAND[name]
    if name == "scaffold":
        return functools.partial(scaffold, rates, **options)
    return make or functools.partial(fed_lora, name, network, **options)


def by_round(algorithm, rates, rounds):
    """AdamW whose rates fall, unless the algorithm has an optimizer with it."""
    if algorithm.optimizer is not None:
        return None
    return lambda r: adamw({name: rate * (1 - r / rounds) for name, rate in rates.items()})


def differ(some, others) -> bool:
    pairs = zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


def test_every_algorithm_of_the_table_is_tried():
    assert BY_HAND.keys() == ALGORITHMS.keys()


# One of each kind; that of all of them in a comparison is below.
@pytest.mark.parametrize("name", ["fedadam", "scaffold", "ffa", "flora", "flexlora"])
def test_a_tuner_trains_as_fit_does_with_the_algorithm(name, tmp_path):
    task = chain_task(jax.tree.map(lambda x: 0.3 * x, random_adapters(NETWORK, 0)))
    rates = {"adapters": 0.003, "other": 0.02}
    tuner = Tuner(
        folder=tmp_path,
        regime="federated",
        examples=CLIENTS.examples,
        clients=CLIENTS,
        budget=Budget(rounds=3, local_steps=2, clients=3, batch_size=2),
        rates=lambda task, part: rates[part],
        seed=5,
        algorithm=Named(name, BY_HAND[name][0], NETWORK),
    )
    found = tuner(task)
    algorithm = by_hand(name, NETWORK, rates)(local_steps=2)
    expected = fit(
        task,
        CLIENTS,
        algorithm,
        rounds=3,
        batch_size=2,
        seed=5,
        optimizer=by_round(algorithm, rates, 3),
    )
    changes = name in ("flora", "fedex")
    assert ("decoder" in found) == changes
    if changes:
        base = found.pop("decoder")
        assert_equal(base, adapted_kernels(expected.frozen["decoder"], found["adapters"]))
        before = adapted_kernels(task.frozen["decoder"], found["adapters"])
        assert differ(base, before)
    assert_equal(found, expected.trainable)
    # Nothing is trained again, and what was changed is read back with the rest.
    again = tuner(task)
    assert_equal(found, {part: again[part] for part in found})
    assert ("decoder" in again) == changes


def test_scaffold_takes_each_part_at_its_own_rate():
    """One client and one step: the whole update is minus the rate times the gradient."""
    moved = {}
    for rates in ({"w": 0.1, "b": 0.01}, {"w": 0.2, "b": 0.01}):
        algorithm = scaffold(rates, local_steps=1)
        assert algorithm is scaffold(dict(rates), local_steps=1)
        end = fit(linear_task(), EXAMPLES, algorithm, rounds=1, batch_size=8).trainable
        moved[rates["w"]] = {n: end[n] - linear_task().trainable[n] for n in end}
    np.testing.assert_allclose(moved[0.2]["w"], 2 * moved[0.1]["w"], rtol=1e-4)
    np.testing.assert_allclose(moved[0.2]["b"], moved[0.1]["b"], rtol=1e-4)
    with pytest.raises(ConfigError, match=r"client_learning_rate\['b'\] must be > 0, got 0"):
        scaffold({"w": 0.1, "b": 0.0})


def test_a_grid_of_scaffold_rates_is_one_program():
    turns = {scaffold(rate, local_steps=2).turns for rate in (0.1, 0.2)}
    assert len(turns) == 1


def test_rules_for_adapters_leave_other_tasks_to_fed_avg():
    make = Named("ffa", {"weighting": "uniform"}, NETWORK).averaging(linear_task(), {})
    assert make(local_steps=3) is fed_avg(weighting="uniform", local_steps=3)
    assert not Named("flora", {}, NETWORK).changes_base(linear_task())


# --- in regimes and configs -------------------------------------------------------------------


def test_regimes_name_algorithms():
    assert with_algorithm("federated") == ("federated", None)
    assert with_algorithm("federated_1:ffa") == ("federated_1", "ffa")
    assert parse("federated:fedadam", 0.3) == ("federated", 0.3, False, "fedadam")
    assert parse("federated_inf:fedadam", 0.3) == ("federated", np.inf, False, "fedadam")
    assert regime_name("federated_inf:fedadam") == "federated, α = ∞, fedadam"
    assert regime_name("federated:fedadam") == "federated, fedadam"
    assert rate_names("federated_1:ffa") == [
        "federated_1:ffa", "federated:ffa", "federated_1", "federated",
    ]  # fmt: skip
    assert rate_names("federated") == ["federated"]
    for regime, words in (
        ("federated:fedsgd", r"regime 'federated:fedsgd': unknown algorithm 'fedsgd'; choose"),
        ("local:fedavg", "'local' averages nothing; only federated regimes take one"),
        ("centralised:fedavg", "'centralised' averages nothing"),
        ("federated_x:fedavg", "unknown; choose among"),
        ("federated:fedsa", "leaves each client a model of its own.*lora_aggregation"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(regime, 0.1)


def test_a_config_chooses_an_algorithm():
    config = small()
    assert loading.algorithm_of(config, "federated") == ("fedavg", {})
    config.federated.algorithm = "fedprox"
    config.federated.algorithm_options = ConfigDict({"mu": 0.1})
    config.federated.algorithms = ConfigDict({"fedadam": {"tau": 0.01}})
    assert loading.algorithm_of(config, "federated_1") == ("fedprox", {"mu": 0.1})
    assert loading.algorithm_of(config, "federated:fedadam") == ("fedadam", {"tau": 0.01})
    assert loading.algorithm_of(config, "federated:flora") == ("flora", {})
    loading.check(config)


@pytest.mark.parametrize(
    ("algorithm", "options", "words"),
    [
        ("fedsgd", {}, r"config.federated.algorithm: unknown algorithm 'fedsgd'; .*'fedavg', 'f"),
        ("fedsa", {}, "config.federated.algorithm: fedsa leaves each client a model"),
        ("fedprox", {"nu": 1}, r"unknown options \['nu'\] of fedprox; choose among .*'mu'"),
        ("fedprox", {"local_steps": 1}, r"unknown options \['local_steps'\] of fedprox"),
        ("scaffold", {"client_learning_rate": 1.0}, "unknown options .*'server_learning_rate'"),
        ("fedprox", {"mu": "1"}, "mu of fedprox must be of the type of 0.01, got '1'"),
        ("fedavg", {"carry_optimizer": 1}, "must be of the type of False, got 1"),
        ("fedprox", {"mu": -1.0}, "config.federated.algorithm: fed_prox: mu must be at least 0"),
        ("fedavg", {"weighting": "size"}, "config.federated.algorithm: weighting is"),
        ("flexlora", {"ranks": 2}, "ranks of flexlora must be a tuple, got 2"),
    ],
)  # fmt: skip
def test_algorithms_that_cannot_be_are_refused_by_name(algorithm, options, words):
    config = small()
    config.federated.algorithm = algorithm
    config.federated.algorithm_options = ConfigDict(options)
    with pytest.raises(ConfigError, match=words):
        loading.check(config)


def test_options_of_algorithms_that_no_regime_names_are_checked_too():
    config = small()
    config.federated.algorithms = ConfigDict({"fedporx": {"mu": 0.1}})
    with pytest.raises(ConfigError, match=r"config.federated.algorithms: unknown .*'fedporx'"):
        loading.check(config)


def test_a_quantised_base_is_not_changed():
    config = small()
    config.regimes, config.models.quantize = ("centralised", "federated:flora"), "nf4"
    with pytest.raises(
        ConfigError, match=r"flora changes the base, which config\.models\.quantize"
    ):
        loading.check(config)
    config.regimes = ("centralised", "federated:ffa")
    loading.check(config)


def test_a_regime_borrows_rates_of_its_kind_but_not_for_other_steps():
    config = small()
    assert loading.rates_name(config, "federated_0.3:fedadam") == "federated"
    assert loading.rates_name(config, "federated_1:fedadam") == "federated_1"
    for regime in ("federated_1:scaffold", "federated:scaffold", "federated_converged:scaffold"):
        with pytest.raises(ConfigError, match=f"none for regime '{regime}'.*'federated:scaffold'$"):
            loading.rates_name(config, regime)
    config.learning_rates["federated:scaffold"] = ConfigDict({"retriever": 0.1})
    assert loading.rates_name(config, "federated_1:scaffold") == "federated:scaffold"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """What cells share, over sixty questions."""
    folder = tmp_path_factory.mktemp("named")
    config = small()
    config.data.name = own_folder(folder, labelled=True)
    config.federated.column, config.federated.alpha = "hops", float("inf")
    config.training.rounds = 2  # RoLoRA takes turns
    config.regimes = tuple(f"federated:{name}" for name in ALGORITHMS)
    config.federated.algorithms = ConfigDict({n: o for n, (o, _) in BY_HAND.items() if o})
    config.federated.algorithms.flexlora.ranks = (4, 8)
    config.learning_rates["federated:scaffold"] = ConfigDict({"retriever": 0.02})
    loading.check(config)
    return Lab(config, loading.load_data(config), folder / "run")


# The strategy that compiles fastest and has what the algorithm is about.
STRATEGY = {name: "generator" if name in RULES else "retriever" for name in ALGORITHMS}
STRATEGY["flora"] = "joint_token"
TASK = {"retriever": "in_batch", "generator": "concatenated", "joint_token": "rag_token"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if "krum" not in name])  # two clients
def test_a_cell_of_a_comparison_is_what_fit_makes(name, lab):
    regime, strategy = f"federated:{name}", STRATEGY[name]
    cell = compute_cell(lab, strategy, regime, 0, 0, controls=False)
    assert cell.cost.bytes_up > 0 and len(cell.curves) == 1
    ((tuned,), _) = lab.tuned_systems(strategy, regime, 0, 0)

    system, budget = lab.system(0), lab.budget()
    task = OBJECTIVES[TASK[strategy]].task(system, lab.dataset)
    known = lab.config.learning_rates["federated:scaffold" if name == "scaffold" else "federated"]
    which = "marginal_" if strategy == "joint_token" else ""
    kinds = {"adapters": f"{which}generator", "query": f"{which}retriever"}
    rates = {part: known[kinds[part]] for part in task.trainable}
    ranks = {"ranks": (4, 8)} if name == "flexlora" else {}
    algorithm = by_hand(name, system.decoder, rates)(**ranks, local_steps=budget.local_steps)
    result = fit(
        task,
        lab.clients(regime, 0),
        algorithm,
        rounds=2,
        batch_size=budget.batch_size,
        seed=0,
        table_rows=min(len(lab.dataset.train), 2 * budget.clients * budget.batch_size),
        optimizer=by_round(algorithm, rates, 2),
    )
    expected = system.replace(**result.trainable)
    if "decoder" in result.frozen:
        expected = expected.replace(decoder=result.frozen["decoder"])
    assert all(differ(result.trainable[part], task.trainable[part]) for part in rates)
    assert_equal(tuned.adapters, expected.adapters)
    assert_equal(tuned.retriever.query, expected.retriever.query)
    assert_equal(tuned.generator.params, expected.generator.params)
    assert differ(tuned.generator.params, system.generator.params) == (name in ("flora", "fedex"))
    for metric, values in evaluate(expected, lab.dataset.test).items():
        np.testing.assert_array_equal(cell.scores[metric], values, err_msg=metric)


@pytest.mark.slow
def test_rates_are_searched_with_the_algorithm(lab):
    def found(regime):
        trials = Trials(lab, regime, SEARCHES[0], [lab.system(0)], lab.dataset.test[:5], "search")
        trials.judge([0.003])
        (system,) = trials.systems[0.003]
        return system.retriever.query

    assert differ(found("federated"), found("federated:scaffold"))
