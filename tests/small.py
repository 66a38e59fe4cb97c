"""Experiments of seconds, a folder of data for them, and what they leave."""

import csv
import json

from ml_collections import ConfigDict

from configs import (
    attacks,
    compare_strategies,
    compression,
    heterogeneity,
    index_refresh,
    inference_modes,
    lora_aggregation,
    methods,
    personalisation,
    privacy,
)
from fedrag_jax.data import synthetic


def small():
    config = _short(compare_strategies.get_config())
    config.strategies = ("none", "retriever", "two_phase")
    config.regimes, config.limits.local.strategies = ("federated", "local"), ()
    config.federated.alpha, config.search_seconds = 1.0, ConfigDict()
    return config


def small_heterogeneity():
    config = _short(heterogeneity.get_config())
    config.seeds, config.strategies = (0, 1), ("none", "retriever")
    config.federated.alpha, config.training.rounds = 1.0, 2
    config.factors.alpha = (float("inf"),)
    config.factors.clients, config.factors.participation = (), (0.5,)
    config.factors.local_steps, config.rate_factors = (2,), (0.25, 1.0)
    config.validation_questions = 40
    return config


def small_aggregation():
    config = _short(lora_aggregation.get_config())
    config.seeds, config.rules, config.ranks = (0, 1), ("fedit", "fedex"), (2,)
    config.alphas, config.learning_rates, config.validation_questions = (1.0,), (5e-4, 1e-3), 40
    return config


def small_compression():
    config = _short(compression.get_config())
    config.seeds, config.strategies, config.training.rounds = (0, 1), ("retriever",), 2
    config.federated.alpha = 1.0
    config.messages = ("plain", "int4", "top_1")
    return config


def small_personalisation():
    config = _short(personalisation.get_config())
    config.seeds, config.strategies, config.training.rounds = (0,), ("retriever",), 4
    config.federated.clients, config.federated.alpha = 4, 1.0
    config.methods.fine_tuned.options.together = 2
    config.learning_rates, config.validation_questions = (1e-3, 2e-3), 40
    return config


def small_attacks():
    config = _short(attacks.get_config())
    config.seeds, config.federated.clients, config.federated.alpha = (0,), 4, 1.0
    config.attackers, config.attacks = (1,), ("none", "sign_flip", "backdoor", "passages")
    config.rules = ("mean", "median")
    return config


def small_privacy():
    config = _short(privacy.get_config())
    config.federated.clients, config.federated.alpha, config.fresh = 8, 1.0, 2
    config.training.rounds, config.training.local_steps = 2, 2
    kept = {name: config.variants[name] for name in ("untuned", "fedavg", "dp_8")}
    config.variants = ConfigDict(kept, sort_keys=False)
    config.victims, config.candidates, config.asked = 2, 10, 12
    config.variants.dp_8.options.delta = 0.2
    return config


def small_modes():
    config = _short(inference_modes.get_config())
    config.strategies, config.modes = ("none", "ralt"), ("concatenated", "rag_token")
    config.data.test_questions, config.beams = 30, 2
    return config


def small_methods():
    config = _short(methods.get_config())
    config.seeds, config.objectives = (0,), ("no_op", "in_batch", "concatenated")
    config.regimes, config.rate_factors = ("federated",), (1.0,)
    config.validation_questions = 40
    return config


def small_refresh():
    config = _short(index_refresh.get_config())
    config.seeds, config.regimes, config.training.rounds = (0,), ("federated",), 2
    kept = {name: config.policies[name] for name in ("never", "every_1", "in_use_40", "query_side")}
    config.policies, config.rate_factors = ConfigDict(kept), (0.1,)
    config.validation_questions = config.probe_questions = 40
    return config


def _short(config):
    config.name = "small"
    config.data.train_questions = 160
    config.data.test_questions = 60
    config.federated.clients = 2
    config.training.rounds = 1
    config.training.local_steps = 1
    config.wandb.mode = "disabled"
    return config


def own_folder(folder, labelled=False, hops=1):
    """Sixty questions of the built-in world, one of them with an answer that is everywhere."""
    world = synthetic.generate()
    some = world.train[:60]
    gold = {i for e in some for i in e.positive_ids}
    passages = [p for p in world.passages if p.id in gold] + world.passages[:40]
    with open(folder / "passages.jsonl", "w") as file:
        for passage in {p.id: p for p in passages}.values():
            file.write(json.dumps({"id": passage.id, "text": passage.text}) + "\n")
    with open(folder / "questions.jsonl", "w") as file:
        for i, e in enumerate(some):
            row = {"id": e.id, "question": e.question, "answers": [*e.answers, "e"], "hops": hops}
            row["split"] = "train" if i < 36 else "validation" if i < 40 else "test"
            if labelled:
                row["positive_ids"] = e.positive_ids
            file.write(json.dumps(row) + "\n")
    return str(folder)


def read(folder):
    with open(folder / "strategies.csv", newline="") as file:
        return list(csv.DictReader(file))
