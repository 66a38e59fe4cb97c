"""The warm-up of a policy: scripts in the right form, what they give away, and that they are learnt."""

import collections
import dataclasses

import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.federated.algorithms.centralised import centralised
from fedrag_jax.federated.fit import fit
from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.generation.rollouts import COMPACT_SEARCHING, SEARCHING, Budget
from fedrag_jax.generation.scripted import names, scripted
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.objectives.policy_task import rollout_table
from fedrag_jax.objectives.search_format import FormatLoss
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.policies import (
    learn_to_search,
    rolling_of,
    search_policy,
    search_warm_up,
)

WORLD = synthetic.generate(synthetic.WorldConfig(people=30, works=30, questions=(200, 20, 40)))


@pytest.fixture(scope="module")
def system():
    return RAGSystem.build(
        WORLD.passages, WORLD.train, top_k=2, adapters=LoraConfig(16, 32.0, ("q_proj", "v_proj"))
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Where was the composer of the Nim Picture born?", ["Nim Picture"]),
        ("Encore, maestro! Where was Kra Lol born?", ["Kra Lol"]),
        ("The Nim Picture was directed by Kra Lol in 1650.", ["Nim Picture", "Kra Lol"]),
        ("Kra Lol settled in Drokrus in 1815. Who?", ["Kra Lol", "Drokrus"]),
        ("Paris is a city.", ["Paris"]),
        ("where is it?", []),
        ("Who met Émile Zola-Dreyfus in Łódź?", ["Émile Zola-Dreyfus", "Łódź"]),
    ],
)
def test_names(text, found):
    assert names(text) == found


@pytest.mark.parametrize("searching", [COMPACT_SEARCHING, SEARCHING])
def test_scripts_are_well_formed_and_know_no_answers(system, searching):
    asked, read_in, counts = [], [], collections.Counter()

    def search(queries, numbers):
        counts.update(numbers)
        asked.append(queries)
        return [f"{query} met Bo Ba in Mo. Cu Cy is there." for query in queries]

    def read(queries):
        read_in.extend(queries)
        return [f"Answer {i}" for i in range(len(queries))]

    tokenizer, questions = system.prompts.tokenizer, [e.question for e in WORLD.train[:40]]
    rng = np.random.default_rng(0)
    scripts = scripted(questions, tokenizer, searching, search, read, rng)
    turns = searching.budget.turns
    assert len(asked) == turns and len(asked[0]) == 40, "one call a turn, of all that ask"
    assert {len(s.queries) for s in scripts} == {*range(1, turns + 1)}
    for number, (script, question) in enumerate(zip(scripts, questions, strict=True)):
        assert script.well_formed(searching.tags) and script.finish == "answer"
        assert script.answer(searching.tags) == f"Answer {number}"
        assert script.queries[0] in question and list(script.queries) == read_in[number]
        assert all(q in ("Bo Ba", "Mo", "Cu Cy") for q in script.queries[1:])
        assert tokenizer.decode(script.prompt) == "<s>" + searching.opening(question)
        written = [tokenizer.decode(p.tokens) for p in script.parts if p.written]
        assert written == list(script.texts)
        found = [tokenizer.decode(p.tokens) for p in script.parts if not p.written]
        assert all("met Bo Ba in Mo." in text for text in found)
        if searching is COMPACT_SEARCHING:
            assert all(text.endswith(f"\n{question}\n") for text in found)
    assert [counts[n] for n in range(40)] == [len(s.queries) for s in scripts]
    asked.clear(), counts.clear()
    again = scripted(questions, tokenizer, searching, search, read, np.random.default_rng(0))
    assert [s.queries for s in again] == [s.queries for s in scripts]


def test_the_loss_is_that_of_what_scripts_wrote(system):
    task, some = search_warm_up(system, WORLD), WORLD.train[:6]
    table = task.table(some) | {"weight": np.array([1, 1, 0, 1, 1, 1], np.float32)}
    loss, _ = FormatLoss(system.decoder)(task.trainable, task.frozen, table, None)
    log_probs = np.asarray(
        answer_log_probs(system.decoder, system.generator.params, system.adapters, table)
    )
    total = count = 0.0
    for i, weight in enumerate(table["weight"]):
        for a in range(log_probs.shape[-1]):
            if weight and table["written"][i, 0, a]:
                total, count = total - log_probs[i, 0, a], count + 1
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_held_out_questions_may_be_longer(system):
    task, first = search_warm_up(system, WORLD), WORLD.train[0]
    long = dataclasses.replace(first, id="long", question=" ".join([first.question] * 9))
    table, usual = task.table([long]), task.table([first])
    assert table["lengths"][0, 0] > usual["tokens"].shape[-1]


LOWER = "in which town of the land was the person born who wrote the book about the old bridge?"
WIDE = "Where was " + "Kra Lol and " * 30 + "Bo Ba and " + "Ko" * 80 + " born?"


@pytest.mark.parametrize("question", [LOWER, WIDE])
def test_scripts_fit_their_budget(system, question):
    """A query of one turn, and an answer of the turns that are left: all of it is trained on."""
    turns, most, _ = COMPACT_SEARCHING.budget
    asked, tokenizer = [], system.prompts.tokenizer

    def search(queries, numbers):
        asked.extend(queries)
        return [question for _ in queries]

    how = [question] * 20, tokenizer, COMPACT_SEARCHING, search
    scripts = scripted(*how, lambda queries: ["Bo " * 90] * 20, np.random.default_rng(0))
    assert {*asked} == {query for script in scripts for query in script.queries}
    for script in scripts:
        written = [p.tokens for p in script.parts if p.written]
        assert script.well_formed(COMPACT_SEARCHING.tags)
        assert all(len(tokens) <= most for tokens in written[:-1])
        assert sum(map(len, written)) == (turns + 1) * most
        assert [tokenizer.decode(tokens) for tokens in written] == [*script.texts]
        assert all(query in question for query in script.queries)
    row = dataclasses.replace(WORLD.train[0], id="row", question=question)
    rolling = rolling_of(system)
    table = rollout_table([scripts], rolling, rolling.width([row]))
    for g, script in enumerate(scripts):
        places = table["answer_positions"][0, g][table["written"][0, g] > 0]
        written = np.concatenate([p.tokens for p in script.parts if p.written])
        np.testing.assert_array_equal(table["tokens"][0, g, places], written)
    tight = COMPACT_SEARCHING._replace(budget=Budget(turns=1, written=2, found=9))
    with pytest.raises(ConfigError, match="a turn of 2 tokens has no room for a text between 'Sea"):
        scripted(
            [question], tokenizer, tight, search, lambda queries: ["Bo"], np.random.default_rng(0)
        )


def test_systems_take_the_form_and_still_read(system):
    task = search_warm_up(system, WORLD)
    one_hop = [e for e in WORLD.test if e.hops == 1][:24]
    before = evaluate(system, one_hop, mode="search")
    trained = fit(task, WORLD.train, centralised(local_steps=20), rounds=5, batch_size=8).trainable
    warm = system.replace(**trained)
    after = evaluate(warm, one_hop, mode="search")
    assert before["em"].mean() < 0.1 and after["em"].mean() > 0.3
    assert after["searches"].mean() > 0.8


def test_the_rollouts_of_a_system_are_its_own(system):
    other = dataclasses.replace(system, searching=SEARCHING)
    assert rolling_of(other).searching is SEARCHING
    assert rolling_of(system, group=2, stop_tokens=(7,)).stop_tokens == (7,)
    assert rolling_of(system).stop_tokens == system.writer.stop_tokens
    with pytest.raises(
        ConfigError, match=r"its own tokenizer and search, so leave out \['search'\]"
    ):
        search_policy(system, WORLD, search=lambda queries, examples: queries)
    question = WORLD.train[0].question
    decoded = system.prompts.tokenizer.decode(rolling_of(other).prompt(question))
    assert decoded == "<s>" + SEARCHING.opening(question)


def test_a_system_learns_to_search_in_the_format_it_is_given(system):
    """Warm-up, rollouts, reward and the trained system alike."""
    searching = SEARCHING._replace(
        instruction="Look up: {question}\n", budget=Budget(turns=1, written=32, found=32)
    )
    some, decode, rewarded = WORLD.train[:2], system.prompts.tokenizer.decode, []

    def reward(example, rollout):
        rewarded.append((example.id, decode(rollout.prompt)))
        return 1.0

    learning = learn_to_search(
        system, WORLD, searching=searching, reward=reward, cost=0.25, group=2
    )
    prompts = ["<s>" + searching.opening(e.question) for e in some]
    table = (warm := next(learning)).table(some)
    for row, length, prompt in zip(table["tokens"], table["lengths"], prompts, strict=True):
        assert decode(row[0, : length[0]]).startswith(prompt + "<search>")
    task = learning.send(warm.trainable)
    packed, _ = task.retrieve(some, task.trainable, task.index)
    expected = [(e.id, prompt) for e, prompt in zip(some, prompts, strict=True)]
    assert rewarded == [one for one in expected for _ in range(2)]
    told = task.collate(some, packed)
    np.testing.assert_allclose(told["reward"], 1 - 0.25 * told["searches"])
    with pytest.raises(StopIteration) as end:
        learning.send(task.trainable)
    assert end.value.value.searching == searching
