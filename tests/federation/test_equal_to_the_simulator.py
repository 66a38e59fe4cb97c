"""A federation over Flower's messages ends every round where the simulator does."""

import jax
import numpy as np
import optax
import pytest
from loopback import Loopback
from parties import assert_agree, federate, nodes, plan_of, simulate
from tiny import CHAIN, random_adapters
from toys import FOUR, leaves, mlp_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.dp_fed_avg import dp_fed_avg
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_avg_m import fed_avg_m
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.algorithms.fed_opt import fed_adam
from fedrag_jax.federated.algorithms.fed_prox import fed_prox
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.compression.casting import cast
from fedrag_jax.federated.compression.quantisation import quantised, rotated
from fedrag_jax.federated.compression.top_k import top_k
from fedrag_jax.federated.engine.cohort import client_batches
from fedrag_jax.federated.engine.two_sides import client_round, member_of
from fedrag_jax.federated.sampling import poisson, uniform
from fedrag_jax.integrations.flower.draws import Draws
from fedrag_jax.integrations.flower.model_file import load_model
from fedrag_jax.integrations.flower.server import run_rounds
from fedrag_jax.models import lora
from fedrag_jax.objectives.task import Task

ALGORITHMS = {
    "fedavg": fed_avg(local_steps=3),
    "fedavg, epochs, uniform weights": fed_avg(local_epochs=2, weighting="uniform"),
    "fedavg, optimizers that stay": fed_avg(
        local_steps=2, carry_optimizer=True, sampling=uniform(3)
    ),
    "fedavg, poisson": fed_avg(local_steps=2, sampling=poisson(0.5)),
    "fedavgm": fed_avg_m(local_steps=3),
    "fedadam": fed_adam(local_epochs=1),
    "fedprox": fed_prox(local_steps=3, mu=0.1),
    "scaffold": scaffold(0.05, local_epochs=2),
    "scaffold, some drawn": scaffold(0.05, local_steps=3, sampling=uniform(2)),
    "fedavg, int8 both ways": compressed(
        fed_avg(local_steps=3), up=quantised(8), down=quantised(8)
    ),
    "fedadam, top-k up": compressed(fed_adam(local_steps=3), up=top_k(0.3)),
    "scaffold, top-k up, some drawn, bfloat16 down": compressed(
        scaffold(0.05, local_steps=3, sampling=uniform(2)), up=top_k(0.3), down=cast("bfloat16")
    ),
    "fedavg, rotated int4 up": compressed(fed_avg(local_steps=3), up=rotated(4)),
    "private": dp_fed_avg(clip=0.1, noise_multiplier=0.5, local_steps=3),
    "private, some drawn": dp_fed_avg(clip=0.1, noise_multiplier=0.5, rate=0.5, local_steps=3),
    "private, a clip that follows": dp_fed_avg(
        clip=0.1, noise_multiplier=0.5, quantile=0.5, count_noise=2.0, local_steps=3
    ),
    "private, int8 up": compressed(
        dp_fed_avg(clip=0.1, noise_multiplier=0.5, local_steps=3), up=quantised(8)
    ),
}


QUICK = (
    "fedavg",
    "fedadam",
    "fedavg, optimizers that stay",
    "fedavg, poisson",
    "scaffold, some drawn",
    "scaffold, top-k up, some drawn, bfloat16 down",
    "private, some drawn",
    "private, int8 up",
)


def slow_but(quick, rows):
    return [row if row in quick else pytest.param(row, marks=pytest.mark.slow) for row in rows]


@pytest.mark.parametrize("name", slow_but(QUICK, ALGORITHMS))
def test_every_round_is_that_of_the_simulator(name, tmp_path):
    # Steps that are clipped, and large beside the rounding of a model that was.
    optimizer = optax.sgd(0.1) if "private" in name else None
    plan = plan_of(ALGORITHMS[name], mlp_task(dropout=True), rounds=4, optimizer=optimizer)
    # Of private ones the server's draws are its own, unless a test knows them.
    result, models = federate(plan, tmp_path, draws=Draws.known(plan))
    expected, others = simulate(plan)
    assert_agree(plan.task.trainable, models, others)
    for record, other in zip(result.history, expected.history, strict=True):
        for field in ("round", "clients", "drawn", "examples"):
            assert record[field] == other[field]
        if other["loss"] is not None:
            assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
            metrics = {name: other["metrics"][name] for name in record["metrics"]}
            assert record["metrics"] == pytest.approx(metrics, rel=1e-5)
            assert record["client_loss"] == pytest.approx(other["client_loss"], rel=1e-5)
        assert record["refused"] == {} and record.get("epsilon") == other.get("epsilon")


NETWORK = lora.add_lora(CHAIN, lora.LoraConfig(3, 12.0, ("q_proj", "lm_head")))
CLIENTS = Partition(list(range(6)), (np.array([0]), np.array([1, 2]), np.array([3, 4, 5])))


def squared_error(trainable, frozen, batch, rng):
    found = NETWORK(frozen["decoder"], batch["x"], adapters=trainable["adapters"])
    error = ((found - batch["y"]) ** 2).sum(-1) + trainable["other"] * batch["x"].mean(-1)
    return (error * batch["weight"]).sum() / batch["weight"].sum(), {}


def chain_task() -> Task:
    """Adapters whose B is not zero, next to something else that is trained."""
    rng = np.random.default_rng(0)
    table = {"x": rng.normal(size=(6, 6)), "y": rng.normal(size=(6, 5))}
    adapters = jax.tree.map(lambda x: 0.3 * x, random_adapters(NETWORK, 0))
    return Task(
        "chain",
        {"adapters": adapters, "other": np.float32(1)},
        {"decoder": CHAIN.init(jax.random.key(1))},
        squared_error,
        lambda examples, _: {n: rows[examples].astype(np.float32) for n, rows in table.items()},
    )


RANKS = {"flora, several ranks": (1, 2, 3)}
RULES = "flora", "fedit", "ffa", "rolora", *RANKS, "fedex", "flexlora"


@pytest.mark.parametrize("rule", slow_but(("flora",), RULES))
def test_rules_for_adapters_too(rule, tmp_path):
    name, ranks = rule.partition(",")[0], RANKS.get(rule)
    algorithm = fed_lora(name, NETWORK, ranks=ranks, local_steps=2)
    settings = {"optimizer": optax.sgd(0.003), "data": CLIENTS}
    plan = plan_of(algorithm, chain_task(), **settings)
    result, models = federate(plan, tmp_path, data=CLIENTS)
    expected, others = simulate(plan, CLIENTS)
    # An SVD leaves the sign and the order of its factors open where numbers differ in the last place.
    share = 1e-3 if rule == "flexlora" else 1e-5
    assert_agree(plan.task.trainable, models, others, share)
    base, changed = (leaves(tree) for tree in (plan.task.frozen, expected.frozen))
    moved = np.abs(changed - base).max()
    assert (moved > 0) == (name in ("flora", "fedex"))
    rounding = 8 * np.finfo(np.float32).eps * np.abs(base).max()
    np.testing.assert_allclose(leaves(result.frozen), changed, rtol=0, atol=1e-5 * moved + rounding)
    # What a party is left with is the same: the adapters and the base.
    for folder in (tmp_path / "server", *tmp_path.glob("party *")):
        trainable, frozen = load_model(plan, folder)
        np.testing.assert_array_equal(leaves(trainable), leaves(result.trainable))
        np.testing.assert_array_equal(leaves(frozen), leaves(result.frozen))
    assert len([*tmp_path.glob("party *")]) == 3


def test_what_travels_is_what_is_trained(tmp_path):
    """And the number, the size and means of one's examples; no frozen array, no example."""
    plan, replies = plan_of(scaffold(0.05, local_steps=2)), []

    def listen(node, message, reply):
        replies.append((message.metadata.message_type, reply))
        return reply

    grid = Loopback(nodes(plan, tmp_path), listen)
    run_rounds(plan, grid, tmp_path / "server", patience=5)
    for kind, reply in replies:
        content = reply.content
        told = {name: {*record} for name, record in content.items()}
        if kind == "train":
            report = {"loss", "examples", "error"}
            about = {"client", "round", "plan"}
            assert told == {"model": {"in", "out"}, "about": about, "report": report}
        else:
            assert {*told} == {"about"}
    asked = [message for _, kind, message in grid.log if kind == "train"]
    names = {f"trainable.{n}" for n in ("in", "out")}
    names |= {f"server.{n}" for n in ("c.in", "c.out", "clients", "rate")}
    assert {*asked[0].content["model"]} == names


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedprox", "scaffold"])
def test_a_server_is_closed_only_where_clients_do_not_need_what_it_keeps(name):
    """`Algorithm.open_server` is what decides whether it is sent."""
    plan = plan_of(ALGORITHMS[name])
    table = plan.task.collate(FOUR.of(1), None)
    rows = np.arange(len(FOUR.of(1)))
    member = member_of(1, 1.0, client_batches(rows, 1, plan.algorithm.work, 0, 3, 11))

    def trained(server):
        state = plan.initial._replace(server=server)
        shared, numbers = plan.shared_round(0)
        about = numbers, state, plan.task.frozen, table, member, plan.key(0)
        return leaves(client_round(shared, plan.task.loss, *about)[0])

    other = jax.tree.map(lambda x: x + 1, plan.initial.server)
    same = np.array_equal(trained(plan.initial.server), trained(other))
    assert same != plan.algorithm.open_server
