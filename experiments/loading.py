"""Loads the data and models that a config of the comparison names, and checks the config."""

import dataclasses
import functools
import json
import sys
from collections.abc import Collection, Iterable, Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs.compare_strategies import get_config
from experiments.reporting.comparison import METRICS
from fedrag_jax.data import datasets
from fedrag_jax.data.examples import Dataset, Example, sample
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms import by_name
from fedrag_jax.federated.algorithms.by_name import OWN_STEPS
from fedrag_jax.federated.engine.cohort import CLIENTS
from fedrag_jax.generation.inference import MODES
from fedrag_jax.models import hub, sentence_folders
from fedrag_jax.models.quantized import quantize
from fedrag_jax.models.shapes import shapes_alone
from fedrag_jax.models.sharding import shard
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.regimes import parse, rate_names, with_algorithm


def load_data(config) -> Dataset:
    """Returns the dataset of `config.data`, with samples of its questions if the config asks for them.

    Raises:
      ConfigError, DataError: as `datasets.load`.
    """
    _whole.cache_clear()  # files may have changed since
    dataset, seed = _whole(*_named(config)), config.data.sample_seed
    train = sample(dataset.train, config.data.train_questions, seed)
    if not config.data.labels:
        train = [dataclasses.replace(e, positive_ids=()) for e in train]
    test = sample(dataset.test, config.data.test_questions, seed)
    return dataclasses.replace(dataset, train=train, test=test)


def _named(config) -> tuple[str, str]:
    return config.data.to_json_best_effort(), config.models.retriever


@functools.lru_cache(maxsize=1)  # for `own_questions`, which follow
def _whole(told: str, retriever: str) -> Dataset:
    """Returns the dataset of `config.data`, given as JSON, with all of its questions."""
    data = ConfigDict(json.loads(told))
    cuts = data.get("passage_tokens") or data.get("corpus")
    dataset = datasets.of_config(data, hub.load(retriever).tokenizer if cuts else None)
    if dataset.origin:
        print(f"{dataset.name}: {dataset.origin}", file=sys.stderr)
    return dataset


def own_questions(config, dataset: Dataset) -> list[Example]:
    """Returns the questions that replace test questions in tests on clients' own topics, or none.

    They come from the training set and from topics that are trained on. Neither they nor other
    questions about their passages are trained on.

    Raises:
      ConfigError: the training set has too few.
    """
    count = config.data.get("own_questions", 0)
    if not count:
        return []
    topics = {e.topic for e in dataset.train} - {""}
    trained = {e.id for e in dataset.train}
    whole = _whole(*_named(config)).train  # with the labels that training may not see
    read = {i for e in whole if e.id in trained for i in e.positive_ids}
    others = [
        e
        for e in whole
        if e.topic in topics and e.id not in trained and read.isdisjoint(e.positive_ids)
    ]
    if len(others) < count:
        raise ConfigError(
            f"config.data.own_questions is {count}, but of the topics of training questions only "
            f"{len(others)} others are left; lower it, or config.data.train_questions"
        )
    return sample(others, count, config.data.sample_seed)


def validation_sample(config, dataset: Dataset) -> list[Example]:
    """Returns the validation questions that choose learning rates: a sample; all for 0."""
    return sample(dataset.validation, config.validation_questions, config.data.sample_seed)


def replicates(config) -> list[tuple[int, int]]:
    """Returns pairs of seeds: (adapters, client sampling, shuffling) and client split."""
    return list(zip(config.seeds, config.split_seeds or config.seeds, strict=True))


def limits_of(config, regime: str) -> list[ConfigDict]:
    """Returns the limits of `config.limits` that apply to a regime."""
    known = parse(regime, config.federated.alpha)
    under = {"local": known.kind == "local", "converged": known.converged}
    return [config.limits[kind] for kind, holds in under.items() if holds]


def strategies_of(config, regime: str, strategies: Sequence[str]) -> list[str]:
    """Returns those strategies that are trained in a regime."""
    limits = [limit.strategies for limit in limits_of(config, regime) if limit.strategies]
    return [name for name in strategies if all(name in some for some in limits)]


def pairs_of(config, regime: str) -> int:
    """Returns the number of pairs of seeds, from the first on, that a regime is computed for."""
    limits = [limit.pairs for limit in limits_of(config, regime) if limit.pairs]
    return min([*limits, len(replicates(config))])


def check(config) -> None:
    """Checks the config before anything is computed; not all experiments have all settings.

    Raises:
      ConfigError: names the setting, its value and what it may be.
    """
    require_some(config, "strategies", "regimes")
    check_replicates(config)
    asked = {"strategies": config.strategies}
    limits = config.get("limits", {})
    asked |= {f"limits.{kind}.strategies": x.strategies for kind, x in limits.items()}
    for name, values in asked.items():
        for value in values:
            try:
                named(value)
            except ConfigError as error:
                raise ConfigError(f"config.{name}: {error}") from error
    for kind, limit in limits.items():
        if limit.pairs < 0:
            raise ConfigError(
                f"config.limits.{kind}.pairs is {limit.pairs}; give a number of pairs of seeds, or 0 "
                "for all"
            )
    if not config.federated.alpha > 0:
        raise ConfigError(f"config.federated.alpha must be > 0, got {config.federated.alpha}")
    if not 0 < config.federated.participation <= 1:
        raise ConfigError(
            f"config.federated.participation must be in (0, 1], got {config.federated.participation}"
        )
    check_scores(config)
    for regime in config.regimes:
        parse(regime, config.federated.alpha)
    check_algorithms(config)


def require_some(config, *names: str) -> None:
    """Raises ConfigError if one of these settings is empty."""
    for name in names:
        if not config[name]:
            raise ConfigError(f"config.{name} is empty; give at least one")


def require_known(
    setting: str, value: str | Iterable[str], known: Collection[str], more: str = ""
) -> None:
    """Raises ConfigError if a setting's value, or one of several, is unknown.

    Args:
      more: end of the message, with another remedy.
    """
    if unknown := [x for x in ([value] if isinstance(value, str) else value) if x not in known]:
        what = repr(value) if isinstance(value, str) else unknown
        raise ConfigError(f"{setting}: {what} unknown; choose among {[*known]}{more}")


def require_federated(config, why: str) -> None:
    """Raises ConfigError if the config has another regime than the federated one."""
    if tuple(config.regimes) != ("federated",):
        raise ConfigError(f"config.regimes must be ('federated',), got {config.regimes}: {why}")


def check_scores(config, *, rankings_alone: bool = False) -> None:
    """Checks how answers are scored, where an experiment has these settings.

    Args:
      rankings_alone: whether the mode may be "", which writes no answers.

    Raises:
      ConfigError: an unknown mode or primary metric, or a metric of answers that nothing writes.
    """
    modes = ["", *MODES] if rankings_alone else [*MODES]
    mode, metric = config.get("mode", modes[-1]), config.get("primary_metric", "mrr")
    require_known("config.mode", mode, modes)
    require_known("config.primary_metric", metric, METRICS)
    if not mode and metric in ("em", "f1"):
        raise ConfigError(
            f'config.primary_metric: {metric!r} needs answers, but config.mode is "", which writes '
            f"none; choose a mode among {[*MODES]}, or another metric"
        )


def algorithm_of(config, regime: str) -> tuple[str, dict]:
    """Returns the name and options of a regime's algorithm: its own, or that of the config."""
    federated, (_, named) = config.federated, with_algorithm(regime)
    if named is None:
        options = federated.get("algorithm_options", ConfigDict())
        return federated.get("algorithm", "fedavg"), options.to_dict()
    options = federated.get("algorithms", {}).get(named, ConfigDict())
    return named, options.to_dict()


def check_algorithms(config) -> None:
    """Checks that all algorithms can be built and suit the base.

    Raises:
      ConfigError: names the setting of the config, its value and what it may be.
    """
    federated = config.federated
    by_name.check(federated.algorithm, federated.algorithm_options, "config.federated.algorithm")
    for name, options in federated.get("algorithms", {}).items():
        by_name.check(name, options, "config.federated.algorithms")
    names = {algorithm_of(config, regime)[0] for regime in config.regimes}
    if config.models.quantize and (changing := names & {*by_name.CHANGING_BASE}):
        raise ConfigError(
            f"{', '.join(sorted(changing))} changes the base, which config.models.quantize makes "
            f"{config.models.quantize}; leave either out"
        )


def rates_name(config, regime: str) -> str:
    """Returns the key of a regime in `config.learning_rates`.

    Raises:
      ConfigError: it has none.
    """
    names = rate_names(regime)
    if ":" in regime and algorithm_of(config, regime)[0] in OWN_STEPS:
        # The rates of AdamW are none for plain SGD.
        names = [name for name in names if ":" in name]
    found = [name for name in names if name in config.learning_rates]
    if not found:
        raise ConfigError(
            f"config.learning_rates has none for regime {regime!r}: search them with "
            f"experiments.choose_learning_rates and add them under {' or '.join(map(repr, names))}"
        )
    return found[0]


def check_replicates(config) -> None:
    """Checks that the seeds make pairs.

    Raises:
      ConfigError: there are none or other things than numbers, they are of different number, or a pair
        is there twice.
    """
    require_some(config, "seeds")
    for name in ("seeds", "split_seeds"):
        if strange := [x for x in config[name] if not isinstance(x, int) or x < 0]:
            raise ConfigError(
                f"config.{name} must be whole numbers from 0 on, got {strange[0]!r}; such as "
                f"--config.{name}='(0, 1, 2)'"
            )
    if config.split_seeds and len(config.split_seeds) != len(config.seeds):
        raise ConfigError(
            f"config.split_seeds has {len(config.split_seeds)} seeds, config.seeds has "
            f"{len(config.seeds)}; both need the same number of seeds; () repeats config.seeds"
        )
    pairs = replicates(config)
    if twice := [pair for pair in pairs if pairs.count(pair) > 1]:
        raise ConfigError(
            f"config.seeds, config.split_seeds: the pair {twice[0]} occurs twice; give each pair once"
        )


def trainable_strategies(config, dataset: Dataset) -> list[str]:
    """Returns the config's strategies that the training questions allow; prints a note on the others.

    Raises:
      ConfigError: none can.
    """
    bare = sum(not e.positive_ids for e in dataset.train)
    left_out = [name for name in config.strategies if bare and named(name).needs_gold]
    if left_out:
        print(
            f"{', '.join(left_out)} left out: needs gold passages, and {bare} of "
            f"{len(dataset.train)} training questions have no positive_ids",
            flush=True,
        )
    left = [name for name in config.strategies if name not in left_out]
    if not left:
        raise ConfigError("config.strategies: none is left; add some that need no gold passages")
    return left


def warn_of_borrowed_rates(config) -> None:
    """Prints a note if other models would train at the rates that were chosen for the built-in ones."""
    usual, models = get_config(), config.models
    others = [models[r] for r in ("retriever", "generator") if models[r] != usual.models[r]]
    if others and config.learning_rates.to_dict() == usual.learning_rates.to_dict():
        logging.warning(
            "config.learning_rates were chosen for the built-in models and can ruin %s; search those "
            "of your models first: python -m experiments.choose_learning_rates --config=...",
            " and ".join(others),
        )


def load_retriever(models, load=hub.load):
    """Returns the retriever with the settings of `config.models`.

    Args:
      load: or `hub.describe`.

    Raises:
      ConfigError: a similarity that there is not.
    """
    use = (models[name] or None for name in ("query_prompt", "document_prompt", "similarity"))
    try:
        return sentence_folders.used_as(load(models.retriever), *use)
    except ConfigError as error:
        raise ConfigError(f"config.models: {error}") from error


def load_generator(models, clients: int = 1, load=hub.load, devices=None):
    """Returns the generator, its frozen base in the format of `config.models`.

    Args:
      clients: the number of copies of the base, each cut over `models.devices` devices; clients are
        spread over the copies. 0 makes as many copies as there are devices for.
      load: or `hub.describe`.
      devices: JAX's own unless given.

    Raises:
      ConfigError: an unknown type, format or way to recompute, or too few devices.
    """
    if models.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"config.models.dtype: 'float32' or 'bfloat16', got {models.dtype!r}")
    devices = jax.devices() if devices is None else devices
    if not 1 <= models.devices <= len(devices):
        raise ConfigError(
            f"config.models.devices: there are {len(devices)}, asked for {models.devices}"
        )
    generator = load(models.generator, models.dtype)
    try:
        network = generator.network.recomputing(models.remat)
    except ConfigError as error:
        raise ConfigError(f"config.models.{error}") from error
    params = generator.params
    if models.quantize:
        quantized = functools.partial(quantize, format=models.quantize)
        try:
            described = shapes_alone(params)
            params = jax.eval_shape(quantized, params) if described else quantized(params)
        except ConfigError as error:
            raise ConfigError(f"config.models.quantize: {error}") from error
    if models.devices > 1:
        params = shard(params, model_mesh(models.devices, clients, devices))
        network = network.attending("plain")  # the compiler cannot partition a kernel
    return dataclasses.replace(generator, network=network, params=params)


def clients_over(config) -> int:
    """Returns the number of devices that clients are spread over; 1 without federated regimes."""
    regimes = *config.get("regimes", ()), *config.get("variants", ())
    federated = any(regime.startswith("federated") for regime in regimes)
    return config.federated.devices if federated else 1


def model_mesh(cut: int, clients: int, devices) -> Mesh:
    """Returns a mesh with an axis "model" of this length, and an axis "clients" over the other devices.

    Raises:
      ConfigError: there are too few devices.
    """
    clients = clients or len(devices) // cut
    if clients * cut > len(devices):
        raise ConfigError(
            f"config.federated.devices x config.models.devices is {clients} x {cut}, and there are "
            f"{len(devices)} devices; lower either"
        )
    some = np.array(devices[: clients * cut])
    if clients == 1:
        return Mesh(some, ("model",))
    return Mesh(some.reshape(clients, cut), (CLIENTS, "model"))
