"""Policy gradients for a generator that searches while it writes: ReSearch (2503.19470), Search-R1
(2503.09516), with GRPO's group-relative advantages (2402.03300) and PPO's clipped ratios (1707.06347).

Each question x is rolled out G times; rollout i has a reward r_i and the written tokens y_t. With the
ratio rho_t = pi(y_t) / pi_old(y_t) the loss is

    L = - agg_t min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) + beta agg_t KL_t
    A_i = (r_i - mean(r)) / (std(r) + 1e-6)

where `agg` averages only over written tokens: retrieved tokens are in neither sum.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.likelihood import answer_distributions, tokens_read, weighted_mean
from fedrag_jax.models.network import Network

# How the tokens of a group become one number: the mean over rollouts of each one's mean (GRPO), the
# mean over all its tokens (DAPO, 2503.14476; Search-R1), or their sum over G times the longest rollout
# there can be, so that no length is favoured (Dr. GRPO, 2503.20783).
AGGREGATIONS = ("rollout", "token", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")  # Schulman's: unbiased; low variance; both, and never negative
_SMALL = 1e-6


def group_advantages(rewards: np.ndarray, scaled: bool = True) -> np.ndarray:
    """Returns the advantages A_i of rewards [..., G] relative to their group; float32.

    The standard deviation is that of a sample (n - 1). For equal rewards all advantages are 0. In a
    group of one, the advantage is the reward itself.

    Args:
      scaled: whether to divide by the standard deviation; otherwise questions are weighted by the
        differences of their rewards (Dr. GRPO).
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.shape[-1] == 1:
        return rewards.astype(np.float32)
    apart = rewards - rewards.mean(-1, keepdims=True)
    if scaled:
        apart = apart / (rewards.std(-1, ddof=1, keepdims=True) + _SMALL)
    return apart.astype(np.float32)


def clipped(ratio: jax.Array, advantage: jax.Array, low: float, high: float) -> jax.Array:
    """min(rho A, clip(rho, 1 - low, 1 + high) A)."""
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def kl_to_reference(log_probs: jax.Array, reference: jax.Array, estimator: str) -> jax.Array:
    """Returns estimates of KL(pi || reference) per token, from log-probabilities of tokens that pi
    wrote.

    With d = log pi - log reference: k1 is d, k2 is d^2 / 2, k3 is e^-d - 1 + d.

    Raises:
      ConfigError: an unknown estimator.
    """
    apart = log_probs - reference
    if estimator == "k1":
        return apart
    if estimator == "k2":
        return apart**2 / 2
    if estimator == "k3":
        return jnp.exp(-apart) - 1 + apart
    raise ConfigError(f"KL estimator must be one of {KL_ESTIMATORS}, got {estimator!r}")


def aggregated(values: jax.Array, written: jax.Array, weight: jax.Array, how: str) -> jax.Array:
    """Aggregates values [B, G, A] of the written tokens to one number, by one of `AGGREGATIONS`.

    Args:
      written: [B, G, A], 1 for tokens of the policy, 0 for others and padding.
      weight: [B], 0 for questions that are padding.

    Raises:
      ConfigError: an unknown aggregation.
    """
    sums, counts = (values * written).sum(-1), written.sum(-1)  # [B, G]
    if how == "rollout":
        return weighted_mean((sums / jnp.maximum(counts, 1)).mean(-1), weight)
    if how == "token":
        total = (counts.sum(-1) * weight).sum()
        return (sums.sum(-1) * weight).sum() / jnp.maximum(total, 1)
    if how == "constant":
        return weighted_mean(sums.mean(-1) / written.shape[-1], weight)
    raise ConfigError(f"aggregation must be one of {AGGREGATIONS}, got {how!r}")


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The loss of the module's docstring, a pure function of a table of rollouts.

    `trainable` or `frozen` hold `decoder` and `adapters`. A batch holds `tokens` [B, G, T], `lengths`
    [B, G], `answer_positions` [B, G, A] and `written` [B, G, A] of the tokens that the policy wrote,
    `old_log_probs` and, with a penalty, `reference_log_probs` [B, G, A], and `advantages` [B, G].

    Attributes:
      clip_low, clip_high: clipping limits; a larger `clip_high` gives unlikely tokens more room to grow
        (clip-higher, DAPO).
      kl: beta.
      estimator: the estimator of the penalty, one of `KL_ESTIMATORS`.
      aggregation: one of `AGGREGATIONS`.
      entropy: weight of an entropy bonus; 0.001 in Search-R1.

    Raises:
      ConfigError: a number out of its range, an unknown name.
    """

    decoder: Network
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.001
    estimator: str = "k3"
    aggregation: str = "rollout"
    entropy: float = 0.0

    def __post_init__(self):
        if not (0 < self.clip_low <= 1 and self.clip_high > 0 and min(self.kl, self.entropy) >= 0):
            raise ConfigError(
                "a policy loss needs clip_low in (0, 1], clip_high > 0, kl >= 0 and entropy >= 0, got "
                f"{self.clip_low}, {self.clip_high}, {self.kl} and {self.entropy}"
            )
        for name, value, known in (
            ("estimator", self.estimator, KL_ESTIMATORS),
            ("aggregation", self.aggregation, AGGREGATIONS),
        ):
            if value not in known:
                raise ConfigError(f"{name} must be one of {known}, got {value!r}")

    def __call__(self, trainable, frozen, batch, rng):
        parts = frozen | trainable
        everything, targets = answer_distributions(
            self.decoder, parts["decoder"], parts["adapters"], batch
        )
        log_probs = jnp.take_along_axis(everything, targets[..., None], axis=-1)[..., 0]
        written, weight = batch["written"], batch["weight"]
        advantages = batch["advantages"][..., None]
        # Padding has a ratio of 1, whatever it is compared with.
        apart = jnp.where(written > 0, log_probs - batch["old_log_probs"], 0.0)
        ratio = jnp.exp(apart)
        gain = clipped(ratio, advantages, self.clip_low, self.clip_high)
        entropies = -(jnp.exp(everything) * everything).sum(-1)
        of = {"entropy": entropies, "clip_fraction": self._clipped_away(ratio, advantages)}
        loss = -aggregated(gain, written, weight, self.aggregation)
        if self.kl:
            reference = jnp.where(written > 0, batch["reference_log_probs"], log_probs)
            of["kl"] = kl_to_reference(log_probs, reference, self.estimator)
            loss += self.kl * aggregated(of["kl"], written, weight, self.aggregation)
        if self.entropy:
            loss -= self.entropy * aggregated(entropies, written, weight, self.aggregation)
        told = {name: aggregated(x, written, weight, "token") for name, x in of.items()}
        told["tokens"] = weighted_mean(tokens_read(batch), weight)
        for name in TOLD:
            if name in batch:
                told[name] = weighted_mean(batch[name], weight)
        return loss, told

    def _clipped_away(self, ratio, advantage) -> jax.Array:
        """Returns 1 for tokens whose gradient the clip removes."""
        beyond = jnp.where(advantage > 0, ratio > 1 + self.clip_high, ratio < 1 - self.clip_low)
        return (beyond & (advantage != 0)).astype(jnp.float32)


# Columns [B] of the table that say how its rollouts went, means over a group; told beside the loss.
TOLD = ("reward", "no_variance", "malformed", "searches", "written_tokens")
