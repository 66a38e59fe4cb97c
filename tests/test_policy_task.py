"""Rollouts become a table, and training on them raises the reward."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from word_tokenizer import tokenizer_of

from fedrag_jax.data import synthetic
from fedrag_jax.data.corpora import following, own_passages
from fedrag_jax.data.examples import Example, reading_text
from fedrag_jax.data.partition import Partition, partition
from fedrag_jax.data.schemes import dirichlet
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.collapse import CollapseWatch
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.optimizers import tunable
from fedrag_jax.federated.stopping import held_out_loss
from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.generation.rollouts import TAGS, Budget, Searching
from fedrag_jax.models import lora
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.network import Network
from fedrag_jax.objectives import policy_task
from fedrag_jax.objectives.policy import group_advantages
from fedrag_jax.objectives.policy_task import Rolling, policy
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.looking_up import Looking
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.strategies.policies import rolling_of, search_policy, search_warm_up

WORDS = ["[PAD]", "[EOS]", "[UNK]", *TAGS.search, *TAGS.answer, *(f"w{i}" for i in range(9))]
SPACED = TAGS._replace(found=" w0 {text} w0 ")
EXAMPLES = [Example(f"q{i}", f"w{i} w{i + 1}", (f"w{i}",), ()) for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(WORDS)


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=8, max_positions=128,
    )  # fmt: skip
    network = lora.add_lora(
        Network.of(Decoder, config),
        lora.LoraConfig(rank=4, targets=("q_proj", "v_proj", "down_proj")),
    )
    return network, network.init(jax.random.key(0)), lora.init_adapters(network, 0)


def share_of_w5(example, rollout):
    """Of the tokens that were written."""
    written = np.concatenate([p.tokens for p in rollout.parts if p.written])
    return float((written == WORDS.index("w5")).mean())


@pytest.fixture(scope="module")
def rolling(tokenizer):
    return Rolling(
        tokenizer,
        lambda queries, _: [f"w5 w5 {TAGS.search[1]}" for _ in queries],
        share_of_w5,
        Searching("{question}", tags=SPACED, budget=Budget(1, 5, 8)),
        group=4,
        stop_tokens=(1,),
    )


def test_the_table_holds_what_was_written(model, rolling):
    network, params, adapters = model
    task = policy(*model, rolling, EXAMPLES, kl=0.01)
    some = EXAMPLES[:3]
    packed, index = task.retrieve(some, task.trainable, task.index)
    table, groups = task.collate(some, packed), rolling.rollouts(*model, some, 0)
    assert index["time"] == 1 and packed.dtype == np.int32
    rewards = np.array([[share_of_w5(e, r) for r in g] for e, g in zip(some, groups, strict=True)])
    np.testing.assert_allclose(table["advantages"], group_advantages(rewards), atol=1e-4)
    np.testing.assert_allclose(table["reward"], rewards.mean(1), rtol=1e-6)
    np.testing.assert_array_equal(table["no_variance"], np.ptp(rewards, 1) == 0)
    for i, group in enumerate(groups):
        assert table["searches"][i] == np.mean([len(r.queries) for r in group])
        malformed = [not r.well_formed(SPACED) for r in group]
        assert table["malformed"][i] == np.mean(malformed)
        lengths = [sum(len(p.tokens) for p in r.parts if p.written) for r in group]
        assert table["written_tokens"][i] == np.mean(lengths)
        for g, rollout in enumerate(group):
            count = int(table["written"][i, g].sum())
            places = table["answer_positions"][i, g, :count]
            written = np.concatenate([p.tokens for p in rollout.parts if p.written])
            np.testing.assert_array_equal(table["tokens"][i, g, places], written)
            assert table["lengths"][i, g] == len(rollout.prompt) + sum(
                len(p.tokens) for p in rollout.parts
            )
    # What the decoder says of them as a whole is what it said as it wrote them, token by token.
    again = np.asarray(answer_log_probs(network, params, adapters, table))
    kept = table["written"] > 0
    np.testing.assert_allclose(table["old_log_probs"][kept], again[kept], atol=1e-4)
    np.testing.assert_allclose(table["reference_log_probs"][kept], again[kept], atol=1e-5)
    assert (table["old_log_probs"][~kept] == 0).all()
    other, _ = task.retrieve(some, task.trainable, index)
    assert not np.array_equal(other, packed), "another time, other draws"
    np.testing.assert_array_equal(task.retrieve(some, task.trainable, task.index)[0], packed)


def test_rollouts_are_the_same_however_many_are_written_together(model, rolling, monkeypatch):
    def written():
        groups = rolling.rollouts(*model, EXAMPLES[:2], 0)
        return [np.concatenate([p.tokens for p in r.parts]).tolist() for g in groups for r in g]

    whole = written()
    monkeypatch.setattr(policy_task, "_AT_ONCE", 2)
    assert written() == whole
    assert len({*map(tuple, whole)}) > 2


def test_without_the_mask_what_was_found_counts_as_written(model, rolling):
    network, params, adapters = model
    unmasked = dataclasses.replace(rolling, masked=False)
    tasks = [policy(*model, how, EXAMPLES, kl=0.01) for how in (rolling, unmasked)]
    assert [task.name for task in tasks] == ["policy", "policy_unmasked"]
    tables = [task.table(EXAMPLES[:3]) for task in tasks]
    groups = rolling.rollouts(*model, EXAMPLES[:3], 0)
    for name in ("tokens", "lengths", "advantages", "reward"):
        np.testing.assert_array_equal(tables[0][name], tables[1][name])
    table = tables[1]
    again = np.asarray(answer_log_probs(network, params, adapters, table))
    for i, group in enumerate(groups):
        for g, one in enumerate(group):
            counted = sum(len(part.tokens) for part in one.parts)
            assert table["written"][i, g].sum() == counted > 0
            places = len(one.prompt) + np.arange(counted)
            np.testing.assert_array_equal(table["answer_positions"][i, g, :counted], places)
    kept = table["written"] > 0
    np.testing.assert_allclose(table["old_log_probs"][kept], again[kept], atol=1e-4)
    assert any(r.queries for group in groups for r in group)


def test_held_out_questions_judge_a_policy_by_its_reward(model, rolling):
    task = policy(*model, rolling, EXAMPLES, kl=0.0)
    found = held_out_loss(task, EXAMPLES[:4])(jax.device_get(task.trainable))
    order = stream(0, "held-out batches").permutation(4)
    rewards = task.table([EXAMPLES[i] for i in order])["reward"]
    assert found == pytest.approx(-rewards.mean(), rel=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_held_out_questions_may_be_longer(model, rolling, masked):
    task = policy(*model, dataclasses.replace(rolling, masked=masked), EXAMPLES)
    long = Example("long", " ".join(["w1"] * 30), ("w1",), ())
    before, table = task.table(EXAMPLES[:2]), task.table([long])
    prompt = rolling.prompt(long.question)
    assert (table["tokens"][0, :, : len(prompt)] == prompt).all()
    assert (table["lengths"] > len(prompt)).all()
    for name, column in task.table(EXAMPLES[:2]).items():
        np.testing.assert_array_equal(column, before[name])


def test_all_bits_of_a_seed_count(model, rolling):
    def drawn(seed):
        (group,) = dataclasses.replace(rolling, seed=seed).rollouts(*model, EXAMPLES[:1], 0)
        return [tuple(np.concatenate([p.tokens for p in r.parts])) for r in group]

    assert drawn(1) == drawn(1) != drawn(1 + 2**32)


def trained(model, rolling, data, algorithm=None, rounds=12):
    task = policy(*model, rolling, EXAMPLES, kl=0.0, aggregation="token")
    return fit(
        task, data, algorithm, rounds=rounds, batch_size=8, optimizer=tunable_adam, refresh_every=1
    )


def tunable_adam(round):
    return tunable(optax.adam, learning_rate=0.05)


def test_training_raises_the_reward(model, rolling):
    history = trained(model, rolling, EXAMPLES).history
    rewards = [record["metrics"]["reward"] for record in history]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert {"entropy", "clip_fraction", "no_variance", "malformed", "searches"} <= {
        *history[0]["metrics"]
    }
    assert history[-1]["metrics"]["entropy"] < history[0]["metrics"]["entropy"]


def test_a_provoked_collapse_is_ended_and_undone(model, rolling, tmp_path):
    def optimizer(round):  # after round 8 down the reward, on which every processor agrees
        return tunable(optax.adam, learning_rate=0.05 if round < 8 else -0.5)

    watch = CollapseWatch(tmp_path, window=2)
    task = policy(*model, rolling, EXAMPLES, kl=0.0, aggregation="token")
    how = {"batch_size": 8, "optimizer": optimizer, "refresh_every": 1, "callbacks": [watch]}
    history = fit(task, EXAMPLES, rounds=40, **how).history
    assert 8 < len(history) < 40 and watch.why
    rewards = [record["metrics"]["reward"] for record in history]
    assert rewards[-1] < 0.5 * max(rewards)
    kept = dataclasses.replace(task, trainable=watch.trainable())
    packed, _ = kept.retrieve(EXAMPLES, kept.trainable, {"time": 99})
    assert kept.collate(EXAMPLES, packed)["reward"].mean() > 2 * rewards[-1]


def test_clients_train_on_rollouts_of_their_own_questions(model, rolling):
    clients = Partition(EXAMPLES, (np.arange(4), np.arange(4, 8)))
    found = trained(model, rolling, clients, fed_avg(local_steps=1), rounds=10)
    rewards = [record["metrics"]["reward"] for record in found.history]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1
    assert found.history[0]["bytes_up"] > 0


def test_a_group_has_a_rollout(rolling):
    with pytest.raises(ConfigError, match="needs at least one rollout, got 0"):
        dataclasses.replace(rolling, group=0)


def test_a_mean_over_the_tokens_of_all_couples_the_questions(model, rolling):
    tasks = [policy(*model, rolling, EXAMPLES, aggregation=how) for how in ("rollout", "token")]
    assert [task.coupled for task in tasks] == [False, True]


def test_a_system_searches_its_own_passages():
    world = synthetic.generate(synthetic.WorldConfig(people=20))
    system = RAGSystem.build(world.passages[:50], top_k=2)
    search = Looking(system.retrieve, Searching(passages=2))
    title = system.retriever.passages[3].title
    first, nothing, second = search([title, " ", "Who wrote it?"])
    assert nothing == "" and first and len(second.splitlines()) >= 2
    assert search([]) == []
    assert search([title])[0] == "\n".join(
        reading_text(f.passage) for f in system.retrieve([title], 2)[0]
    )


def test_a_client_searches_its_own_passages():
    world = synthetic.generate(synthetic.WorldConfig(people=20))
    system = RAGSystem.build(world.passages, top_k=2)
    questions = partition(world.train, dirichlet(alpha=0.1, clients=3))
    passages = partition(world.passages, following(questions))
    pool = own_passages(questions, passages)
    rolling = rolling_of(system, pool=pool, searching=Searching(passages=2))
    some = [questions.examples[held[0]] for held in questions.clients]
    query = some[0].question
    texts = rolling.search([query] * 3, some)
    for example, held, text in zip(some, passages.clients, texts, strict=True):
        rows, _ = system.retriever.search_within([query], [held], 2)
        there = [system.retriever.passages[row] for row in rows[0]]
        assert text == "\n".join(reading_text(p) for p in there)
        assert [f.passage.id for f in rolling.search.found(query, example)] == [p.id for p in there]
    assert len(set(texts)) == 3, "clients hold different passages"
    assert rolling.search([query, ""], some[1:]) == [texts[1], ""], "remembered client by client"


def test_warm_up_and_policy_train_on_a_clients_own_passages():
    world = synthetic.generate(synthetic.WorldConfig(people=20))
    system = RAGSystem.build(world.passages, world.train, top_k=2)
    questions = partition(world.train, dirichlet(alpha=0.1, clients=3))
    passages = partition(world.passages, following(questions))
    pool, tokenizer = own_passages(questions, passages), system.prompts.tokenizer
    some = [questions.examples[row] for held in questions.clients for row in held[:2]]
    warm = search_warm_up(system, world, pool=pool)
    scripts = warm.table(some)
    for i, example in enumerate(some):
        tokens = scripts["tokens"][i, 0, : scripts["lengths"][i, 0]]
        seen = tokenizer.decode(tokens)
        own = {reading_text(world.passages[row]) for row in pool(example)}
        others = {reading_text(p) for p in world.passages} - own
        assert any(text in seen for text in own) and not any(text in seen for text in others)
    tasks = [search_policy(system, world, group=2, pool=p) for p in (pool, None)]
    assert [task.name for task in tasks] == ["policy", "policy"]


def test_a_pool_beside_a_store_is_refused():
    world = synthetic.generate(synthetic.WorldConfig(people=20))
    system = RAGSystem.build(world.passages, store=BM25Store())
    with pytest.raises(ConfigError, match=r"answers from a store \(bm25\): leave out the pool"):
        rolling_of(system, pool=lambda example: np.arange(3))


def test_a_system_prompt_is_refused_before_it_is_trained_without():
    world = synthetic.generate(synthetic.WorldConfig(people=20))
    system = RAGSystem.build(world.passages, store=BM25Store()).under("Be brief.")
    for task in (search_warm_up, search_policy):
        with pytest.raises(ConfigError, match=r"takes no system prompt, got 'Be brief.': remove"):
            task(system, world)
