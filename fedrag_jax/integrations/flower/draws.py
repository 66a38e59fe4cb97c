"""What a server draws in a round: who takes part, and noise."""

import secrets
from typing import NamedTuple

import jax
import numpy as np

from fedrag_jax.data.seeds import stream
from fedrag_jax.federated.engine.client import update_key
from fedrag_jax.integrations.flower.plan import Plan


class Draws(NamedTuple):
    """Where a server's draws come from.

    Attributes:
      seed: of who takes part.
      key: of noise, into which the round is folded.
    """

    seed: int
    key: jax.Array

    @classmethod
    def known(cls, plan: Plan) -> "Draws":
        """The simulator's, of the seed that all parties know."""
        return cls(plan.seed, update_key(plan.seed))

    @classmethod
    def of(cls, plan: Plan) -> "Draws":
        """Those of a plan: of the system's randomness where nobody else may know them.

        They are drawn anew whenever a server starts. A round that it had not finished was told to
        nobody, so other noise in its second try gives nothing away.
        """
        if not plan.algorithm.secret:
            return cls.known(plan)
        data = np.frombuffer(secrets.token_bytes(8), np.uint32)
        return cls(secrets.randbits(128), jax.random.wrap_key_data(data, impl="threefry2x32"))

    def who(self, plan: Plan, sizes: np.ndarray, round: int) -> np.ndarray:
        """Who of parties with so many examples takes part in a round, from 0: places in `sizes`.

        As in a simulation, where all parties are there.
        """
        rng = stream(self.seed, "client sampling", round)
        return np.sort(plan.algorithm.work.sampling.draw(sizes, rng))

    def of_round(self, round: int) -> jax.Array:
        """The key of a round, from 0."""
        return jax.random.fold_in(self.key, np.int32(round))
