"""A federation of saved systems: each party's folder holds its `system` and its `questions.jsonl`.

The system is what `fedrag index` made of the party's documents. Documents, vectors and questions stay
in the folder. What is trained, and how, is the configuration of the run, which all parties are sent
(`[tool.flwr.app.config]` of `pyproject.toml`); its keys are those of `DEFAULTS`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flwr.app import Context

from fedrag_jax.data.examples import Dataset, Example, Passage
from fedrag_jax.data.json_sets import load_questions
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.algorithms.by_name import Named, check
from fedrag_jax.files import read_json, write_json
from fedrag_jax.integrations.flower.model_file import load_model
from fedrag_jax.integrations.flower.party import FOLDER
from fedrag_jax.integrations.flower.plan import Plan
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore
from fedrag_jax.strategies.objectives import OBJECTIVES
from fedrag_jax.strategies.regimes import adamw
from fedrag_jax.systems.system_like import system_like

SYSTEM, QUESTIONS, RUN = "system", "questions.jsonl", "run.json"
DEFAULTS: dict[str, Any] = {
    "clients": 3,
    "rounds": 5,
    "local-steps": 5,
    "batch-size": 8,
    "objective": "concatenated",
    "algorithm": "fedavg",
    "algorithm-options": "",
    "learning-rate": 1e-3,
    "seed": 0,
    "retriever": "builtin:encoder",
    "generator": "builtin:decoder",
}


def party_plan(context: Context) -> Plan:
    """The plan of a party, about its own system; keeps the run's configuration in its folder.

    Raises:
      ConfigError: no folder, no system there, a configuration that cannot be.
      DataError: no questions.
    """
    folder, config = _folder(context), _configured(context.run_config)
    write_json(folder / RUN, config, indent=2)
    return plan_of(folder, config)


def party_questions(context: Context) -> list[Example]:
    """The questions that a party trains on."""
    folder = _folder(context)
    return _dataset(folder, _system(folder)).train


def server_plan(context: Context) -> Plan:
    """The plan of the server, which has the models and no documents."""
    config = _configured(context.run_config)
    passages = [Passage(f"nothing-{i}", "", "Nothing.") for i in range(2)]
    examples = [Example("nothing", "Nothing?", ("Nothing",), ("nothing-0",))]
    system = RAGSystem.build(
        passages,
        examples,
        retriever=config["retriever"],
        generator=config["generator"],
        top_k=1,
        seed=config["seed"],
    )
    return _plan(config, system, Dataset("nothing", passages, examples, [], []))


def plan_of(folder: pathlib.Path, config: Mapping[str, Any]) -> Plan:
    """The plan of the party with a folder."""
    system = _system(folder)
    dataset = _dataset(folder, system)
    passages = dataset.passages
    top_k = min(system.top_k, len(passages))
    return _plan(config, system_like(system, passages, dataset.train, top_k=top_k), dataset)


def tuned(folder: pathlib.Path) -> RAGSystem:
    """A party's system with what the federation has trained, over its own documents.

    Raises:
      CheckpointError: the federation has not ended, or not for this party.
      DataError: the folder has not taken part in one.
    """
    config = read_json(folder / RUN)
    plan = plan_of(folder, config)
    trainable, frozen = load_model(plan, folder)
    base = {"decoder": frozen["decoder"]} if frozen is not plan.task.frozen else {}
    return _system(folder).replace(**trainable, **base)


def _plan(config: Mapping[str, Any], system: RAGSystem, dataset: Dataset) -> Plan:
    task = OBJECTIVES[config["objective"]].task(system, dataset)
    task = dataclasses.replace(task, name=config["objective"])
    rates = dict.fromkeys(task.trainable, config["learning-rate"])
    named = Named(config["algorithm"], _options(config), system.decoder)
    algorithm = named.averaging(task, rates)(local_steps=config["local-steps"])
    return Plan(
        task,
        algorithm,
        clients=config["clients"],
        rounds=config["rounds"],
        batch_size=config["batch-size"],
        optimizer=None if algorithm.optimizer else adamw(rates),
        seed=config["seed"],
    )


def _configured(given: Mapping[str, Any]) -> dict[str, Any]:
    where = "the run's configuration"
    config = DEFAULTS | {name: value for name, value in given.items() if name in DEFAULTS}
    for name, value in config.items():
        number = isinstance(DEFAULTS[name], float) and isinstance(value, int)
        if not number and type(value) is not type(DEFAULTS[name]):
            kind = type(DEFAULTS[name]).__name__
            raise ConfigError(f"{where}: {name} must be of type {kind}, got {value!r}")
    config["learning-rate"] = float(config["learning-rate"])
    if config["objective"] not in OBJECTIVES:
        raise ConfigError(
            f"{where}: unknown objective {config['objective']!r}; choose among {[*OBJECTIVES]}"
        )
    check(config["algorithm"], _options(config), where)
    return config


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(config["algorithm-options"] or "{}")
    except ValueError as error:
        raise ConfigError(
            f"the run's configuration: algorithm-options must be JSON such as '{{\"mu\": 0.1}}', got "
            f"{config['algorithm-options']!r}"
        ) from error


def _folder(context: Context) -> pathlib.Path:
    folder = context.node_config.get(FOLDER)
    if folder is None:
        raise ConfigError(f"{FOLDER} of the node's configuration must name the party's folder")
    return pathlib.Path(str(folder))


def _system(folder: pathlib.Path) -> RAGSystem:
    path = folder / SYSTEM
    if not path.is_dir():
        raise ConfigError(f"{path} is missing: fedrag index DOCUMENTS --to {path}")
    return RAGSystem.load(path)


def _dataset(folder: pathlib.Path, system: RAGSystem) -> Dataset:
    if not isinstance(system.store, KnowledgeStore | None):
        raise DataError(
            f"{folder / SYSTEM} does not tell which passages it has, and training searches them: index "
            "them with fedrag index"
        )
    passages = system.retriever.passages if system.store is None else system.store.passages()
    return load_questions(folder / QUESTIONS, [*passages], ("train",))
