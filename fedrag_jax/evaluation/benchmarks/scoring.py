"""Scores of one question, in [0, 1]; NaN if a score does not apply to it."""

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
    """Returns `em` and `f1` by the benchmark's rule, and its additional scores.

    With SQuAD v2's rule, an abstention counts as the empty answer, which is correct for unanswerable
    questions; `answerable_em` and `unanswerable_em` separate the two kinds of questions.
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
    """Scores a written choice: `accuracy`, `unparsable`."""
    return {"accuracy": float(choice == question.label), "unparsable": float(choice is None)}


def likeliest(
    question: Question, texts: Sequence[str], log_probs: np.ndarray, lengths: Sequence[int]
) -> Scores:
    """Returns `accuracy` of the choice with the highest log p, and `accuracy_per_token` and
    `accuracy_per_byte` with the highest mean per token and per UTF-8 byte; ties go to the first choice.

    In English, the score per byte equals `acc_norm` of lm-evaluation-harness, which counts characters;
    in any language it equals `acc_bytes`. Neither depends on the tokenizer.

    Args:
      texts: the scored texts of the choices.
      lengths: their lengths in tokens.
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
    """Scores a ranking, best first: `recall_at_5`, `mrr` and, for retrieval benchmarks, `ndcg_at_10`
    and `recall_fraction_at_100`, which is BEIR's Recall@100.

    The scores are NaN for a question without gold passages, or with one that is not in the corpus.

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


def answer_in_passages(question: Question, read: Sequence[Passage]) -> Scores:
    """Returns `answer_in_passages`: whether any passage read contains an answer, gold or not."""
    if not question.answers:
        return {"answer_in_passages": math.nan}
    if not read:
        return {"answer_in_passages": 0.0}
    rows, texts = [[*range(len(read))]], [reading_text(p) for p in read]
    found = rankings.answer_recall_at_k(rows, texts, [question.answers], len(read))
    return {"answer_in_passages": float(found[0])}
