"""What the cells of a comparison share, and the questions that they are scored on."""

import collections
import functools
import types

import numpy as np
import pytest
from small import small

from experiments import client_scores, compare_strategies, lab, loading
from experiments.finished_lab import untuned_of_other_seeds
from experiments.reporting import cells
from experiments.run import Point
from fedrag_jax.data import synthetic
from fedrag_jax.errors import ConfigError
from fedrag_jax.tracking.ledger import Cost


def test_clients_are_scored_on_questions_such_as_they_hold():
    from fedrag_jax.data.examples import Example
    from fedrag_jax.data.partition import Partition

    def about(*topics):
        return [Example(f"q{i}", "?", ("a",), (), topic) for i, topic in enumerate(topics)]

    held = Partition(about("x", "x", "y", "x"), (np.array([0, 1]), np.array([2, 3])))
    own = [np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0])]
    of_clients = functools.partial(client_scores.client_scores, held, column="topic")
    # The second holds as many of y, asked once, as of x, asked twice.
    assert of_clients(about("x", "x", "y"), own) == [50.0, 50.0]
    assert of_clients(about("x", "x", "y"), own[:1]) == [50.0, 25.0]
    assert of_clients(about("y", "y", "y"), own) == [pytest.approx(100 / 3)]
    assert of_clients(about("z", "z", "z"), own) == []

    # The mean over questions is the mean over clients, and what has no score counts for nobody.
    asked = about("x", "x", "y")

    def mean(scores):
        found, weights = client_scores.own_scores(held, asked, scores, "topic")
        assert weights.mean() == pytest.approx(1) or np.isnan(found).any()
        return np.nansum(found * weights) / weights.sum()

    assert mean(own) == pytest.approx(0.5)
    assert mean(own[:1]) == pytest.approx(0.375)
    blank = [np.where([True, False, False], np.nan, scores) for scores in own]
    # Of the x that is left the first client knows nothing; the second knows y, half of what it holds.
    assert mean(blank) == pytest.approx((0 + 0.5) / 2)
    found, weights = client_scores.own_scores(held, asked, [np.full(3, np.nan)], "topic")
    assert np.isnan(found).all() and not weights.any()


def test_prompts_show_validation_questions_with_their_answers(tmp_path):
    config = small()
    config.models.shots = 2
    run = compare_strategies.lab(config, tmp_path)
    system, test = run.system(0), run.dataset.test[0]
    prompt = system.generator.tokenizer.decode(system.prompts.prompt(test.question, [0]))
    shown = [e for e in synthetic.generate().validation if f"{e.question} {e.answer}\n" in prompt]
    assert len(shown) == 2 and prompt.endswith(test.question)
    # What a prompt tells decides neither when to stop nor which learning rate is best.
    judging = [*run.stop_questions(), *run.dataset.validation]
    assert judging and not {e.id for e in shown} & {e.id for e in judging}
    before, _, after = prompt.partition(system.retriever.passages[0].text)
    assert all(e.question in before for e in shown) and after

    config.models.shots = 0
    plain = compare_strategies.lab(config, tmp_path).system(0)
    assert not plain.prompts.style.opening


def test_what_takes_long_is_limited_to_some_strategies_and_seeds():
    config = small()
    config.seeds, config.strategies = (0, 1, 2), ("none", "retriever", "generator", "joint_token")
    config.regimes = "federated", "local", "federated_converged", "local_1_converged"
    config.limits.local.strategies = "none", "retriever", "generator"
    config.limits.converged.update({"strategies": ("retriever", "generator"), "pairs": 2})
    loading.check(config)
    asked = types.SimpleNamespace(config=config, dataset=synthetic.generate())
    found = collections.Counter((p.regime, p.name) for p in compare_strategies.points(asked))
    tuned = ("retriever", "generator")
    assert found == {
        **{("federated", name): 3 for name in config.strategies},
        **{("local", name): 3 for name in ("none", *tuned)},
        **{(where, name): 2 for where in config.regimes[2:] for name in tuned},
    }
    config.limits.converged.pairs = -1
    with pytest.raises(ConfigError, match=r"limits.converged.pairs is -1; .* or 0 for all"):
        loading.check(config)
    config.limits.local.strategies = ("join",)
    with pytest.raises(ConfigError, match=r"config\.limits\.local\.strategies: .*'join'"):
        loading.check(config)


def test_left_over_training_questions_stand_for_clients_own_topics(tmp_path):
    config = small()
    config.data.update({"own_questions": 24, "test_questions": 20})
    run = compare_strategies.lab(config, tmp_path)
    train, asked = run.dataset.train, np.array(run.asked)
    tests, others = asked[run.of_test], asked[run.of_own]
    assert [*tests] == run.dataset.test and len(others) == 24 == (~run.of_test).sum()
    assert {e.topic for e in others} <= {e.topic for e in train}
    assert not {e.id for e in others} & {e.id for e in [*train, *run.dataset.validation, *tests]}
    read = {i for e in train for i in e.positive_ids}
    assert not any(read & {*e.positive_ids} for e in others)
    # Nor where training may not see which passages its questions are about.
    config.data.labels = False
    hidden = loading.own_questions(config, loading.load_data(config))
    assert [e.id for e in hidden] == [e.id for e in others]
    config.data.labels = True

    # Each lone client is asked all tests, and of the others those on what it holds.
    clients = run.clients("local", 0)
    held = [{e.topic for e in clients.of(i)} for i in range(2)]
    found = lab.asked_scores(run, [run.system(0)] * 2, clients, run.config.mode)
    for scores, topics in zip(found, held, strict=True):
        wanted = [run.of_test[i] or e.topic in topics for i, e in enumerate(asked)]
        assert [*~np.isnan(scores["em"])] == wanted
    cell = lab.compute_cell(run, "none", "federated", 0, 0)
    assert [*~np.isnan(cell.scores["em"])] == [*run.of_test]
    assert [*~np.isnan(cell.scores["own_em"])] == [*run.of_own]
    assert len(cell.clusters) == 44 and len(cell.client_em) == 2
    # Of a client the mean over its topics of their EM, by how often it holds each.
    everywhere = lab.asked_scores(run, [run.system(0)], clients, run.config.mode)[0]["em"]
    for client, em in enumerate(cell.client_em):
        total = weight = 0
        for topic in {e.topic for e in others}:
            of_topic = [i for i in np.flatnonzero(run.of_own) if asked[i].topic == topic]
            count = sum(e.topic == topic for e in clients.of(client))
            total, weight = total + count * everywhere[of_topic].mean(), weight + count
        assert em == pytest.approx(100 * total / weight)
    # A cell that is there is read back for another regime.
    cells.save(tmp_path, cell)
    again = lab.compute_cell(run, "none", "local", 0, 0)
    assert all(np.array_equal(again.scores[m], x, equal_nan=True) for m, x in cell.scores.items())

    # So it is for another seed, where the answers would be the same.
    elsewhere = run.like(config, tmp_path / "elsewhere")
    computed = lab.compute_cell(elsewhere, "none", "federated", 1, 0)
    known = lab.compute_cell(run, "none", "federated", 1, 0)
    assert known.cost.evaluate_seconds == cell.cost.evaluate_seconds
    assert computed.cost.evaluate_seconds != cell.cost.evaluate_seconds
    for metric, scores in computed.scores.items():
        assert np.array_equal(known.scores[metric], scores, equal_nan=True)

    config.data.own_questions = 100_000
    with pytest.raises(ConfigError, match=r"own_questions is 100000, but .* only \d+ others"):
        compare_strategies.lab(config, tmp_path)


def test_seeds_do_not_change_the_untuned_system(tmp_path):
    config = types.SimpleNamespace(seeds=(0, 1), split_seeds=(), regimes=("federated",))
    scores = {"em": np.array([1.0, 0.0])}
    for name in ("none", "retriever"):
        where = name, "federated", 0, 0
        cell = cells.Cell(*where, scores, {}, [], Cost(), {}, np.arange(2))
        cells.save(tmp_path / "bm25", cell)

    def known(name, folder):
        point = Point(name, "federated", 1, 1, folder=folder)
        return untuned_of_other_seeds(config, tmp_path, point)

    found = known("none", "bm25")
    assert (found.seed, found.split, found.scores["em"].tolist()) == (1, 1, [1.0, 0.0])
    assert known("retriever", "bm25") is None and known("none", "hybrid") is None
