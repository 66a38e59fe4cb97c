"""Noise of the server's own, and messages that are encoded on their way."""

import jax
import numpy as np
import optax
import pytest
from flwr.app import Array
from loopback import Loopback
from parties import assert_agree, federate, nodes, plan_of, simulate
from test_faults import Dies, is_bad, replaced
from toys import FOUR, leaves

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DivergenceError
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.dp_fed_avg import dp_fed_avg
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.compression.casting import cast
from fedrag_jax.federated.compression.quantisation import quantised
from fedrag_jax.federated.compression.top_k import top_k
from fedrag_jax.integrations.flower.draws import Draws
from fedrag_jax.integrations.flower.server import run_rounds

CLIP = 0.05  # less than what anybody moves by
BOTH = {"up": top_k(0.3), "down": quantised(8)}


def private_plan(noise, steps=3):
    algorithm = dp_fed_avg(clip=CLIP, noise_multiplier=noise, local_steps=steps)
    return plan_of(algorithm, rounds=1, optimizer=optax.sgd(0.1))


def answers(plan, folder, data=FOUR):
    """What parties answer in a round, as trees by name, and what the server sent them."""
    sent = []

    def meddle(node, message, reply):
        if message.metadata.message_type == "train":
            sent.append((message.content["model"], reply.content["model"]))
        return reply

    run_rounds(plan, Loopback(nodes(plan, folder, data), meddle), folder / "server", patience=5)
    return sent


def test_a_private_update_is_clipped_before_it_leaves_its_party(tmp_path):
    plan = private_plan(1.0)
    norms = []
    for model, answer in answers(plan, tmp_path):
        pairs = [(model[f"trainable.{name}"].numpy(), x.numpy()) for name, x in answer.items()]
        norms.append(np.sqrt(sum(((y - x) ** 2).sum() for x, y in pairs)))
    assert len(norms) == 4
    np.testing.assert_allclose(norms, CLIP, rtol=1e-4)  # all of them would have moved further


def test_an_update_that_its_party_did_not_clip_is_clipped_by_the_server(tmp_path):
    plan = private_plan(0.0)

    def meddle(node, message, reply):
        if not is_bad(node, message, reply):
            return reply
        record = reply.content["model"]
        record["out"] = Array(np.full(5, 1e3, np.float32))
        return replaced(reply, "model", record)

    _, (moved,) = federate(plan, tmp_path, meddle)
    _, (honest,) = federate(plan, tmp_path / "honest")
    # One of four moves the mean by no more than from one end of its clip to the other.
    assert 0 < np.linalg.norm(leaves(moved) - leaves(honest)) <= 2 * CLIP / 4


def test_a_server_draws_its_noise_of_its_own(tmp_path):
    """And none of it can be worked out from what all parties know."""
    plan = private_plan(1.0, 2)
    found = [federate(plan, tmp_path / str(i))[1][0] for i in range(2)]
    found.append(federate(plan, tmp_path / "known", draws=Draws.known(plan))[1][0])
    one, two, known = (leaves(model) for model in found)
    assert min(abs(a - b).min() for a, b in ((one, two), (one, known), (two, known))) > 0
    draws = [Draws.of(plan) for _ in range(2)]
    assert len({d.seed for d in draws}) == 2
    assert len({tuple(np.asarray(jax.random.key_data(d.key))) for d in draws}) == 2
    plain = plan_of()
    assert Draws.of(plain).seed == plain.seed


@pytest.mark.slow
def test_noise_on_the_sum_is_as_wide_as_it_is_said_to_be(tmp_path):
    clients = Partition(FOUR.examples, FOUR.clients)
    quiet = private_plan(0.0, 2)
    _, (still,) = federate(quiet, tmp_path / "quiet", data=clients)
    loud = private_plan(3.0, 2)
    runs = [federate(loud, tmp_path / str(i), data=clients)[1][0] for i in range(20)]
    noise = np.array([leaves(model) - leaves(still) for model in runs]).ravel()
    expected = 3.0 * CLIP / 4
    assert noise.size == 400
    assert noise.std() == pytest.approx(expected, rel=0.15)
    assert abs(noise.mean()) < 4 * expected / 20


def test_records_tell_what_a_private_round_has_spent(tmp_path):
    def record_fields(rounds):
        if rounds > 2:
            raise ConfigError("3 rounds spend more than is claimed")
        return {"epsilon": 0.5 * rounds}

    algorithm = dp_fed_avg(local_steps=1)._replace(record_fields=record_fields)
    result, _ = federate(plan_of(algorithm, rounds=2), tmp_path)
    assert [record["epsilon"] for record in result.history] == [0.5, 1.0]
    with pytest.raises(ConfigError, match="more than is claimed"):
        plan_of(algorithm, rounds=3)


def test_messages_travel_encoded_and_their_bytes_are_counted(tmp_path):
    plan = plan_of(compressed(fed_avg(local_steps=3), up=quantised(8), down=cast("bfloat16")))
    result, _ = federate(plan, tmp_path)
    expected, _ = simulate(plan)
    header = 128  # of NumPy's format, an array
    for record, other in zip(result.history, expected.history, strict=True):
        for way in ("up", "down")[: 1 + (record["round"] > 1)]:
            there = {
                kind.replace("uint16", "bfloat16"): n for kind, n in record["traffic"][way].items()
            }
            plain = {kind: n + 4 * header for kind, n in other["traffic"][way].items()}
            assert there == plain
    # Nobody has heard anything before the first round.
    assert result.history[0]["traffic"]["down"] == {
        "in float32": 4 * (60 + header), "out float32": 4 * (20 + header)
    }  # fmt: skip


@pytest.mark.parametrize("algorithm", [fed_avg(local_steps=3), scaffold(0.05, local_steps=3)])
def test_a_lost_answer_costs_the_answer_and_no_more(algorithm, tmp_path):
    """What its message had left out is left out still, and what it has not heard it is told whole."""
    plan, asked = plan_of(compressed(algorithm, **BOTH), rounds=4), []

    def meddle(node, message, reply):
        order = message.content["order"]
        if message.metadata.message_type == "train":
            asked.append((int(order["round"]), node - 100, bool(order["whole"])))
        if is_bad(node, message, reply) and int(order["round"]) == 2:
            record = reply.content["model"]
            record["in.values"] = Array(np.full(record["in.values"].shape, np.nan, np.float32))
            return replaced(reply, "model", record)
        return reply

    result, _ = federate(plan, tmp_path, meddle)
    assert [r["clients"] for r in result.history] == [[0, 1, 2, 3], [0, 1, 3], *[[0, 1, 2, 3]] * 2]
    assert {(r, k) for r, k, whole in asked if whole} == {*((1, k) for k in range(4)), (3, 2)}


@pytest.mark.parametrize("within", [False, True])
def test_a_server_that_ends_goes_on_with_what_parties_have_heard(within, tmp_path):
    plan = plan_of(compressed(scaffold(0.05, local_steps=3), **BOTH), rounds=4)

    def meddle(node, message, reply):
        order = message.content["order"]
        if message.metadata.message_type == "train" and order["round"] == 3 and node == 102:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(plan, tmp_path, meddle if within else None, callbacks=[] if within else [Dies(2)])
    _, models = federate(plan, tmp_path)
    _, others = simulate(plan)
    assert_agree(others[1], models, others[2:])


def test_a_party_that_lost_what_it_heard_is_told_again(tmp_path):
    plan = plan_of(compressed(fed_avg(local_steps=3), down=quantised(8)), rounds=4)
    with pytest.raises(KeyboardInterrupt):
        federate(plan, tmp_path, callbacks=[Dies(2)])
    (tmp_path / "party 2" / "memory.safetensors").unlink()
    result, _ = federate(plan, tmp_path)
    assert "counted round 2 of this party last" in result.history[2]["refused"]["2"]
    assert result.history[3]["clients"] == [0, 1, 2, 3]


def test_a_message_that_decodes_to_no_numbers_is_named(tmp_path):
    plan = plan_of(compressed(fed_avg(local_steps=3), up=quantised(8)), rounds=1)

    def meddle(node, message, reply):
        if not is_bad(node, message, reply):
            return reply
        record = reply.content["model"]
        record["in.values"] = Array(np.full(15, 127, np.int8))
        record["in.scales"] = Array(np.full(1, 3e38, np.float32))
        return replaced(reply, "model", record)

    with pytest.raises(DivergenceError, match=r"client\(s\): 2\."):
        federate(plan, tmp_path, meddle)
