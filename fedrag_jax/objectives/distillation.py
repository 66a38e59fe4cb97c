"""Distillation: the retriever learns from the scores that a generator or another teacher gives
passages.

For the k passages z retrieved for a question x, a frozen teacher gives a signal t_z, and the distance
between

    Q(z) = softmax(t_z / temperature)          p_R(z|x) = softmax(score_scale cos(x, z))

is minimised, with a gradient only for p_R. The methods differ in the signal and the divergence:

| method | signal | temperature | loss | from |
|---|---|---|---|---|
| `lsr` | p(y|z, x) | 0.01 | KL(p_R, Q) | RA-DIT, 2310.01352, section 2.3 |
| `replug` | p(y|z, x) | 0.1, score_scale 10 | KL(Q, p_R) | REPLUG LSR, 2301.12652 |
| `pdist` | log p(y|z, x) | 1 | KL(Q, p_R) | PDist, Atlas, 2208.03299 |
| `adist` | attention to z | 0.01, ours | KL(Q, p_R) | ADist, Atlas: `supervision.Attention` |
| `loop` | -log p(y|all but z, x) | 1 | KL(Q, p_R) | LOOP, Atlas |
| `emdr` | log p(y|z, x) | | -log sum_z p_R(z|x) p(y|z, x) | EMDR2, 2106.05346; Atlas |
| `distilled` | a teacher's score | 1 | KL(Q, p_R) | for example a cross-encoder |

p(y|z, x) is a product over the tokens of the answer and its EOS. The probability itself is a bad signal
for answers of several tokens: it is so small that Q is almost uniform and teaches nothing. The metric
`target_entropy` (at most log k) shows this. REPLUG's code uses `signal="log_probability"`, Atlas' code
`"mean_log_probability"` (per token). REPLUG's arXiv text has KL(p_R, Q), its NAACL text and code have
KL(Q, p_R): `first` selects one of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.corpora import Pool
from fedrag_jax.data.examples import Example, embedding_text
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.likelihood import tokens_read, weighted_mean
from fedrag_jax.models.network import Network
from fedrag_jax.objectives import costs
from fedrag_jax.objectives.encoding import (
    Passages,
    Questions,
    passage_scores,
    searching,
    too_few,
    trained_parts,
)
from fedrag_jax.objectives.joint import marginal_likelihood
from fedrag_jax.objectives.supervision import Attention, LeaveOneOut, Likelihoods, Teacher
from fedrag_jax.objectives.task import PyTree, StepCost, Task
from fedrag_jax.retrieval.refresh import Policy
from fedrag_jax.retrieval.retriever import Retriever


def _log_probability(batch) -> jax.Array:
    return (batch["answer_log_probs"] * batch["answer_mask"][:, None]).sum(-1)


# Signals t_z [B, k] of a batch.
SIGNALS: dict[str, Callable[[Any], jax.Array]] = {
    "probability": lambda batch: jnp.exp(_log_probability(batch)),
    "log_probability": _log_probability,
    "mean_log_probability": lambda batch: (
        _log_probability(batch) / jnp.maximum(batch["answer_mask"].sum(1, keepdims=True), 1)
    ),
    "leave_one_out": lambda batch: -batch["left_out_log_probs"],
    "attention": lambda batch: batch["attention"],
    "teacher": lambda batch: batch["teacher_scores"],
}


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A divergence between the teacher's Q and the retriever's p_R, mean over examples.

    The batch holds questions in the format of `objectives.encoding`, `retrieved` int [B, k], and the
    columns of the signal.

    Attributes:
      first: "target" for KL(Q, p_R), "retriever" for KL(p_R, Q).
      decoder: the decoder that gives the signal, if any; the loss itself runs no decoder.
    """

    encoder: Network
    signal: str
    temperature: float
    first: str
    score_scale: float
    decoder: Network | None = None

    def __call__(self, trainable, frozen, batch, rng):
        scores = passage_scores(self.encoder, frozen | trainable, batch, self.score_scale)
        log_r = jax.nn.log_softmax(scores)
        signal = jax.lax.stop_gradient(SIGNALS[self.signal](batch))
        log_q = jax.nn.log_softmax(signal / self.temperature)
        divergence = kl(log_q, log_r) if self.first == "target" else kl(log_r, log_q)
        told = {
            "retrieval_entropy": entropy(log_r),
            "target_entropy": entropy(log_q),
            "tokens": tokens_read(batch),
        }
        loss = weighted_mean(divergence, batch["weight"])
        return loss, {name: weighted_mean(x, batch["weight"]) for name, x in told.items()}

    def cost(self) -> StepCost:
        """The cost of a step, including the decoder's likelihoods; other teachers are not counted."""

        def flops(task, table):
            read = 0.0 if self.decoder is None else costs.frozen_reading(self.decoder, table)
            return read + costs.trained_encoding(self.encoder, task, table, "retrieved")

        def unrolled():
            return dataclasses.replace(self, encoder=self.encoder.unrolled())

        return costs.declared(self, unrolled, flops, asked=lambda task: self.decoder)


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p, q) = sum_z p_z (log p_z - log q_z) [B], from log-probabilities [B, k]."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def entropy(log_p: jax.Array) -> jax.Array:
    """-sum_z p_z log p_z [B], in nats, from log-probabilities [B, k]."""
    return -(jnp.exp(log_p) * log_p).sum(-1)


METHODS: dict[str, dict[str, Any]] = {
    "lsr": {"signal": "probability", "temperature": 0.01, "first": "retriever"},
    "replug": {
        "signal": "probability", "temperature": 0.1, "first": "target", "score_scale": 10.0,
    },
    "pdist": {"signal": "log_probability", "temperature": 1.0, "first": "target"},
    "adist": {"signal": "attention", "temperature": 0.01, "first": "target"},
    "loop": {"signal": "leave_one_out", "temperature": 1.0, "first": "target"},
}  # fmt: skip


def distillation(
    method: str,
    decoder: Network,
    parts: PyTree,
    prompts: Prompts,
    retriever: Retriever,
    questions: Sequence[Example],
    *,
    train: tuple[str, ...] = ("query",),
    passages: int = 10,
    refresh: Policy | None = None,
    pool: Pool | None = None,
    **settings,
) -> Task:
    """Returns a task that tunes the retriever by a frozen generator's signal.

    Args:
      method: "lsr", "replug", "pdist", "adist", "loop" or "emdr".
      parts: `decoder` and `adapters` of the generator. Its signal is computed once per passage and
        question (for `adist` and `loop`, per set of passages).
      questions: all training examples; they determine the width of question arrays.
      train: the trained parts among `query`, `document`, `head`.
      passages: k, the number of passages retrieved per question with the current retriever.
      refresh: how the index follows the document encoder; None re-embeds everything at each retrieval.
      pool: `pool(example)`: the corpus rows that an example may find, if passages stay with their
        clients (`data.corpora.own_passages`); default: all.
      settings: `signal`, `temperature`, `first`, `score_scale`, which replace the method's own; for
        `emdr`, `marginal` ("token" for RAG-Token's) and `score_scale`.

    Raises:
      ConfigError: an unknown method or setting, no or unknown parts to train, or fewer than two
        passages.
    """
    if method == "emdr":
        _require_known(settings, ("marginal", "score_scale"))
        task = marginal_likelihood(
            decoder, parts, prompts, retriever, questions,
            train=train, passages=passages, refresh=refresh, pool=pool,
            **{"marginal": "sequence"} | settings,
        )  # fmt: skip
        return dataclasses.replace(task, name="emdr", label="retriever: EMDR²")
    if method not in METHODS:
        raise ConfigError(f"distillation: method is one of {[*METHODS, 'emdr']}, got {method!r}")
    loss = _loss(retriever, METHODS[method] | settings, decoder)
    if loss.signal == "teacher":
        raise ConfigError("distillation: signal 'teacher' needs another model: use `distilled`")
    sources = {"leave_one_out": LeaveOneOut, "attention": Attention}
    source = sources.get(loss.signal, Likelihoods)(decoder, parts, prompts)
    return _task(method, loss, source, retriever, questions, train, passages, refresh, pool)


def distilled(
    score: Callable[[list[str], list[str]], Any],
    retriever: Retriever,
    questions: Sequence[Example],
    *,
    train: tuple[str, ...] = ("query",),
    passages: int = 10,
    refresh: Policy | None = None,
    pool: Pool | None = None,
    **settings,
) -> Task:
    """Returns a task that tunes the retriever by a teacher's scores, such as a cross-encoder's.

    Args:
      score: `score(questions, texts) -> float [P]`: one score per pair; each pair is scored once.
      train, passages, refresh, pool: as in `distillation`.
      settings: `temperature`, `first`, `score_scale`.

    Raises:
      ConfigError: an unknown setting or one out of range, no or unknown parts to train, or fewer than
        two passages.
    """
    _require_known(settings, ("temperature", "first", "score_scale"))
    defaults = {"signal": "teacher", "temperature": 1.0, "first": "target"}
    teacher = Teacher(score, [embedding_text(p) for p in retriever.passages])
    loss = _loss(retriever, defaults | settings)
    return _task("distilled", loss, teacher, retriever, questions, train, passages, refresh, pool)


def _loss(retriever: Retriever, settings: dict[str, Any], decoder=None) -> Distillation:
    _require_known(settings, ("signal", "temperature", "first", "score_scale"))
    loss = Distillation(retriever.encoder, **{"score_scale": 20.0} | settings, decoder=decoder)
    if loss.signal not in SIGNALS or loss.first not in ("target", "retriever"):
        raise ConfigError(
            f"distillation: signal is one of {[*SIGNALS]} and first 'target' or 'retriever', got "
            f"{loss.signal!r} and {loss.first!r}"
        )
    if not (loss.temperature > 0 and loss.score_scale > 0):
        raise ConfigError(
            "distillation: temperature and score_scale must be > 0, got "
            f"{loss.temperature} and {loss.score_scale}"
        )
    return loss


def _require_known(settings: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := [name for name in settings if name not in known]:
        raise ConfigError(f"distillation: unknown settings {unknown}; choose among {[*known]}")


def _task(name, loss, source, retriever, examples, train, passages, refresh, pool) -> Task:
    if fault := too_few(passages):
        raise ConfigError(f"{name}: {fault}")
    trainable, frozen = trained_parts(retriever, train)
    questions = Questions(retriever, examples, frozen="query" not in train)
    read = Passages(retriever, train)

    def collate(some, rows):
        table = {"retrieved": rows} | questions(some) | read(retrieved=rows)
        return table | source(some, rows)

    return Task(
        name=name,
        trainable=trainable,
        frozen=frozen,
        loss=loss,
        collate=collate,
        cost=loss.cost(),
        label=f"retriever: {name.upper()}",
        **searching(retriever, train, passages, refresh, pool),
    )
