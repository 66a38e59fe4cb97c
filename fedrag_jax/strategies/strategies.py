"""The fine-tuning strategies of Lawton et al. 2025 (arXiv 2510.01600), section 2.

| strategy | trains | objective | needs gold passages |
|---|---|---|---|
| none | nothing | | no |
| retriever | query encoder | multiple-negatives ranking | yes |
| generator | adapters | answer NLL over the base retriever's passages, in one prompt | no |
| independent | nothing more | puts those two together | yes |
| two_phase | adapters, then query encoder | RAG-Token, the other part frozen | no |
| joint_token | both at once | RAG-Token | no |
| joint_sequence | both at once | RAG-Sequence | no |

A strategy is a function `(system, dataset, tune) -> system`, where `tune(task) -> trainable` trains a
task in the setting of the experiment: the strategies do not know whether that is federated.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.objectives.generator import concatenated
from fedrag_jax.objectives.joint import marginal_likelihood
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.objectives.task import PyTree, Task
from fedrag_jax.rag import RAGSystem

Tune = Callable[[Task], PyTree]


def none(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
    """The system as it came."""
    return system


def retriever(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
    """Query-side tuning on gold passages."""
    task = multiple_negatives_ranking(
        system.retriever.encoder,
        system.retriever.query,
        system.retriever.tokenizer,
        dataset,
        document_vectors=system.retriever.vectors,
        score_scale=system.score_scale,
        max_length=system.retriever.encoder.config.max_length,
    )
    return system.replace(**tune(task))


def generator(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
    """Adapters tuned on what the base retriever finds."""
    task = concatenated(
        system.decoder, system.generator.params, system.adapters, system.prompts, _found(system)
    )
    return system.replace(**tune(task))


def independent(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
    """The tuned retriever and the tuned generator, which have never met."""
    tuned = retriever(system, dataset, tune), generator(system, dataset, tune)
    return system.replace(query=tuned[0].retriever.query, adapters=tuned[1].adapters)


def two_phase(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
    """RAG-Token twice: the adapters first, then the query encoder under the tuned generator."""
    return second_phase(first_phase(system, dataset, tune), dataset, tune)


def first_phase(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
    """RAG-Token on the adapters, the retriever frozen."""
    return system.replace(**tune(_marginal(system, dataset, ("adapters",), "token")))


def second_phase(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
    """RAG-Token on the query encoder, the generator frozen."""
    return system.replace(**tune(_marginal(system, dataset, ("query",), "token")))


def joint_token(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
    """RAG-Token on both parts at once."""
    return system.replace(**tune(_marginal(system, dataset, ("adapters", "query"), "token")))


def joint_sequence(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
    """RAG-Sequence on both parts at once."""
    return system.replace(**tune(_marginal(system, dataset, ("adapters", "query"), "sequence")))


STRATEGIES = {
    f.__name__: f
    for f in (none, retriever, generator, independent, two_phase, joint_token, joint_sequence)
}


def _marginal(system: RAGSystem, dataset: Dataset, train: tuple[str, ...], marginal: str) -> Task:
    # Passages beyond those that are read teach the retriever alone, where it moves.
    passages = system.marginal_k if "query" in train else system.top_k
    return marginal_likelihood(
        system.decoder,
        {"decoder": system.generator.params, "adapters": system.adapters},
        system.prompts,
        system.retriever,
        dataset.train,
        train=train,
        marginal=marginal,
        passages=passages,
        score_scale=system.score_scale,
    )


def _found(system: RAGSystem) -> Callable[[Sequence[Example]], np.ndarray]:
    """What the system's retriever finds for examples, searched once."""
    known: dict[str, np.ndarray] = {}

    def rows(examples: Sequence[Example]) -> np.ndarray:
        missing = [e for e in examples if e.id not in known]
        if missing:
            found, _ = system.retriever.search([e.question for e in missing], system.top_k)
            known.update(zip((e.id for e in missing), found, strict=True))
        return np.stack([known[e.id] for e in examples])

    return rows
