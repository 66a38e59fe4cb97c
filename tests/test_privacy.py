"""Client-level privacy: the noise by its distribution, clipping in NumPy, ε as the library has it."""

import jax
import numpy as np
import optax
import pytest
from scipy import stats
from test_algorithms import START, Keep, steps
from toys import EXAMPLES, FOUR, assert_close, assert_equal, linear_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms.by_name import Named
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.dp_fed_avg import dp_fed_avg
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.attacks import attacked, model_replacement
from fedrag_jax.federated.compression.top_k import top_k
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.privacy.accounting import calibrated_noise, epsilon
from fedrag_jax.federated.sampling import poisson, uniform
from fedrag_jax.tracking.checkpoints import Checkpointer

EIGHT = Partition(EXAMPLES, tuple(np.array_split(np.random.default_rng(5).permutation(23), 8)))


@pytest.fixture
def library():
    return pytest.importorskip("dp_accounting")


def trained(algorithm, data=EIGHT, task=None, **settings):
    settings = {"rounds": 3, "batch_size": 9, "optimizer": optax.sgd(0.05)} | settings
    return fit(task or linear_task(), data, algorithm, **settings)


def flat(trainable):
    return np.append(trainable["w"], trainable["b"])


def wide_task():
    """Ten thousand numbers, and nothing to learn."""

    def loss(trainable, frozen, batch, rng):
        return 0 * (trainable["a"].sum() + trainable["b"].sum()), {}

    trainable = {"a": np.zeros((60, 100)), "b": np.zeros(4000)}
    return linear_task(trainable=trainable, loss=loss)


# --- the mechanism -----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_noise_is_gaussian_of_the_size_that_is_accounted_for(rate):
    """z C / (q N) for each number, whoever was drawn, independent in all rounds and places."""
    algorithm = dp_fed_avg(clip=0.3, noise_multiplier=2.0, rate=rate, local_steps=1)
    keep = Keep()
    ends = [
        trained(algorithm, task=wide_task(), rounds=1, seed=s, callbacks=[keep]) for s in (0, 1)
    ]
    noise = np.array([np.append(e.trainable["a"].ravel(), e.trainable["b"]) for e in ends])
    deviation = 2.0 * 0.3 / (rate * 8)
    for one in noise:
        assert stats.kstest(one / deviation, "norm").pvalue > 1e-3
        assert one.std() == pytest.approx(deviation, rel=0.03)
    assert abs(np.corrcoef(noise)[0, 1]) < 0.04
    again = trained(algorithm, task=wide_task(), rounds=1, seed=0).trainable
    assert_equal(again, ends[0].trainable)


def test_clipping_in_numpy():
    algorithm = dp_fed_avg(clip=0.4, noise_multiplier=0.0, rate=0.6, local_steps=2)
    with jax.enable_x64(True):
        found = trained(algorithm, group_size=3, rounds=4)
    x, counts = START, []
    for record in found.history:
        moved = np.array([steps(x, EIGHT.clients[k], count=2) - x for k in record["clients"]])
        norms = np.linalg.norm(moved, axis=1)
        total = (moved * np.minimum(1, 0.4 / norms)[:, None]).sum(0)
        counts.append(len(record["clients"]))
        share = np.average(norms > 0.4, weights=EIGHT.sizes()[record["clients"]])
        assert record["metrics"]["clipped"] == pytest.approx(share)
        x = x + total / (0.6 * 8)  # whoever was drawn
    assert len({*counts}) > 1
    np.testing.assert_allclose(flat(found.trainable), x, atol=1e-6)
    assert found.history[0]["metrics"]["clip"] == pytest.approx(0.4)


def test_one_client_moves_the_model_by_the_clip_at_most():
    """Sensitivity: with or without a client that sends anything whatever."""
    algorithm = dp_fed_avg(clip=0.4, noise_multiplier=0.0, local_steps=2)
    huge = attacked(algorithm, model_replacement(1e6), (3,))
    flipped = attacked(algorithm, model_replacement(-1e6), (3,))
    ends = [flat(trained(a, rounds=1).trainable) for a in (huge, flipped)]
    assert np.linalg.norm(ends[0] - ends[1]) == pytest.approx(2 * 0.4 / 8, rel=1e-4)


def test_without_clipping_and_noise_it_is_averaging():
    plain = trained(fed_avg(local_steps=2, weighting="uniform")).trainable
    neutral = dp_fed_avg(clip=1e6, noise_multiplier=0.0, local_steps=2)
    assert_close(trained(neutral).trainable, plain, 1e-5)


def test_the_clip_follows_a_quantile_in_numpy():
    """Andrew et al., Algorithm 1; the noise of the counts is drawn from the round's key."""
    settings = {"clip": 0.1, "quantile": 0.5, "clip_rate": 0.3, "count_noise": 1e-6}
    algorithm = dp_fed_avg(noise_multiplier=0.0, local_steps=2, **settings)
    keep = Keep()
    with jax.enable_x64(True):
        found = trained(algorithm, rounds=5, callbacks=[keep])
    x, c = START, 0.1
    for record in found.history:
        assert record["metrics"]["clip"] == pytest.approx(c, rel=1e-4)
        moved = [steps(x, rows, count=2) - x for rows in EIGHT.clients]
        norms = np.linalg.norm(moved, axis=1)
        x = x + sum(m * min(1, c / n) for m, n in zip(moved, norms, strict=True)) / 8
        c = c * np.exp(-0.3 * ((norms <= c).mean() - 0.5))
    np.testing.assert_allclose(flat(found.trainable), x, atol=1e-4)
    assert float(keep.state.server["clip"]) == pytest.approx(c, rel=1e-4)


def test_counts_and_sum_share_the_noise():
    """z_Δ = (z⁻² − (2σ_b)⁻²)^−½ on the sum, and σ_b on the counts, in forty rounds."""
    z, counts, rate = 1.5, 1.0, 0.01

    def flat_loss(trainable, frozen, batch, rng):
        return 0 * trainable["w"].sum() + 0 * trainable["b"], {}

    algorithm = dp_fed_avg(
        clip=0.3,
        noise_multiplier=z,
        quantile=0.5,
        clip_rate=rate,
        count_noise=counts,
        local_steps=1,
    )
    kept = []

    class KeepAll(Keep):
        def round_end(self, state, record):
            kept.append(flat(jax.device_get(state.state.trainable)))

    task = linear_task(loss=flat_loss)
    found = trained(algorithm, task=task, rounds=41, callbacks=[KeepAll()])
    clips = np.array([record["metrics"]["clip"] for record in found.history])
    # No update is above the clip: b is 1 but for the noise, σ_b / (q N).
    steps_of_clip = np.diff(np.log(clips)) / rate
    assert stats.kstest((steps_of_clip + 0.5) * 8 / counts, "norm").pvalue > 1e-3
    of_sum = z / np.sqrt(1 - (z / (2 * counts)) ** 2)
    moved = np.diff(np.array([START, *kept]), axis=0) * 8 / (clips[:, None] * of_sum)
    assert stats.kstest(moved.ravel(), "norm").pvalue > 1e-3


def test_locally_private_clients_add_noise_themselves():
    """z C √K / N of K clients, and none of the server; the same in groups of any size."""
    algorithm = dp_fed_avg(clip=0.3, noise_multiplier=2.0, rate=0.5, local=True, local_steps=1)
    found = trained(algorithm, task=wide_task(), rounds=1, group_size=3)
    noise = np.append(found.trainable["a"].ravel(), found.trainable["b"])
    answered = len(found.history[0]["clients"])
    assert 0 < answered < 8
    deviation = 2.0 * 0.3 * np.sqrt(answered) / (0.5 * 8)
    assert stats.kstest(noise / deviation, "norm").pvalue > 1e-3
    other = trained(algorithm, task=wide_task(), rounds=1, group_size=2).trainable
    assert_close(found.trainable, other, 1e-5)


def test_a_locally_private_client_is_a_data_set_of_one(library):
    """Two of its messages are 2 C apart: half of the multiplier, and who is drawn is no secret."""
    algorithm = dp_fed_avg(local=True, noise_multiplier=3.0, rate=0.5, delta=0.01, local_steps=1)
    assert algorithm.record_fields(3)["epsilon"] == epsilon(1.5, 1.0, 3, 0.01)


@pytest.mark.slow
def test_noise_of_locally_private_clients_is_calibrated(library):
    calibrated = dp_fed_avg(local=True, epsilon=3.0, calibrate_for=2, delta=0.01, local_steps=1)
    assert trained(calibrated, rounds=2).history[-1]["epsilon"] == pytest.approx(3.0, rel=1e-2)


def test_an_empty_round_adds_noise_alone():
    algorithm = dp_fed_avg(clip=0.3, noise_multiplier=1.0, rate=0.01, local_steps=1)
    found = trained(algorithm, task=wide_task(), rounds=1)
    assert found.history[0]["clients"] == []
    deviation = 0.3 / (0.01 * 8)
    noise = np.append(found.trainable["a"].ravel(), found.trainable["b"])
    assert stats.kstest(noise / deviation, "norm").pvalue > 1e-3


@pytest.mark.slow
def test_a_resumed_run_is_the_run(tmp_path):
    algorithm = dp_fed_avg(clip=0.4, noise_multiplier=0.5, rate=0.5, quantile=0.5, local_steps=2,
                           count_noise=1.0)  # fmt: skip
    algorithm = compressed(algorithm, up=top_k(0.5))
    whole = trained(algorithm)
    trained(algorithm, rounds=2, callbacks=[Checkpointer(tmp_path)])
    assert_equal(trained(algorithm, callbacks=[Checkpointer(tmp_path)]).trainable, whole.trainable)


# --- accounting --------------------------------------------------------------------------------


def test_epsilon_is_that_of_the_librarys_own_examples(library):
    # dp_accounting.pld, test_poisson_subsampled_gaussian: δ = 0.15594 at ε = 1.
    assert epsilon(0.5, 0.2, 3, 0.15594, "pld") == pytest.approx(1.0, abs=1e-3)
    # Without sampling, its closed form of the Gaussian mechanism; three rounds are one of z / √3.
    exact = library.get_epsilon_gaussian(2.0, 1e-5)
    assert epsilon(2.0 * np.sqrt(3), 1.0, 3, 1e-5, "pld") == pytest.approx(exact, rel=1e-3)
    # Rényi: ε = min over α of the bound on ρ α with ρ = rounds / (2 z²), never below the exact one.
    for rounds, noise in ((1, 1.0), (10, 5.0)):
        exact = library.get_epsilon_gaussian(noise / np.sqrt(rounds), 1e-6)
        assert exact <= epsilon(noise, 1.0, rounds, 1e-6) <= 1.15 * exact


@pytest.mark.slow
def test_sampling_amplifies_and_rounds_add_up(library):
    assert epsilon(1.0, 0.1, 10, 1e-5) < epsilon(1.0, 0.5, 10, 1e-5) < epsilon(1.0, 1.0, 10, 1e-5)
    assert epsilon(1.0, 0.1, 10, 1e-5) < epsilon(1.0, 0.1, 20, 1e-5)
    assert epsilon(1.0, 0.1, 10, 1e-5, "pld") < epsilon(1.0, 0.1, 10, 1e-5, "rdp")


def test_noise_is_calibrated(library):
    noise = calibrated_noise(2.0, 0.2, 30, 1e-4)
    assert epsilon(noise, 0.2, 30, 1e-4) <= 2.0 + 1e-3
    assert epsilon(noise - 0.01, 0.2, 30, 1e-4) > 2.0


def test_records_tell_what_is_spent(library):
    algorithm = dp_fed_avg(noise_multiplier=1.2, rate=0.5, delta=0.01, local_steps=1)
    found = trained(attacked(algorithm, model_replacement(2.0), (1,)))
    told = [record["epsilon"] for record in found.history]
    assert told == [epsilon(1.2, 0.5, r, 0.01) for r in (1, 2, 3)] and told[0] < told[2]
    assert "epsilon" not in trained(dp_fed_avg(local_steps=1), rounds=1).history[0]
    calibrated = dp_fed_avg(epsilon=3.0, calibrate_for=2, delta=0.01, local_steps=1)
    assert trained(calibrated, rounds=2).history[-1]["epsilon"] == pytest.approx(3.0, rel=1e-2)
    with pytest.raises(ConfigError, match=r"3 rounds spend an ε of .* more than the claimed 3"):
        trained(calibrated, rounds=3)


def test_it_is_chosen_by_name(library):
    options = {"epsilon": 8, "delta": 1e-3, "calibrate_for": 5, "rate": 0.5, "up": "int8"}
    found = Named("dpfedavg", options).averaging(linear_task(), {})(local_steps=2)
    assert "dp_fed_avg(clip=1.0" in found.name and "sampling=poisson(0.5)" in found.name


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dp_fed_avg(weighting="examples"), "depend on other clients' data"),
        (lambda: dp_fed_avg(sampling=uniform(3)), "sampled independently; leave `sampling`"),
        (lambda: dp_fed_avg(sampling=poisson(0.5)), "give `rate`"),
        (lambda: dp_fed_avg(clip=0.0), "clip must be > 0, got 0.0"),
        (lambda: dp_fed_avg(epsilon=3.0), "an ε needs a δ"),
        (lambda: dp_fed_avg(quantile=0.5, local=True), "local=True would not"),
        (lambda: dp_fed_avg(quantile=1.0), r"quantile must be in \[0, 1\)"),
        (lambda: dp_fed_avg(rate=1.5, delta=1e-3), r"rate must be in \(0, 1\], got 1.5"),
        (lambda: dp_fed_avg(rate=1.5), r"rate must be in \(0, 1\], got 1.5"),
        (lambda: dp_fed_avg(rate=0.0), r"rate must be in \(0, 1\], got 0.0"),
        (lambda: dp_fed_avg(delta=0.01, accountant="moments"), "accountant is one of .*'moments'"),
        (lambda: dp_fed_avg(noise_multiplier=0.0, delta=0.01), "noise_multiplier 0.0 gives no ε"),
        (lambda: trained(dp_fed_avg(delta=0.25), FOUR), "delta 0.25 is not below 1/4"),
        (lambda: trained(dp_fed_avg(quantile=0.5)), "must be below twice the noise of the counts"),
    ],
)
def test_refusals(call, words, library):
    with pytest.raises(ConfigError, match=words):
        call()
