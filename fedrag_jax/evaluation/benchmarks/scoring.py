"""Scores of one question, in [0, 1]; NaN where a score does not apply to it."""

import math
from collections.abc import Collection, Sequence

import numpy as np

from fedrag_jax.data.examples import Passage, reading_text
from fedrag_jax.data.hub_rows import Question
from fedrag_jax.evaluation import metrics, rankings
from fedrag_jax.evaluation.benchmarks.sets import BenchmarkSet

Scores = dict[str, float]
DEPTH = {"retrieval": 100}  # passages ranked by kind; else as many as MRR@10 wants
USUAL_DEPTH = 10


def open_answer(known: BenchmarkSet, question: Question, answer: str) -> Scores:
    """`em` and `f1` by the set's rule, and what the set has beside them.

    By SQuAD v2's, words that say that nothing is known count as the empty answer, which is right where
    there is none: `answerable_em`, `unanswerable_em` tell the two sorts of questions apart.
    """
    unknown = bool(metrics.abstained([answer])[0])
    said = "" if unknown and known.rule == "squad_v2" else answer
    scores = {
        "em": metrics.exact_match(said, question.answers, known.rule),
        "f1": metrics.f1(said, question.answers, known.rule),
        "abstained": float(unknown),
    }
    if "substring" in known.also:
        scores["substring"] = metrics.substring_match(answer, question.answers)
    if "answerable" in known.also:
        has, nan = bool(question.answers), math.nan
        scores["answerable_em"] = scores["em"] if has else nan
        scores["unanswerable_em"] = nan if has else scores["em"]
    return scores


def chosen(question: Question, choice: int | None) -> Scores:
    """Of a choice that was written: `accuracy`, `unparsable`."""
    return {"accuracy": float(choice == question.label), "unparsable": float(choice is None)}


def likeliest(
    question: Question, texts: Sequence[str], log_probs: np.ndarray, lengths: Sequence[int]
) -> Scores:
    """`accuracy` of the choice with the highest log p, `accuracy_per_token` and `accuracy_per_byte` of
    the highest mean over its tokens and over its bytes in UTF-8; of equal ones the first.

    In English, by byte is `acc_norm` of lm-evaluation-harness, which counts characters, and `acc_bytes`
    anywhere. Neither depends on the tokenizer.

    Args:
      texts: of the choices, as they are scored.
      lengths: of them, in tokens.
    """
    in_bytes = [len(text.encode()) for text in texts]
    by = {"": [1] * len(texts), "_per_token": lengths, "_per_byte": in_bytes}
    return {
        f"accuracy{name}": float((log_probs / np.maximum(n, 1)).argmax() == question.label)
        for name, n in by.items()
    }


def ranked(
    known: BenchmarkSet, question: Question, found: Sequence[Passage], corpus: Collection[str]
) -> Scores:
    """Of passages best first: `recall_at_5`, `mrr` and, where ranking is all, `ndcg_at_10` and
    `recall_fraction_at_100`, which is BEIR's Recall@100.

    NaN for a question without gold passages, or with one that the corpus does not have.

    Args:
      corpus: ids of all passages searched.
    """
    wanted = {
        "recall_at_5": lambda ids, golds: rankings.recall_at_k(ids, golds, min(5, len(ids[0]))),
        "mrr": rankings.mrr,
    }
    if "recall_all" in known.also:
        wanted["recall_all_at_5"] = lambda ids, golds: rankings.recall_all_at_k(
            ids, golds, min(5, len(ids[0]))
        )
    if known.kind == "retrieval":
        wanted["ndcg_at_10"] = rankings.ndcg
        wanted["recall_fraction_at_100"] = lambda ids, golds: rankings.recall_fraction_at_k(
            ids, golds, min(100, len(ids[0]))
        )
    if not question.golds or not all(gold in corpus for gold in question.golds):
        return dict.fromkeys(wanted, math.nan)
    if not found:
        return dict.fromkeys(wanted, 0.0)
    ids = [[passage.id for passage in found]]
    return {name: float(score(ids, [question.golds])[0]) for name, score in wanted.items()}


def told(question: Question, read: Sequence[Passage]) -> Scores:
    """`answer_in_passages`: whether one of the answers is somewhere in what was read, gold or not."""
    if not question.answers:
        return {"answer_in_passages": math.nan}
    if not read:
        return {"answer_in_passages": 0.0}
    rows, texts = [[*range(len(read))]], [reading_text(p) for p in read]
    found = rankings.answer_recall_at_k(rows, texts, [question.answers], len(read))
    return {"answer_in_passages": float(found[0])}
