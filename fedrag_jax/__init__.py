"""Federated fine-tuning of retrieval-augmented generation, simulated in JAX.

The most used names are imported from here. Each is loaded on first use, so `fedrag --help` does not
import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrag_jax.data.datasets import load as load_dataset
    from fedrag_jax.data.examples import Dataset, Example, Passage
    from fedrag_jax.data.json_sets import load_questions
    from fedrag_jax.data.outside_corpora import read as load_passages
    from fedrag_jax.data.partition import Partition, partition
    from fedrag_jax.data.schemes import dirichlet, dirichlet_per_client, iid, natural, shards
    from fedrag_jax.errors import FedragError
    from fedrag_jax.evaluation.evaluator import evaluate, evaluate_retrieval
    from fedrag_jax.evaluation.significance import (
        bootstrap_interval,
        equivalence_test,
        holm,
        paired_permutation_test,
        paired_t_test,
    )
    from fedrag_jax.federated.algorithms.centralised import centralised
    from fedrag_jax.federated.algorithms.fed_avg import fed_avg
    from fedrag_jax.federated.algorithms.fed_avg_m import fed_avg_m
    from fedrag_jax.federated.algorithms.fed_lora import fed_lora
    from fedrag_jax.federated.algorithms.fed_opt import fed_adagrad, fed_adam, fed_yogi
    from fedrag_jax.federated.algorithms.fed_prox import fed_prox
    from fedrag_jax.federated.algorithms.local_only import local_only
    from fedrag_jax.federated.algorithms.scaffold import scaffold
    from fedrag_jax.federated.callbacks import Callback
    from fedrag_jax.federated.fit import FitResult, fit
    from fedrag_jax.federated.sweep import sweep
    from fedrag_jax.models.hub import load as load_model
    from fedrag_jax.models.lora import LoraConfig
    from fedrag_jax.objectives.joint import marginal_likelihood
    from fedrag_jax.objectives.retriever import multiple_negatives_ranking
    from fedrag_jax.objectives.task import Task
    from fedrag_jax.rag import RAGSystem
    from fedrag_jax.retrieval.stores.bm25 import BM25Store
    from fedrag_jax.retrieval.stores.device_store import DeviceStore
    from fedrag_jax.retrieval.stores.faiss_store import FaissStore
    from fedrag_jax.retrieval.stores.hybrid import HybridStore
    from fedrag_jax.retrieval.stores.registry import open_store
    from fedrag_jax.retrieval.stores.reranked import RerankedStore
    from fedrag_jax.strategies.objectives import OBJECTIVES
    from fedrag_jax.strategies.strategies import STRATEGIES
    from fedrag_jax.tracking.checkpoints import Checkpointer
    from fedrag_jax.tracking.logs import JsonlLog, Progress
    from fedrag_jax.tracking.weights_and_biases import WandbLog

__version__ = "0.1.0"
# The module of each name, and what it is called there where that differs.
_WHERE = {
    # A system and its passages.
    "RAGSystem": "rag",
    "LoraConfig": "models.lora",
    "load_model": "models.hub:load",
    "FaissStore": "retrieval.stores.faiss_store",
    "DeviceStore": "retrieval.stores.device_store",
    "BM25Store": "retrieval.stores.bm25",
    "HybridStore": "retrieval.stores.hybrid",
    "RerankedStore": "retrieval.stores.reranked",
    "open_store": "retrieval.stores.registry",
    # Data, and who holds what.
    "Passage": "data.examples",
    "Example": "data.examples",
    "Dataset": "data.examples",
    "load_dataset": "data.datasets:load",
    "load_passages": "data.outside_corpora:read",
    "load_questions": "data.json_sets",
    "Partition": "data.partition",
    "partition": "data.partition",
    "iid": "data.schemes",
    "dirichlet": "data.schemes",
    "dirichlet_per_client": "data.schemes",
    "shards": "data.schemes",
    "natural": "data.schemes",
    # What is trained.
    "Task": "objectives.task",
    "multiple_negatives_ranking": "objectives.retriever",
    "marginal_likelihood": "objectives.joint",
    "OBJECTIVES": "strategies.objectives",
    "STRATEGIES": "strategies.strategies",
    # How.
    "fit": "federated.fit",
    "FitResult": "federated.fit",
    "sweep": "federated.sweep",
    "centralised": "federated.algorithms.centralised",
    "local_only": "federated.algorithms.local_only",
    "fed_avg": "federated.algorithms.fed_avg",
    "fed_avg_m": "federated.algorithms.fed_avg_m",
    "fed_prox": "federated.algorithms.fed_prox",
    "fed_adagrad": "federated.algorithms.fed_opt",
    "fed_adam": "federated.algorithms.fed_opt",
    "fed_yogi": "federated.algorithms.fed_opt",
    "scaffold": "federated.algorithms.scaffold",
    "fed_lora": "federated.algorithms.fed_lora",
    "Callback": "federated.callbacks",
    "Checkpointer": "tracking.checkpoints",
    "JsonlLog": "tracking.logs",
    "Progress": "tracking.logs",
    "WandbLog": "tracking.weights_and_biases",
    # How good it is.
    "evaluate": "evaluation.evaluator",
    "evaluate_retrieval": "evaluation.evaluator",
    "bootstrap_interval": "evaluation.significance",
    "paired_permutation_test": "evaluation.significance",
    "paired_t_test": "evaluation.significance",
    "equivalence_test": "evaluation.significance",
    "holm": "evaluation.significance",
    "FedragError": "errors",
}
__all__ = (
    "OBJECTIVES",
    "STRATEGIES",
    "BM25Store",
    "Callback",
    "Checkpointer",
    "Dataset",
    "DeviceStore",
    "Example",
    "FaissStore",
    "FedragError",
    "FitResult",
    "HybridStore",
    "JsonlLog",
    "LoraConfig",
    "Partition",
    "Passage",
    "Progress",
    "RAGSystem",
    "RerankedStore",
    "Task",
    "WandbLog",
    "bootstrap_interval",
    "centralised",
    "dirichlet",
    "dirichlet_per_client",
    "equivalence_test",
    "evaluate",
    "evaluate_retrieval",
    "fed_adagrad",
    "fed_adam",
    "fed_avg",
    "fed_avg_m",
    "fed_lora",
    "fed_prox",
    "fed_yogi",
    "fit",
    "holm",
    "iid",
    "load_dataset",
    "load_model",
    "load_passages",
    "load_questions",
    "local_only",
    "marginal_likelihood",
    "multiple_negatives_ranking",
    "natural",
    "open_store",
    "paired_permutation_test",
    "paired_t_test",
    "partition",
    "scaffold",
    "shards",
    "sweep",
)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _WHERE[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), there or name)


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
