import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import EXAMPLES, FOUR, assert_close, assert_equal, collate, leaves, linear_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.data.seeds import stream
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.engine.client import local_update
from fedrag_jax.federated.engine.cohort import Cohort, grouped, padding, sample_cohort
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.sampling import everyone, fixed, poisson, uniform, weighted
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


# --- who takes part ----------------------------------------------------------------------------

SIZES = np.array([1, 2, 3, 4, 10, 20])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (uniform(3), np.full(6, 0.5)),
        (weighted(1), SIZES / 40),
        (poisson(0.3), np.full(6, 0.3)),
        (fixed(4, 1), [0, 1, 0, 0, 1, 0]),
        (everyone, np.ones(6)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_how_often_a_client_is_drawn(sampling, expected):
    draws = 4000
    rounds = [sampling.draw(SIZES, stream(0, "sampling", r)) for r in range(draws)]
    counts = sum(np.bincount(clients, minlength=6) for clients in rounds)
    np.testing.assert_allclose(counts / draws, expected, atol=4 * (0.25 / draws) ** 0.5)
    assert all(len(set(clients.tolist())) == len(clients) for clients in rounds)
    assert max(map(len, rounds)) <= sampling.places(SIZES)


def test_weighted_sampling_is_without_replacement():
    both = [weighted(5).draw(SIZES, stream(0, "w", r)) for r in range(2000)]
    left_out = np.bincount([(set(range(6)) - set(b.tolist())).pop() for b in both], minlength=6)
    assert (np.diff(left_out) < 0).all()  # the smaller a client, the likelier it is left out


def test_dropout_and_stragglers_know_seed_round_and_client():
    work = Work(local_steps=8, dropout=0.4, stragglers=0.5)
    rounds = [sample_cohort(FOUR, work, r, 2, seed=1) for r in range(400)]
    answered = np.concatenate([c.clients for c in rounds])
    share = np.bincount(answered, minlength=4) / 400
    np.testing.assert_allclose(share, 0.6, atol=0.1)
    steps = np.concatenate([c.steps for c in rounds])
    counts = np.bincount(steps, minlength=9) / len(steps)  # 1 to 8, and half stay at 8
    np.testing.assert_allclose(counts[1:8], 0.5 / 8, atol=0.04)
    np.testing.assert_allclose(counts[8], 0.5 + 0.5 / 8, atol=0.06)
    # Whoever else was drawn, a client does in a round what it does in that round.
    alone = Work(local_steps=8, dropout=0.4, stragglers=0.5, sampling=fixed(2))
    for r in range(20):
        mine = sample_cohort(FOUR, alone, r, 2, seed=1)
        assert (2 in rounds[r].clients) == (2 in mine.clients)
        if len(mine.clients):
            there = rounds[r].clients == 2
            assert_equal(
                mine._replace(share=0), Cohort(*(x[there] for x in rounds[r][:5]))._replace(share=0)
            )
    for c in rounds[:20]:
        assert ((c.example_weight > 0).any(-1).sum(1) == c.steps).all()
        assert c.share.sum() == pytest.approx(1)


def test_a_straggler_may_take_all_steps_or_one():
    work = Work(local_steps=2, stragglers=0.999)
    steps = [sample_cohort(FOUR, work, r, 2, seed=1).steps for r in range(400)]
    assert np.mean(np.concatenate(steps) == 2) == pytest.approx(0.5, abs=0.05)


def test_a_round_nobody_answers_changes_nothing():
    result = fit(linear_task(), FOUR, fed_avg(sampling=poisson(1e-6)), rounds=2)
    assert_equal(result.trainable, jax.tree.map(np.float32, linear_task().trainable))
    assert [(r["clients"], r["examples"], r["bytes_up"]) for r in result.history] == [
        ([], 0, 0)
    ] * 2
    assert result.history[0]["loss"] is None


def test_records_count_those_drawn_and_the_bytes():
    algorithm = fed_avg(sampling=uniform(3), dropout=0.5)
    history = fit(linear_task(), FOUR, algorithm, rounds=10).history
    assert {r["drawn"] for r in history} == {3}
    assert len({len(r["clients"]) for r in history}) > 1
    assert all(r["bytes_down"] == 3 * 16 for r in history)  # four floats
    assert all(r["bytes_up"] == len(r["clients"]) * 16 for r in history)


# --- clients with very different amounts of data -----------------------------------------------


def test_little_of_the_computing_is_padding():
    sizes = np.maximum(2, np.exp(np.random.default_rng(0).normal(3, 1.2, 1000)).astype(int))
    rows = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
    data, work = Partition(range(sizes.sum()), tuple(rows)), Work(local_epochs=1)
    cohort = sample_cohort(data, work, 0, 8, 0)
    assert 1 - sizes.sum() / (cohort.indices.size) > 0.9  # as one array of [K, S, B]
    for group_size, devices in ((1, 1), (8, 1), (32, 1), (4, 8)):
        parts = grouped(cohort, group_size, data, work, devices)
        assert padding(parts) <= 0.15
        assert all(len(part.clients) % devices == 0 for part in parts)
        clients = np.concatenate([part.clients.ravel() for part in parts])
        assert sorted(clients[clients < 1000]) == list(range(1000))
        seen = np.concatenate([part.indices[part.example_weight > 0] for part in parts])
        assert sorted(seen) == list(range(sizes.sum()))
        # Every device has about the same to do.
        steps = sum(p.steps.max(1).reshape(devices, -1).sum(1) for p in parts)
        assert steps.max() < 1.1 * steps.mean() + sizes.max() / 8


def test_small_clients_have_small_batches():
    data = Partition(range(70), tuple(np.split(np.arange(70), [2, 4, 6, 40])))
    work = Work(local_steps=3)
    parts = grouped(sample_cohort(data, work, 0, 16, 0), 2, data, work)
    assert [p.indices.shape[-1] for p in parts] == [16, 2]
    assert padding(parts) == pytest.approx(1 - (2 * 16 + 3 * 2) / (2 * 16 + 4 * 2))
    with jax.enable_x64(True):
        ends = [
            fit(linear_task(), FOUR, fed_avg(local_epochs=2), batch_size=b, group_size=g).trainable
            for b, g in ((8, 1), (8, 4))
        ]
    assert_close(*ends, 1e-9)


@pytest.mark.parametrize("algorithm", [fed_avg, local_only])
def test_rounds_in_which_nobody_is_drawn_read_what_a_client_holds(algorithm):
    read = []

    def retrieve(examples, trainable):
        read.extend(e["id"] for e in examples)
        return np.zeros((len(examples), 1), np.int32)

    held = Partition(EXAMPLES, (np.arange(9, 16), np.arange(16, 23)))
    seldom = algorithm(local_steps=1, sampling=poisson(1e-6))
    task = linear_task(retrieve=retrieve)
    found = fit(task, held, seldom, rounds=2, batch_size=2, optimizer=optax.sgd(0.01))
    assert [record["clients"] for record in found.history] == [[], []]
    assert {*read} == {9}
