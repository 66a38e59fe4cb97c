import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import EXAMPLES, FOUR, assert_close, assert_equal, collate, leaves, linear_task

from fedrag_jax.federated.client import local_update
from fedrag_jax.federated.cohort import Cohort, grouped, sample_cohort
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.federated.work import Work


def test_a_client_walks_through_its_examples_in_shuffled_epochs():
    rounds = [sample_cohort(FOUR, Work(local_steps=2), r, 4, seed=1) for r in range(4)]
    seen = np.concatenate([c.indices[3].ravel() for c in rounds])  # 4 rounds x 8 of 8 examples
    epochs = seen.reshape(4, 8)
    assert all(set(epoch) == set(FOUR.clients[3].tolist()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    middle = np.concatenate([c.indices[1].ravel() for c in rounds])[:30].reshape(6, 5)
    assert all(set(epoch) == set(FOUR.clients[1].tolist()) for epoch in middle)
    # Two clients of 8 examples are shuffled apart.
    other = np.concatenate([c.indices[2].ravel() for c in rounds])
    held = [rows.tolist() for rows in FOUR.clients]
    assert [held[3].index(i) for i in seen[:8]] != [held[2].index(i) for i in other[:8]]
    for cohort in rounds:
        assert (cohort.steps == 2).all()
        assert cohort.example_weight[1:].all()
        np.testing.assert_array_equal(cohort.example_weight[0], [[1, 1, 0, 0]] * 2)
        np.testing.assert_allclose(cohort.share, np.array([2, 5, 8, 8]) / 23)


def test_local_epochs_visit_every_example_once():
    cohort = sample_cohort(FOUR, Work(local_epochs=2), 1, 3, seed=1)
    assert cohort.indices.shape == (4, 6, 3)
    assert cohort.steps.tolist() == [2, 4, 6, 6]
    for k, rows in enumerate(FOUR.clients):
        seen = cohort.indices[k][cohort.example_weight[k] > 0].reshape(2, -1)
        assert all(sorted(epoch) == sorted(rows) for epoch in seen)
    before = sample_cohort(FOUR, Work(local_epochs=2), 0, 3, seed=1)
    assert (before.indices[3] != cohort.indices[3]).any()
    # One shape for all rounds, whoever is drawn.
    sampled = Work(local_epochs=2, sampling=uniform(1))
    shapes = {sample_cohort(FOUR, sampled, r, 3, seed=1).indices.shape for r in range(20)}
    assert shapes == {(1, 6, 3)}


def test_sampling_knows_the_round():
    work = Work(sampling=uniform(2))
    draws = [sample_cohort(FOUR, work, r, 3, seed=1) for r in range(20)]
    again = [sample_cohort(FOUR, work, r, 3, seed=1) for r in reversed(range(20))][::-1]
    for first, second in zip(draws, again, strict=True):
        assert_equal(first, second)
    assert all(len(set(c.clients.tolist())) == 2 for c in draws)
    assert {c for cohort in draws for c in cohort.clients.tolist()} == {0, 1, 2, 3}
    other = [sample_cohort(FOUR, work, r, 3, seed=2).clients.tolist() for r in range(20)]
    assert other != [c.clients.tolist() for c in draws]
    # A client's batches are its own, whoever else was drawn.
    everybody = sample_cohort(FOUR, Work(), 5, 3, seed=1)
    for k, client in enumerate(draws[5].clients):
        np.testing.assert_array_equal(draws[5].indices[k], everybody.indices[client])


def test_groups_are_filled_with_clients_that_weigh_nothing():
    work = Work(local_steps=2)
    cohort = sample_cohort(FOUR, work, 0, 3, seed=1)
    (groups,) = grouped(cohort, 3, FOUR, work)
    assert groups.clients.tolist() == [[0, 1, 2], [3, 4, 4]]
    np.testing.assert_allclose(groups.share * 23, [[2, 5, 8], [8, 0, 0]])
    assert not groups.steps[1, 1:].any() and not groups.example_weight[1, 1:].any()
    np.testing.assert_array_equal(groups.indices.reshape(6, 2, 3)[:4], cohort.indices)


def test_steps_not_taken_leave_parameters_and_optimizer_alone():
    def update(room, steps, others=()):
        key = jax.random.key(0)
        table = jax.tree.map(jnp.asarray, collate(EXAMPLES, None))
        task = linear_task()
        client = local_update(task.loss, optax.adam(0.1), task.frozen, table, key)
        x = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32)[None], task.trainable)
        steps = np.array([steps, *others], np.int32)
        k = len(steps)
        x = jax.tree.map(lambda x: jnp.repeat(x, k, 0), x)
        weight = (np.arange(room) < steps[:, None])[..., None] * np.ones(4, np.float32)
        rows = np.tile(np.arange(room * 4, dtype=np.int32).reshape(room, 4), (k, 1, 1))
        member = Cohort(np.arange(k, dtype=np.int32), np.ones(k), steps, rows, weight)
        return jax.jit(client.update)(x, client.init(x), member)

    short, long = update(2, 2), update(5, 2)
    assert_equal(long, short)
    beside = update(5, 2, others=[5])  # a busier client in the group
    assert_close(jax.tree.map(lambda x: x[:1], beside), short, 1e-6)
    x, state, report = update(2, 0)
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
