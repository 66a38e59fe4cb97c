import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import EXAMPLES, FOUR, assert_close, collate, leaves, linear_task, make_examples, mlp_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.engine.cohort import sample_cohort
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.sampling import uniform

# --- equality of groupings ---------------------------------------------------------------------


def plain_loop(task, data, algorithm, optimizer, rounds, batch_size, seed, carry):
    """FedAvg as one would write it without thinking of speed."""
    table = task.collate(data.examples, None)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"local update"))
    gradient = jax.jit(jax.grad(lambda *a: task.loss(*a)[0]))
    x, kept = jax.tree.map(jnp.asarray, task.trainable), {}
    for r in range(rounds):
        cohort = sample_cohort(data, algorithm.work, r, batch_size, seed)
        updates = []
        for k, client in enumerate(cohort.clients.tolist()):
            y = x
            state = kept[client] if carry and client in kept else optimizer.init(y)
            for s in range(cohort.steps[k]):
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
        (True, optax.adam(1e-2), {"sampling": uniform(3), "carry_optimizer": True}),
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
        # Groups of 3: two of the six places are padding.
        settings = {"rounds": 2, "batch_size": 9, "group_size": 3, "optimizer": optax.sgd(0.1)}
        result = fit(linear_task(), FOUR, algorithm, **settings)
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
            y = fit(
                linear_task(trainable=x), FOUR, fed_avg(local_steps=2), rounds=1, **settings
            ).trainable
            velocity = jax.tree.map(lambda v, y, x: 0.9 * v + y - x, velocity, y, x)
            x = jax.tree.map(lambda x, v: x + 0.5 * v, x, velocity)
        algorithm = fed_avg(local_steps=2, server_optimizer=optax.sgd(0.5, momentum=0.9))
        assert_close(fit(task, FOUR, algorithm, rounds=3, **settings).trainable, x, 1e-12)


def test_half_precision_updates_are_summed_in_single():
    # 256 clients of one example, each moving 1 by 2^-8: in bfloat16 their sum would stall.
    task = linear_task(
        trainable={"w": jnp.ones((), jnp.bfloat16)},
        loss=lambda t, f, batch, rng: (t["w"] * (batch["weight"].sum() / 1), {}),
    )
    data = Partition(make_examples(257), tuple(np.arange(257)[:, None]))
    result = fit(
        task, data, fed_avg(local_steps=1), rounds=1, batch_size=1, optimizer=optax.sgd(2.0**-7)
    )
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
    together = fit(
        linear_task(), FOUR, local_only(local_steps=4), batch_size=8, group_size=2, **settings
    )
    for client in range(4):
        alone = fit(
            linear_task(), FOUR.of(client), local_only(local_steps=4), batch_size=8, **settings
        )
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

    assert moved(FOUR, fed_avg(local_steps=1)) == 3
    assert moved(FOUR, fed_avg(local_steps=1, carry_optimizer=True)) == 1 + 1.5 + 1.75
    assert (moved(FOUR, local_only(local_steps=1)) == 1 + 1.5 + 1.75).all()
    assert moved(EXAMPLES, local_only(local_steps=1)) == 1 + 1.5 + 1.75
