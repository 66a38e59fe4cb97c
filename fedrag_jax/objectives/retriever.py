"""Losses that tune the retriever on labelled passages."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrag_jax.data.corpora import Pool
from fedrag_jax.data.examples import Dataset, ids_of, require_golds
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.likelihood import tokens_read, weighted_mean
from fedrag_jax.models.network import Network
from fedrag_jax.objectives import costs
from fedrag_jax.objectives.encoding import (
    Passages,
    Questions,
    as_trained,
    passage_vectors,
    question_vectors,
    trained_parts,
)
from fedrag_jax.objectives.task import StepCost, Task
from fedrag_jax.retrieval.mining import Mining, hard_negatives
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.similarity import unit


@dataclasses.dataclass(frozen=True)
class MultipleNegativesRanking:
    """In-batch softmax over similarities (Lawton et al. 2025, Ft. Embed.).

    L = -1/B sum_i log exp(s cos(q_i, d_i)) / sum_j exp(s cos(q_i, d_j)), or with the encoder's own
    similarity instead of the cosine. Pairs j that share a gold passage with question i, and padding,
    are not negatives. Mined negatives, if any, are additional d_j for the whole batch.

    With several `dimensions`, the loss is the mean over the losses of truncated vectors (Matryoshka
    representation learning, Kusupati et al. 2022, 2205.13147, with equal weights).

    The batch holds questions in the format of `objectives.encoding`, `positive` int [B] (corpus row),
    `golds` int [B, G] and, for mined negatives, `negatives` int [B, H]; -1 is none.

    Attributes:
      score_scale: s, the inverse of a temperature.
      at_once: number of texts encoded at a time, as in GradCache; 0 encodes the whole batch.
    """

    encoder: Network
    score_scale: float = 20.0
    dimensions: tuple[int, ...] = ()
    at_once: int = 0

    def __call__(self, trainable, frozen, batch, rng):
        parts, golds = frozen | trainable, batch["golds"]
        size, there = len(golds), batch["weight"] > 0
        passages, negative = ["positive"], ~_share_a_gold(golds, golds) & there[None]
        if "negatives" in batch:
            passages.append("negatives")
            mined = jnp.where(there[:, None], batch["negatives"], -1).reshape(-1)
            usable = ~_share_a_gold(golds, mined[:, None]) & (mined >= 0)[None]
            negative = jnp.concatenate([negative, usable], axis=1)
        shown = negative | jnp.eye(size, negative.shape[1], dtype=bool)

        queries = question_vectors(self.encoder, parts, batch, self.at_once)
        documents = passage_vectors(self.encoder, parts, batch, *passages, at_once=self.at_once)
        losses = []
        for d in self.dimensions or (queries.shape[-1],):
            cut = queries[:, :d], documents[:, :d]
            if self.encoder.config.similarity == "cosine":
                cut = map(unit, cut)
            q, p = cut
            scores = jnp.where(shown, self.score_scale * (q @ p.T), -jnp.inf)
            own = jnp.arange(size)
            losses.append(optax.softmax_cross_entropy_with_integer_labels(scores, own))
        first = (scores.argmax(1) == own).astype(jnp.float32)
        told = {"first": first, "tokens": tokens_read(batch)}
        loss = weighted_mean(sum(losses) / len(losses), batch["weight"])
        return loss, {name: weighted_mean(x, batch["weight"]) for name, x in told.items()}

    def cost(self) -> StepCost:
        """The cost of a step."""

        def flops(task, table):
            passages = ["positive", *(["negatives"] if "negatives" in table else [])]
            return costs.trained_encoding(self.encoder, task, table, *passages)

        def unrolled():
            return dataclasses.replace(self, encoder=self.encoder.unrolled())

        return costs.declared(self, unrolled, flops)


def _share_a_gold(golds: jax.Array, others: jax.Array) -> jax.Array:
    """Returns bool [B, N]: whether any of golds [B, G] is among others [N, M]; -1 is none."""
    same = golds[:, None, :, None] == others[None, :, None, :]
    return (same & (golds >= 0)[:, None, :, None]).any((2, 3))


def multiple_negatives_ranking(
    retriever: Retriever,
    dataset: Dataset,
    *,
    train: tuple[str, ...] = ("query",),
    score_scale: float = 20.0,
    dimensions: Sequence[int] = (),
    at_once: int = 0,
    mining: Mining | None = None,
    negatives: Mapping[str, Sequence[int]] | None = None,
    pool: Pool | None = None,
    max_question_tokens: int = 0,
) -> Task:
    """Returns the task of ranking the first gold passage of each question above those of its batch.

    Without mined negatives, a client learns nothing from one question, or from questions that share a
    gold passage: `fit` warns about it.

    Args:
      train: the trained parts among `query`, `document`, `head`. Query-side tuning is ("query",).
        ("head",) learns a matrix after both frozen encoders, which then run only once (like the shared
        head of pFedRAG, Findings of EMNLP 2025.769).
      score_scale: inverse of the softmax temperature.
      dimensions: lengths at which truncated vectors are trained; the metric `first` refers to the
        largest.
      at_once: number of texts encoded at a time, as in GradCache; 0 encodes the whole batch.
      mining: settings of hard negatives, which are mined at every retrieval (each round, unless `fit`
        says otherwise) with the current retriever.
      negatives: given negatives instead: corpus rows for each question by its id, equally many.
      pool: `pool(example)`: the corpus rows for mined negatives, if passages stay with their clients
        (`data.corpora.own_passages`); default: all. In-batch negatives always come from the same
        client.
      max_question_tokens: longer questions are truncated; 0 uses the encoder's limit.

    Raises:
      ConfigError: dimensions that the vectors do not have; no or unknown parts to train; both given and
        mined negatives; in `fit`, batches of one question without mined negatives.
      DataError: in collating, a question without a gold passage.
    """
    size = retriever.bare_vectors.shape[1]
    if not all(0 < d <= size for d in dimensions):
        raise ConfigError(f"dimensions must be between 1 and {size}, got {tuple(dimensions)}")
    if dimensions and retriever.encoder.config.similarity == "euclidean":
        raise ConfigError(
            "dimensions need vectors that are compared by cosine or dot product, but the encoder uses "
            "euclidean distance: leave them out"
        )
    if mining and negatives is not None:
        raise ConfigError("negatives are both given and to be mined: leave out one of them")
    row = {identifier: i for i, identifier in enumerate(ids_of(dataset.passages))}
    labelled = [*dataset.train, *dataset.validation]  # which stop the training
    most = max((len(e.positive_ids) for e in labelled), default=1)
    trainable, frozen = trained_parts(retriever, train)
    questions = Questions(retriever, dataset.train, "query" not in train, max_question_tokens)
    passages = Passages(retriever, train)

    def golds_of(examples) -> np.ndarray:
        remedy = "give them, or choose a strategy without labels"
        require_golds(examples, f"ranking needs positive_ids; {remedy}")
        golds = np.full((len(examples), most), -1, np.int32)
        for i, example in enumerate(examples):
            golds[i, : len(example.positive_ids)] = [row[p] for p in example.positive_ids]
        return golds

    def mine(examples, trained) -> np.ndarray:
        current = as_trained(retriever, trained)
        return hard_negatives(current, examples, golds_of(examples), mining, pool)

    def collate(examples, mined):
        golds = golds_of(examples)
        rows = {"positive": golds[:, 0]}
        if negatives is not None:
            mined = np.array([negatives[e.id] for e in examples], np.int32)
        if mined is not None:
            rows["negatives"] = mined
        return questions(examples) | rows | {"golds": golds} | passages(**rows)

    def idle(examples, batch_size) -> str:
        if batch_size < 2:
            raise ConfigError(
                "ranking uses the passages of other questions in the batch as negatives, so batch_size "
                f"must be at least 2, got {batch_size}; or give mined negatives"
            )
        if not set.intersection(*({*e.positive_ids} for e in examples)):
            return ""
        one = len(examples) == 1
        held = "it holds one question" if one else f"its {len(examples)} questions share a passage"
        return f"{held}, so there are no negatives in a batch; give it others, or mined negatives"

    loss = MultipleNegativesRanking(
        retriever.encoder, score_scale, tuple(sorted(dimensions)), at_once
    )
    return Task(
        name="multiple_negatives_ranking" + ("_mined" if mining else ""),
        trainable=trainable,
        frozen=frozen,
        loss=loss,
        collate=collate,
        retrieve=mine if mining else None,
        spent=retriever.spent,
        cost=loss.cost(),
        coupled=True,
        idle=None if mining or negatives is not None else idle,
        label="retriever: ranking" + (", mined negatives" if mining else ""),
    )
