"""Losses that tune the retriever from labelled passages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrag_jax.data.batching import encoder_table
from fedrag_jax.data.examples import embedding_text
from fedrag_jax.errors import DataError
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.likelihood import tokens_read, weighted_mean
from fedrag_jax.objectives.task import PyTree, Task


@dataclasses.dataclass(frozen=True)
class MultipleNegativesRanking:
    """In-batch softmax over cosine similarities (Lawton et al. 2025, Ft. Embed.).

    L = -1/B sum_i log exp(s cos(q_i, d_i)) / sum_j exp(s cos(q_i, d_j)), where pairs j that share a
    gold passage with question i are no negatives of it, nor is padding.

    The batch holds `question_tokens`, `question_mask` [B, T], `positive` int [B] (corpus row) and
    `golds` int [B, G], padded with -1. With `sides="query"` document vectors are looked up in
    `frozen["document_vectors"]` [N, D]; with "both" the passages are encoded anew by the trainable
    `document` encoder from `frozen["passages"]`.
    """

    encoder: Network
    score_scale: float = 20.0
    sides: str = "query"

    def __call__(self, trainable, frozen, batch, rng):
        parts = frozen | trainable
        queries = self.encoder(parts["query"], batch["question_tokens"], batch["question_mask"])
        if self.sides == "query":
            documents = parts["document_vectors"][batch["positive"]]
        else:
            passages = {k: v[batch["positive"]] for k, v in parts["passages"].items()}
            documents = self.encoder(parts["document"], passages["tokens"], passages["mask"])
        scores = self.score_scale * normalised(queries) @ normalised(documents).T

        golds, own = batch["golds"], jnp.eye(len(queries), dtype=bool)
        shared = (golds[:, None, :, None] == golds[None, :, None, :]) & (golds >= 0)[
            :, None, :, None
        ]
        negative = ~shared.any((2, 3)) & (batch["weight"] > 0)[None, :]
        scores = jnp.where(own | negative, scores, -jnp.inf)
        nll = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(len(queries)))
        first = (scores.argmax(1) == jnp.arange(len(queries))).astype(jnp.float32)
        told = {"first": first, "tokens": tokens_read(batch)}
        loss = weighted_mean(nll, batch["weight"])
        return loss, {name: weighted_mean(x, batch["weight"]) for name, x in told.items()}


def normalised(vectors: jax.Array) -> jax.Array:
    """Vectors [..., D] at unit length, so that an inner product is a cosine."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def multiple_negatives_ranking(
    encoder: Network,
    query: PyTree,
    tokenizer,
    dataset,
    *,
    document_vectors=None,
    document: PyTree | None = None,
    score_scale: float = 20.0,
    max_length: int = 256,
) -> Task:
    """Ranking of the first gold passage of each question among those of its batch.

    Query-side tuning, with `document_vectors` [N, D] frozen, unless `document` parameters are given:
    then both encoders are trained, each on its own.
    """
    row = {passage.id: i for i, passage in enumerate(dataset.passages)}
    most = max((len(e.positive_ids) for e in dataset.train), default=1)
    if document is None:
        sides, trainable = "query", {"query": query}
        frozen = {"document_vectors": jnp.asarray(document_vectors)}
    else:
        sides, trainable = "both", {"query": query, "document": document}
        texts = [embedding_text(p) for p in dataset.passages]
        table = encoder_table(tokenizer, texts, max_length)
        frozen = {"passages": {name: jnp.asarray(array) for name, array in table.items()}}

    width = encoder_table(tokenizer, [e.question for e in dataset.train], max_length)[
        "tokens"
    ].shape[1]

    def collate(examples, _):
        unlabelled = [e.id for e in examples if not e.positive_ids]
        if unlabelled:
            raise DataError(
                f"{len(unlabelled)} questions name no gold passage, {unlabelled[0]!r} first: ranking "
                "needs positive_ids; give them, or choose a strategy without labels"
            )
        golds = np.full((len(examples), most), -1, np.int32)
        for i, example in enumerate(examples):
            golds[i, : len(example.positive_ids)] = [row[p] for p in example.positive_ids]
        return question_table(tokenizer, examples, width) | {
            "positive": golds[:, 0],
            "golds": golds,
        }

    return Task(
        name="multiple_negatives_ranking",
        trainable=trainable,
        frozen=frozen,
        loss=MultipleNegativesRanking(encoder, score_scale, sides),
        collate=collate,
    )


def question_table(tokenizer, examples, width: int) -> dict[str, np.ndarray]:
    """`question_tokens`, `question_mask` [N, width]: questions as the query encoder reads them."""
    table = encoder_table(tokenizer, [e.question for e in examples], width)
    pad = ((0, 0), (0, width - table["tokens"].shape[1]))
    return {f"question_{name}": np.pad(array, pad) for name, array in table.items()}
