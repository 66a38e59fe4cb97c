"""Marginal likelihood over retrieved passages: RAG-Token and RAG-Sequence (Lewis et al. 2020).

With l_zi = log p(y_i | x, z, y_<i) and r_z = log p(z | x), the log-softmax of the scores over the k
retrieved passages:

    RAG-Sequence  log p(y|x) = logsumexp_z (r_z + sum_i l_zi)
    RAG-Token     log p(y|x) = sum_i logsumexp_z (r_z + l_zi)

They are equal if one position is scored, and both are the plain answer likelihood at k = 1. The same
loss is used for joint training and for both phases of two-phase training: the parts in `trainable` are
trained, and the outputs of frozen parts are computed once and put into the batch.
"""

import dataclasses
import warnings

import jax
import numpy as np
from jax.scipy.special import logsumexp

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.corpora import Pool
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.likelihood import answer_log_probs, tokens_read, weighted_mean
from fedrag_jax.models.network import Network
from fedrag_jax.objectives import costs
from fedrag_jax.objectives.encoding import (
    Passages,
    Questions,
    found_by,
    passage_scores,
    searching,
    too_few,
    trained_parts,
)
from fedrag_jax.objectives.supervision import Likelihoods
from fedrag_jax.objectives.task import PyTree, StepCost, Task
from fedrag_jax.retrieval.refresh import Policy
from fedrag_jax.retrieval.retriever import Retriever

_PARTS = {"adapters": "generator", "query": "retriever", "document": "documents", "head": "head"}


def rag_sequence(log_probs: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """log p(y|x) [B] of `log_probs` [B, k, A], retrieval `scores` [B, k], answer `mask` [B, A]."""
    r = jax.nn.log_softmax(scores)
    return logsumexp(r + (log_probs * mask[:, None]).sum(-1), axis=1)


def rag_token(log_probs: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """log p(y|x) [B] of `log_probs` [B, k, A], retrieval `scores` [B, k], answer `mask` [B, A]."""
    r = jax.nn.log_softmax(scores)
    return (logsumexp(r[:, :, None] + log_probs, axis=1) * mask).sum(-1)


MARGINALS = {"token": rag_token, "sequence": rag_sequence}


@dataclasses.dataclass(frozen=True)
class MarginalLoss:
    """-log p(y|x) with the passages marginalised, mean over examples.

    The batch holds the answer arrays of `answer_log_probs`, `retrieved` int [B, k] (corpus rows), and
    questions in the format of `objectives.encoding`; scores come from the current encoders. For a
    frozen generator the batch has `answer_log_probs` [B, k, A] instead, for a frozen retriever
    `retrieval_scores` [B, k].
    """

    decoder: Network
    encoder: Network
    marginal: str = "token"
    score_scale: float = 20.0

    def __call__(self, trainable, frozen, batch, rng):
        parts = frozen | trainable
        log_probs = batch.get("answer_log_probs")
        if log_probs is None:
            log_probs = answer_log_probs(self.decoder, parts["decoder"], parts["adapters"], batch)
        scores = batch.get("retrieval_scores")
        if scores is None:
            scores = passage_scores(self.encoder, parts, batch, self.score_scale)
        log_marginal = MARGINALS[self.marginal](log_probs, scores, batch["answer_mask"])
        entropy = -(jax.nn.softmax(scores) * jax.nn.log_softmax(scores)).sum(1)
        loss = weighted_mean(-log_marginal, batch["weight"])
        told = {"retrieval_entropy": entropy, "tokens": tokens_read(batch)}
        return loss, {name: weighted_mean(x, batch["weight"]) for name, x in told.items()}

    def cost(self) -> StepCost:
        """The cost of a step, including the likelihoods of a frozen generator."""

        def flops(task, table):
            read = costs.trained_reading if "adapters" in task.trainable else costs.frozen_reading
            encoding = costs.trained_encoding(self.encoder, task, table, "retrieved")
            return read(self.decoder, table) + encoding

        def unrolled():
            networks = {"decoder": self.decoder.unrolled(), "encoder": self.encoder.unrolled()}
            return dataclasses.replace(self, **networks)

        return costs.declared(
            self,
            unrolled,
            flops,
            asked=lambda task: None if "adapters" in task.trainable else self.decoder,
        )


def marginal_likelihood(
    decoder: Network,
    parts: PyTree,
    prompts: Prompts,
    retriever: Retriever,
    questions,
    *,
    train: tuple[str, ...] = ("adapters", "query"),
    marginal: str = "token",
    passages: int = 5,
    score_scale: float = 20.0,
    refresh: Policy | None = None,
    pool: Pool | None = None,
) -> Task:
    """Returns the task of joint tuning, or of one phase of two-phase tuning, by marginal likelihood.

    Args:
      parts: `decoder` and `adapters`; the retriever provides `query` and `document`.
      questions: all training examples; they determine the width of question arrays.
      train: the trained parts among `adapters`, `query`, `document`, `head`. Passages are retrieved
        again during training unless only `adapters` are trained.
      refresh: how the index follows the document encoder; None re-embeds everything at each retrieval.
      pool: `pool(example)`: the corpus rows that an example may find, if passages stay with their
        clients (`data.corpora.own_passages`); default: all.

    Raises:
      ConfigError: an unknown marginal, no or unknown parts to train, or fewer than two passages if only
        the retriever is trained (a warning if adapters are trained too).
    """
    if marginal not in MARGINALS:
        raise ConfigError(f"marginal is one of {[*MARGINALS]}, got {marginal!r}")
    trains = ("adapters", "query", "document", "head")
    if not train or {*train} - {*trains}:
        raise ConfigError(f"train names some of {trains}, got {train}")
    moving = tuple(name for name in train if name != "adapters")
    if moving and (fault := too_few(passages)):
        if "adapters" not in train:
            raise ConfigError(f"marginal likelihood: {fault}")
        warnings.warn(f"only the adapters learn: {fault}", stacklevel=2)
    loss = MarginalLoss(decoder, retriever.encoder, marginal, score_scale)
    trainable, frozen = trained_parts(retriever, moving) if moving else ({}, {})
    if "adapters" in train:
        trainable = {"adapters": parts["adapters"]} | trainable
        frozen["decoder"] = parts["decoder"]
    asked = Questions(retriever, questions, frozen=bool(moving) and "query" not in train)
    read = Passages(retriever, moving)
    likelihoods = Likelihoods(decoder, parts, prompts)

    def collate(examples, retrieved):
        if retrieved is None:
            retrieved, cosines = found_by(retriever, examples, passages, pool)
            table = {"retrieval_scores": (score_scale * cosines).astype(np.float32)}
        else:
            table = {"retrieved": retrieved} | asked(examples) | read(retrieved=retrieved)
        if "adapters" in train:
            return table | prompts.training_table(examples, retrieved, per_passage=True)
        return table | likelihoods(examples, retrieved)

    return Task(
        name=f"rag_{marginal}_{'_'.join(train)}",
        trainable=trainable,
        frozen=frozen,
        loss=loss,
        collate=collate,
        cost=loss.cost(),
        label=f"RAG-{marginal.title()}: {' and '.join(_PARTS[part] for part in train)}",
        **(searching(retriever, moving, passages, refresh, pool) if moving else {}),
    )
