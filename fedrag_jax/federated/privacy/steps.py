"""DP-SGD on clients: a client's update is differentially private for each of its examples.

Deep Learning with Differential Privacy
    Abadi et al., CCS 2016, arXiv 1607.00133, Algorithm 1

    g = (Σ_i ∇ℓ_i · min(1, C / ‖∇ℓ_i‖) + N(0, (z C)² I)) / B

`jax-privacy` clips the gradients. Batches walk through shuffled epochs, as in any client, so there is
no amplification by sampling: every read of an example spends budget.

pip install 'fedrag-jax[privacy]'
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, missing
from fedrag_jax.federated.algorithm import normal_like
from fedrag_jax.federated.privacy.accounting import epsilon
from fedrag_jax.federated.work import Work
from fedrag_jax.generation.likelihood import weighted_mean
from fedrag_jax.objectives.task import Loss, PyTree, Task


@dataclasses.dataclass(frozen=True)
class PrivateLoss:
    """A loss with the value of another loss and the gradient of the formula above.

    Rows that pad a batch have no gradient, but B counts them, also those that `fit` leaves out.
    """

    loss: Loss
    clip: float
    noise_multiplier: float
    batch_size: int

    def through(self, see: Callable[[PyTree], PyTree]) -> "PrivateLoss":
        """Returns the loss of the parameters from which `see` makes those of this loss, which are the
        ones whose gradients are clipped."""
        inner = self.loss
        return dataclasses.replace(self, loss=lambda y, *rest: inner(see(y), *rest))

    def __call__(self, trainable, frozen, batch, rng):
        of_examples, of_noise = jax.random.split(rng)
        y = jax.lax.stop_gradient(trainable)
        if len(batch["weight"]) > self.batch_size:
            raise ConfigError(
                f"private_steps: batch_size is {self.batch_size}, but a batch has "
                f"{len(batch['weight'])} examples; give the batch_size of the fit"
            )

        def one(y, frozen, batch, rng):
            weight = batch["weight"]
            value, metrics = self.loss(y, frozen, batch | {"weight": jnp.ones_like(weight)}, rng)
            return value * weight[0], metrics

        summed = _library().clipping.clipped_grad(
            one,
            has_aux=True,
            l2_clip_norm=self.clip,
            batch_argnums=2,
            prng_argnum=3,
            return_values=True,
        )
        total, each = summed(y, frozen, batch, of_examples)
        deviation = self.noise_multiplier * self.clip
        gradient = jax.tree.map(
            lambda x, noise: (x + deviation * noise) / self.batch_size,
            total,
            normal_like(of_noise, total),
        )
        # The sum over `along` has the value 0, and `gradient` as its gradient in `trainable`.
        moved = jax.tree.map(lambda a, b: a - b, trainable, y)
        along = jax.tree.map(lambda g, d: (g * d).sum(), gradient, moved)
        losses, metrics = each.values, each.aux
        value = weighted_mean(losses, batch["weight"]) + sum(jax.tree.leaves(along))
        return value, {name: weighted_mean(x, batch["weight"]) for name, x in metrics.items()}


def private_steps(task: Task, *, clip: float, noise_multiplier: float, batch_size: int) -> Task:
    """Returns the task with steps that are private for each example; it works with every algorithm.

    Args:
      clip: C, the maximum norm of an example's gradient over all trained parameters.
      noise_multiplier: z, the noise's standard deviation divided by C.
      batch_size: B, that of the fit.

    Raises:
      ConfigError: a clip that is not positive, a negative z, a loss in which the examples of a batch
        depend on each other, or no jax-privacy; in a fit, larger batches.
    """
    if not clip > 0 or noise_multiplier < 0:
        raise ConfigError(
            f"private_steps: clip must be > 0 and noise_multiplier at least 0, got {clip} and "
            f"{noise_multiplier}"
        )
    if task.coupled:
        raise ConfigError(
            f"private_steps: in {task.name!r} the loss of a question depends on the others of its "
            "batch, but private steps take the gradients of single questions; train with an objective "
            "of single questions, such as 'concatenated', or make whole clients private with dp_fed_avg"
        )
    _library()
    loss = PrivateLoss(task.loss, float(clip), float(noise_multiplier), int(batch_size))
    return dataclasses.replace(task, name=f"{task.name}_private", loss=loss, cost=None)


def example_epsilon(
    noise_multiplier: float,
    data: Partition,
    work: Work,
    *,
    rounds: int,
    batch_size: int,
    delta: float,
    accountant: str = "rdp",
) -> float:
    """Returns ε of the example that is read most often, if its client takes part in every round.

    Neighbouring data sets differ in one example, whose gradient is replaced by zero (zero-out).

    Raises:
      ConfigError: a δ that is not below 1 / examples; as `accounting.epsilon`.
    """
    held = int(data.sizes().sum())
    if delta >= 1 / held:
        raise ConfigError(
            f"delta {delta} is not below 1/{held}, so the model might reveal a whole example; lower it"
        )
    visits = max(_visits(int(n), work, rounds, batch_size) for n in data.sizes())
    return epsilon(noise_multiplier, 1.0, visits, delta, accountant)


def _visits(held: int, work: Work, rounds: int, batch_size: int) -> int:
    """Returns an upper bound on the reads of an example, as a number of steps that contain it once.

    A batch that spans two epochs may contain an example twice. It then counts four times, because the
    budget of Gaussian noise grows with the square of the sensitivity. This may happen at every second
    end of an epoch.
    """
    if work.local_epochs is not None:
        return rounds * work.local_epochs
    steps = rounds * work.local_steps
    width = min(batch_size, held)
    epochs = math.ceil(steps * width / held)
    twice = epochs // 2 if held % width else 0
    return epochs + 2 * twice


def _library() -> Any:
    try:
        import jax_privacy.clipping
    except ImportError as error:
        raise missing("clipping single examples needs jax-privacy", "privacy") from error
    return jax_privacy
