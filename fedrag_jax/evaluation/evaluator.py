"""Evaluates a system on a set of questions: answers, retrieval, and controls."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Unpack

import jax
import numpy as np

from fedrag_jax.data.examples import Example, Passage, ids_of
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation import metrics, rankings
from fedrag_jax.generation.inference import SEARCH
from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.generation.text import AnsweringOptions
from fedrag_jax.models.network import Network
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore

RANKED = 10  # passages searched for, as MRR@10 wants
DISTRACTORS = 50  # passages among which one without the answer is looked for
BATCH = 32  # prompts whose likelihood is computed at once


def evaluate(
    system: RAGSystem,
    examples: Sequence[Example],
    rule: str = "squad",
    **how: Unpack[AnsweringOptions],
) -> dict[str, np.ndarray]:
    """Returns scores per question in [0, 1], each [Q]: `em`, `f1`, `recall_at_5`, `mrr`.

    The system searches its own passages, or its store if it has one. There is one search with enough
    passages for the rankings, and the first top-k are read. By default answers are greedy, from one
    prompt. The ranking scores of questions without a gold passage are NaN.

    Args:
      rule: rule of `metrics.f1`, such as "zh" and "ja" for answers in Chinese and Japanese.
      how: `mode`, `beams` and other options of `RAGSystem.batch_query`. In mode "search" the result
        also has `searches`, the number of searches per question; rankings are those of the question
        itself.

    Raises:
      DataError: a gold passage that is not among the system's passages.
      ConfigError: questions with gold passages, and a store that does not list its passages.
    """
    golds, k = _golds(system, examples), system.top_k
    found = _found(system, examples, max(RANKED, k))
    if how.get("mode") == SEARCH:
        responses = system.batch_query([e.question for e in examples], **how)
        told = [response.answer for response in responses]
        scores = metrics.score_answers(told, [e.answers for e in examples], rule)
        scores["searches"] = np.array([len(response.searches) for response in responses])
    else:
        weights = None if found.scores is None else [some[:k] for some in found.scores]
        scores = answers(system, examples, [some[:k] for some in found.read], weights, rule, **how)
    return scores | _rank_scores(*_numbered(found.names, golds), (5,))


def evaluate_retrieval(
    system: RAGSystem, examples: Sequence[Example], depths: Sequence[int] = (5,)
) -> dict[str, np.ndarray]:
    """`recall_at_<depth>` and `mrr` as `evaluate` gives them, each [Q], without answering anything.

    Raises:
      DataError, ConfigError: as `evaluate`.
    """
    golds = _golds(system, examples)
    found = _found(system, examples, max(RANKED, *depths))
    return _rank_scores(*_numbered(found.names, golds), depths)


def ranking(
    retriever: Retriever, examples: Sequence[Example], read: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns corpus rows and similarities [Q, k] of the passages for `rank_scores` and for reading."""
    depth = min(max(RANKED, read), len(retriever.passages))
    return retriever.search([e.question for e in examples], depth)


def rank_scores(
    retriever: Retriever, examples: Sequence[Example], rows, depths: Sequence[int] = (5,)
) -> dict[str, np.ndarray]:
    """Returns `recall_at_<depth>` and `mrr` [Q] of corpus rows [Q, >= 10], best first; NaN without
    gold.

    Raises:
      DataError: a gold passage that is not in the corpus.
    """
    return _rank_scores(rows, _gold_rows(retriever, examples), depths)


def _rank_scores(rows, golds: Sequence[set], depths: Sequence[int]) -> dict[str, np.ndarray]:
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


def rankings_alone(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """The scores of `evaluate` without answering anything: `em` and `f1` are NaN.

    Raises:
      DataError, ConfigError: as `evaluate`.
    """
    names = _found(system, examples, max(RANKED, system.top_k)).names
    unknown = np.full(len(examples), np.nan)
    scores = _rank_scores(*_numbered(names, _golds(system, examples)), (5,))
    return {"em": unknown, "f1": unknown} | scores


# --- controls --------------------------------------------------------------------------------------


def gold_passage(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Returns `em`, `f1` [Q] with only the gold passages: the ceiling of a perfect retriever.

    Raises:
      DataError, ConfigError: as `evaluate`.
    """
    golds = _golds(system, examples)
    if system.store is None:
        return answers(system, examples, [sorted(rows) for rows in golds])
    known: dict[str, Passage] = {}
    if any(golds):
        assert isinstance(system.store, KnowledgeStore)  # or there would be no golds
        known = {p.id: p for p in system.store.get([*set().union(*golds)])}
    ids = [dict.fromkeys(e.positive_ids) for e in examples]
    return answers(system, examples, [[known[i] for i in some] for some in ids])


def closed_book(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Returns `em`, `f1` [Q] without any passage: what the generator has memorised."""
    return answers(system, examples, [()] * len(examples))


def distractor_passage(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Returns `em`, `f1` [Q] with the nearest passage without the answer instead of the gold one.

    If all of a question's nearest 50 passages contain an answer, it is read without a passage.

    Raises:
      DataError, ConfigError: as `evaluate`.
    """
    golds, found = _golds(system, examples), _found(system, examples, DISTRACTORS)
    read = []
    for example, gold, some, names in zip(examples, golds, found.read, found.names, strict=True):
        texts = [_passage(system, one).text for one in some]
        alone = np.arange(len(texts))[:, None]  # each passage as a ranking of its own
        told = rankings.answer_recall_at_k(alone, texts, [example.answers] * len(texts), 1)
        usable = zip(some, names, told, strict=True)
        read.append([one for one, name, tells in usable if not tells and name not in gold][:1])
    return answers(system, examples, read)


def answers(
    system: RAGSystem,
    examples: Sequence[Example],
    rows: Sequence[Sequence[int | Passage]],
    scores=None,
    rule: str = "squad",
    **how,
) -> dict[str, np.ndarray]:
    """Returns `em`, `f1` [Q] for the given corpus rows or passages, without a search.

    Args:
      scores: similarities [Q, k] of the passages.
      rule, how: see `evaluate`.
    """
    predictions = system.answer([e.question for e in examples], rows, scores, **how)
    return metrics.score_answers(predictions, [e.answers for e in examples], rule)


def answer_nll(system: RAGSystem, examples: Sequence[Example], rows) -> np.ndarray:
    """Returns -log p(first answer, EOS | passages, question) [Q], in nats, for corpus rows [Q, k]."""
    prompts, found = system.prompts.wide_enough_for(examples), []
    table = prompts.training_table(examples, rows, per_passage=False)
    for start in range(0, len(examples), BATCH):
        some = np.arange(start, start + BATCH) % len(examples)  # the last batch is filled up
        batch = {name: column[some] for name, column in table.items()}
        log_probs = _log_probs(system.decoder, system.generator.params, system.adapters, batch)
        found.append(-(np.asarray(log_probs)[:, 0] * batch["answer_mask"]).sum(1))
    return np.concatenate(found)[: len(examples)]


_log_probs = jax.jit(answer_log_probs, static_argnums=0)


def traced(network: Network, params, adapters, table, place: Callable) -> jax.stages.Traced:
    """Returns the traced program of `answer_nll`, from shapes.

    Args:
      table: shapes of `Prompts.training_table`.
      place: `place(tree)`: adds the placement to shapes.
    """
    batch = {k: jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype) for k, x in table.items()}
    return _log_probs.trace(network, *place((params, adapters, batch)))


# --- what a system answers from --------------------------------------------------------------------


class _Found(NamedTuple):
    """The passages a system finds for each of Q questions, best first.

    Attributes:
      read: corpus rows, or passages of a store.
      scores: their similarities; None if a store uses other scores.
      names: their identifiers: corpus rows or ids.
    """

    read: np.ndarray | Sequence[Sequence[int | Passage]]
    scores: np.ndarray | Sequence[Sequence[float]] | None
    names: np.ndarray | Sequence[Sequence[Hashable]]


def _found(system: RAGSystem, examples: Sequence[Example], depth: int) -> _Found:
    """Returns the `depth` best passages, or all of them."""
    if system.store is None:  # rows, because the corpus is tokenised
        rows, scores = ranking(system.retriever, examples, depth)
        return _Found(rows, scores, rows)
    found = system.retrieve([e.question for e in examples], depth)
    return _Found(
        [[f.passage for f in some] for some in found],
        [[f.score for f in some] for some in found] if system.store.cosines else None,
        [[f.passage.id for f in some] for some in found],
    )


def _passage(system: RAGSystem, one: int | Passage) -> Passage:
    return one if isinstance(one, Passage) else system.retriever.passages[one]


def _golds(system: RAGSystem, examples: Sequence[Example]) -> list[set]:
    """Returns the gold passages of each question, by the names of `_Found`."""
    store, golds = system.store, [{*e.positive_ids} for e in examples]
    if store is None:
        return _gold_rows(system.retriever, examples)
    if not any(golds):
        return golds
    if not isinstance(store, KnowledgeStore):
        raise ConfigError(
            f"a store of kind {store.kind!r} does not list its passages, so its rankings cannot be "
            "scored: give questions without positive_ids, then only answers are scored"
        )
    try:
        store.get(sorted(set().union(*golds)))
    except DataError as error:
        raise DataError(
            f"positive_ids of the questions: {error}; give the ids that its passages have, or none"
        ) from error
    return golds


def _gold_rows(retriever: Retriever, examples: Sequence[Example]) -> list[set[int]]:
    row = {identifier: i for i, identifier in enumerate(ids_of(retriever.passages))}
    for example in examples:
        if missing := {*example.positive_ids} - row.keys():
            raise DataError(
                f"question {example.id!r} has positive id {min(missing)!r}, which none of the "
                f"{len(row):,} passages has: give the ids that they have, or none"
            )
    return [{row[i] for i in e.positive_ids} for e in examples]


def _numbered(
    names: np.ndarray | Sequence[Sequence[Hashable]], golds: Sequence[set]
) -> tuple[np.ndarray, list[set[int]]]:
    """Returns rankings int [Q, k >= 10] with a number per passage, and gold numbers; missing results
    get numbers of no passage."""
    number: dict[Hashable, int] = {}
    ranked = np.tile(-1 - np.arange(max(RANKED, *map(len, names))), (len(names), 1))
    for row, some in zip(ranked, names, strict=True):
        row[: len(some)] = [number.setdefault(name, len(number)) for name in some]
    return ranked, [{number.setdefault(name, len(number)) for name in gold} for gold in golds]
