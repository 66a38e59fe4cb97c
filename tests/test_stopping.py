"""Validation decides when training ends, and which of its models is kept."""

import json

import jax
import numpy as np
import optax
import pytest
from test_fed_lora import CLIENTS, NETWORK, chain_task
from tiny import random_adapters
from toys import EXAMPLES, FOUR, assert_equal, linear_task, squared_error

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.ditto import ditto
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.algorithms.fine_tuned import fine_tuned
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.algorithms.local_parts import local_parts
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.collapse import CollapseWatch
from fedrag_jax.federated.compression.casting import cast
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.stopping import EarlyStopping, held_out_loss, read_evaluations
from fedrag_jax.strategies.regimes import Budget, Stopping, parse, rate_names
from fedrag_jax.tracking.checkpoints import Checkpointer


class Scripted:
    """A judge with a list of losses, that remembers what it was shown."""

    def __init__(self, *losses):
        self.losses, self.shown = list(losses), []

    def __call__(self, trainable, index):
        self.shown.append(trainable)
        return self.losses[len(self.shown) - 1]


def train(tmp_path, judge, *others, rounds=10, every=2, patience=2, **settings):
    stopping = EarlyStopping(judge, every, patience, tmp_path)
    result = fit(
        linear_task(),
        FOUR,
        fed_avg(local_steps=2),
        rounds=rounds,
        batch_size=2,
        optimizer=optax.sgd(0.01),
        callbacks=[*others, stopping],
        **settings,
    )
    return result, stopping


def test_training_ends_when_patience_does_and_the_best_is_kept(tmp_path):
    judge = Scripted(3.0, 2.0, 2.5, 2.0)  # of rounds 0, 2, 4, 6: equal is not better
    result, stopping = train(tmp_path, judge)
    assert len(result.history) == 6 and result.history[-1]["rounds"] == 10
    assert [e["round"] for e in read_evaluations(tmp_path / "validation.jsonl")] == [0, 2, 4, 6]
    assert stopping.best["round"] == 2
    assert_equal(stopping.trainable(), judge.shown[1])
    assert not np.array_equal(judge.shown[1]["w"], result.trainable["w"])


def test_a_training_that_has_ended_makes_no_further_round(tmp_path):
    losses = (3.0, 2.0, 2.5, 2.2)
    kept = Checkpointer(tmp_path / "checkpoints")
    result, _ = train(tmp_path, Scripted(*losses), kept)
    for _ in range(2):
        judge = Scripted()  # is not asked again
        again, stopping = train(tmp_path, judge, Checkpointer(tmp_path / "checkpoints"))
        assert again.history == result.history and stopping.best["round"] == 2
        assert_equal(again.trainable, result.trainable)


def test_a_new_training_takes_nothing_of_an_earlier_one_in_its_folder(tmp_path):
    train(tmp_path, Scripted(3.0, 1.0, 1.5, 2.0))
    judge = Scripted(2.5, 2.4, 2.6, 2.7)  # all worse than the best of the first
    result, stopping = train(tmp_path, judge)
    assert len(result.history) == 6 and len(judge.shown) == 4
    assert [e["loss"] for e in read_evaluations(stopping.log)] == [2.5, 2.4, 2.6, 2.7]
    assert_equal(stopping.trainable(), judge.shown[1])


@pytest.mark.parametrize("rounds", [2, 3])  # one at which an evaluation is due, and another
def test_losses_without_their_parameters_are_nothing_to_improve_on(tmp_path, rounds):
    kept = Checkpointer(tmp_path / "checkpoints")
    _, stopping = train(tmp_path, Scripted(3.0, 1.0, 1.5), kept, rounds=rounds)
    stopping.kept.unlink()
    judge = Scripted(2.5, 2.4, 2.6)
    _, stopping = train(tmp_path, judge, Checkpointer(tmp_path / "checkpoints"), rounds=rounds + 3)
    assert stopping.evaluations[0]["round"] == rounds
    assert_equal(stopping.trainable(), judge.shown[1])


@pytest.mark.parametrize("nothing", [np.nan, -np.inf])
def test_a_loss_that_is_not_finite_is_the_worst(tmp_path, nothing):
    judge = Scripted(nothing, 2.0, nothing, 3.0)
    result, stopping = train(tmp_path, judge)
    assert stopping.best["round"] == 2 and len(result.history) == 6
    assert_equal(stopping.trainable(), judge.shown[1])


PARTS = [
    (fed_lora("flora", NETWORK), r"fed_lora\(rule=flora.* changes the base"),
    (compressed(fed_lora("fedex", NETWORK), up=cast("bfloat16")), "changes the base"),
    (fed_lora("fedsa", NETWORK), "leaves models with its clients"),
    (local_only(), r"local_only\(.* leaves models with its clients"),
    (local_parts(private=("other",)), "leaves models with its clients"),
    (ditto(), "leaves models with its clients"),
    (fine_tuned(), "leaves models with its clients"),
]


@pytest.mark.parametrize(("algorithm", "words"), PARTS)
def test_what_keeps_the_trained_part_needs_it_to_be_the_model(tmp_path, algorithm, words):
    task = chain_task(random_adapters(NETWORK, 0))
    for callback in (EarlyStopping(Scripted(), 1, 1, tmp_path), CollapseWatch(tmp_path)):
        with pytest.raises(ConfigError, match=rf"{words}, but {type(callback).__name__} saves"):
            fit(task, CLIENTS, algorithm, rounds=1, batch_size=3, callbacks=[callback])


class Ends(Callback):
    def __init__(self):
        self.ends, self.failing = 0, False

    def round_end(self, state, record):
        if self.failing:
            raise RuntimeError("of another callback")

    def end(self):
        self.ends += 1


def test_callbacks_are_told_of_the_end_however_it_comes(tmp_path):
    watch = Ends()
    train(tmp_path / "whole", Scripted(*range(9, 0, -1)), watch)
    assert watch.ends == 1
    train(tmp_path / "stopped", Scripted(1.0, 2.0, 3.0), watch)
    assert watch.ends == 2
    watch.failing = True
    with pytest.raises(RuntimeError, match="of another callback"):
        train(tmp_path / "failed", Scripted(1.0), watch)
    assert watch.ends == 3


def test_a_training_that_never_improves_ends_as_it_began(tmp_path):
    result, stopping = train(tmp_path, Scripted(1.0, 2.0, 3.0))
    assert len(result.history) == 4
    assert_equal(stopping.trainable(), linear_task().trainable)


def test_a_training_that_goes_on_improving_ends_at_its_cap(tmp_path):
    result, stopping = train(tmp_path, Scripted(4.0, 3.0, 2.0, 1.0), rounds=5)
    assert len(result.history) == 5
    # The last round is judged though it is none of every two.
    assert [e["round"] for e in stopping.evaluations] == [0, 2, 4, 5]
    assert_equal(stopping.trainable(), jax.device_get(result.trainable))


def test_all_callbacks_are_told_of_the_last_round(tmp_path):
    class Ends(Callback):
        def round_end(self, state, record):
            return True

    result, stopping = train(tmp_path, Scripted(2.0, 1.0), Ends(), every=1)
    assert len(result.history) == 1 and len(stopping.evaluations) == 2


@pytest.mark.parametrize("killed_at", [3, 4, 5])
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, killed_at):
    class Killed(Exception):
        pass

    class Kills(Callback):
        def round_end(self, state, record):
            if state.round == killed_at:
                raise Killed

    def judge(trainable, index):  # best at round 4, whenever it is asked
        return abs(float(trainable["b"]) - bs[4])

    bs = {}

    class Watch(Callback):
        def round_end(self, state, record):
            bs[state.round] = float(state.state.trainable["b"])

    fit(linear_task(), FOUR, fed_avg(local_steps=2), rounds=8, batch_size=2,
        optimizer=optax.sgd(0.01), callbacks=[Watch()])  # fmt: skip
    whole, usual = train(tmp_path / "whole", judge, rounds=8)
    here = tmp_path / "killed"
    with pytest.raises(Killed):
        train(here, judge, Checkpointer(here / "saved", every=3), Kills(), rounds=8)
    again, stopping = train(here, judge, Checkpointer(here / "saved", every=3), rounds=8)
    strip = [{k: e[k] for k in ("round", "loss")} for e in stopping.evaluations]
    assert strip == [{k: e[k] for k in ("round", "loss")} for e in usual.evaluations]
    assert stopping.best["round"] == 4 and len(again.history) == len(whole.history) == 8
    assert_equal(stopping.trainable(), usual.trainable())


def test_held_out_loss_is_the_mean_over_examples_of_what_is_retrieved_now():
    """Batches that do not divide the examples, and passages found by the parameters that are judged."""
    asked = []

    def retrieve(examples, trainable):
        asked.append(float(trainable["b"]))
        return np.full((len(examples), 1), int(trainable["b"] > 0))

    def collate(examples, rows):
        return {
            "x": np.array([e["x"] for e in examples], np.float32),
            "y": np.array([e["y"] for e in examples], np.float32) + rows[:, 0].astype(np.float32),
            "id": np.array([e["id"] for e in examples], np.int32),
        }

    judge = held_out_loss(linear_task(retrieve=retrieve, collate=collate), EXAMPLES, batch_size=5)
    for b in (0.25, -0.5, 0.25):
        trainable = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(b)}
        errors = [(e["x"] @ trainable["w"] + b - e["y"] - (b > 0)) ** 2 for e in EXAMPLES]
        assert judge(trainable) == pytest.approx(np.mean(errors), rel=1e-5)
    assert asked == [0.25, -0.5, 0.25]
    batch = {"weight": np.ones(23, np.float32)} | linear_task().collate(EXAMPLES, None)
    whole, _ = squared_error(linear_task().trainable, {}, batch, None)
    assert held_out_loss(linear_task(), EXAMPLES)(linear_task().trainable) == pytest.approx(
        float(whole), rel=1e-5
    )


def test_regimes_that_could_only_fail_later_are_refused(tmp_path):
    with pytest.raises(DataError, match="linear: no validation questions"):
        held_out_loss(linear_task(), [])
    for every, patience in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="must be at least 1, got"):
            EarlyStopping(Scripted(), every, patience, tmp_path)


def test_a_lone_client_may_take_as_many_steps_as_all_together():
    matched = Budget(rounds=8, local_steps=3, clients=8)
    converged = matched._replace(stopping=Stopping())
    assert matched.schedule("local").rounds * 3 == 24
    assert converged.schedule("local") == converged.schedule("centralised")
    assert converged.schedule("local").rounds * converged.schedule("local").local_steps == 192
    assert matched.schedule("centralised").rounds * 3 == 192
    assert converged.schedule("federated") == matched.schedule("federated")


def test_names_of_regimes():
    assert parse("centralised", 0.1) == ("centralised", 0.1, False, "")
    assert parse("local_converged", 0.1) == ("local", 0.1, True, "")
    assert parse("federated_inf_converged", 0.1) == ("federated", np.inf, True, "")
    assert parse("federated_1_converged:fedprox", 0.1) == ("federated", 1.0, True, "fedprox")
    assert rate_names("federated_1_converged:fedprox") == [
        "federated_1_converged:fedprox", "federated_converged:fedprox", "federated_1:fedprox",
        "federated:fedprox",
        "federated_1_converged", "federated_converged", "federated_1", "federated",
    ]  # fmt: skip
    names = ["local_1_converged", "local_converged", "local_1", "local"]
    assert rate_names("local_1_converged") == names
    assert rate_names("local_converged") == ["local_converged", "local"]
    assert rate_names("centralised") == ["centralised"]
    for wrong in ("converged", "_converged", "centralised_1_converged", "local_-1", "federated_x"):
        with pytest.raises(ConfigError, match="unknown; choose among"):
            parse(wrong, 0.1)


def test_evaluations_are_a_log_of_lines(tmp_path):
    train(tmp_path, Scripted(1.0, 2.0, 3.0))
    lines = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert [{*json.loads(line)} for line in lines] == [{"round", "loss", "seconds"}] * 3
    assert read_evaluations(tmp_path / "none.jsonl") == []


def test_a_resumed_training_with_an_index_is_judged_alike(tmp_path):
    """What a policy draws depends on the index; the judge continues from that of the training."""

    def retrieve(examples, trained, index):
        time = int(index["time"])
        drawn = np.random.default_rng(time).integers(0, 1000, (len(examples), 1))
        return drawn.astype(np.int32), {"time": np.asarray(time + 1)}

    def collate(examples, drawn):
        table = linear_task().collate(examples, None)
        return table | {"y": table["y"] + (drawn[:, 0] / 1000).astype(np.float32)}

    task = linear_task(retrieve=retrieve, collate=collate, index={"time": np.asarray(0)})

    def judged(folder, rounds):
        stopping = EarlyStopping(held_out_loss(task, EXAMPLES[:8]), 1, 99, folder)
        kept = Checkpointer(folder / "checkpoints")
        how = {"batch_size": 2, "optimizer": optax.sgd(0.01), "callbacks": [kept, stopping]}
        fit(task, FOUR, fed_avg(local_steps=1), rounds=rounds, **how)
        return [e["loss"] for e in read_evaluations(folder / "validation.jsonl")]

    whole = judged(tmp_path / "whole", 5)
    judged(tmp_path / "parts", 3)
    assert judged(tmp_path / "parts", 5) == whole


@pytest.mark.parametrize("clients", [3, 49, 1000])
def test_one_client_of_any_number_may_take_part(clients):
    schedule = Budget(rounds=2, clients=clients, participation=1 / clients).schedule("federated")
    assert schedule.drawn == 1 and schedule.rounds == 2 * clients
