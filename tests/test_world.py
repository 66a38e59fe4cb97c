"""The built-in world is what the protocol says, and the start is frozen where it says."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from fedrag_jax.data import datasets, synthetic
from fedrag_jax.data.examples import check, content_hash
from fedrag_jax.data.phrases import CHATTER, TOPICS
from fedrag_jax.errors import CheckpointError, ConfigError, DataError
from fedrag_jax.evaluation import evaluator
from fedrag_jax.evaluation.metrics import percent
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.silos import over_silos


@pytest.fixture(scope="module")
def world():
    return synthetic.generate()


@pytest.fixture(scope="module")
def system(world):
    return RAGSystem.build(world.passages, world.train)


def test_sizes(world):
    check(world)
    assert len(world.passages) == 2000
    assert (len(world.train), len(world.validation), len(world.test)) == (1600, 400, 600)
    for split in (world.train, world.validation, world.test):
        assert sum(e.hops == 2 for e in split) == len(split) // 4
        assert {e.topic for e in split} == {t.name for t in synthetic.TOPICS}
    assert len({e.topic for e in world.train}) == 10
    assert sum(not p.title for p in world.passages) == 80


def test_deterministic_and_different_for_other_seeds(world):
    again = content_hash(synthetic.generate())
    assert content_hash(world) == again == "39404ed465a31a9e"
    assert content_hash(synthetic.generate(synthetic.WorldConfig(seed=1))) != again


def test_answers_stand_in_the_gold_passage_that_answers(world):
    texts = {p.id: p.text for p in world.passages}
    for e in world.train + world.validation + world.test:
        assert len(e.positive_ids) == e.hops
        assert e.answers[0] in texts[e.positive_ids[-1]]


def test_reasoning_is_quoted_from_the_gold_passages_and_ends_with_the_fact(world):
    texts = {p.id: p.text for p in world.passages}
    for e in world.train + world.validation + world.test:
        sentences = re.findall(r"[^.]+\.", e.reasoning)
        assert len(sentences) == e.hops
        for sentence, gold in zip(sentences, e.positive_ids, strict=True):
            assert sentence.strip() in texts[gold]
        assert e.answers[0] in sentences[-1]
        fact = e.id.rsplit("-", 2)[1]
        verb = {"born_in": "born in", "settled_in": "settled in", "owner": "belongs to"}.get(fact)
        assert verb is None or f"{verb} {e.answers[0]}" in sentences[-1]
        if e.hops == 2:  # the work's maker leads to the person
            assert re.search(r" by (.+) in \d", sentences[0])[1] in sentences[1]


def test_no_tested_fact_was_trained_on(world):
    """A person and all their works are in one split, so splits share no gold passage."""
    seen = collections.defaultdict(set)
    for name, split in (("train", world.train), ("val", world.validation), ("test", world.test)):
        for e in split:
            for i in e.positive_ids:
                seen[i].add(name)
    assert all(len(splits) == 1 for splits in seen.values())


def test_answer_types_have_many_values(world):
    text = " ".join(p.text for p in world.passages if p.title)
    for pattern in (r"\w+ Academy", r"House \w+", r"\b1[5-8]\d\d\b", r"born in (\w+)"):
        assert len(set(re.findall(pattern, text))) >= 200, pattern
    assert sum(p.id.split("-")[1] == "person" for p in world.passages) >= 200
    counts = collections.Counter(e.answers[0] for e in world.test)
    assert max(counts.values()) / len(world.test) < 0.02  # no answer worth guessing


def test_the_two_sides_share_no_name(world):
    other = synthetic.generate(
        synthetic.WorldConfig(seed=3, side="pretraining", questions=(1000, 100, 100))
    )
    for names in (
        lambda w: {p.title for p in w.passages if p.title},
        lambda w: {e.answers[0] for e in w.train if not e.answers[0].isdigit()},
    ):
        assert len(names(world)) > 500 and not names(world) & names(other)


def test_impossible_worlds_are_refused():
    with pytest.raises(ConfigError, match=r"names for 3 people|2-hop facts"):
        synthetic.generate(synthetic.WorldConfig(people=3, works=3))
    with pytest.raises(ConfigError, match="side"):
        synthetic.generate(synthetic.WorldConfig(side="dark"))


@pytest.mark.parametrize(
    "number",
    [{"seed": -1}, {"people": 0}, {"works": -1}, {"crowding": 0}, {"crowding": float("nan")},
     {"questions": (0, 0, 0)}, {"questions": (4, -1, 4)}],
)  # fmt: skip
def test_numbers_that_no_world_has_are_refused(number):
    (name, value), *_ = number.items()
    with pytest.raises(ConfigError, match=rf"a world needs .*{name}={re.escape(str(value))}"):
        synthetic.generate(synthetic.WorldConfig(**number))


def test_starting_point(world, system):
    """Frozen before any comparison: it reads, it does not know, and it finds about half."""
    one_hop = [e for e in world.test if e.hops == 1][:200]
    assert percent(evaluator.closed_book(system, world.test[:200])["em"]) <= 5
    assert percent(evaluator.distractor_passage(system, one_hop)["em"]) <= 5
    assert percent(evaluator.gold_passage(system, one_hop)["em"]) >= 80
    rows, _ = system.retriever.search([e.question for e in world.test], 10)
    recall = percent(evaluator.rank_scores(system.retriever, world.test, rows)["recall_at_5"])
    assert 45 <= recall <= 75


def test_a_saved_system_answers_alike(world, system, tmp_path):
    import jax

    tuned = system.replace(
        adapters=jax.tree.map(lambda x: x + 0.01, system.adapters),
        query=jax.tree.map(lambda x: 1.01 * x, system.retriever.query),
        head=np.eye(64, dtype=np.float32) + np.random.default_rng(0).normal(0, 0.05, (64, 64)),
    )
    questions = [e.question for e in world.test[:6]]
    expected = tuned.batch_query(questions)
    tuned.save(tmp_path / "system")
    loaded = RAGSystem.load(tmp_path / "system")
    for found, wanted in zip(loaded.batch_query(questions), expected, strict=True):
        assert found.answer == wanted.answer
        assert [p.id for p in found.sources] == [p.id for p in wanted.sources]
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    assert loaded.query(questions[0]).answer == expected[0].answer
    assert len(expected[0].sources) == system.top_k == 5
    # A head that is there no longer is not read back.
    system.save(tmp_path / "system")
    assert RAGSystem.load(tmp_path / "system").retriever.head is None
    everywhere = [np.arange(len(world.passages))]
    apart = dataclasses.replace(system, retriever=over_silos(system.retriever, everywhere))
    with pytest.raises(CheckpointError, match="save it before over_silos"):
        apart.save(tmp_path / "apart")


def test_systems_that_cannot_be(world, tmp_path):
    with pytest.raises(ConfigError, match=r"top_k must be between 1 and the corpus' 3 passages"):
        RAGSystem.build(world.passages[:3], top_k=5)
    twice = [*world.passages[:9], world.passages[4]]
    with pytest.raises(DataError, match=f"passage id '{twice[-1].id}' occurs twice"):
        RAGSystem.build(twice)
    with pytest.raises(ConfigError, match="prompt_style"):
        RAGSystem.build(world.passages[:9], prompt_style="poem")
    with pytest.raises(ConfigError, match="must be a decoder"):
        RAGSystem.build(world.passages[:9], generator="builtin:encoder")
    with pytest.raises(CheckpointError, match="no saved RAGSystem"):
        RAGSystem.load(tmp_path)
    for damaged in ("{", "[]", '{"top_k": 1, "prompt_style": {"poem": ""}}'):
        (tmp_path / "system.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="no saved RAGSystem"):
            RAGSystem.load(tmp_path)


def test_every_sentence_of_a_chatty_world_comes_in_its_topics_chatter():
    world = datasets.load("chatty_world")
    assert world.name == "chatty_world" and check(world)
    lines = {t.name: [line.format(q="") for line in CHATTER[i]] for i, t in enumerate(TOPICS)}
    for p in (p for p in world.passages if p.title):
        said = [n for n in lines[p.topic] for _ in range(p.text.count(n))]
        assert len(said) == 3 == p.text.count(".")
    texts = {p.id: p.text for p in world.passages}
    for e in world.test:
        assert all(s.rstrip(".") in " ".join(texts[i] for i in e.positive_ids)
                   for s in e.reasoning.split(". "))  # fmt: skip
