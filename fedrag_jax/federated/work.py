"""The clients that take part in a round, and the amount of their work."""

import dataclasses
from typing import TypedDict

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.sampling import ClientSampling, everyone


@dataclasses.dataclass(frozen=True)
class Work:
    """Settings of a round that all algorithms share.

    Attributes:
      local_steps: S, the same for every client; ignored if `local_epochs` is set.
      local_epochs: passes over each client's own examples, or None.
      sampling: client sampling: `everyone`, `uniform(n)`, `weighted(n)`, `poisson(rate)`, `fixed(...)`.
      dropout: the probability that a sampled client never answers.
      stragglers: the probability that a client completes only some of its steps; the number is uniform
        (Li et al. 2020, FedProx, 1812.06127, section 5.2, where they do fewer epochs). The completed
        steps are used.
      weighting: the weight p_k of a client's update in the mean: proportional to its number of
        "examples", or "uniform".

    Raises:
      ConfigError: a count below 1, a probability outside [0, 1), or an unknown weighting.
    """

    local_steps: int = 10
    local_epochs: int | None = None
    sampling: ClientSampling = everyone
    dropout: float = 0.0
    stragglers: float = 0.0
    weighting: str = "examples"

    def __post_init__(self):
        for name in ("local_steps", "local_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("dropout", "stragglers"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"{name} is a probability below 1, got {value}")
        if self.weighting not in ("examples", "uniform"):
            raise ConfigError(f'weighting is "examples" or "uniform", got {self.weighting!r}')
        if self.sampling.name.startswith("weighted") and self.weighting == "examples":
            raise ConfigError(
                f"sampling={self.sampling.name} already samples by examples; weighting by them too "
                'counts them twice: set weighting="uniform"'
            )

    def __str__(self):
        length = (
            f"local_steps={self.local_steps}"
            if self.local_epochs is None
            else f"local_epochs={self.local_epochs}"
        )
        return (
            f"{length}, sampling={self.sampling.name}, dropout={self.dropout}, "
            f"stragglers={self.stragglers}, weighting={self.weighting}"
        )


class StepOptions(TypedDict, total=False):
    """Settings of `Work` by name, without the weighting."""

    local_steps: int
    local_epochs: int | None
    sampling: ClientSampling
    dropout: float
    stragglers: float


class WorkOptions(StepOptions, total=False):
    """Settings of `Work` by name, as arguments of algorithms."""

    weighting: str
