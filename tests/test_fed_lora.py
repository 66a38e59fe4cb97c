"""What each rule makes of the clients' adapters, seen in the dense product they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CHAIN, random_adapters
from toys import assert_close, assert_equal, leaves

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import RULES, fed_lora
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.sampling import fixed, poisson
from fedrag_jax.models import lora
from fedrag_jax.models.network import flatten, unflatten
from fedrag_jax.models.quantized import quantize
from fedrag_jax.objectives.task import Task
from fedrag_jax.tracking.checkpoints import Checkpointer

CLIENTS = Partition(list(range(6)), (np.array([0]), np.array([1, 2]), np.array([3, 4, 5])))
SHARES = np.array([1, 2, 3]) / 6
NETWORK = lora.add_lora(CHAIN, lora.LoraConfig(3, 12.0, ("q_proj", "lm_head")))
SGD = {"optimizer": optax.sgd(0.003), "batch_size": 3}


def squared_error(trainable, frozen, batch, rng, network=NETWORK):
    found = network(frozen["decoder"], batch["x"], adapters=trainable["adapters"])
    error = ((found - batch["y"]) ** 2).sum(-1) + trainable["other"] * batch["x"].mean(-1)
    return (error * batch["weight"]).sum() / batch["weight"].sum(), {}


def chain_task(adapters, loss=squared_error):
    """Adapters, next to something else that is trained."""
    rng = np.random.default_rng(0)
    table = {"x": rng.normal(size=(6, 6)), "y": rng.normal(size=(6, 5))}
    return Task(
        "chain",
        {"adapters": adapters, "other": np.float32(1)},
        {"decoder": CHAIN.init(jax.random.key(1))},
        loss,
        lambda examples, _: {n: rows[examples].astype(np.float32) for n, rows in table.items()},
    )


@pytest.fixture(scope="module")
def task():
    """Adapters whose B is not zero."""
    return chain_task(jax.tree.map(lambda x: 0.3 * x, random_adapters(NETWORK, 0)))


@pytest.fixture(scope="module")
def alone(task):
    """What each client makes of the start when it is alone, training A and B."""
    return one_by_one(task, "fedit")


def dense(adapters) -> dict[tuple, np.ndarray]:
    """{path of a kernel: alpha / rank A B} in NumPy."""
    found = {path: np.asarray(x, np.float64) for path, x in flatten(adapters)}
    return {
        path[:-1]: 4.0 * found[path] @ found[(*path[:-1], "lora_b")]
        for path in found
        if path[-1] == "lora_a"
    }


def base_change(task, result):
    before, after = dict(flatten(task.frozen["decoder"])), dict(flatten(result.frozen["decoder"]))
    return {p[:-1]: np.asarray(after[p]) - np.asarray(x) for p, x in before.items()}


def one_by_one(task, rule):
    data = (Partition(CLIENTS.examples, (rows,)) for rows in CLIENTS.clients)
    return [fit(task, d, fed_lora(rule, NETWORK), rounds=1, **SGD).trainable for d in data]


def cut_to_rank(matrix):
    u, s, vt = np.linalg.svd(matrix)
    return (u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]


def mean(trees):
    return {path: sum(p * t[path] for p, t in zip(SHARES, trees, strict=True)) for path in trees[0]}


def gap(found, expected, start):
    """The largest difference in units of the largest update."""
    update = max(np.abs(expected[p] - start[p]).max() for p in expected)
    return max(np.abs(found[p] - expected[p]).max() for p in expected) / update


def after(task, result):
    """The product of the adapters and the change of the base: what the model has become."""
    change = base_change(task, result)
    return {p: x + change[p] for p, x in dense(result.trainable["adapters"]).items()}


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedit", "ffa", "rolora", "flora", "fedex", "flexlora"])
def test_which_rules_keep_the_mean_update(task, alone, rule):
    if rule in ("ffa", "rolora"):  # which begins with B
        alone = one_by_one(task, "ffa")
    clients = [dense(t["adapters"]) for t in alone]
    start, expected = dense(task.trainable["adapters"]), mean(clients)
    result = fit(task, CLIENTS, fed_lora(rule, NETWORK), rounds=1, **SGD)
    off = gap(after(task, result), expected, start)
    if rule in ("ffa", "rolora", "flora", "fedex"):
        assert off < 2e-5
    elif rule == "fedit":
        assert 0.02 < off < 2
    else:
        assert 1e-3 < off < 2  # what a rank of three cannot hold of a mean of three products


@pytest.mark.slow
def test_fedit_averages_the_factors(task):
    result = fit(task, CLIENTS, fed_lora("fedit", NETWORK), rounds=2, **SGD)
    plain = fit(task, CLIENTS, fed_avg(), rounds=2, **SGD)
    assert_close(result.trainable, plain.trainable, 1e-6)


def test_ffa_and_rolora_move_what_they_should(task):
    def moved(rule, rounds):
        end = fit(task, CLIENTS, fed_lora(rule, NETWORK), rounds=rounds, **SGD).trainable
        start = dict(flatten(task.trainable["adapters"]))
        found = {p[-1] for p, x in flatten(end["adapters"]) if (np.asarray(x) != start[p]).any()}
        return found, float(end["other"])

    assert moved("ffa", 2)[0] == {"lora_b"}
    assert moved("rolora", 1)[0] == {"lora_b"}
    assert moved("rolora", 2)[0] == {"lora_a", "lora_b"}
    # Whatever else is trained is trained by all of them.
    assert len({round(moved(rule, 2)[1], 4) for rule in ("ffa", "rolora", "fedit")}) == 1


def test_rolora_trains_a_alone_in_its_second_round(task):
    keep = Keep()
    fit(task, CLIENTS, fed_lora("rolora", NETWORK), rounds=2, callbacks=[keep], **SGD)
    first, second = (dict(flatten(s.trainable["adapters"])) for s in keep.states)
    for path in first:
        assert (first[path] == second[path]).all() == (path[-1] == "lora_b")


def test_flexlora_is_the_best_approximation_of_its_rank(task, alone):
    expected = mean([dense(t["adapters"]) for t in alone])
    result = fit(task, CLIENTS, fed_lora("flexlora", NETWORK), rounds=1, **SGD)
    found = dense(result.trainable["adapters"])
    for path, whole in expected.items():
        best = cut_to_rank(whole)
        np.testing.assert_allclose(found[path], best, atol=1e-4 * np.abs(whole).max())
        assert np.linalg.norm(whole - best) > 0


def test_flora_restarts_with_fresh_adapters(task):
    keep = Keep()
    fit(task, CLIENTS, fed_lora("flora", NETWORK), rounds=2, callbacks=[keep], **SGD)
    first, second = (dict(flatten(s.trainable["adapters"])) for s in keep.states)
    for path in first:
        if path[-1] == "lora_b":
            assert not first[path].any()
        else:
            assert (first[path] != second[path]).all()


@pytest.mark.slow
def test_fedsa_shares_a_and_keeps_b(task, alone):
    result = fit(task, CLIENTS, fed_lora("fedsa", NETWORK), rounds=1, **SGD)
    found = dict(flatten(result.trainable["adapters"]))
    each = [dict(flatten(t["adapters"])) for t in alone]
    for path, rows in found.items():
        assert len(rows) == 3
        expected = np.stack([e[path] for e in each])
        if path[-1] == "lora_a":
            expected = np.broadcast_to(np.tensordot(SHARES, expected, 1), expected.shape)
        np.testing.assert_allclose(rows, expected, atol=1e-6)
    # A client that was never drawn has the mean A and the B it began with.
    drawn = fed_lora("fedsa", NETWORK, sampling=fixed(0, 1))
    found = fit(task, CLIENTS, drawn, rounds=1, **SGD).trainable["adapters"]
    start = dict(flatten(task.trainable["adapters"]))
    for path, rows in flatten(found):
        assert (np.asarray(rows[2]) == start[path]).all() == (path[-1] == "lora_b")


# --- clients of different ranks ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["flora", "flexlora"])
def test_ranks_of_clients_and_their_own_scale(task, rule):
    """Client k trains the first r_k columns, at the scale alpha / r_k of a network of that rank."""
    ranks = (1, 2, 3)
    start = chain_task(lora.init_adapters(NETWORK, 3))
    products = []
    for rank, rows in zip(ranks, CLIENTS.clients, strict=True):
        small = lora.add_lora(CHAIN, lora.LoraConfig(rank, 12.0, NETWORK.lora.targets))
        cut = unflatten(
            (p, x[..., :rank] if p[-1] == "lora_a" else x[..., :rank, :])
            for p, x in flatten(start.trainable["adapters"])
        )
        own = chain_task(cut, functools.partial(squared_error, network=small))
        data = Partition(CLIENTS.examples, (rows,))
        end = fit(own, data, fed_avg(), rounds=1, **SGD).trainable["adapters"]
        products.append({p[:-1]: np.asarray(x) for p, x in flatten(lora.product(small, end))})
    expected = mean(products)
    result = fit(start, CLIENTS, fed_lora(rule, NETWORK, ranks=ranks), rounds=1, **SGD)
    found, zero = after(start, result), {p: 0 * x for p, x in expected.items()}
    if rule == "flora":
        assert gap(found, expected, zero) < 2e-5
    else:
        best = {}
        for path, whole in expected.items():
            best[path] = cut_to_rank(whole)
        assert gap(found, best, zero) < 1e-3


def test_clients_of_smaller_ranks_hold_the_first_columns(task):
    """What a round that learns nothing averages: all hold the first, 3/6 the last."""
    how = {"rounds": 1, "batch_size": 3, "optimizer": optax.sgd(0.0)}
    result = fit(task, CLIENTS, fed_lora("flexlora", NETWORK, ranks=(1, 2, 3)), **how)
    start = dict(flatten(jax.tree.map(np.asarray, task.trainable["adapters"])))
    for path, found in dense(result.trainable["adapters"]).items():
        a, b = (start[*path, name] for name in ("lora_a", "lora_b"))
        np.testing.assert_allclose(found, 4.0 * (a * np.array([1, 5 / 6, 1 / 2])) @ b, atol=1e-5)


@pytest.mark.slow
def test_equal_ranks_are_no_ranks(task):
    for rule in ("flora", "flexlora"):
        plain, ranked = (
            fit(task, CLIENTS, fed_lora(rule, NETWORK, ranks=ranks), rounds=2, **SGD)
            for ranks in (None, (3, 3, 3))
        )
        a, b = (after(task, result) for result in (plain, ranked))
        assert max(np.abs(a[p] - b[p]).max() for p in a) < 1e-5


# --- the battery -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_group_sizes_agree_and_runs_resume(task, rule, tmp_path):
    algorithm = fed_lora(rule, NETWORK, local_steps=2, **mixed(rule))
    whole = fit(task, CLIENTS, algorithm, rounds=3, **SGD)
    wide = fit(task, CLIENTS, algorithm, rounds=3, group_size=2, **SGD)
    fit(task, CLIENTS, algorithm, rounds=1, callbacks=[Checkpointer(tmp_path)], **SGD)
    again = fit(task, CLIENTS, algorithm, rounds=3, callbacks=[Checkpointer(tmp_path)], **SGD)
    assert_equal(again.trainable, whole.trainable)
    assert_equal(again.frozen, whole.frozen)
    if rule == "fedsa":
        assert_close(wide.trainable, whole.trainable, 1e-5)
    else:  # singular vectors have no sign
        a, b = (after(task, result) for result in (wide, whole))
        assert max(np.abs(a[p] - b[p]).max() for p in a) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rule", [r for r in RULES if r != "fedsa"])
def test_nothing_moves_at_a_rate_of_zero_or_where_nobody_answers(task, rule):
    start = dense(task.trainable["adapters"])
    for work, rate in (({}, 0.0), ({"sampling": poisson(1e-9)}, 0.1)):
        algorithm = fed_lora(rule, NETWORK, **work)
        result = fit(task, CLIENTS, algorithm, rounds=2, optimizer=optax.sgd(rate))
        found = after(task, result)
        assert max(np.abs(found[p] - start[p]).max() for p in start) < 1e-4, work
        assert float(result.trainable["other"]) == 1


def test_bytes(task):
    a, b = 4 * (2 * 6 * 3 + 6 * 3), 4 * (2 * 3 * 6 + 3 * 5)  # of two layers and the output
    dense = 4 * (2 * 6 * 6 + 6 * 5)
    stacked = min(3 * (a + b), dense)
    expected = {  # of three clients: (down, up) in a round, beside 4 bytes of the other parameter
        "fedit": (3 * (a + b), 3 * (a + b)),
        "ffa": (3 * b, 3 * b),
        "rolora": (3 * b, 3 * b),
        "flora": (3 * stacked, 3 * (a + b)),
        "fedex": (3 * (a + b + stacked), 3 * (a + b)),
        "flexlora": (3 * (a + b), 3 * (a + b)),
        "fedsa": (3 * a, 3 * a),
    }
    for rule, (down, up) in expected.items():
        history = fit(task, CLIENTS, fed_lora(rule, NETWORK), rounds=2, **SGD).history
        assert (history[0]["bytes_down"], history[0]["bytes_up"]) == (down + 12, up + 12), rule
        if rule == "rolora":
            assert history[1]["bytes_up"] == 3 * a + 12
        down = {
            "fedex": {"adapters", "other", "decoder update"},
            "flora": {"other", "decoder update"},
        }
        for way, kinds in (("up", {"adapters", "other"}), ("down", down.get(rule))):
            sent = history[0]["traffic"][way]
            assert set(sent) == {f"{kind} float32" for kind in kinds or ("adapters", "other")}
            assert sum(sent.values()) == history[0][f"bytes_{way}"]
    ranked = fed_lora("flexlora", NETWORK, ranks=(1, 2, 3))
    history = fit(task, CLIENTS, ranked, rounds=1, **SGD).history
    assert history[0]["bytes_up"] == (1 + 2 + 3) * (a + b) // 3 + 12


# --- refusals ----------------------------------------------------------------------------------


def test_a_quantised_base_is_not_changed(task):
    pytest.importorskip("qwix", reason="qwix is absent")
    frozen = {"decoder": quantize(task.frozen["decoder"], "int8", block=6)}
    quantised = Task(task.name, task.trainable, frozen, task.loss, task.collate)
    for rule in ("flora", "fedex"):
        with pytest.raises(
            ConfigError, match=f"{rule} changes the base, but this base is quantised"
        ):
            fit(quantised, CLIENTS, fed_lora(rule, NETWORK), rounds=1, **SGD)
    fit(quantised, CLIENTS, fed_lora("flexlora", NETWORK), rounds=1, **SGD)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "lora"}, "rule is one of"),
        ({"rule": "fedit", "ranks": (1, 2, 3)}, "leave ranks out or use flora or flexlora"),
        ({"rule": "flora", "ranks": (1, 2, 4)}, "from 1 to that of the network, 3"),
        ({"rule": "flora", "ranks": (1, 2)}, "2 ranks for 3 clients"),
        ({"rule": "fedit", "part": "lora"}, "the task trains .*, not 'lora'"),
    ],
)
def test_refusals(task, settings, words):
    with pytest.raises(ConfigError, match=words):
        fit(task, CLIENTS, fed_lora(network=NETWORK, **settings), rounds=1, **SGD)


def mixed(rule):
    return {"ranks": (1, 2, 3)} if RULES[rule].mixed_ranks else {}


class Keep(Callback):
    def __init__(self):
        self.states = []

    def round_end(self, state, record):
        self.states.append(jax.tree.map(np.array, state.state))


def test_the_change_of_the_base_is_in_the_checkpoint(task, tmp_path):
    keep = Keep()
    algorithm = fed_lora("fedex", NETWORK)
    fit(task, CLIENTS, algorithm, rounds=1, callbacks=[Checkpointer(tmp_path), keep], **SGD)
    restored = fit(task, CLIENTS, algorithm, rounds=1, callbacks=[Checkpointer(tmp_path)], **SGD)
    assert leaves(keep.states[0].server).any()
    change = base_change(task, restored)
    for path, x in flatten(keep.states[0].server):
        np.testing.assert_allclose(change[path[:-1]], x, atol=1e-6)
    assert all(isinstance(x, jnp.ndarray) for x in jax.tree.leaves(restored.frozen))


@pytest.mark.slow
def test_layers_of_several_ranks_keep_them():
    """What a layer does not have stays zero, also after the factors were made anew."""
    patterns = ((r"layers\.0\..*", 2, 12.0),)
    network = lora.add_lora(CHAIN, lora.LoraConfig(5, 12.0, ("q_proj", "lm_head"), patterns))
    loss = functools.partial(squared_error, network=network)
    fresh = chain_task(lora.init_adapters(network, 0), loss)
    result = fit(fresh, CLIENTS, fed_lora("flexlora", network), rounds=2, **SGD)
    found = dict(flatten(result.trainable["adapters"]))
    a, b = (found["layers", "q_proj", name] for name in ("lora_a", "lora_b"))
    assert not a[0, :, 2:].any() and not b[0, 2:].any()
    assert a[1].any(0).all() and b[1].any(1).all()
    # Of a matrix [6, 5] no more than five factors can be made, and a wider adapter has room left.
    wide = lora.add_lora(CHAIN, lora.LoraConfig(7, 12.0, ("lm_head",)))
    task = chain_task(random_adapters(wide, 0), functools.partial(squared_error, network=wide))
    end = fit(task, CLIENTS, fed_lora("flexlora", wide), rounds=1, **SGD).trainable["adapters"]
    assert end["lm_head"]["lora_a"].shape == (6, 7)


@pytest.mark.parametrize("rule", ["fedit", "flora", "fedex"])
def test_what_retrieves_with_the_model_has_the_changed_base(rule):
    """A policy rolls out in `retrieve`: with base and adapters of the round, whose sum is the model."""
    start = chain_task(jax.tree.map(lambda x: 0.3 * x, random_adapters(NETWORK, 0)))
    seen = []

    def retrieve(examples, trained, index):
        base = trained.get("decoder", start.frozen["decoder"])
        seen.append(lora.add_product(base, lora.product(NETWORK, trained["adapters"])))
        return np.zeros((len(examples), 1), np.int32), index

    task = dataclasses.replace(start, retrieve=retrieve, index={"time": np.asarray(0)})
    how = {"batch_size": 3, "optimizer": optax.sgd(0.003)}
    algorithm = fed_lora(rule, NETWORK, local_steps=5)
    fit(task, CLIENTS, algorithm, rounds=3, **how)
    two = fit(start, CLIENTS, algorithm, rounds=2, **how)
    product = lora.product(NETWORK, two.trainable["adapters"])
    assert_close(seen[2], lora.add_product(two.frozen["decoder"], product), 1e-5)
