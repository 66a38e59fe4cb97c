"""The shared parts of `privacy`'s cells: clients, training of a variant, losses after it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from experiments.lab import Lab
from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.data.partition import Partition, partition
from fedrag_jax.data.schemes import dirichlet_per_client
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import answer_nll
from fedrag_jax.evaluation.leakage.membership import halves
from fedrag_jax.evaluation.leakage.signals import ranking_nll
from fedrag_jax.federated.algorithms.by_name import Named
from fedrag_jax.federated.engine.cohort import sample_cohort
from fedrag_jax.federated.fit import FitResult
from fedrag_jax.federated.sweep import require_trained, sweep
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.objectives.task import Task
from fedrag_jax.strategies.objectives import OBJECTIVES
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.regimes import adamw

OBJECTIVE = {"retriever": "in_batch", "generator": "concatenated"}
NEGATIVES = 8  # of a question that is ranked by itself


class Crowd(NamedTuple):
    """The questions of all clients, and the clients that train.

    Attributes:
      questions: N of them.
      user: int [N], the client of each.
      fresh: bool [N], which of them nobody trains on.
      trains: bool [1 + S, U], which clients train the model that is attacked, and each shadow model.
    """

    questions: list[Example]
    user: np.ndarray
    fresh: np.ndarray
    trains: np.ndarray

    def rows(self, user: int) -> np.ndarray:
        """Returns the rows that a client trains on."""
        return np.flatnonzero((self.user == user) & ~self.fresh)

    def trained_on(self) -> np.ndarray:
        """bool [1 + S, N]."""
        return self.trains[:, self.user] & ~self.fresh


def crowd(config, dataset: Dataset, split: int) -> Crowd:
    """Returns clients with equally many questions each, drawn by the seed of the split.

    Raises:
      ConfigError: clients that hold no more questions than are to be fresh.
    """
    count = config.federated.clients
    scheme = dirichlet_per_client(config.federated.alpha, count, config.federated.column)
    clients = partition(dataset.train, scheme, seed=split).clients
    if min(map(len, clients)) < config.fresh + 2:
        raise ConfigError(
            f"config.fresh is {config.fresh}, and a client holds {min(map(len, clients))} questions: "
            "at least two must be left to train on; lower it, or config.federated.clients"
        )
    user, fresh = np.zeros(len(dataset.train), int), np.zeros(len(dataset.train), bool)
    for number, rows in enumerate(clients):
        user[rows] = number
        fresh[np.sort(rows)[: config.fresh]] = True
    target = halves(count, 2, split)[:1]
    shadows = halves(count, config.shadows, split + 1_000_000)
    return Crowd(dataset.train, user, fresh, np.concatenate([target, shadows]))


def labels_by_heart(dataset: Dataset, seed: int) -> Dataset:
    """The training questions with each other's answers and gold passages, in random order."""
    order = stream(seed, "labels by heart").permutation(len(dataset.train))
    taken = [dataset.train[i] for i in order]
    return dataclasses.replace(
        dataset,
        train=[
            dataclasses.replace(e, answers=other.answers, positive_ids=other.positive_ids)
            for e, other in zip(dataset.train, taken, strict=True)
        ],
    )


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A variant in one lab with one pair of seeds.

    Attributes:
      how: the variant's settings.
      dataset: whose training questions are those of the clients, with the labels that are trained on.
      task: what is trained.
    """

    lab: Lab
    how: Any
    seed: int
    dataset: Dataset
    crowd: Crowd
    task: Task

    @classmethod
    def of(cls, lab: Lab, name: str, seed: int, split: int) -> "Trainer":
        how, dataset = lab.config.variants[name], lab.dataset
        if how.get("by_heart", False):
            dataset = labels_by_heart(dataset, split)
        task = OBJECTIVES[OBJECTIVE[lab.config.strategy]].task(lab.system(seed), dataset)
        return cls(lab, how, seed, dataset, crowd(lab.config, dataset, split), task)

    @property
    def rounds(self) -> int:
        return self.how.get("rounds", self.lab.config.training.rounds)

    def fit_of(self, users, number: int = 0, rounds: int = 0) -> dict[str, Any]:
        """Returns the arguments of `fit`, for some of the clients.

        Args:
          number: of the training, which its seed depends on.
          rounds: number of rounds, from the first; 0 is all.
        """
        config, every = self.lab.config, self.rounds
        rates = {
            part: self.lab.rate("federated", named(config.strategy), part)
            for part in self.task.trainable
        }

        def optimizer(round):
            return adamw({part: rate * (1 - round / every) for part, rate in rates.items()})

        options = dict(self.how.get("options", {}))
        if options.get("epsilon"):
            options["calibrate_for"] = every
        algorithm = Named(
            self.how.get("algorithm", "fedavg"), options, self.lab.system(self.seed).decoder
        )
        steps = self.how.get("local_steps", config.training.local_steps)
        data = Partition(self.dataset.train, tuple(self.crowd.rows(user) for user in users))
        return {
            "task": self.task,
            "data": data,
            "algorithm": algorithm.averaging(self.task, rates)(local_steps=steps),
            "rounds": rounds or every,
            "batch_size": config.training.batch_size,
            "optimizer": optimizer,
            "group_size": config.training.group_size or None,
            "seed": 1000 * self.seed + number,
            "table_rows": int(data.sizes().sum()),
        }

    def trained(self) -> list[FitResult]:
        """Returns the attacked model and the shadow models.

        Raises:
          DivergenceError: one of them diverges.
        """
        return require_trained(sweep([
            self.fit_of(np.flatnonzero(some), number) for number, some in enumerate(self.crowd.trains)
        ]))  # fmt: skip

    def sent(self, users) -> list[tuple[np.ndarray, FitResult]]:
        """Returns for each client its questions of the first round [n], and its update as the algorithm
        passes it on, from a round without the other clients."""
        fits = [self.fit_of([user], rounds=1) for user in users]
        read = []
        for one in fits:
            work = one["algorithm"].work
            cohort = sample_cohort(one["data"], work, 0, one["batch_size"], one["seed"])
            read.append(np.unique(cohort.indices[cohort.example_weight > 0]))
        return list(zip(read, require_trained(sweep(fits)), strict=True))

    def one_by_one(self) -> Task:
        """A task like the one trained, of which a question by itself has a gradient."""
        if self.lab.config.strategy == "generator":
            return self.task
        system, rng = self.lab.system(self.seed), stream(self.seed, "negatives")
        count = len(self.dataset.passages)
        negatives = {e.id: rng.choice(count, NEGATIVES, replace=False) for e in self.dataset.train}
        return multiple_negatives_ranking(
            system.retriever, self.dataset, score_scale=system.score_scale, negatives=negatives
        )

    def losses(self, system) -> np.ndarray:
        """Returns the losses of all clients' questions [N], in nats."""
        if self.lab.config.strategy == "retriever":
            return ranking_nll(system.retriever, self.dataset.train, system.score_scale)
        return answer_nll(system, self.dataset.train, self._read)

    @functools.cached_property
    def _read(self) -> np.ndarray:
        questions = [e.question for e in self.dataset.train]
        system = self.lab.system(self.seed)
        return system.retriever.search(questions, system.top_k)[0]
