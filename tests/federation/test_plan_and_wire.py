"""What cannot be deployed is refused by name, and arrays arrive as they were sent or not at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flwr.app import Array, ArrayRecord
from parties import federate, nodes, plan_of, simulate
from tiny import CHAIN
from toys import EXAMPLES, FOUR, assert_equal, leaves, mlp_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.federated.algorithm import Algorithm, State, Traffic
from fedrag_jax.federated.algorithms.centralised import centralised
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.dp_fed_avg import dp_fed_avg
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.algorithms.robust import robust
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.algorithms.secure import secure
from fedrag_jax.federated.attacks import attacked, sign_flip
from fedrag_jax.federated.compression.quantisation import quantised
from fedrag_jax.federated.optimizers import tunable
from fedrag_jax.federated.robust.coordinates import median
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.federated.work import Work
from fedrag_jax.integrations.flower.model_file import load_model
from fedrag_jax.integrations.flower.wire import WireError, from_record, sizes, to_record
from fedrag_jax.models import lora

NETWORK = lora.add_lora(CHAIN, lora.LoraConfig(3, 12.0, ("q_proj",)))


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        (
            fed_lora("fedsa", NETWORK),
            r"fed_lora\(rule=fedsa.*leaves each client a model of its own",
        ),
        (local_only(), r"local_only.*leaves each client a model of its own"),
        (centralised(), "centralised: there are 4 clients"),
        (dp_fed_avg(local=True), "dp_fed_avg.*drawn from a seed that the server knows"),
        (
            compressed(robust(median()), down=quantised(8)),
            "compressed.*needs all updates of a round",
        ),
        (secure(fed_avg()), "secure.*masks are drawn from a seed"),
        (robust(median()), "robust.*needs all updates of a round at once"),
        (attacked(fed_avg(), sign_flip(), [0]), "attacked.*attackers are simulated"),
        (fed_avg(dropout=0.1), r"fed_avg.*dropout=0\.1 simulates what real parties do"),
        (fed_avg(stragglers=0.2), r"fed_avg.*stragglers=0\.2 simulates"),
    ],
)
def test_algorithms_that_cannot_be_deployed_are_refused_by_name(algorithm, why):
    with pytest.raises(ConfigError, match=why):
        plan_of(algorithm)


def test_one_client_alone_is_no_federation():
    alone = Partition(EXAMPLES, (np.arange(23),))
    with pytest.raises(ConfigError, match=r"centralised.*Client\.total once"):
        plan_of(centralised(), data=alone)


def test_one_party_alone_makes_all_rounds_whatever_the_quorum(tmp_path):
    one = Partition(FOUR.examples, FOUR.clients[:1])
    result, _ = federate(plan_of(data=one), tmp_path, data=one, quorum=2)
    assert [record["clients"] for record in result.history] == [[0]] * 3


def test_an_algorithm_that_asks_clients_twice_is_refused():
    def init(trainable, client_init, client_count):
        return State(trainable)

    def turn(state, cohort, client):
        def group(members):
            x = jax.tree.map(lambda x: x[None], state.trainable)
            y, _, report = client.update(x, client.init(x), members)
            return jax.tree.map(lambda x: x[0], y), ((), report)

        client.total(group, cohort)
        sums, rest = client.total(group, cohort)
        return State(sums), [report for _, report in rest]

    twice = Algorithm(Work(), init, (turn,), lambda *_: Traffic(), name="twice")
    with pytest.raises(ConfigError, match=r"twice cannot be deployed.* calls them 2 and 2 times"):
        plan_of(twice)


def test_tasks_that_keep_an_index_are_refused_by_name():
    task = mlp_task()
    searching = dataclasses.replace(task, retrieve=lambda e, t, i: None, index={"a": np.zeros(1)})
    with pytest.raises(ConfigError, match="task 'mlp' cannot be deployed: its retrieval"):
        plan_of(task=searching)
    with pytest.raises(ConfigError, match="refresh_every=1"):
        plan_of(task=dataclasses.replace(task, retrieve=lambda e, t: None), refresh_every=2)
    with pytest.raises(ConfigError, match="clients must be at least 1, got 0"):
        dataclasses.replace(plan_of(), clients=0)


def test_too_many_to_draw_is_refused_before_anybody_is_asked(tmp_path):
    plan = plan_of(fed_avg(sampling=uniform(4)))
    with pytest.raises(ConfigError, match=r"uniform\(4\)"):
        federate(plan, tmp_path, apps=nodes(plan, tmp_path, numbers=[0]), present=3)


def test_what_is_retrieved_is_retrieved_with_the_model_of_the_round(tmp_path):
    """Each party searches with what it was sent, as the simulator does."""

    def retrieve(examples, trainable):
        closest = np.argsort(np.abs(np.asarray(trainable["out"])))[:1]
        return np.tile(closest, (len(examples), 1)).astype(np.int32)

    def collate(examples, retrieved):
        table = mlp_task().collate(examples, None)
        return table | {"y": table["y"] + retrieved[:, 0].astype(np.float32)}

    task = dataclasses.replace(mlp_task(), retrieve=retrieve, collate=collate)
    plan = plan_of(task=task)
    result, _ = federate(plan, tmp_path)
    expected, _ = simulate(plan)
    np.testing.assert_allclose(leaves(result.trainable), leaves(expected.trainable), atol=1e-6)
    assert all(record["refreshed"] for record in result.history)


def test_plans_are_equal_by_what_all_must_share():
    plan = plan_of(scaffold(0.05))
    assert plan.fingerprint == plan_of(scaffold(0.05)).fingerprint
    plan, other = plan_of(), plan_of(seed=12, optimizer=tunable(optax.adamw, learning_rate=0.5))
    assert plan.fingerprint != other.fingerprint
    assert plan.differences(other.settings) == (
        "optimizer is [0.5] there and [0.001] here; seed is 12 there and 11 here"
    )
    assert plan.differences(plan.settings) == ""


TREE = {
    "a": {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.float32(2)},
    "b": jnp.arange(4, dtype=jnp.bfloat16),
    "c": [np.arange(3, dtype=np.int32), np.zeros((0, 2), np.float16)],
}


def test_arrays_arrive_as_they_were_sent():
    record = to_record(TREE)
    assert [*record] == ["a.x", "a.y", "b", "c.0", "c.1"]
    back = from_record(record, TREE, "a test")
    assert_equal(back, TREE)
    assert all(
        x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True)
    )
    assert sum(sizes(record).values()) == sum(len(array.data) for array in record.values())


def test_everything_wrong_is_told_at_once():
    record = to_record(TREE)
    record["b"] = Array(np.full(4, 0x7F80, np.uint16))  # infinity in bfloat16
    record["a.x"] = Array(np.zeros((3, 2), np.float32))
    del record["a.y"]
    record["d"] = Array(np.zeros(1))
    with pytest.raises(WireError) as caught:
        from_record(record, TREE, "client 3")
    assert str(caught.value) == (
        "arrays of client 3 are refused: missing a.y; unexpected d; a.x is float32 [3, 2] but should "
        "be float32 [2, 3]; b is not finite"
    )
    with pytest.raises(WireError, match=r"missing a\.x"):
        from_record(ArrayRecord(), TREE, "client 3")


def test_a_model_of_another_plan_is_not_loaded(tmp_path):
    federate(plan_of(rounds=1), tmp_path)
    trainable, _ = load_model(plan_of(rounds=1), tmp_path / "party 0")
    assert leaves(trainable).size == 20
    with pytest.raises(CheckpointError, match="belongs to plan"):
        load_model(plan_of(seed=3), tmp_path / "party 0")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(plan_of(), tmp_path)
    assert FOUR.examples is EXAMPLES
