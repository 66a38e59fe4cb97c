"""A federation of saved systems: each party's folder has its `system` and its `questions.jsonl`.

`fedrag index` makes the system from the party's documents. Documents, vectors and questions stay in the
folder. The configuration of the run (`[tool.flwr.app.config]` of `pyproject.toml`) says what is trained
and how. All parties receive it; its keys are those of `DEFAULTS`, and those of `SERVER`, which only the
server reads.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from flwr.app import Context

from fedrag_jax.data.examples import Dataset, Example, Passage
from fedrag_jax.data.json_sets import load_questions
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.algorithms.by_name import Named, check
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.files import read_json, write_json, writing
from fedrag_jax.integrations.flower.model_file import MODEL, load_model, trained_by
from fedrag_jax.integrations.flower.party import FOLDER
from fedrag_jax.integrations.flower.plan import Plan
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore
from fedrag_jax.strategies.objectives import OBJECTIVES
from fedrag_jax.strategies.regimes import adamw
from fedrag_jax.systems.system_like import system_like
from fedrag_jax.tracking.weights_and_biases import WandbLog

SYSTEM, QUESTIONS, RUNS = "system", "questions.jsonl", "runs"
DEFAULTS: dict[str, Any] = {
    "clients": 3,
    "rounds": 5,
    "local-steps": 5,
    "batch-size": 8,
    "objective": "in_batch",
    "algorithm": "fedavg",
    "algorithm-options": "",
    "learning-rate": 1e-3,
    "seed": 0,
    "wandb": "disabled",
    "wandb-project": "fedrag",
    "retriever": "builtin:encoder",
    "generator": "builtin:decoder",
}

SERVER = "folder", "quorum", "patience", "search", "top-k"


def party_plan(context: Context) -> Plan:
    """Returns the plan of a party for its own system; keeps the run's configuration in its folder.

    Raises:
      ConfigError: no folder, no system in it, or an invalid configuration.
      DataError: no questions.
    """
    folder, config = _folder(context), _configured(context.run_config)
    plan = plan_of(folder, config)
    _remember(folder, config, plan)
    return plan


def party_system(context: Context) -> RAGSystem:
    """Returns the party's own system."""
    return _system(_folder(context))


def party_questions(context: Context) -> list[Example]:
    """Returns the questions on which a party trains."""
    folder = _folder(context)
    return _dataset(folder, _system(folder)).train


def server_plan(context: Context) -> Plan:
    """Returns the server's plan, with the models and no documents; keeps the run's configuration."""
    config = _configured(context.run_config)
    folder = run_folder(context)
    plan = _server_plan(config)[1]
    _remember(folder, config, plan)
    return plan


def server_system(context: Context) -> RAGSystem:
    """Returns a system of the server's models, with the trained parameters if there are any.

    Raises:
      CheckpointError: the trained model cannot be read.
    """
    folder = run_folder(context)
    if not (folder / MODEL).exists():
        return _server_plan(_configured(context.run_config))[0]
    system, plan = _server_plan(_remembered(folder))
    return _with_trained(system, plan, folder)


def run_folder(context: Context) -> pathlib.Path:
    """Returns the server's folder of a run."""
    return pathlib.Path(str(context.run_config.get("folder", "server/run")))


def server_callbacks(context: Context) -> list[Callback]:
    """Returns the callbacks that the server's configuration asks for: the log to Weights & Biases.

    Raises:
      ConfigError: an unknown mode.
    """
    config = _configured(context.run_config)
    return [WandbLog(run_folder(context), config["wandb-project"], config["wandb"], config)]


def plan_of(folder: pathlib.Path, config: Mapping[str, Any]) -> Plan:
    """Returns the plan of the party with this folder."""
    system = _system(folder)
    dataset = _dataset(folder, system)
    passages = dataset.passages
    top_k = min(system.top_k, len(passages))
    return _plan(config, system_like(system, passages, dataset.train, top_k=top_k), dataset)


def tuned(folder: pathlib.Path) -> RAGSystem:
    """Returns a party's system over its own documents, with the trained parameters.

    Raises:
      CheckpointError: the party has not received a final model.
    """
    config = _remembered(folder)
    return _with_trained(_system(folder), plan_of(folder, config), folder)


def _remember(folder: pathlib.Path, config: Mapping[str, Any], plan: Plan) -> None:
    """Keeps the configuration of a plan; those of other plans stay, whose model may be the last."""
    with writing(folder / RUNS):
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
    write_json(folder / RUNS / f"{plan.fingerprint}.json", config, indent=2)


def _remembered(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the configuration of the plan that the model in a folder belongs to."""
    return read_json(folder / RUNS / f"{trained_by(folder)}.json")


def _with_trained(system: RAGSystem, plan: Plan, folder: pathlib.Path) -> RAGSystem:
    trainable, frozen = load_model(plan, folder)
    base = {"decoder": frozen["decoder"]} if frozen is not plan.task.frozen else {}
    return system.replace(**trainable, **base)


def _server_plan(config: Mapping[str, Any]) -> tuple[RAGSystem, Plan]:
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
    return system, _plan(config, system, Dataset("nothing", passages, examples, [], []))


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
    if unknown := [name for name in given if name not in (*DEFAULTS, *SERVER)]:
        raise ConfigError(f"{where}: unknown keys {unknown}; choose among {[*DEFAULTS, *SERVER]}")
    config = DEFAULTS | {name: value for name, value in given.items() if name in DEFAULTS}
    for name, value in config.items():
        number = isinstance(DEFAULTS[name], float) and isinstance(value, int)
        if not number and type(value) is not type(DEFAULTS[name]):
            kind = type(DEFAULTS[name]).__name__
            raise ConfigError(f"{where}: {name} must be of type {kind}, got {value!r}")
    config["learning-rate"] = float(config["learning-rate"])
    if not 0 < config["learning-rate"] < math.inf:
        raise ConfigError(
            f"{where}: learning-rate must be above 0 and finite, got {config['learning-rate']}"
        )
    if config["objective"] not in OBJECTIVES:
        raise ConfigError(
            f"{where}: unknown objective {config['objective']!r}; choose among {[*OBJECTIVES]}"
        )
    check(config["algorithm"], _options(config), where)
    return config


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config["algorithm-options"] or "{}"
    with contextlib.suppress(ValueError):
        if isinstance(options := json.loads(text), dict):
            return options
    raise ConfigError(
        f"the run's configuration: algorithm-options must be JSON such as '{{\"mu\": 0.1}}', got "
        f"{text!r}"
    )


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
            f"{folder / SYSTEM} cannot list its passages, which training needs: make it with fedrag "
            "index"
        )
    passages = system.retriever.passages if system.store is None else system.store.passages()
    return load_questions(folder / QUESTIONS, [*passages], ("train",))
