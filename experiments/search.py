"""Which learning rates the strategies need, and how one is searched."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.comparison import Comparison
from experiments.inputs import replicates
from fedrag_jax.errors import DataError, DivergenceError


class Search(NamedTuple):
    """A rate that is looked for.

    Attributes:
      name: in `config.learning_rates`.
      part: whose rate it is.
      strategy: that is trained with it, by name.
      metric: that judges it; F1 and MRR are less noisy than EM.
    """

    name: str
    part: str
    strategy: str
    metric: str


SEARCHES = (
    Search("retriever", "retriever", "retriever", "mrr"),
    Search("generator", "generator", "generator", "f1"),
    Search("marginal_generator", "generator", "first_phase", "f1"),
    Search("marginal_retriever", "retriever", "second_phase", "f1"),
    Search("ralt", "generator", "ralt", "f1"),
    Search("lsr", "retriever", "lsr", "f1"),
)


def seeds_of(config, setting: str) -> list[tuple[int, int]]:
    """Pairs of seeds that a rate is judged with: two, but one where each client trains by itself."""
    return replicates(config)[: 1 if setting.startswith("local") else 2]


class Trials:
    """Trains a strategy in a setting at the rates it is asked for, and keeps what came of each.

    Args:
      bases: systems to start from, one for each training that a rate takes: all clients of the local
        setting with each pair of seeds.
      where: tells bases apart that were themselves tuned.
      examples: validation questions; a local client is judged on a share of them.

    Attributes:
      systems: of each rate, in the order of the bases.
      seconds: devices have spent on all trainings.
    """

    def __init__(self, run: Comparison, setting: str, search: Search, bases, examples, where=""):
        self.run, self.setting, self.search = run, setting, search
        self.bases, self.examples, self.where = bases, examples, where
        self.systems: dict[float, list] = {}
        self.seconds = 0.0

    def judge(self, rates: Sequence[float]) -> list[float]:
        """The metric of each rate in percent, a mean over seeds and clients; -inf where it diverges."""
        from fedrag_jax.strategies import strategies
        from fedrag_jax.strategies.strategy import together
        from fedrag_jax.strategies.tuner import tune_together

        strategy = getattr(strategies, self.search.strategy)
        tuners = [tuner for rate in rates for tuner in self._tuners(rate)]
        tuned = together(
            strategy,
            [*self.bases] * len(rates),
            self.run.dataset,
            lambda asked: tune_together([(tuners[i], task) for i, task in asked]),
        )
        self.seconds += sum(cost.device_seconds for t in tuners for cost in t.costs.values())
        width = len(self.bases)
        for number, rate in enumerate(rates):
            self.systems[rate] = tuned[number * width : (number + 1) * width]
        return [self._score(rate) for rate in rates]

    def _tuners(self, rate: float) -> list:
        members = self.run.members(self.setting)
        found = []
        for pair in seeds_of(self.run.config, self.setting):
            for client in members:
                tuner = self.run.tuner(lambda *_: rate, self.setting, *pair, client)
                tuner.folder = tuner.folder / self.where / f"{self.search.strategy}-{rate:g}"
                found.append(tuner)
        return found

    def _score(self, rate: float) -> float:
        from fedrag_jax.evaluation.evaluator import evaluate

        systems, about = self.systems[rate], f"{self.setting}, {self.search.strategy}, {rate:g}"
        if any(isinstance(system, DivergenceError) for system in systems):
            print(f"{about}: diverged", flush=True)
            return -np.inf
        count = len(self.run.members(self.setting))
        parts = [self.examples[i::count] or self.examples for i in range(count)]
        scores = [
            evaluate(system, parts[i % count], mode=self.run.config.mode)[self.search.metric]
            for i, system in enumerate(systems)
        ]
        scores = np.concatenate(scores)
        if np.isnan(scores).all():
            raise DataError(
                f"no validation question can be scored by {self.search.metric}; label some"
            )
        print(
            f"{about}: validation {self.search.metric} {100 * np.nanmean(scores):.1f}", flush=True
        )
        return 100 * float(np.nanmean(scores))
