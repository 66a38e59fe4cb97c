"""One system on one set of questions: answers, retrieval, and the controls that keep them honest."""

from collections.abc import Sequence

import jax
import numpy as np

from fedrag_jax.data.examples import Example
from fedrag_jax.evaluation import metrics, rankings
from fedrag_jax.objectives.likelihood import answer_log_probs
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.retriever import Retriever

RANKED = 10  # passages searched for, as MRR@10 wants
BATCH = 32  # prompts whose likelihood is computed at once


def evaluate(
    system: RAGSystem, examples: Sequence[Example], rule: str = "squad", **how
) -> dict[str, np.ndarray]:
    """Per-question scores in [0, 1], each [Q]: `em`, `f1`, `recall_at_5`, `mrr`.

    Answers are greedy, from one prompt with the system's top-k passages, unless said otherwise.
    Rankings of questions without a gold passage have no score: NaN.

    Args:
      rule: of `metrics.f1`, such as "zh" and "ja" for answers in Chinese and Japanese.
      how: `mode`, `beams` and other options of `RAGSystem.answer`.
    """
    rows, cosines = ranking(system.retriever, examples, system.top_k)
    k = system.top_k
    scores = answers(system, examples, rows[:, :k], cosines[:, :k], rule, **how)
    return scores | rank_scores(system.retriever, examples, rows)


def ranking(
    retriever: Retriever, examples: Sequence[Example], read: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Corpus rows and cosines [Q, k] of as many passages as `rank_scores` wants, and as are read."""
    depth = min(max(RANKED, read), len(retriever.passages))
    return retriever.search([e.question for e in examples], depth)


def rank_scores(
    retriever: Retriever, examples: Sequence[Example], rows, depths: Sequence[int] = (5,)
) -> dict[str, np.ndarray]:
    """`recall_at_<depth>` and `mrr` [Q] of corpus rows [Q, >= 10], best first; NaN without gold."""
    golds = _gold_rows(retriever, examples)
    labelled = np.array([bool(gold) for gold in golds])
    ranked, golds = np.asarray(rows)[labelled], [gold for gold in golds if gold]

    def everywhere(scores):
        found = np.full(len(labelled), np.nan)
        found[labelled] = scores
        return found

    scores = {
        f"recall_at_{k}": everywhere(rankings.recall_at_k(ranked, golds, min(k, len(rows[0]))))
        for k in depths
    }
    return scores | {"mrr": everywhere(rankings.mrr(ranked, golds))}


def gold_passage(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """`em`, `f1` [Q] when the gold passages alone are read: the ceiling of a perfect retriever."""
    return answers(system, examples, [sorted(g) for g in _gold_rows(system.retriever, examples)])


def closed_book(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """`em`, `f1` [Q] without any passage: what the generator knows by heart."""
    return answers(system, examples, [()] * len(examples))


def distractor_passage(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """`em`, `f1` [Q] when the nearest passage without the answer stands in for the gold one.

    A question of whose nearest 50 passages none will do is read without a passage.
    """
    depth = min(50, len(system.retriever.passages))
    found, _ = system.retriever.search([e.question for e in examples], depth)
    golds = _gold_rows(system.retriever, examples)
    texts = [p.text for p in system.retriever.passages]
    rows = []
    for example, gold, ranked in zip(examples, golds, found, strict=True):
        alone = ranked[:, None]  # each passage as a ranking of its own
        told = rankings.answer_recall_at_k(alone, texts, [example.answers] * depth, 1)
        usable = [row for row, tells in zip(ranked, told, strict=True) if not tells]
        rows.append([row for row in usable if row not in gold][:1])
    return answers(system, examples, rows)


def answers(
    system: RAGSystem,
    examples: Sequence[Example],
    rows: Sequence[Sequence[int]],
    scores=None,
    rule: str = "squad",
    **how,
) -> dict[str, np.ndarray]:
    """`em`, `f1` [Q] when those corpus rows are read, whatever the retriever would find.

    Args:
      scores: cosines [Q, k] of the rows.
      rule, how: see `evaluate`.
    """
    predictions = system.answer([e.question for e in examples], rows, scores, **how)
    return metrics.score_answers(predictions, [e.answers for e in examples], rule)


def answer_nll(system: RAGSystem, examples: Sequence[Example], rows) -> np.ndarray:
    """-log p(first answer, EOS | passages, question) [Q], in nats, when corpus rows [Q, k] are read."""
    prompts, found = system.prompts.wide_enough_for(examples), []
    table = prompts.training_table(examples, rows, per_passage=False)
    for start in range(0, len(examples), BATCH):
        some = np.arange(start, start + BATCH) % len(examples)  # the last batch is filled up
        batch = {name: column[some] for name, column in table.items()}
        log_probs = _log_probs(system.decoder, system.generator.params, system.adapters, batch)
        found.append(-(np.asarray(log_probs)[:, 0] * batch["answer_mask"]).sum(1))
    return np.concatenate(found)[: len(examples)]


_log_probs = jax.jit(answer_log_probs, static_argnums=0)


def _gold_rows(retriever, examples) -> list[set[int]]:
    row = {p.id: i for i, p in enumerate(retriever.passages)}
    return [{row[i] for i in e.positive_ids} for e in examples]
