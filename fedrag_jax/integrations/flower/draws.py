"""The random draws of a server in a round: the participants and the noise."""

import secrets
from typing import NamedTuple

import jax
import numpy as np

from fedrag_jax.data.seeds import stream
from fedrag_jax.federated.engine.client import update_key
from fedrag_jax.integrations.flower.plan import Plan


class Draws(NamedTuple):
    """The sources of a server's random draws.

    Attributes:
      seed: seed of client sampling.
      key: key of the noise; the round is folded in.
    """

    seed: int
    key: jax.Array

    @classmethod
    def known(cls, plan: Plan) -> "Draws":
        """Returns the simulator's draws, from the seed that all parties know."""
        return cls(plan.seed, update_key(plan.seed))

    @classmethod
    def of(cls, plan: Plan) -> "Draws":
        """Returns the draws of a plan: from the system's randomness if they must be secret.

        A restarted server has new draws. Nobody has seen the result of an unfinished round, so the
        new noise in its second attempt reveals nothing.
        """
        if not plan.algorithm.secret:
            return cls.known(plan)
        data = np.frombuffer(secrets.token_bytes(8), np.uint32)
        return cls(secrets.randbits(128), jax.random.wrap_key_data(data, impl="threefry2x32"))

    def who(self, plan: Plan, sizes: np.ndarray, round: int) -> np.ndarray:
        """Samples the parties of a round, counted from 0; returns places in `sizes`.

        With all parties connected, the sample is that of the simulation.

        Args:
          sizes: numbers of examples of the connected parties, int [N].
        """
        rng = stream(self.seed, "client sampling", round)
        return np.sort(plan.algorithm.work.sampling.draw(sizes, rng))

    def of_round(self, round: int) -> jax.Array:
        """Returns the key of a round, counted from 0."""
        return jax.random.fold_in(self.key, np.int32(round))
