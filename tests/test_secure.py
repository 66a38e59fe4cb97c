"""Secure aggregation: the sum is the sum, each message is noise, and dropouts are made good."""

import itertools

import jax
import numpy as np
import optax
import pytest
from scipy import stats
from test_algorithms import START, steps
from test_fed_lora import NETWORK
from toys import EXAMPLES, FOUR, assert_close, linear_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DivergenceError
from fedrag_jax.federated.algorithms.by_name import Named
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.dp_fed_avg import dp_fed_avg
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.algorithms.fed_opt import fed_adam
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.algorithms.robust import robust
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.algorithms.secure import _least, secure
from fedrag_jax.federated.attacks import attacked, broken
from fedrag_jax.federated.compression.casting import cast
from fedrag_jax.federated.engine import client as engine
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.robust.coordinates import median
from fedrag_jax.federated.sampling import fixed, uniform

EIGHT = Partition(EXAMPLES, tuple(np.array_split(np.random.default_rng(5).permutation(23), 8)))


def trained(algorithm, data=FOUR, task=None, **settings):
    settings = {"rounds": 2, "batch_size": 9} | settings
    optimizer = None if algorithm.optimizer is not None else optax.sgd(0.05)
    return fit(task or linear_task(), data, algorithm, optimizer=optimizer, **settings)


def flat(trainable):
    return np.append(trainable["w"], trainable["b"])


INNER = {
    "fed_avg": fed_avg(local_steps=3),
    "carried": fed_avg(local_steps=3, carry_optimizer=True, sampling=uniform(3)),
    "fed_adam": fed_adam(local_steps=3),
    "scaffold": scaffold(0.05, local_steps=3, sampling=uniform(3)),
    "dp_fed_avg": dp_fed_avg(local_steps=3, clip=0.3, quantile=0.5, count_noise=2.0),
}


@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        ("scaffold", 3),
        *(pytest.param(n, g, marks=pytest.mark.slow) for n in INNER for g in (1, 3)),
    ],
)
def test_a_masked_sum_is_the_sum(name, group_size):
    """Within the rounding of K clients, at any group size."""
    inner = INNER[name]
    plain = trained(inner)
    found = trained(secure(inner), group_size=group_size)
    # Adam divides by what was rounded; the others are off by K roundings a round.
    assert_close(found.trainable, plain.trainable, 1e-3 if name == "fed_adam" else 2e-5)
    for one, other in zip(found.history, plain.history, strict=True):
        assert one["clients"] == other["clients"] and one["dropped"] == []
        assert one["client_loss"] == pytest.approx(other["client_loss"], abs=1e-4)


def test_rounding_is_that_of_the_bits():
    inner = fed_avg(local_steps=3)
    plain = flat(trained(inner, rounds=1).trainable)
    error = np.abs(flat(trained(secure(inner, bits=5), rounds=1).trainable) - plain).max()
    assert 0 < error <= 4 * 2.0**-6 + 1e-6  # half a step for each client


def test_rounding_leaves_a_private_message_within_its_clip():
    """All numbers are above half a step: the nearest multiples would be up to twice as long."""

    def loss(trainable, frozen, batch, rng):
        return -trainable["a"].sum() * (batch["id"][0] == 0), {}  # of one client alone

    size, step = 50_000, 2.0**-20
    task = linear_task(trainable={"a": np.zeros(size)}, loss=loss)
    two = Partition(EXAMPLES, (np.array([0]), np.array([1])))
    for steps_long in (0.51, 1.51):
        clip = steps_long * step * size**0.5
        private = dp_fed_avg(clip=clip, noise_multiplier=0.0, local_steps=1)
        found = fit(task, two, secure(private), rounds=1, batch_size=1, optimizer=optax.sgd(1.0))
        sent = 2 * np.asarray(found.trainable["a"], np.float64)
        assert np.linalg.norm(sent) <= clip
        np.testing.assert_array_equal(sent, int(steps_long) * step)


def test_debugging_sees_the_same_round():
    algorithm = secure(fed_avg(local_steps=2, dropout=0.3), threshold=0.5)
    one, other = (trained(algorithm, debug=debug) for debug in (False, True))
    assert_close(other.trainable, one.trainable, 1e-6)
    assert [r["dropped"] for r in other.history] == [r["dropped"] for r in one.history]


def test_a_message_that_is_not_finite_is_no_honest_zero():
    algorithm = secure(fed_avg(local_steps=2))
    with pytest.raises(DivergenceError, match=r"round 1: .* client\(s\): 1\."):
        trained(attacked(algorithm, broken(), (1,)))


def test_a_share_of_survivors_is_a_number_of_clients():
    for most, k in itertools.combinations_with_replacement(range(64, 1, -1), 2):
        assert _least(k / most, 64)[most] == k
    np.testing.assert_array_equal(_least(2 / 3, 6), [2, 2, 2, 2, 3, 4, 4])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("clients", [2, 3, 4, 7, 10])
def test_what_is_too_large_is_cut_and_keeps_its_sign(clients, sign):
    """All clients at the end of the range: their sum must not wrap around."""

    def loss(trainable, frozen, batch, rng):
        return (trainable["a"] * -sign * 1e6).sum(), {}

    task = linear_task(trainable={"a": np.zeros(3)}, loss=loss)
    crowd = Partition(EXAMPLES, tuple(np.array_split(np.arange(len(EXAMPLES)), clients)))
    algorithm = secure(fed_avg(local_steps=1, weighting="uniform"), bits=20)
    found = fit(task, crowd, algorithm, rounds=1, batch_size=1, optimizer=optax.sgd(1.0))
    moved = sign * np.asarray(found.trainable["a"])
    assert (moved > 0).all() and (moved <= 2.0**31 / 2.0**20).all()
    assert moved == pytest.approx(2.0**11, rel=1e-3)


def test_messages_are_uniform_and_masks_cancel(monkeypatch):
    """What arrives of each client, caught on its way into the sum."""
    caught = []
    total = engine.local_update

    def watched(*arguments):
        client = total(*arguments)

        def recorded(work, *inputs):
            def message(*group):
                sums, rest = work(*group)
                jax.debug.callback(lambda x: caught.append(np.asarray(x)), sums["a"])
                return sums, rest

            return client.total(message, *inputs)

        return client._replace(total=recorded)

    from fedrag_jax.federated.engine import round as rounds

    monkeypatch.setattr(rounds, "local_update", watched)

    def loss(trainable, frozen, batch, rng):
        return (trainable["a"] * 0.1).sum(), {}

    task = linear_task(trainable={"a": np.zeros(5000)}, loss=loss)
    found = trained(secure(fed_avg(local_steps=1, weighting="uniform")), task=task, rounds=1)
    jax.effects_barrier()
    caught = [x for x in caught if x.any()]  # groups that nobody is in
    assert len(caught) == 4 and all(x.dtype == np.uint32 for x in caught)
    for message in caught:
        assert stats.kstest(message / 2.0**32, "uniform").pvalue > 1e-3
    summed = np.sum(caught, axis=0, dtype=np.uint32).astype(np.int32) / 2.0**20
    np.testing.assert_allclose(summed, -0.005, atol=4 * 2.0**-21)
    np.testing.assert_allclose(found.trainable["a"], summed, atol=1e-7)


def test_those_who_drop_out_are_made_good():
    """The mean over the survivors, whose masks with the others are taken away."""
    algorithm = secure(fed_avg(local_steps=2, dropout=0.3), threshold=0.6)
    found = trained(algorithm, EIGHT, rounds=6, group_size=3, seed=2)
    x, dropped = START, []
    for record in found.history:
        gone, sizes = record["dropped"], EIGHT.sizes()
        dropped.append(len(gone))
        left = [k for k in range(8) if k not in gone]
        assert all((record["client_loss"][k] is None) == (k in gone) for k in range(8))
        assert record["bytes_up"] == len(left) * 4 * 4
        if left:
            p = sizes[left] / sizes[left].sum()
            x = x + p @ [steps(x, EIGHT.clients[k], count=2) - x for k in left]
    assert {1, 3, 8} <= {*dropped}  # some, as many as may be, too many
    np.testing.assert_allclose(flat(found.trainable), x, atol=1e-4)


def test_it_is_chosen_by_name():
    found = Named("fedadam", {"secure": True, "down": "bfloat16"}).averaging(linear_task(), {})
    assert found(local_steps=2).name.startswith("secure(compressed(fed_adam(")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: secure(robust(median())), r"robust\(.* needs every single update"),
        (lambda: secure(fed_lora("flora", NETWORK)), "multiplies the factors of each client"),
        (lambda: secure(local_only()), "sends nothing that could be summed"),
        (lambda: secure(fed_lora("fedsa", NETWORK)), "leaves models with its clients"),
        (lambda: secure(compressed(fed_avg(), up=cast("float16"))), "every single update"),
        (lambda: secure(fed_avg(), bits=31), "bits must be from 1 to 30, got 31"),
        (lambda: secure(fed_avg(), threshold=0.0), r"threshold must be in \(0, 1\], got 0"),
        (lambda: trained(secure(fed_avg(sampling=fixed(2)))), "1 of 4 clients take part"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
