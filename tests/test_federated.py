import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import CountedLoss, collate, linear_task, make_examples, mlp_task, squared_error

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DataError, DivergenceError
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.client import local_update
from fedrag_jax.federated.cohort import Cohort, grouped, sample_cohort
from fedrag_jax.federated.fed_avg import fed_avg
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.local_only import local_only
from fedrag_jax.federated.optimizers import tunable

EXAMPLES = make_examples()
ORDER = np.random.default_rng(5).permutation(23)
FOUR = Partition(EXAMPLES, tuple(np.split(ORDER, [2, 7, 15])))  # 2, 5, 8 and 8 examples


def leaves(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_close(tree, other, tolerance):
    np.testing.assert_allclose(leaves(tree), leaves(other), rtol=0, atol=tolerance)


# --- equality of groupings ---------------------------------------------------------------------


def plain_loop(task, data, algorithm, optimizer, rounds, batch_size, seed, carry):
    """FedAvg as one would write it without thinking of speed."""
    table = task.collate(data.examples, None)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"local update"))
    gradient = jax.jit(jax.grad(lambda *a: task.loss(*a)[0]))
    x, kept = jax.tree.map(jnp.asarray, task.trainable), {}
    for r in range(rounds):
        cohort = sample_cohort(data, algorithm, r, batch_size, seed)
        updates = []
        for k, client in enumerate(cohort.clients.tolist()):
            y = x
            state = kept[client] if carry and client in kept else optimizer.init(y)
            for s in np.flatnonzero(cohort.step_mask[k]):
                real = cohort.example_weight[k, s] > 0
                batch = {name: rows[cohort.indices[k, s]] for name, rows in table.items()}
                step_key = jax.random.fold_in(jax.random.fold_in(key, r), client)
                step_key = jax.random.fold_in(step_key, s)
                g = gradient(y, task.frozen, batch | {"weight": real.astype(np.float32)}, step_key)
                change, state = optimizer.update(g, state, y)
                y = optax.apply_updates(y, change)
            kept[client] = state
            updates.append(jax.tree.map(jnp.subtract, y, x))
        sizes = [len(data.clients[c]) for c in cohort.clients]
        shares = np.array(sizes) / sum(sizes)
        for p, update in zip(shares, updates, strict=True):
            x = jax.tree.map(lambda x, u, p=p: x + p * u, x, update)
    return x


@pytest.mark.parametrize(
    ("x64", "optimizer", "settings"),
    [
        (True, optax.adamw(1e-2), {"local_steps": 3}),
        (True, optax.adamw(1e-2), {"local_epochs": 2}),
        (True, optax.adam(1e-2), {"clients_per_round": 3, "carry_optimizer": True}),
        (False, optax.sgd(0.05), {"local_epochs": 2}),
    ],
    ids=["steps", "epochs", "sampled and carried", "float32"],
)
def test_every_group_size_equals_a_plain_loop(x64, optimizer, settings):
    with jax.enable_x64(x64):
        task, algorithm = mlp_task(dropout="local_steps" in settings), fed_avg(**settings)
        expected = plain_loop(
            task, FOUR, algorithm, optimizer, 3, 3, 11, settings.get("carry_optimizer", False)
        )
        tolerance = 1e-9
        if not x64:
            tolerance = 1e-5 * np.abs(leaves(expected) - leaves(task.trainable)).max()
        for group_size in range(1, 5):
            kwargs = {"rounds": 3, "batch_size": 3, "optimizer": optimizer, "seed": 11}
            result = fit(task, FOUR, algorithm, group_size=group_size, **kwargs)
            assert_close(result.trainable, expected, tolerance)
            assert all(x.dtype == jnp.zeros(()).dtype for x in jax.tree.leaves(result.trainable))


def test_local_only_is_the_same_for_every_group_size():
    with jax.enable_x64(True):
        results = [
            fit(mlp_task(), FOUR, local_only(local_epochs=1), rounds=2, group_size=g).trainable
            for g in range(1, 6)
        ]
    assert results[0]["in"].shape == (4, 3, 5)
    for result in results[1:]:
        assert_close(result, results[0], 1e-9)


# --- the mean and the server -------------------------------------------------------------------


def numpy_sgd(w, b, rows, lr):
    x, y = (np.array([EXAMPLES[i][name] for i in rows]) for name in "xy")
    error = 2 * (x @ w + b - y) / len(rows)
    return w - lr * error @ x, b - lr * error.sum()


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_fed_avg_is_the_weighted_mean_in_numpy(weighting):
    w, b = np.array([0.5, -1.0, 2.0]), 0.25
    sizes = np.array([2, 5, 8, 8])
    weights = sizes / 23 if weighting == "examples" else np.full(4, 0.25)
    # Batches at least as large as the clients: every step is one gradient step on all they have.
    for _ in range(2):
        models = []
        for rows in FOUR.clients:
            y = w, b
            for _ in range(3):
                y = numpy_sgd(*y, rows, 0.1)
            models.append(y)
        w = sum(p * m[0] for p, m in zip(weights, models, strict=True))
        b = sum(p * m[1] for p, m in zip(weights, models, strict=True))
    algorithm = fed_avg(local_steps=3, weighting=weighting)
    with jax.enable_x64(True):
        result = fit(
            linear_task(), FOUR, algorithm, rounds=2, batch_size=9, optimizer=optax.sgd(0.1)
        )
    assert_close(result.trainable, {"w": w, "b": b}, 1e-12)


def test_one_client_with_one_step_is_a_gradient_step():
    algorithm = fed_avg(local_steps=1)
    with jax.enable_x64(True):
        result = fit(
            linear_task(), EXAMPLES, algorithm, rounds=1, batch_size=23, optimizer=optax.sgd(0.1)
        )
    w, b = numpy_sgd(np.array([0.5, -1.0, 2.0]), 0.25, range(23), 0.1)
    assert_close(result.trainable, {"w": w, "b": b}, 1e-12)


def test_server_momentum_works_on_the_mean_update():
    settings = {"batch_size": 9, "optimizer": optax.sgd(0.1)}
    with jax.enable_x64(True):
        task = linear_task()
        x, velocity = task.trainable, jax.tree.map(jnp.zeros_like, task.trainable)
        for _ in range(3):  # v ← 0.9 v + Δ, x ← x + 0.5 v
            y = fit(linear_task(trainable=x), FOUR, fed_avg(2), rounds=1, **settings).trainable
            velocity = jax.tree.map(lambda v, y, x: 0.9 * v + y - x, velocity, y, x)
            x = jax.tree.map(lambda x, v: x + 0.5 * v, x, velocity)
        algorithm = fed_avg(2, server_optimizer=optax.sgd(0.5, momentum=0.9))
        assert_close(fit(task, FOUR, algorithm, rounds=3, **settings).trainable, x, 1e-12)


def test_half_precision_updates_are_summed_in_single():
    # 256 clients of one example, each moving 1 by 2^-8: in bfloat16 their sum would stall.
    task = linear_task(
        trainable={"w": jnp.ones((), jnp.bfloat16)},
        loss=lambda t, f, batch, rng: (t["w"] * (batch["weight"].sum() / 1), {}),
    )
    data = Partition(make_examples(257), tuple(np.arange(257)[:, None]))
    result = fit(task, data, fed_avg(1), rounds=1, batch_size=1, optimizer=optax.sgd(2.0**-7))
    assert result.trainable["w"].dtype == jnp.bfloat16
    assert float(result.trainable["w"]) == pytest.approx(1 - 2.0**-7, abs=1e-6)


# --- centralised and local-only ----------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [None, local_only(local_steps=10)])
def test_centralised_is_a_plain_optax_loop(algorithm):
    with jax.enable_x64(True):
        task, optimizer = linear_task(), optax.adamw(1e-2)
        result = fit(task, EXAMPLES, algorithm, rounds=2, batch_size=4, optimizer=optimizer, seed=3)
        # 2 rounds of 10 steps of 4: 80 places of the walk through shuffled epochs of 23.
        walk = np.concatenate(
            [
                np.random.default_rng([3, zlib.crc32(b"local shuffling"), 0, epoch]).permutation(23)
                for epoch in range(4)
            ]
        )
        table = collate(EXAMPLES, None)
        x, state = task.trainable, optimizer.init(task.trainable)
        for s in range(20):
            rows = walk[4 * s : 4 * s + 4]
            batch = {"x": table["x"][rows], "y": table["y"][rows]}

            def loss(x, batch=batch):
                return jnp.mean((batch["x"] @ x["w"] + x["b"] - batch["y"]) ** 2)

            updates, state = optimizer.update(jax.grad(loss)(x), state, x)
            x = optax.apply_updates(x, updates)
        assert_close(result.trainable, x, 1e-12)


def test_local_only_trains_each_client_as_if_alone():
    settings = {"rounds": 3, "optimizer": optax.adam(1e-2), "seed": 2}
    together = fit(linear_task(), FOUR, local_only(4), batch_size=8, group_size=2, **settings)
    for client in range(4):
        alone = fit(linear_task(), FOUR.of(client), local_only(4), batch_size=8, **settings)
        own = jax.tree.map(lambda x, c=client: x[c], together.trainable)
        assert_close(own, alone.trainable, 1e-6)
        seen = [record["client_loss"][client] for record in together.history]
        assert seen == pytest.approx([record["loss"] for record in alone.history], rel=1e-5)


def test_the_optimizer_is_carried_only_where_it_should_be():
    def moved(data, algorithm):
        # Under momentum a constant gradient of 1 moves by lr (1 + 1.5 + 1.75 + ...).
        task = linear_task(trainable={"w": np.zeros(())}, loss=lambda t, f, b, r: (t["w"], {}))
        optimizer = optax.sgd(1.0, momentum=0.5)
        return -np.asarray(fit(task, data, algorithm, rounds=3, optimizer=optimizer).trainable["w"])

    assert moved(FOUR, fed_avg(1)) == 3
    assert moved(FOUR, fed_avg(1, carry_optimizer=True)) == 1 + 1.5 + 1.75
    assert (moved(FOUR, local_only(1)) == 1 + 1.5 + 1.75).all()
    assert moved(EXAMPLES, local_only(1)) == 1 + 1.5 + 1.75


# --- cohorts and padding -----------------------------------------------------------------------


def test_a_client_walks_through_its_examples_in_shuffled_epochs():
    rounds = [sample_cohort(FOUR, fed_avg(2), r, 4, seed=1) for r in range(4)]
    seen = np.concatenate([c.indices[3].ravel() for c in rounds])  # 4 rounds x 8 of 8 examples
    epochs = seen.reshape(4, 8)
    assert all(set(epoch) == set(FOUR.clients[3].tolist()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    middle = np.concatenate([c.indices[1].ravel() for c in rounds])[:30].reshape(6, 5)
    assert all(set(epoch) == set(FOUR.clients[1].tolist()) for epoch in middle)
    for cohort in rounds:
        assert cohort.step_mask.all()
        assert cohort.example_weight[1:].all()
        np.testing.assert_array_equal(cohort.example_weight[0], [[1, 1, 0, 0]] * 2)
        np.testing.assert_array_equal(cohort.size, [2, 5, 8, 8])


def test_local_epochs_visit_every_example_once():
    cohort = sample_cohort(FOUR, fed_avg(local_epochs=2), 1, 3, seed=1)
    assert cohort.indices.shape == (4, 6, 3)
    assert cohort.step_mask.sum(1).tolist() == [2, 4, 6, 6]
    for k, rows in enumerate(FOUR.clients):
        seen = cohort.indices[k][cohort.example_weight[k] > 0].reshape(2, -1)
        assert all(sorted(epoch) == sorted(rows) for epoch in seen)


def test_sampling_knows_the_round():
    algorithm = fed_avg(clients_per_round=2)
    draws = [sample_cohort(FOUR, algorithm, r, 3, seed=1) for r in range(20)]
    again = [sample_cohort(FOUR, algorithm, r, 3, seed=1) for r in reversed(range(20))][::-1]
    for first, second in zip(draws, again, strict=True):
        assert_equal(first, second)
    assert all(len(set(c.clients.tolist())) == 2 for c in draws)
    assert {c for cohort in draws for c in cohort.clients.tolist()} == {0, 1, 2, 3}
    other = [sample_cohort(FOUR, algorithm, r, 3, seed=2).clients.tolist() for r in range(20)]
    assert other != [c.clients.tolist() for c in draws]
    # A client's batches are its own, whoever else was drawn.
    everybody = sample_cohort(FOUR, fed_avg(), 5, 3, seed=1)
    for k, client in enumerate(draws[5].clients):
        np.testing.assert_array_equal(draws[5].indices[k], everybody.indices[client])


def test_groups_are_filled_with_clients_that_weigh_nothing():
    cohort = sample_cohort(FOUR, fed_avg(2), 0, 3, seed=1)
    groups = grouped(cohort, 3, total=4)
    assert groups.clients.tolist() == [[0, 1, 2], [3, 4, 4]]
    assert groups.size.tolist() == [[2, 5, 8], [8, 0, 0]]
    assert not groups.step_mask[1, 1:].any() and not groups.example_weight[1, 1:].any()
    np.testing.assert_array_equal(groups.indices.reshape(6, 2, 3)[:4], cohort.indices)


def test_masked_steps_leave_parameters_and_optimizer_alone():
    def update(steps, mask):
        key = jax.random.key(0)
        table = jax.tree.map(jnp.asarray, collate(EXAMPLES, None))
        task = linear_task()
        client = local_update(task.loss, optax.adam(0.1), task.frozen, table, key)
        x = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32)[None], task.trainable)
        weight = np.array(mask, np.float32)[None, :, None] * np.ones((1, steps, 4), np.float32)
        rows = np.arange(steps * 4, dtype=np.int32).reshape(1, steps, 4)
        member = Cohort(np.zeros(1, np.int32), np.ones(1), rows, np.array([mask]), weight)
        return jax.jit(client.update)(x, client.init(x), member)

    short, long = update(2, [True, True]), update(5, [True, True, False, False, False])
    assert_equal(long, short)
    x, state, report = update(2, [False, False])
    assert_equal(jax.tree.map(lambda x: x[0], x), {"w": np.float32([0.5, -1, 2]), "b": 0.25})
    assert not leaves(state).any()
    assert report["examples"] == 0 and report["loss"] == 0 and report["finite"]


def test_padding_rows_weigh_nothing():
    wide, narrow = (
        fit(linear_task(), FOUR.of(0), rounds=2, batch_size=b, optimizer=optax.sgd(0.1), seed=4)
        for b in (7, 2)
    )
    assert_close(wide.trainable, narrow.trainable, 1e-6)
    assert [r["examples"] for r in wide.history] == [r["examples"] for r in narrow.history]
    assert wide.history[0]["metrics"] == pytest.approx(narrow.history[0]["metrics"])


# --- one program per shape ---------------------------------------------------------------------


def test_a_shape_is_traced_once_and_learning_rates_share_it():
    loss = CountedLoss(squared_error)
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    for seed in range(3):
        result = fit(linear_task(loss=loss), FOUR, fed_avg(2), optimizer=optimizer, seed=seed)
    assert loss.traces == 1
    assert result.history[0]["compile_seconds"] < 0.05
    fit(linear_task(loss=loss), FOUR, local_only(2), optimizer=optimizer, rounds=2)
    assert loss.traces == 2
    grid = [tunable(optax.adam, learning_rate=rate) for rate in (0.1, 0.2)]
    ends = [fit(linear_task(loss=loss), FOUR, fed_avg(2), optimizer=point) for point in grid]
    assert loss.traces == 3
    fixed = fit(linear_task(), FOUR, fed_avg(2), optimizer=optax.adam(0.2))
    assert_close(ends[1].trainable, fixed.trainable, 1e-5)
    assert np.abs(leaves(ends[0].trainable) - leaves(ends[1].trainable)).max() > 1e-3
    fit(linear_task(loss=loss), FOUR, fed_avg(2), optimizer=optimizer, batch_size=3, rounds=1)
    assert loss.traces == 4


def test_the_task_survives_the_fit():
    task = linear_task(trainable={"w": jnp.ones(3), "b": jnp.zeros(())})
    for algorithm in (fed_avg(1), local_only(1)):
        fit(task, FOUR, algorithm, rounds=2)
    assert_equal(task.trainable, {"w": np.ones(3), "b": np.zeros(())})


# --- between rounds ----------------------------------------------------------------------------


class Keep(Callback):
    def __init__(self):
        self.states, self.records = [], []

    def round_end(self, state, record):
        self.states.append(jax.tree.map(np.array, state.state))
        self.records.append(record)


def retrieving_task(calls):
    def retrieve(examples, trainable):
        calls.append(([e["id"] for e in examples], float(trainable["w"])))
        return np.array([[e["id"], len(calls)] for e in examples], np.int32)

    def collate_retrieved(examples, retrieved):
        assert [e["id"] for e in examples] == retrieved[:, 0].tolist()
        return {"step": retrieved[:, 1].astype(np.float32)}

    def loss(trainable, frozen, batch, rng):
        mean = (batch["step"] * batch["weight"]).sum() / batch["weight"].sum()
        return trainable["w"] * mean, {}

    return linear_task(
        trainable={"w": np.zeros(())}, loss=loss, collate=collate_retrieved, retrieve=retrieve
    )


def test_retrieval_is_asked_again_with_what_has_been_trained():
    calls = []
    settings = {"rounds": 5, "optimizer": optax.sgd(1.0), "refresh_every": 2}
    result = fit(retrieving_task(calls), FOUR, fed_avg(1), **settings)
    # Each round moves w by minus the number of the retrieval it trains on: 1 1 2 2 3.
    assert calls == [(list(range(23)), 0), (list(range(23)), -2), (list(range(23)), -6)]
    assert float(result.trainable["w"]) == -9


def test_local_only_retrieves_for_each_client_with_its_own_model():
    calls = []
    fit(retrieving_task(calls), FOUR, local_only(1), rounds=2, optimizer=optax.sgd(1.0))
    ids = [rows.tolist() for rows in FOUR.clients]
    assert [c[0] for c in calls] == ids + ids
    # Client c trained on retrieval number c + 1.
    assert [c[1] for c in calls] == [0, 0, 0, 0, -1, -2, -3, -4]


def test_records_tell_of_the_round():
    keep = Keep()
    algorithm = fed_avg(3, clients_per_round=2)
    result = fit(linear_task(), FOUR, algorithm, rounds=4, batch_size=4, seed=6, callbacks=[keep])
    assert result.history == keep.records
    seen = 0
    for r, record in enumerate(result.history):
        cohort = sample_cohort(FOUR, algorithm, r, 4, seed=6)
        weights = cohort.example_weight.sum((1, 2))
        seen += int(weights.sum())
        assert (record["round"], record["rounds"], record["examples"]) == (r + 1, 4, seen)
        assert record["clients"] == cohort.clients.tolist()
        assert record["loss"] == pytest.approx(np.average(record["client_loss"], weights=weights))
        ids = np.average(cohort.indices, weights=cohort.example_weight)
        assert record["metrics"]["id"] == pytest.approx(ids)
        assert min(record[f"{s}seconds"] for s in ("", "refresh_", "compile_")) >= 0
    assert_equal(keep.states[-1].trainable, result.trainable)


@pytest.mark.parametrize("broken", ["loss", "parameters"])
def test_divergence_names_round_and_clients(broken):
    def loss(trainable, frozen, batch, rng):
        value, metrics = squared_error(trainable, frozen, batch, rng)
        steps = trainable["steps"]
        bad = (jnp.isin(batch["id"], FOUR.clients[2])).any() & (steps > 1.5)
        # The square root has an infinite slope where its value is still finite.
        root = jnp.sqrt(jnp.where(bad, 0.0, 1.0) * (trainable["w"] ** 2).sum())
        trouble = jnp.where(bad, jnp.nan, 0.0) if broken == "loss" else root
        return value + trouble - steps, metrics

    task = linear_task(loss=loss)
    task.trainable["steps"] = np.zeros(())  # gradient −1: counts rounds at learning rate 1
    keep = Keep()
    labels = {"w": "still", "b": "still", "steps": "moves"}
    optimizer = optax.multi_transform({"still": optax.sgd(1e-3), "moves": optax.sgd(1.0)}, labels)
    with pytest.raises(DivergenceError, match=r"round 3: .*client\(s\): 2\. "):
        fit(task, FOUR, fed_avg(1), group_size=3, optimizer=optimizer, callbacks=[keep])
    assert [record["round"] for record in keep.records] == [1, 2]


def test_divergence_of_the_server_is_named():
    algorithm = fed_avg(1, server_optimizer=optax.sgd(np.inf))
    with pytest.raises(DivergenceError, match=r"round 1: .*none \(the server\)"):
        fit(linear_task(), FOUR, algorithm)


# --- refusals ----------------------------------------------------------------------------------


class Jump(Callback):
    def __init__(self, round):
        self.round = round

    def start(self, state):
        return type(state)(self.round, state.state, None, (), state.settings)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fit(linear_task(), FOUR), ConfigError, "algorithm for 4 clients"),
        (lambda: fit(linear_task(), []), DataError, "no examples"),
        (lambda: fit(linear_task(), EXAMPLES, rounds=0), ConfigError, "rounds .* got 0"),
        (lambda: fit(linear_task(), EXAMPLES, batch_size=0), ConfigError, "batch_size"),
        (lambda: fit(linear_task(), EXAMPLES, group_size=-1), ConfigError, "group_size"),
        (lambda: fit(linear_task(), EXAMPLES, refresh_every=0), ConfigError, "refresh_every"),
        (lambda: fit(linear_task(), EXAMPLES, seed=-1), ConfigError, "seed"),
        (lambda: fed_avg(0), ConfigError, "local_steps must be at least 1, got 0"),
        (lambda: local_only(local_epochs=0), ConfigError, "local_epochs"),
        (lambda: fed_avg(weighting="size"), ConfigError, "got 'size'"),
        (lambda: fit(linear_task(), FOUR, fed_avg(clients_per_round=5)), ConfigError, "got 5"),
        (
            lambda: fit(linear_task(collate=lambda e, r: {"x": np.ones(3)}), EXAMPLES),
            DataError,
            "'x' of the table has shape",
        ),
        (
            lambda: fit(linear_task(collate=lambda e, r: {"weight": np.ones(23)}), EXAMPLES),
            DataError,
            '"weight"',
        ),
        (
            lambda: fit(linear_task(), EXAMPLES, callbacks=[Callback(), Jump(2)]),
            ConfigError,
            "Jump went to round 2",
        ),
        (lambda: fit(linear_task(), EXAMPLES, callbacks=[Jump(11)]), ConfigError, "at round 11"),
    ],
)
def test_refusals_name_value_and_remedy(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_equal_settings_give_the_same_algorithm():
    pairs = itertools.product([fed_avg, local_only], [{"local_steps": 4}, {"local_epochs": 1}])
    assert all(make(**settings) is make(**settings) for make, settings in pairs)
    assert fed_avg(4) is not fed_avg(5)
