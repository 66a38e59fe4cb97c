"""Federated fine-tuning of retrieval-augmented generation, simulated in JAX.

What people use first is imported from here, when it is asked for: `fedrag --help` needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrag_jax.data.partition import Partition, partition
    from fedrag_jax.data.schemes import dirichlet
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.federated.algorithms.fed_avg import fed_avg
    from fedrag_jax.federated.algorithms.fed_avg_m import fed_avg_m
    from fedrag_jax.federated.algorithms.fed_lora import fed_lora
    from fedrag_jax.federated.algorithms.fed_opt import fed_adagrad, fed_adam, fed_yogi
    from fedrag_jax.federated.algorithms.fed_prox import fed_prox
    from fedrag_jax.federated.algorithms.local_only import local_only
    from fedrag_jax.federated.algorithms.scaffold import scaffold
    from fedrag_jax.federated.fit import fit
    from fedrag_jax.federated.sweep import sweep
    from fedrag_jax.objectives.task import Task
    from fedrag_jax.rag import RAGSystem

__version__ = "0.1.0"
_MODULES = {
    "RAGSystem": "rag",
    "Task": "objectives.task",
    "fit": "federated.fit",
    "sweep": "federated.sweep",
    "Partition": "data.partition",
    "partition": "data.partition",
    "dirichlet": "data.schemes",
    "fed_avg": "federated.algorithms.fed_avg",
    "fed_avg_m": "federated.algorithms.fed_avg_m",
    "fed_adagrad": "federated.algorithms.fed_opt",
    "fed_adam": "federated.algorithms.fed_opt",
    "fed_yogi": "federated.algorithms.fed_opt",
    "fed_prox": "federated.algorithms.fed_prox",
    "scaffold": "federated.algorithms.scaffold",
    "fed_lora": "federated.algorithms.fed_lora",
    "local_only": "federated.algorithms.local_only",
    "evaluate": "evaluation.evaluator",
}
__all__ = (
    "Partition",
    "RAGSystem",
    "Task",
    "dirichlet",
    "evaluate",
    "fed_adagrad",
    "fed_adam",
    "fed_avg",
    "fed_avg_m",
    "fed_lora",
    "fed_prox",
    "fed_yogi",
    "fit",
    "local_only",
    "partition",
    "scaffold",
    "sweep",
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
