"""What each strategy trains, in which order, and what it leaves alone."""

import dataclasses

import jax
import numpy as np
import pytest
from toys import EXAMPLES, FOUR, linear_task

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Dataset
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.sweep import sweep
from fedrag_jax.generation.likelihood import tokens_read
from fedrag_jax.models.lora import adapted_kernels
from fedrag_jax.models.network import flatten
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.strategies import strategies
from fedrag_jax.strategies import tuner as tuner_module
from fedrag_jax.strategies.objectives import OBJECTIVES
from fedrag_jax.strategies.regimes import Budget
from fedrag_jax.strategies.strategies import STRATEGIES
from fedrag_jax.strategies.strategy import tune_systems
from fedrag_jax.tracking.ledger import Cost, compiler_flops, mean_cost, step_flops

TRAINED = {
    "none": [],
    "retriever": [{"query"}],
    "generator": [{"adapters"}],
    "ralt": [{"adapters"}],
    "lsr": [{"query"}],
    "ra_dit": [{"adapters"}, {"query"}],
    "independent": [{"query"}, {"adapters"}],
    "two_phase": [{"adapters"}, {"query"}],
    "joint_token": [{"adapters", "query"}],
    "joint_sequence": [{"adapters", "query"}],
}


@pytest.fixture(scope="module")
def world():
    whole = synthetic.generate()
    return Dataset("some", whole.passages[:200], whole.train, whole.validation, whole.test)


@pytest.fixture(scope="module")
def system(world):
    return RAGSystem.build(world.passages, world.train[:40], marginal_k=7)


class Recorder:
    """A `tune` that keeps the tasks it is given and moves what they train a little."""

    def __init__(self):
        self.tasks = []

    def __call__(self, task):
        self.tasks.append(task)
        return jax.tree.map(lambda x: x + 0.01, task.trainable)


def moved(before, after) -> bool:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_parts_that_move(name, system, world):
    there = {p.id for p in world.passages}
    labelled = [e for e in world.train if set(e.positive_ids) <= there][:40]
    short = dataclasses.replace(world, train=labelled)
    tune = Recorder()
    tuned = STRATEGIES[name](system, short, tune)
    assert [set(task.trainable) for task in tune.tasks] == TRAINED[name]
    parts = set().union(*TRAINED[name])
    assert moved(system.retriever.query, tuned.retriever.query) == ("query" in parts)
    assert moved(system.adapters, tuned.adapters) == ("adapters" in parts)
    assert tuned.retriever.document is system.retriever.document
    assert tuned.generator is system.generator
    for task in tune.tasks:
        assert not set(task.trainable) & set(task.frozen)


@pytest.mark.parametrize("name", ["generator", "independent", "ra_dit", "two_phase", "joint_token"])
def test_a_base_that_training_has_changed_goes_into_the_system(name, system, world):
    there = {p.id for p in world.passages}
    labelled = [e for e in world.train if set(e.positive_ids) <= there][:40]
    short = dataclasses.replace(world, train=labelled)
    tune = Recorder()

    def merging(task):
        """As FLoRA has it: some of what is frozen comes out changed."""
        found = tune(task)
        if "adapters" in task.trainable:
            kernels = adapted_kernels(task.frozen["decoder"], system.adapters)
            found["decoder"] = jax.tree.map(lambda x: x + 0.5, kernels)
        return found

    tuned = STRATEGIES[name](system, short, merging)
    before, after = (dict(flatten(s.generator.params)) for s in (system, tuned))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        change = 0.5 if path[-2] in system.decoder.lora.targets else 0.0
        np.testing.assert_array_equal(after[path], leaf + change)


def test_marginal_training_sees_more_passages_than_are_read(system, world):
    tune = Recorder()
    STRATEGIES["joint_token"](system, dataclasses.replace(world, train=world.train[:40]), tune)
    (task,) = tune.tasks
    found = task.retrieve(world.train[:3], task.trainable)
    assert found.shape == (3, 7)
    assert task.collate(world.train[:3], found)["tokens"].shape[:2] == (3, 7)
    assert system.top_k == 5


def test_the_second_phase_listens_to_the_tuned_generator(system, world):
    short = dataclasses.replace(world, train=world.train[:40])

    def likelihoods(strategy, base):
        tune = Recorder()
        strategy(base, short, tune)
        task = tune.tasks[-1]
        some = world.train[:3]
        return task.table(some)["answer_log_probs"]

    two_phase = likelihoods(strategies.two_phase, system)
    tuned = system.replace(adapters=jax.tree.map(lambda x: x + 0.01, system.adapters))
    np.testing.assert_allclose(two_phase, likelihoods(strategies.second_phase, tuned), atol=1e-5)
    assert np.abs(two_phase - likelihoods(strategies.second_phase, system)).max() > 1e-2


def test_several_systems_go_through_a_strategy_together(system, world):
    short = dataclasses.replace(world, train=world.train[:40])
    other = system.replace(adapters=jax.tree.map(lambda x: x + 0.01, system.adapters))
    asked = []

    def tune_all(tasks):
        asked.append(tasks)
        return [
            ValueError("fails") if i == 1 else jax.tree.map(lambda x: x + 0.01, task.trainable)
            for i, task in tasks
        ]

    found = tune_systems(strategies.two_phase, [system, system, other], short, tune_all)
    (first, second), (_, failed, _) = asked, found
    assert [i for i, _ in first] == [0, 1, 2] and [i for i, _ in second] == [0, 2]
    assert first[0][1] is first[1][1] and first[0][1] is not first[2][1]
    assert isinstance(failed, ValueError)
    for one, i in ((system, 0), (other, 2)):
        alone = strategies.two_phase(one, short, Recorder())
        for part in (lambda s: s.adapters, lambda s: s.retriever.query):
            jax.tree.map(np.testing.assert_array_equal, part(found[i]), part(alone))


@pytest.mark.parametrize(("count", "most"), [(step_flops, 0.5), (compiler_flops, 0.51)])
def test_a_frozen_generator_that_is_read_is_paid_for(system, world, count, most):
    """Forward passes alone: between a third and a half of joint training, as arithmetic has it.

    Compilers count what is no product, too, each in its own way.
    """
    short = dataclasses.replace(world, train=world.train[:40])
    flops = []
    for strategy in (strategies.second_phase, strategies.joint_token):
        tune = Recorder()
        strategy(system, short, tune)
        (task,) = tune.tasks
        table = task.table(short.train[:1])
        flops.append(count(task, table, batch_size=4))
    assert 1 / 3 < flops[0] / flops[1] < most


def test_no_more_passages_than_there_are(world):
    assert RAGSystem.build(world.passages[:6], top_k=5).marginal_k == 6


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"marginal_k": 0}, "marginal_k must be > 0, got 0"),
        ({"score_scale": 0.0}, "score_scale must be > 0, got 0.0"),
    ],
)
def test_settings_that_train_nothing_are_refused(world, setting, words):
    with pytest.raises(ConfigError, match=words):
        RAGSystem.build(world.passages[:6], **setting)


def test_questions_the_prompts_were_not_made_for_are_refused(world):
    system = RAGSystem.build(world.passages[:6])
    with pytest.raises(DataError, match=r"training questions to RAGSystem\.build"):
        system.prompts.training_table(world.train[:2], np.zeros((2, 1), int), per_passage=True)


@pytest.mark.slow
def test_tokens_are_those_that_training_reads(system, world, tmp_path):
    """Each of four examples once: prompts and questions as they are tokenised, no padding."""
    there = {p.id for p in world.passages}
    some = [e for e in world.train if set(e.positive_ids) <= there][:4]
    short = dataclasses.replace(world, train=some)
    system = RAGSystem.build(world.passages, some, marginal_k=3)
    rows, _ = system.retriever.search([e.question for e in some], 5)
    together = [
        len(system.prompts.prompt(e.question, r)) + len(system.prompts.answer_tokens(e.answers[0]))
        for e, r in zip(some, rows, strict=True)
    ]
    apart = [
        len(system.prompts.prompt(e.question, [r]))
        + len(system.prompts.answer_tokens(e.answers[0]))
        for e, found in zip(some, rows, strict=True)
        for r in found[:3]
    ]
    questions = [len(system.retriever.tokenizer(e.question)["input_ids"]) for e in some]
    expected = {
        "retriever": sum(questions),
        "generator": sum(together),
        "joint_token": sum(apart) + sum(questions),
        "second_phase": sum(apart) + sum(questions),  # read once, used as often as it is
    }
    for name, tokens in expected.items():
        tune = Recorder()
        getattr(strategies, name)(system, short, tune)
        (task,) = tune.tasks
        table = task.table(some)
        assert tokens_read(table | {"weight": np.ones(4)}).sum() == tokens, name
    tuner = tuner_module.Tuner(
        tmp_path, "centralised", some, None, Budget(2, 1, 1, 4), lambda *_: 0.0, seed=0
    )
    strategies.retriever(system, short, tuner)
    assert tuner.costs["multiple_negatives_ranking"].tokens == 2 * sum(questions)  # two rounds


def test_costs_add_up():
    one = Cost(seconds=1.0, peak_bytes=5, traffic={"up query float32": 3, "down query float32": 4})
    two = Cost(seconds=2.0, peak_bytes=2, traffic={"up query float32": 1, "up adapters int8": 2})
    both = one + two
    assert (both.seconds, both.peak_bytes, both.bytes_up, both.bytes_down) == (3.0, 5, 6, 4)
    mean = mean_cost([one, two])
    assert (mean.seconds, mean.peak_bytes, mean.bytes_up, mean.bytes_down) == (1.5, 5, 3, 2)


@pytest.mark.parametrize("room, sweeps", [(3, [3]), (2, [2, 1]), (0, [1, 1, 1])])
def test_as_many_are_trained_at_once_as_memory_allows(tmp_path, monkeypatch, room, sweeps):
    task, done = linear_task(), []  # of 16 bytes

    def watched(fits):
        done.append(len(fits))
        return sweep(fits)

    monkeypatch.setattr(tuner_module, "sweep", watched)
    monkeypatch.setattr(tuner_module, "AT_ONCE", room * 3 * 16)
    monkeypatch.setattr(tuner_module.Tuner, "_cost", lambda *_: Cost())
    budget = Budget(rounds=1, local_steps=1, clients=4, batch_size=2)
    same = {"regime": "local", "examples": EXAMPLES, "clients": FOUR, "budget": budget, "seed": 0}
    tuners = [
        tuner_module.Tuner(tmp_path / str(rate), rates=lambda *_, r=rate: r, client=1, **same)
        for rate in (0.1, 0.2, 0.3)
    ]
    found = tuner_module.tune_together([(tuner, task) for tuner in tuners])
    assert done == sweeps
    assert len({float(tree["w"][0]) for tree in found}) == 3
    tuner_module.tune_together([(tuner, task) for tuner in tuners])
    assert done == sweeps  # finished


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_objectives_train_the_part_they_name_on_batches_of_the_system(name, system, world):
    there = {p.id for p in world.passages}
    labelled = [e for e in world.train if set(e.positive_ids) <= there][:20]
    objective = OBJECTIVES[name]
    # Built for no questions, as a loaded system is.
    system = RAGSystem.build(world.passages, marginal_k=7)
    task = objective.task(system, dataclasses.replace(world, train=labelled))
    parts = {"retriever": {"query", "document", "head"}, "generator": {"adapters"}}
    parts["both"] = parts["retriever"] | parts["generator"]
    assert task.trainable.keys() <= parts[objective.part]
    assert system.replace(**task.trainable).top_k == system.top_k
    assert {len(column) for column in task.table(labelled[:3]).values()} == {3}
    # One p(z|x) in all of training, whatever an objective would take by itself.
    assert getattr(task.loss, "score_scale", system.score_scale) == system.score_scale
    if objective.labels:
        bare = [dataclasses.replace(e, positive_ids=()) for e in labelled]
        with pytest.raises(DataError, match="positive_ids"):
            objective.task(system, dataclasses.replace(world, train=bare)).collate(bare, None)
    store = FaissStore(system.retriever.vectors.shape[1])
    with pytest.raises(ConfigError, match="this system has none: build it with `passages`"):
        objective.task(RAGSystem.build(store=store), dataclasses.replace(world, train=labelled))


@pytest.mark.parametrize("name", ["concatenated", "closed_book", "rag_token", "raft", "pdist"])
def test_a_system_built_for_its_questions_trains_on_the_same_arrays(name, world):
    """Whether or not the system is told of them again."""
    there = {p.id for p in world.passages}
    labelled = [e for e in world.train if set(e.positive_ids) <= there][:20]
    built = RAGSystem.build(world.passages, [*labelled, *world.train[40:60]], marginal_k=7)
    task = OBJECTIVES[name].task(built, dataclasses.replace(world, train=labelled))
    again = dataclasses.replace(built, prompts=built.prompts.wide_enough_for(labelled))
    other = OBJECTIVES[name].task(again, dataclasses.replace(world, train=labelled))
    one, two = task.table(labelled), other.table(labelled)
    assert all(np.array_equal(one[column], two[column]) for column in one)
    prompts, count = built.prompts, {"concatenated": 5, "closed_book": 0}
    if name in count:
        assert one["tokens"].shape == (20, 1, prompts.training_width(count[name]))
        assert one["answer_mask"].shape == (20, prompts.answer_width)


def test_matryoshka_trains_parts_of_the_vectors_that_are_compared(world):
    dataset = dataclasses.replace(world, train=world.train[:4])
    system = RAGSystem.build(world.passages)
    assert OBJECTIVES["matryoshka"].task(system, dataset).loss.dimensions == (16, 32, 64)
    cut = dataclasses.replace(system, retriever=system.retriever.cut(32))
    assert OBJECTIVES["matryoshka"].task(cut, dataset).loss.dimensions == (8, 16, 32)
    with pytest.raises(ConfigError, match="compared by cosine or dot product"):
        euclidean = RAGSystem.build(world.passages, similarity="euclidean")
        OBJECTIVES["matryoshka"].task(euclidean, dataset)
