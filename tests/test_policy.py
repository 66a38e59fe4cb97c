"""Policy losses against loops in NumPy, and what is in neither sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.likelihood import answer_distributions, answer_log_probs
from fedrag_jax.models import lora
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.policy import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    PolicyLoss,
    aggregated,
    clipped,
    group_advantages,
    kl_to_reference,
)

pytestmark = pytest.mark.usefixtures("strict_types")

B, G, T, A = 3, 4, 14, 6


def test_advantages_are_against_the_group():
    rewards = np.array([[1, 0, 0, 0.5], [0, 0, 0, 0], [1, 1, 1, 1]])
    found = group_advantages(rewards)
    for row, expected in zip(found, rewards, strict=True):
        mean = sum(expected) / 4
        std = (sum((r - mean) ** 2 for r in expected) / 3) ** 0.5
        np.testing.assert_allclose(row, [(r - mean) / (std + 1e-6) for r in expected], atol=1e-5)
    assert (found[1:] == 0).all() and found.dtype == np.float32
    np.testing.assert_allclose(group_advantages(rewards, False)[0], rewards[0] - rewards[0].mean())
    np.testing.assert_array_equal(group_advantages([[0.7], [0.0]]), np.float32([[0.7], [0.0]]))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.4)])
def test_clipping_takes_the_worse_of_both(low, high):
    for ratio in (0.5, 0.79, 0.9, 1.0, 1.19, 1.3, 2.0):
        for advantage in (-2.0, 0.0, 1.5):
            limited = min(max(ratio, 1 - low), 1 + high)
            expected = min(ratio * advantage, limited * advantage)
            found = clipped(jnp.float32(ratio), jnp.float32(advantage), low, high)
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_estimates_of_the_kl():
    rng = np.random.default_rng(0)
    log_probs, reference = np.log(rng.dirichlet(np.ones(6), 2))
    drawn = rng.choice(6, 200_000, p=np.exp(log_probs))
    exact = (np.exp(log_probs) * (log_probs - reference)).sum()
    both = jnp.float32(log_probs[drawn]), jnp.float32(reference[drawn])
    for estimator in KL_ESTIMATORS:
        found = np.asarray(kl_to_reference(*both, estimator), np.float64)
        d = log_probs[drawn] - reference[drawn]
        by_hand = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[estimator]
        np.testing.assert_allclose(found, by_hand, atol=2e-5)
        if estimator != "k2":  # which is biased
            np.testing.assert_allclose(found.mean(), exact, rtol=0.03)
    assert np.asarray(kl_to_reference(*both, "k3")).min() >= -1e-6


def values(seed=0):
    rng = np.random.default_rng(seed)
    written = (rng.random((B, G, A)) < 0.6).astype(np.float32)
    written[0, 1] = 0  # a rollout that wrote nothing
    return rng.normal(size=(B, G, A)).astype(np.float32), written, np.float32([1, 0, 2])


def slow_aggregated(values, written, weight, how):
    total, norm = 0.0, 0.0
    for b in range(B):
        for g in range(G):
            some = [v for v, w in zip(values[b, g], written[b, g], strict=True) if w]
            if how == "rollout":
                total += weight[b] * (sum(some) / len(some) if some else 0) / G
                norm += weight[b] / G
            elif how == "token":
                total, norm = total + weight[b] * sum(some), norm + weight[b] * len(some)
            else:
                total, norm = total + weight[b] * sum(some) / (G * A), norm + weight[b] / G
    return total / norm


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_what_is_not_written_is_in_no_sum(how):
    some, written, weight = values()
    found = aggregated(*map(jnp.asarray, (some, written, weight)), how)
    np.testing.assert_allclose(found, slow_aggregated(some, written, weight, how), rtol=1e-5)
    other = np.where(written > 0, some, 1e3).astype(np.float32)
    other[1] = -1e3  # padding
    again = aggregated(*map(jnp.asarray, (other, written, weight)), how)
    np.testing.assert_allclose(again, found, rtol=1e-6)


@pytest.fixture(scope="module")
def parts():
    config = DecoderConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    network = lora.add_lora(Network.of(Decoder, config), lora.LoraConfig(rank=2))
    adapters = lora.init_adapters(network, 0)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    return network, network.init(jax.random.key(0)), adapters


@pytest.fixture(scope="module")
def batch(parts):
    network, params, adapters = parts
    rng = np.random.default_rng(3)
    batch = {
        "tokens": rng.integers(0, 20, (B, G, T)).astype(np.int32),
        "lengths": rng.integers(T - 3, T + 1, (B, G)).astype(np.int32),
        "answer_positions": np.sort(rng.integers(2, T - 3, (B, G, A)), -1).astype(np.int32),
        "written": values()[1],
        "advantages": group_advantages(rng.random((B, G))),
        "weight": np.float32([1, 0, 2]),
    }
    batch = {name: jnp.asarray(column) for name, column in batch.items()}
    now = answer_log_probs(network, params, adapters, batch)
    noise = rng.normal(0, 0.3, (2, B, G, A)).astype(np.float32)
    return batch | {"old_log_probs": now + noise[0], "reference_log_probs": now + noise[1]}


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_the_loss_is_that_of_a_loop(parts, batch, how, kl):
    network, params, adapters = parts
    loss = PolicyLoss(network, clip_high=0.3, kl=kl, aggregation=how, entropy=0.01)
    found, told = loss({"adapters": adapters}, {"decoder": params}, batch, None)
    now = np.asarray(answer_log_probs(network, params, adapters, batch), np.float64)
    gains, penalties, clips = (np.zeros((B, G, A)) for _ in range(3))
    for at in np.ndindex(B, G, A):
        ratio = np.exp(now[at] - float(batch["old_log_probs"][at]))
        advantage = float(batch["advantages"][at[:2]])
        limited = min(max(ratio, 0.8), 1.3)
        gains[at] = min(ratio * advantage, limited * advantage)
        clips[at] = limited * advantage < ratio * advantage
        d = now[at] - float(batch["reference_log_probs"][at])
        penalties[at] = np.exp(-d) - 1 + d
    about = np.asarray(batch["written"]), np.asarray(batch["weight"])
    expected = kl * slow_aggregated(penalties, *about, how) - slow_aggregated(gains, *about, how)
    everything, _ = answer_distributions(network, params, adapters, batch)
    everything = np.asarray(everything, np.float64)
    entropies = -(np.exp(everything) * everything).sum(-1)
    expected -= 0.01 * slow_aggregated(entropies, *about, how)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(
        told["entropy"], slow_aggregated(entropies, *about, "token"), rtol=1e-5
    )
    np.testing.assert_allclose(
        told["clip_fraction"], slow_aggregated(clips, *about, "token"), atol=1e-6
    )
    if kl:
        np.testing.assert_allclose(
            told["kl"], slow_aggregated(penalties, *about, "token"), atol=1e-5
        )


def test_on_policy_the_gradient_is_that_of_reinforce(parts, batch):
    network, params, adapters = parts
    now = answer_log_probs(network, params, adapters, batch)
    batch = batch | {"old_log_probs": now}
    loss = PolicyLoss(network, kl=0.0, aggregation="token")

    def ours(adapters):
        return loss({"adapters": adapters}, {"decoder": params}, batch, None)[0]

    def reinforce(adapters):
        log_probs = answer_log_probs(network, params, adapters, batch)
        weighted = log_probs * batch["advantages"][..., None]
        return -aggregated(weighted, batch["written"], batch["weight"], "token")

    found, expected = jax.grad(ours)(adapters), jax.grad(reinforce)(adapters)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found)) > 1e-4


def test_padding_and_found_tokens_send_no_gradient(parts, batch):
    network, params, adapters = parts
    loss = PolicyLoss(network)
    other = batch | {
        "old_log_probs": jnp.where(batch["written"] > 0, batch["old_log_probs"], -1e4),
        "reference_log_probs": jnp.where(batch["written"] > 0, batch["reference_log_probs"], 1e4),
    }

    def gradient(batch):
        return jax.grad(lambda a: loss({"adapters": a}, {"decoder": params}, batch, None)[0])(
            adapters
        )

    pairs = zip(*map(jax.tree.leaves, (gradient(batch), gradient(other))), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-7)
        assert np.isfinite(np.asarray(a)).all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"clip_low": 0.0}, r"clip_low in \(0, 1\]"),
        ({"clip_high": -1.0}, "clip_high > 0"),
        ({"kl": -0.1}, "kl >= 0"),
        ({"estimator": "k4"}, r"estimator must be one of .* got 'k4'"),
        ({"aggregation": "mean"}, r"aggregation must be one of .* got 'mean'"),
    ],
)
def test_what_is_no_policy_loss_is_refused(parts, how, message):
    with pytest.raises(ConfigError, match=message):
        PolicyLoss(parts[0], **how)
