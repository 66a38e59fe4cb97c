"""Scores are of what a system answers from: a store of any kind, silos, or its own corpus."""

import dataclasses
import json

import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation import evaluator, metrics
from fedrag_jax.evaluation.benchmarks.benchmarker import Benchmarker
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.silos import over_silos
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.hybrid import HybridStore
from fedrag_jax.retrieval.stores.passage_source import Found, PassageSource
from fedrag_jax.retrieval.stores.qdrant import QdrantStore
from fedrag_jax.strategies.regimes import Budget
from fedrag_jax.systems import training

WORLD = synthetic.generate(synthetic.WorldConfig())
PASSAGES = WORLD.passages[:300]
HELD = {p.id for p in PASSAGES}
EXAMPLES = [e for e in WORLD.test if {*e.positive_ids} <= HELD][:24]
QUESTIONS = [e.question for e in EXAMPLES]


@pytest.fixture(scope="module")
def system():
    return RAGSystem.build(PASSAGES)


def filled(system, store):
    store.add(PASSAGES, None if store.dimension is None else system.embed(PASSAGES))
    return system.over(store)


def words(system):
    return filled(system, BM25Store())


def hnsw(system):
    return filled(system, FaissStore(system.retriever.vectors.shape[1], "hnsw", effort=300))


def hybrid(system):
    parts = [FaissStore(system.retriever.vectors.shape[1]), BM25Store()]
    return filled(system, HybridStore(parts))


def silos(system):
    rows = np.array_split(np.random.default_rng(0).permutation(len(PASSAGES)), 4)
    rows = [np.append(some, rows[0][:40]) if i else some for i, some in enumerate(rows)]
    apart = over_silos(system.retriever, rows, merge="rrf")
    return dataclasses.replace(system, retriever=apart)


def by_hand(system):
    """From what `retrieve` finds, question by question; answers of `batch_query`."""
    scores = {"recall_at_5": [], "mrr": []}
    for example, found in zip(EXAMPLES, system.retrieve(QUESTIONS, 10), strict=True):
        right = [f.passage.id in example.positive_ids for f in found]
        scores["recall_at_5"].append(float(any(right[:5])))
        scores["mrr"].append(1 / (1 + right.index(True)) if any(right) else 0.0)
    read = [[f.passage for f in some[:5]] for some in system.retrieve(QUESTIONS, 10)]
    answers = system.answer(QUESTIONS, read)
    return scores | metrics.score_answers(answers, [e.answers for e in EXAMPLES])


@pytest.mark.parametrize("kind", [words, hnsw, hybrid, silos])
def test_a_system_is_scored_by_what_it_answers_from(system, kind):
    flat, other = evaluator.evaluate(system, EXAMPLES), kind(system)
    found, expected = evaluator.evaluate(other, EXAMPLES), by_hand(other)
    assert found.keys() == expected.keys() == {"em", "f1", "recall_at_5", "mrr"}
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    rankings = evaluator.evaluate_retrieval(other, EXAMPLES, (3, 5))
    assert rankings.keys() == {"recall_at_3", "recall_at_5", "mrr"}
    for name in ("recall_at_5", "mrr"):
        np.testing.assert_array_equal(rankings[name], expected[name])
    assert (rankings["recall_at_3"] <= rankings["recall_at_5"]).all()
    same = [
        [f.passage.id for f in a] == [f.passage.id for f in b]
        for a, b in zip(system.retrieve(QUESTIONS, 10), other.retrieve(QUESTIONS, 10), strict=True)
    ]
    if kind is hnsw:  # it looks at everything, so it is as exact
        assert all(same)
        assert {n: x.tolist() for n, x in found.items()} == {n: x.tolist() for n, x in flat.items()}
    else:
        assert (found["mrr"] != flat["mrr"]).any() and not all(same)


def test_a_gold_passage_is_no_distractor_if_it_does_not_tell_the_answer(system, monkeypatch):
    monkeypatch.setattr(evaluator, "answers", lambda system, examples, read: read)
    first, second = (f.passage.id for f in system.retrieve(QUESTIONS[:1], 2)[0])
    for gold, other in ((first, second), (second, first)):
        asked = dataclasses.replace(EXAMPLES[0], answers=("nowhere",), positive_ids=(gold,))
        ((row,),) = evaluator.distractor_passage(system, [asked])
        assert PASSAGES[row].id == other


def test_modes_that_weigh_passages_have_the_scores_of_the_store(system):
    found = evaluator.evaluate(hnsw(system), EXAMPLES[:6], mode="rag_token", beams=2)
    expected = evaluator.evaluate(system, EXAMPLES[:6], mode="rag_token", beams=2)
    np.testing.assert_array_equal(found["f1"], expected["f1"])


def test_controls_read_what_the_store_has(system):
    over = words(system)
    texts = {p.id: p for p in PASSAGES}
    golds = [[texts[i] for i in e.positive_ids] for e in EXAMPLES]
    answers = [e.answers for e in EXAMPLES]
    expected = metrics.score_answers(system.answer(QUESTIONS, golds), answers)
    found = evaluator.gold_passage(over, EXAMPLES)
    np.testing.assert_array_equal(found["em"], expected["em"])
    read = []
    for example, some in zip(EXAMPLES, over.retrieve(QUESTIONS, 50), strict=True):
        said = [f" {' '.join(f.passage.text.lower().replace('.', '').split())} " for f in some]
        tells = [any(f" {a.lower()} " in text for a in example.answers) for text in said]
        usable = [f.passage for f, told in zip(some, tells, strict=True) if not told]
        read.append([p for p in usable if p.id not in example.positive_ids][:1])
    expected = metrics.score_answers(system.answer(QUESTIONS, read), answers)
    np.testing.assert_array_equal(
        evaluator.distractor_passage(over, EXAMPLES)["f1"], expected["f1"]
    )
    # Without the corpus: nothing but the store is looked at.
    alone = RAGSystem.build(store=over.store)
    for control in (evaluator.gold_passage, evaluator.closed_book, evaluator.distractor_passage):
        np.testing.assert_array_equal(control(alone, EXAMPLES)["f1"], control(over, EXAMPLES)["f1"])


def test_less_may_be_found_than_is_looked_for(system):
    store = BM25Store()
    store.add(PASSAGES[:3])
    asked = [
        Example("a", PASSAGES[0].title, ("x",), (PASSAGES[0].id,)),
        Example("b", "zzzz", ("x",), (PASSAGES[1].id,)),
        Example("c", "zzzz", ("x",), ()),
    ]
    found = evaluator.evaluate(system.over(store), asked)
    np.testing.assert_array_equal(found["mrr"], [1.0, 0.0, np.nan])
    np.testing.assert_array_equal(found["recall_at_5"], [1.0, 0.0, np.nan])


class _Elsewhere(PassageSource):
    """Finds, and tells nothing else."""

    kind, cosines = "elsewhere", False

    def search(self, questions, vectors=None, k=5):
        return [[Found(p, 1.0) for p in PASSAGES[:k]] for _ in questions]

    def _settings(self):
        return {}

    def _save(self, folder):
        raise NotImplementedError

    @classmethod
    def _load(cls, folder, regimes, memory_map):
        raise NotImplementedError


def test_what_cannot_be_scored_is_refused_by_name(system, tmp_path):
    foreign = system.over(_Elsewhere())
    for score in (evaluator.evaluate, evaluator.gold_passage, evaluator.distractor_passage):
        with pytest.raises(ConfigError, match="kind 'elsewhere' does not list its passages"):
            score(foreign, EXAMPLES[:2])
    bare = [dataclasses.replace(e, positive_ids=()) for e in EXAMPLES[:2]]
    found = evaluator.evaluate(foreign, bare)
    assert np.isnan(found["mrr"]).all() and np.isfinite(found["f1"]).all()
    lost = [dataclasses.replace(EXAMPLES[0], positive_ids=("gone",))]
    with pytest.raises(DataError, match=f"{EXAMPLES[0].id!r} has positive id 'gone'"):
        evaluator.evaluate(system, lost)
    with pytest.raises(
        DataError, match="positive_ids of the questions: passage id 'gone' is not in"
    ):
        evaluator.evaluate(words(system), lost)


def test_passages_of_a_benchmark_are_searched_as_the_system_searches(system, tmp_path):
    with open(tmp_path / "squad.passages.jsonl", "w") as file:
        for p in PASSAGES:
            file.write(json.dumps(dataclasses.asdict(p)) + "\n")
    with open(tmp_path / "squad.questions.jsonl", "w") as file:
        for e in EXAMPLES:
            row = {"id": e.id, "question": e.question, "answers": e.answers}
            row |= {"positive_ids": e.positive_ids, "split": "validation"}
            file.write(json.dumps(row) + "\n")

    def run(using):
        benchmarker = Benchmarker(using, progress=False)
        return benchmarker.run("squad", source=tmp_path, corpus="benchmark")

    mrr = run(words(system)).metrics["mrr"].mean
    assert mrr == pytest.approx(100 * np.mean(by_hand(words(system))["mrr"]))
    assert mrr != run(system).metrics["mrr"].mean
    assert run(hybrid(system)).system["search"].count("bm25") == 1
    dimension = system.retriever.vectors.shape[1]
    for using, error in (
        (silos(system), "silos cannot be filled with others"),
        (system.over(_Elsewhere()), "kind 'elsewhere' cannot be filled"),
        (
            system.over(QdrantStore("c", dimension, str(tmp_path / "q"))),
            "an external store of kind 'qdrant'",
        ),
    ):
        with pytest.raises(ConfigError, match=error):
            run(using)


@pytest.mark.slow
def test_training_reports_scores_of_the_system_that_it_leaves(system, tmp_path):
    over = words(system)
    asked = [e for e in WORLD.train if {*e.positive_ids} <= HELD][:8]
    found = training.train(
        over,
        Dataset("own", PASSAGES, asked, EXAMPLES, []),
        tmp_path,
        strategy="retriever",
        regime="centralised",
        budget=Budget(1, 1, 1, 4),
        clients=Partition(asked, (np.arange(len(asked)),)),
        rates={"query": 1e-2},
        factors=[1.0],
    )
    mrr = np.mean(by_hand(over)["mrr"])
    # Who looks for words finds the same, however its encoder is trained.
    assert found.before["mrr"] == found.best.scores["mrr"] == pytest.approx(mrr)
    assert found.system.store is over.store
