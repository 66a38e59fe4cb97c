"""A system that answers from a store: as from its own corpus, from what comes later, after tuning."""

import asyncio
import subprocess
import sys

import jax
import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.hybrid import HybridStore

WORLD = synthetic.generate(synthetic.WorldConfig())
PASSAGES = WORLD.passages[:300]
HELD = {p.id for p in PASSAGES}
QUESTIONS = [e.question for e in WORLD.test if {*e.positive_ids} <= HELD][:12]


@pytest.fixture(scope="module")
def system():
    return RAGSystem.build(PASSAGES)


@pytest.fixture
def over(system):
    store = FaissStore(system.retriever.vectors.shape[1])
    store.add(PASSAGES, system.embed(PASSAGES))
    return system.over(store)


def test_a_store_of_the_corpus_answers_as_the_corpus(system, over):
    expected, found = system.batch_query(QUESTIONS), over.batch_query(QUESTIONS)
    assert [r.answer for r in found] == [r.answer for r in expected]
    assert [r.sources for r in found] == [r.sources for r in expected]
    np.testing.assert_allclose([r.scores for r in found], [r.scores for r in expected], rtol=1e-5)
    for mode in ("ensemble", "rag_sequence_fast"):
        one, other = (s.batch_query(QUESTIONS[:3], mode=mode) for s in (system, over))
        assert [r.answer for r in one] == [r.answer for r in other]
    assert over.over(None).query(QUESTIONS[0]) == system.query(QUESTIONS[0])
    assert over.batch_query([]) == []


@pytest.mark.parametrize("blank", ["", " \n\t\u3000"])
def test_a_blank_question_is_refused_by_every_road(system, over, blank):
    words = BM25Store()
    words.add(PASSAGES[:20])
    for answering in (system, over, system.over(words)):
        for ask in (
            lambda s: s.query(blank),
            lambda s: s.retrieve([blank]),
            lambda s: s.read([blank], [[PASSAGES[0]]]),
            lambda s: s.answer([blank], [()]),
            lambda s: next(s.stream(blank)),
            lambda s: next(s.stream(blank, PASSAGES[:2])),
            lambda s: asyncio.run(s.aquery(blank, mode="vote")),
        ):
            with pytest.raises(DataError, match="question 1 of 1 is blank: ask something"):
                ask(answering)
    with pytest.raises(DataError, match="question 2 of 3 is blank"):
        system.batch_query([QUESTIONS[0], blank, QUESTIONS[1]])


def test_what_is_put_into_the_store_is_read_at_once(over):
    (example,) = [e for e in WORLD.test if {*e.positive_ids} <= HELD and e.hops == 1][:1]
    (gold,) = [p for p in PASSAGES if p.id == example.positive_ids[0]]
    over.store.delete([gold.id])
    assert gold not in over.query(example.question).sources
    over.store.add([gold], over.embed([gold]))
    assert gold in over.query(example.question).sources


def test_half_characters_are_refused_wherever_they_are_read(system):
    half = Passage("half", "", "Ada \ud83d")
    answered = Example("q", "Who?", ("\ud83d",), ())
    for read in (
        lambda: RAGSystem.build([half, *PASSAGES[:5]]),
        lambda: RAGSystem.build(PASSAGES[:5], [answered]),
        lambda: system.embed([half]),
        lambda: system.answer(["Who?"], [[half]]),
        lambda: system.query("Who \ud83d?"),
    ):
        with pytest.raises(
            DataError, match=r"(passage 'half'|'.ud83d'|'Who .ud83d.') .*half a char"
        ):
            read()


def test_a_system_needs_no_corpus_of_its_own(over):
    alone = RAGSystem.build(store=over.store)
    assert alone.batch_query(QUESTIONS) == over.batch_query(QUESTIONS)
    empty = RAGSystem.build(store=FaissStore(over.store.dimension))
    response = empty.query(QUESTIONS[0])
    assert response.sources == () and isinstance(response.answer, str)
    with pytest.raises(ConfigError, match="needs passages to answer from"):
        alone.over(None)
    with pytest.raises(ConfigError, match="top_k must be between 1 and the corpus' 0 passages"):
        RAGSystem.build()


def test_a_store_of_other_vectors_is_refused(system):
    with pytest.raises(
        ConfigError, match=r"of dimension 7, the system's are of \d+: open the store"
    ):
        system.over(FaissStore(7))


def test_words_and_vectors_together(over):
    hybrid = HybridStore([FaissStore(over.store.dimension), BM25Store()])
    hybrid.add(PASSAGES, over.embed(PASSAGES))
    named = over.over(hybrid).query(f"Where is {PASSAGES[0].title}?")
    assert PASSAGES[0] in named.sources and list(named.scores) == sorted(named.scores, reverse=True)
    # Modes that weigh passages do so by cosines, whatever the store scores by.
    asked = QUESTIONS[:4]
    read = [[f.passage for f in some] for some in over.over(hybrid).retrieve(asked)]
    vectors = over.retriever.embed_questions(asked)
    cosines = np.stack(
        [over.embed(some) @ vector for some, vector in zip(read, vectors, strict=True)]
    )
    for mode in ("ensemble", "rag_token"):
        assert (
            over.over(hybrid).batch_query(asked, mode=mode)[2].answer
            == (over.answer(asked, read, cosines, mode=mode)[2])
        )
    words = BM25Store()
    words.add(PASSAGES)
    assert PASSAGES[0] in over.over(words).query(f"Where is {PASSAGES[0].title}?").sources


def test_a_tuned_document_encoder_gives_the_store_new_vectors(over):
    document = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(0), x.shape),
        over.retriever.document,
    )
    tuned = over.replace(document=document, query=document)
    expected = tuned.over(None).batch_query(QUESTIONS)
    assert [r.sources for r in tuned.batch_query(QUESTIONS)] != [r.sources for r in expected]
    tuned.store.refresh(tuned.embed)
    assert [r.sources for r in tuned.batch_query(QUESTIONS)] == [r.sources for r in expected]


def test_twins_that_wait_answer_the_same(over):
    async def ask():
        together = await asyncio.gather(over.aquery(QUESTIONS[0]), over.abatch_query(QUESTIONS[:3]))
        return together, [piece async for piece in over.astream(QUESTIONS[0])]

    (one, several), pieces = asyncio.run(ask())
    assert one == over.query(QUESTIONS[0]) and several == over.batch_query(QUESTIONS[:3])
    assert "".join(pieces) == one.answer
    assert "".join(over.stream(QUESTIONS[0], beams=None)) == one.answer
    with pytest.raises(ConfigError, match="mode 'concatenated' takes no beams, got 2"):
        next(over.stream(QUESTIONS[0], beams=2))


def test_another_process_opens_a_saved_system_and_answers_the_same(over, tmp_path):
    over.store.add(
        [Passage("later", "Later", "Later came later.")],
        over.embed([Passage("later", "Later", "Later came later.")]),
    )
    alone = RAGSystem.build(store=over.store, top_k=3)
    alone.save(tmp_path / "s")
    code = (
        "import sys; from fedrag_jax.rag import RAGSystem\n"
        f"system = RAGSystem.load({str(tmp_path / 's')!r}, memory_map=True)\n"
        "for r in system.batch_query(sys.argv[1:]): print(r.answer, [p.id for p in r.sources], sep='|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *QUESTIONS], check=True, capture_output=True, text=True
    )
    expected = [f"{r.answer}|{[p.id for p in r.sources]}" for r in alone.batch_query(QUESTIONS)]
    assert done.stdout.splitlines() == expected
    assert len(RAGSystem.load(tmp_path / "s").store) == 301
