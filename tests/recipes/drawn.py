"""Questions drawn to their gold passages, by their inner product alone."""

import dataclasses

import numpy as np

from fedrag_jax.generation.likelihood import weighted_mean
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.task import Task


@dataclasses.dataclass(frozen=True)
class Drawn:
    """L = -q.d"""

    encoder: Network

    def __call__(self, trainable, frozen, batch, rng):
        vectors = self.encoder(trainable["query"], batch["tokens"], batch["mask"])
        loss = weighted_mean(-(vectors * batch["gold"]).sum(-1), batch["weight"])
        return loss, {"similarity": -loss}


def drawn(retriever, dataset) -> Task:
    """Of a retriever."""
    row = {p.id: i for i, p in enumerate(retriever.passages)}

    def collate(examples, retrieved):
        encoded = retriever.tokenizer(
            [e.question for e in examples], padding="max_length", max_length=32, truncation=True
        )
        return {
            "tokens": np.array(encoded["input_ids"], np.int32),
            "mask": np.array(encoded["attention_mask"], np.int32),
            "gold": retriever.vectors[[row[e.positive_ids[0]] for e in examples]],
        }

    return Task("drawn", {"query": retriever.query}, {}, Drawn(retriever.encoder), collate)
