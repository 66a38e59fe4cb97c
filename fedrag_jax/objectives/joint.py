"""Marginal likelihood over retrieved passages: RAG-Token and RAG-Sequence (Lewis et al. 2020).

With l_zi = log p(y_i | x, z, y_<i) and r_z = log p(z | x), the log-softmax of the scores over the k
retrieved passages:

    RAG-Sequence  log p(y|x) = logsumexp_z (r_z + sum_i l_zi)
    RAG-Token     log p(y|x) = sum_i logsumexp_z (r_z + l_zi)

They are equal where one position is scored, and both are the plain answer likelihood at k = 1.
One loss serves joint training and both phases of two-phase training: what is trained is what lies in
`trainable`, and what is frozen is computed once and put in the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from fedrag_jax.data.batching import Prompts, encoder_table
from fedrag_jax.data.examples import embedding_text
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.likelihood import answer_log_probs, tokens_read, weighted_mean
from fedrag_jax.objectives.retriever import normalised, question_table
from fedrag_jax.objectives.task import PyTree, Task
from fedrag_jax.retrieval.retriever import Retriever


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

    The batch holds the answer arrays of `answer_log_probs`, `retrieved` int [B, k] (corpus rows) and
    `question_tokens`, `question_mask` [B, T]; scores are those of the current query encoder. A
    frozen generator is given as `answer_log_probs` [B, k, A], a frozen retriever as
    `retrieval_scores` [B, k] instead.
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
        known = batch.get("retrieval_scores")
        scores = self.scores(parts, batch) if known is None else known
        log_marginal = MARGINALS[self.marginal](log_probs, scores, batch["answer_mask"])
        entropy = -(jax.nn.softmax(scores) * jax.nn.log_softmax(scores)).sum(1)
        loss = weighted_mean(-log_marginal, batch["weight"])
        told = {"retrieval_entropy": entropy, "tokens": tokens_read(batch)}
        return loss, {name: weighted_mean(x, batch["weight"]) for name, x in told.items()}

    def scores(self, parts, batch) -> jax.Array:
        """Scaled cosine of each question with its passages [B, k]."""
        queries = self.encoder(parts["query"], batch["question_tokens"], batch["question_mask"])
        if "document" in parts:
            rows = batch["retrieved"].reshape(-1)
            passages = {name: array[rows] for name, array in parts["passages"].items()}
            documents = self.encoder(parts["document"], passages["tokens"], passages["mask"])
            documents = documents.reshape(*batch["retrieved"].shape, -1)
        else:
            documents = parts["document_vectors"][batch["retrieved"]]
        return self.score_scale * jnp.einsum(
            "bd,bkd->bk", normalised(queries), normalised(documents)
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
) -> Task:
    """Joint tuning, or one phase of two-phase tuning, by marginal likelihood.

    Args:
      parts: `decoder` and `adapters`; the retriever brings `query` and `document`.
      questions: all examples that may be trained on; they set the width of question arrays.
      train: which of `adapters`, `query`, `document` move. The corpus is re-embedded when
        `document` moves, questions are searched again when `query` or `document` does.
    """
    parts = parts | {"query": retriever.query, "document": retriever.document}
    tokenizer, max_length = retriever.tokenizer, retriever.encoder.config.max_length
    width = encoder_table(tokenizer, [e.question for e in questions], max_length)["tokens"].shape[1]
    loss = MarginalLoss(decoder, retriever.encoder, marginal, score_scale)
    trainable = {name: parts[name] for name in train}
    frozen = {}
    if "adapters" in train:
        frozen["decoder"] = parts["decoder"]
    if "document" in train:
        texts = [embedding_text(p) for p in retriever.passages]
        table = encoder_table(tokenizer, texts, max_length)
        frozen["passages"] = {name: jnp.asarray(array) for name, array in table.items()}
        frozen.setdefault("query", parts["query"])
    elif "query" in train:
        frozen["document_vectors"] = jnp.asarray(retriever.vectors)
    frozen = {name: value for name, value in frozen.items() if name not in trainable}
    likelihoods = _Likelihoods(decoder, parts, prompts)

    def search(examples, trained) -> np.ndarray:
        current = retriever
        if "document" in trained:
            current = current.refresh(trained["document"])
        current = current.with_query(trained.get("query", retriever.query))
        return current.search([e.question for e in examples], passages)[0]

    def collate(examples, retrieved):
        if retrieved is None:
            retrieved, cosines = retriever.search([e.question for e in examples], passages)
            table = {"retrieval_scores": (score_scale * cosines).astype(np.float32)}
        else:
            table = {"retrieved": retrieved} | question_table(tokenizer, examples, width)
        if "adapters" in train:
            return table | prompts.training_table(examples, retrieved, per_passage=True)
        return table | likelihoods(examples, retrieved)

    moves = "query" in train or "document" in train
    return Task(
        name=f"rag_{marginal}_{'_'.join(train)}",
        trainable=trainable,
        frozen=frozen,
        loss=loss,
        collate=collate,
        retrieve=search if moves else None,
    )


class _Likelihoods:
    """Answer likelihoods under a frozen generator, each (question, passage) computed once."""

    CHUNK = 64

    def __init__(self, decoder: Network, parts: PyTree, prompts: Prompts):
        self._decoder, self._prompts, self._parts, self._known = decoder, prompts, parts, {}

    def __call__(self, examples, retrieved) -> dict[str, np.ndarray]:
        """`answer_log_probs` [N, k, A], `answer_mask` [N, A], `lengths` [N, k] of the prompts that were
        read and `prompt_tokens` [N, k], the same with padding."""
        pairs = [(e, row) for e, rows in zip(examples, retrieved, strict=True) for row in rows]
        missing = [
            p for p in dict.fromkeys((e.id, int(r)) for e, r in pairs) if p not in self._known
        ]
        by_id = {e.id: e for e in examples}
        for start in range(0, len(missing), self.CHUNK):
            chunk = missing[start : start + self.CHUNK]
            padded = chunk + chunk[:1] * (self.CHUNK - len(chunk))
            table = self._prompts.training_table(
                [by_id[i] for i, _ in padded], np.array([[r] for _, r in padded]), per_passage=True
            )
            found = _frozen_log_probs(
                self._decoder, self._parts["decoder"], self._parts["adapters"], table
            )
            of_each = zip(np.asarray(found)[:, 0], table["lengths"][:, 0], strict=True)
            self._known.update(zip(chunk, of_each, strict=False))
        known, lengths = zip(*(self._known[e.id, int(row)] for e, row in pairs), strict=True)
        masks = [self._prompts.answer_tokens(e.answers[0]) for e in examples]
        shape = (len(examples), len(retrieved[0]), known[0].shape[-1])
        mask = np.arange(shape[-1]) < np.array([len(m) for m in masks])[:, None]
        return {
            "answer_log_probs": np.stack(known).reshape(shape),
            "answer_mask": mask.astype(np.float32),
            "lengths": np.array(lengths, np.int32).reshape(shape[:2]),
            "prompt_tokens": np.full(shape[:2], self._prompts.training_width(1), np.int32),
        }


_frozen_log_probs = jax.jit(answer_log_probs, static_argnums=0)  # one program for all clients
