"""Silos that search together against one index, and against fusing, choosing and counting by hand."""

import dataclasses
import itertools
import tracemalloc
from collections import defaultdict

import jax
import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.objectives.joint import marginal_likelihood
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.device_index import DeviceIndex
from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.index.silos import QueryTraffic, SearchBudget, fuse, over_silos
from fedrag_jax.retrieval.retriever import Retriever

N, DIMENSION, ROW_AND_SCORE = 300, 16, 8


def unit(count, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def retriever_of(vectors):
    """One index; nothing here embeds questions."""
    passages = [Passage(f"p{i}", "ä" * (i % 7), f"text {i}") for i in range(len(vectors))]
    store = FaissIndex.build(vectors)
    return Retriever(None, None, None, None, passages, vectors, vectors, store)


WHOLE = retriever_of(unit(N, 0))
QUERIES = unit(30, 1)


def dealt(silos, seed=2):
    """Rows of silos of unequal size."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, N), silos - 1, replace=False))
    return np.split(rng.permutation(N), cuts)


def overlapping(silos, copies=100):
    """Each passage with one silo at least, some with another, too."""
    rng = np.random.default_rng(4)
    again = rng.integers(0, silos, N)
    return [
        np.union1d(rows, np.flatnonzero(again[:copies] == number))
        for number, rows in enumerate(dealt(silos))
    ]


def assert_same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    assert (found[0].dtype, found[1].dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("k", [1, 10, N])
@pytest.mark.parametrize("silos", [1, 2, 7, 100])
def test_merging_by_score_is_one_index(silos, k, queries):
    found = over_silos(WHOLE, dealt(silos)).index.search(QUERIES[:queries], k)
    assert_same(found, WHOLE.index.search(QUERIES[:queries], k))


@pytest.mark.parametrize("merge", ["score", "rrf"])
def test_one_silo_is_one_index(merge):
    alone = over_silos(WHOLE, [np.arange(N)], merge=merge, budget=SearchBudget(silos=1))
    assert_same(alone.index.search(QUERIES, 10), WHOLE.index.search(QUERIES, 10))
    assert alone.index.published_bytes == 0


@pytest.mark.parametrize("queries", [1, 30])
def test_ties_between_silos_are_ordered_by_row(queries):
    vectors = unit(N, 0)
    copies = np.sort(np.random.default_rng(3).choice(N, 40, replace=False))
    vectors[copies] = vectors[copies[0]]
    rows, _ = over_silos(retriever_of(vectors), dealt(6)).index.search(
        np.repeat(vectors[copies[:1]], queries, 0), 25
    )
    assert (rows == copies[:25]).all()


def test_a_passage_with_several_silos_is_found_once():
    assert_same(
        over_silos(WHOLE, overlapping(5)).index.search(QUERIES, 20),
        WHOLE.index.search(QUERIES, 20),
    )


def test_silos_may_search_on_the_device():
    store = over_silos(WHOLE, dealt(3), index=DeviceIndex.build).index
    assert all(type(silo.index) is DeviceIndex for silo in store.silos)
    assert_same(store.search(QUERIES, 10), WHOLE.index.search(QUERIES, 10))


@pytest.mark.parametrize("per_silo", [None, 4])
@pytest.mark.parametrize("split", [dealt, overlapping])
def test_reciprocal_rank_fusion_against_a_dictionary(split, per_silo):
    silos, k = split(5), 9
    budget = SearchBudget(passages_per_silo=per_silo)
    found = over_silos(WHOLE, silos, merge="rrf", budget=budget).index.search(QUERIES, k)
    for query, rows, scores in zip(QUERIES, *found, strict=True):
        cosine = WHOLE.vectors.astype(np.float64) @ query
        votes = defaultdict(float)
        for held in silos:
            best = sorted(held, key=lambda row: -cosine[row])[: per_silo or k]
            for rank, row in enumerate(best, start=1):
                votes[row] += 1 / (60 + rank)
        expected = sorted(votes, key=lambda row: (-round(votes[row], 12), -cosine[row], row))
        assert rows.tolist() == expected[:k]
        np.testing.assert_allclose(scores, cosine[rows], atol=1e-6)  # cosines, not votes


def test_votes_of_several_silos_add_up():
    # Row 7 is second with two silos, rows 3 and 5 are first with one each.
    question, row = np.zeros(4, int), np.array([3, 7, 5, 7])
    score, rank = np.array([0.9, 0.2, 0.8, 0.2], np.float32), np.array([1, 2, 1, 2])
    how = {"questions": 1, "k": 3}
    assert fuse(question, row, score, rank, merge="rrf", **how)[0].tolist() == [[7, 3, 5]]
    assert fuse(question, row, score, rank, merge="score", **how)[0].tolist() == [[3, 5, 7]]


@pytest.mark.parametrize(
    ("better", "worse", "otherwise"), [((1, 13), (5, 8), 61), ((6, 9), (2, 14), 59)]
)
def test_sixty_is_added_to_ranks_from_one(better, worse, otherwise):
    def votes(ranks, constant=60):
        return sum(1 / (constant + rank) for rank in ranks)

    assert votes(better) > votes(worse) and votes(better, otherwise) < votes(worse, otherwise)
    rows, _ = fuse(
        np.zeros(4, int),
        np.array([9, 9, 2, 2]),
        np.full(4, 0.5),
        np.array(better + worse),
        questions=1,
        k=2,
        merge="rrf",
    )
    assert rows.tolist() == [[9, 2]]


def test_the_same_votes_in_another_order_are_a_tie():
    row = np.repeat([4, 2], 3)
    rank = np.array([1, 2, 7, 1, 7, 2])  # added up as they stand, these differ in the last digit
    assert sum(1 / (60 + rank[:3])) != sum(1 / (60 + rank[3:]))
    rows, _ = fuse(
        np.zeros(6, int), row, np.full(6, 0.5), rank, questions=1, k=2, merge="rrf"
    )  # fmt: skip
    assert rows.tolist() == [[2, 4]]


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_budget_asks_the_silos_with_the_nearest_centroids(most):
    silos, k = dealt(6, seed=11), 5
    store = over_silos(WHOLE, silos, budget=SearchBudget(silos=most), centroids=3).index
    assert [len(p) for p in store.published] == [min(3, len(rows)) for rows in silos]
    assert store.published_bytes == sum(map(len, store.published)) * DIMENSION * 4
    norms = np.linalg.norm(np.concatenate(store.published), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
    rows, scores, traffic = store.ask(QUERIES, k)
    assert (traffic.silos == most).all()
    for query, found, cosines in zip(QUERIES, rows, scores, strict=True):
        near = [max(centroids @ query) for centroids in store.published]
        nearest = sorted(range(6), key=lambda i: -near[i])
        together = itertools.combinations(nearest, most)
        chosen = next(some for some in together if sum(min(len(silos[i]), k) for i in some) >= k)
        held = np.concatenate([silos[i] for i in chosen])
        cosine = WHOLE.vectors @ query
        assert found.tolist() == sorted(held, key=lambda row: -cosine[row])[:k]
        np.testing.assert_allclose(cosines, cosine[found], atol=1e-6)


def test_a_question_goes_to_the_silo_about_it():
    axes = np.eye(DIMENSION, dtype=np.float32)[:4]
    noise = 0.1 * np.random.default_rng(0).normal(size=(N, DIMENSION))
    whole = retriever_of((axes[np.arange(N) % 4] + noise).astype(np.float32))
    silos = [np.arange(topic, N, 4) for topic in range(4)]
    narrow = over_silos(whole, silos, budget=SearchBudget(silos=1), centroids=1).index
    assert_same(narrow.search(axes, 10), whole.index.search(axes, 10))


def test_a_silo_is_passed_over_where_too_little_would_be_left():
    silos = [np.arange(3), np.arange(3, 5), np.arange(5, N)]
    at_home = WHOLE.vectors[:3]  # what the first silo would be asked
    for most, k, passed_over in ((1, 3, False), (1, 4, True), (2, 10, False)):
        store = over_silos(WHOLE, silos, budget=SearchBudget(silos=most)).index
        assert (store.search(at_home, k)[0].min() > 2) == passed_over
    with pytest.raises(ConfigError, match="2 silos have at most 8 passages, but 10 are needed"):
        held = [*silos[:2], np.arange(5, 10), np.arange(10, N)]
        few = SearchBudget(silos=2, passages_per_silo=4)
        over_silos(WHOLE, held, budget=few).index.search(at_home, 10)


def test_traffic_is_that_of_every_message():
    silos, k, per_silo = dealt(5), 8, 4
    heard = []
    retriever = over_silos(
        WHOLE, silos, budget=SearchBudget(3, per_silo), centroids=2, listen=heard.append
    )
    rows, _ = retriever.index.search(QUERIES, k)
    (traffic,) = heard
    assert isinstance(traffic, QueryTraffic)
    texts = [len(embedding_text(p).encode()) for p in WHOLE.passages]
    assert max(texts) > max(len(embedding_text(p)) for p in WHOLE.passages)  # bytes, not characters
    np.testing.assert_array_equal(traffic.silos, np.full(30, 3))
    np.testing.assert_array_equal(traffic.query_bytes, np.full(30, 3 * DIMENSION * 4))
    np.testing.assert_array_equal(traffic.answer_bytes, np.full(30, 3 * per_silo * ROW_AND_SCORE))
    fetched = [sum(texts[row] for row in found) for found in rows]
    np.testing.assert_array_equal(traffic.passage_bytes, fetched)
    np.testing.assert_array_equal(traffic.total_bytes, 3 * (64 + per_silo * 8) + np.array(fetched))


def test_small_silos_answer_with_what_they_have():
    silos = [np.arange(2), np.arange(2, N)]
    assert (
        over_silos(WHOLE, silos).index.ask(QUERIES, 5)[2].answer_bytes == (2 + 5) * ROW_AND_SCORE
    ).all()


@pytest.mark.parametrize("most", [None, 1])
def test_what_the_asker_has_is_free_and_counts_for_no_budget(most):
    silos, k = dealt(4, seed=12), 6
    budget = SearchBudget(most, passages_per_silo=k if most is None else 4)
    store = over_silos(WHOLE, silos, budget=budget, asker=1, centroids=2).index
    rows, _, traffic = store.ask(QUERIES, k)
    assert (traffic.silos == (most or 3)).all()
    assert store.published_bytes == (0 if most is None else 3 * 2 * DIMENSION * 4)
    texts = [len(embedding_text(p).encode()) for p in WHOLE.passages]
    away = [sum(texts[row] for row in found if row not in silos[1]) for found in rows]
    np.testing.assert_array_equal(traffic.passage_bytes, away)
    if most is None:
        assert_same(store.search(QUERIES, k), WHOLE.index.search(QUERIES, k))
    else:
        cosine = QUERIES @ WHOLE.vectors[silos[1]].T
        own = silos[1][cosine.argmax(1)]
        better = (cosine.max(1)[:, None] <= QUERIES @ WHOLE.vectors.T).sum(1) <= k
        assert all(row in found for row, found in zip(own[better], rows[better], strict=True))


def test_no_questions_cost_nothing():
    rows, scores, traffic = over_silos(WHOLE, dealt(3)).index.ask(np.empty((0, DIMENSION)), 4)
    assert rows.shape == scores.shape == (0, 4) and traffic.total_bytes.shape == (0,)


def test_other_vectors_are_searched_and_published_by_the_same_silos():
    budget, vectors = SearchBudget(silos=2), unit(N, 9)
    moved = over_silos(WHOLE, dealt(5), merge="rrf", budget=budget).index.with_vectors(vectors)
    afresh = over_silos(retriever_of(vectors), dealt(5), merge="rrf", budget=budget).index
    assert_same(moved.search(QUERIES, 7), afresh.search(QUERIES, 7))
    for centroids, same in zip(moved.published, afresh.published, strict=True):
        np.testing.assert_array_equal(centroids, same)


# Where a retriever is used.


@pytest.fixture(scope="module")
def system():
    world = synthetic.generate()
    return RAGSystem.build(world.passages[:60], world.train[:8], top_k=3, marginal_k=4), world


@pytest.fixture
def scattered(system):
    system, _ = system
    silos = np.array_split(np.random.default_rng(0).permutation(60), 5)
    return dataclasses.replace(system, retriever=over_silos(system.retriever, silos))


def test_a_system_answers_from_silos_as_from_one_index(system, scattered):
    system, world = system
    heard = []
    store = dataclasses.replace(scattered.retriever.index, listen=heard.append)
    retriever = dataclasses.replace(scattered.retriever, index=store)
    scattered = dataclasses.replace(scattered, retriever=retriever)
    questions = [e.question for e in world.test[:3]]
    for ours, theirs in zip(
        scattered.batch_query(questions), system.batch_query(questions), strict=True
    ):
        assert (ours.answer, ours.sources) == (theirs.answer, theirs.sources)
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-6)
    assert [len(traffic.silos) for traffic in heard] == [3]


def test_training_retrieves_from_silos_and_from_what_they_embed_anew(system, scattered):
    system, world = system
    examples = world.train[:8]

    def task(of):
        return marginal_likelihood(
            of.decoder,
            {"decoder": of.generator.params, "adapters": of.adapters},
            of.prompts,
            of.retriever,
            examples,
            train=("query", "document"),
            passages=of.marginal_k,
        )

    def moved(x):
        return x + 0.1 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32)

    trained = {"document": jax.tree.map(moved, system.retriever.document)}
    found = task(scattered).retrieve(examples, trained)
    np.testing.assert_array_equal(found, task(system).retrieve(examples, trained))
    assert (found != task(scattered).retrieve(examples, {})).any()
    tuned = scattered.replace(document=trained["document"], query=system.retriever.query)
    assert len(tuned.retriever.index.silos) == 5


# What is refused.


def test_budgets_that_allow_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"budget\.silos must be at least 1, got 0"):
        over_silos(WHOLE, dealt(3), budget=SearchBudget(silos=0))
    with pytest.raises(ConfigError, match=r"budget\.passages_per_silo must be at least 1, got 0"):
        over_silos(WHOLE, dealt(3), budget=SearchBudget(passages_per_silo=0))


def test_budgets_that_allow_too_little_are_refused():
    narrow = over_silos(WHOLE, dealt(3), budget=SearchBudget(2, 3)).index
    with pytest.raises(ConfigError, match="2 silos have at most 6 passages, but 7 are needed"):
        narrow.search(QUERIES, 7)
    everywhere = over_silos(WHOLE, dealt(3), budget=SearchBudget(passages_per_silo=2)).index
    with pytest.raises(ConfigError, match=r"question 0 have 6 different passages.*k is 7"):
        everywhere.search(QUERIES, 7)
    copies = over_silos(WHOLE, [np.arange(N)] * 2, budget=SearchBudget(passages_per_silo=4)).index
    with pytest.raises(ConfigError, match="have 4 different passages"):
        copies.search(QUERIES, 5)


@pytest.mark.parametrize("budget", [SearchBudget(), SearchBudget(silos=1)])
def test_searches_are_refused_as_by_one_index(budget):
    store = over_silos(WHOLE, dealt(3), budget=budget).index
    for k in (0, N + 1):
        with pytest.raises(ConfigError, match=f"corpus' {N} passages, got {k}"):
            store.search(QUERIES, k)
    with pytest.raises(ConfigError, match="dimension 16, got 8"):
        store.search(QUERIES[:, :8], 1)
    with pytest.raises(DataError, match="query vector 0"):
        store.search(np.full((1, DIMENSION), np.nan), 1)


@pytest.mark.parametrize(
    ("silos", "settings", "error", "words"),
    [
        ([], {}, DataError, "there are no silos"),
        ([np.arange(N), []], {}, DataError, "silo 1: rows must be between 0 and 299"),
        ([np.arange(N + 1)], {}, DataError, "silo 0"),
        ([np.arange(-1, N)], {}, DataError, "silo 0"),
        ([[0, 0, *range(N)]], {}, DataError, r"each once, got \[  0   0"),
        ([np.arange(N - 2)], {}, DataError, "298 and 1 others are in no silo"),
        ([np.arange(N)], {"merge": "mean"}, ConfigError, "got 'mean'"),
        ([np.arange(N)], {"asker": 1}, ConfigError, "between 0 and 0 or None, got 1"),
        ([np.arange(N)], {"centroids": 0}, ConfigError, "at least 1, got 0"),
    ],
)
def test_silos_that_cannot_be_are_refused(silos, settings, error, words):
    with pytest.raises(error, match=words):
        over_silos(WHOLE, silos, **settings)


@pytest.mark.parametrize("budget", [SearchBudget(), SearchBudget(silos=3), SearchBudget(5, 4)])
@pytest.mark.parametrize("merge", ["score", "rrf"])
def test_questions_are_asked_in_parts_where_silos_are_many(monkeypatch, budget, merge):
    store = over_silos(WHOLE, overlapping(40), merge=merge, budget=budget, centroids=3).index
    whole = store.ask(QUERIES, 6)
    monkeypatch.setattr("fedrag_jax.retrieval.index.silos._ANSWERS", 50)
    parts = store.ask(QUERIES, 6)
    assert_same(parts, whole)
    for spent, expected in zip(parts[2], whole[2], strict=True):
        np.testing.assert_array_equal(spent, expected)
    assert store.ask(QUERIES[:0], 6)[0].shape == (0, 6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_clients():
    vectors = np.random.default_rng(0).normal(size=(40_000, 64)).astype(np.float32)
    passages = [Passage(str(i), "", "t") for i in range(len(vectors))]
    store = FaissIndex.build(vectors)
    whole = Retriever(None, None, None, None, passages, vectors, vectors, store)
    order, peaks = np.random.default_rng(1).permutation(len(vectors)), []
    queries = np.random.default_rng(2).normal(size=(50, 64)).astype(np.float32)
    for clients in (2_500, 10_000):
        tracemalloc.start()
        silos = over_silos(whole, np.array_split(order, clients)).index
        found = silos.search(queries, 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        np.testing.assert_array_equal(found[0], store.search(queries, 10)[0])
    assert peaks[0] > vectors.nbytes and peaks[1] < 1.3 * peaks[0]
