"""The search for learning rates of strategies, regime by regime."""

import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.lab import Lab
from experiments.launch import settled_config
from experiments.loading import algorithm_of, check, load_data, replicates, strategies_of
from experiments.rates import SEARCHES, Search, at_edge, chosen_rate, kept_rate
from fedrag_jax.data.examples import sample
from fedrag_jax.errors import DivergenceError
from fedrag_jax.evaluation.evaluator import evaluate, evaluate_retrieval
from fedrag_jax.federated.algorithms.by_name import OWN_STEPS
from fedrag_jax.files import kept, read_json, write_json
from fedrag_jax.strategies import strategies
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.strategy import tune_systems
from fedrag_jax.strategies.tuner import tune_together


def seeds_of(config, regime: str) -> list[tuple[int, int]]:
    """Returns the pairs of seeds for scoring a rate: two, or one if each client trains alone."""
    return replicates(config)[: 1 if regime.startswith("local") else 2]


class Trials:
    """Trains a strategy in a regime at given rates, and keeps the result of each rate.

    Args:
      bases: systems to start from, one for each training that a rate takes: all clients of the local
        regime with each pair of seeds.
      where: subfolder for bases that were themselves tuned.
      examples: validation questions; a local client is judged on a share of them.

    Attributes:
      systems: the tuned systems by rate, in the order of the bases.
      seconds: device-seconds of all trainings.
    """

    def __init__(self, run: Lab, regime: str, search: Search, bases, examples, where=""):
        self.run, self.regime, self.search = run, regime, search
        self.bases, self.examples, self.where = bases, examples, where
        self.systems: dict[float, list] = {}
        self.seconds = 0.0

    def judge(self, rates: Sequence[float]) -> list[float]:
        """Returns the metric of each rate in percent, the mean over seeds and clients; -inf if it
        diverges."""
        strategy = getattr(strategies, self.search.strategy)
        tuners = [tuner for rate in rates for tuner in self._tuners(rate)]
        tuned = tune_systems(
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
        members = self.run.members(self.regime)
        found = []
        for pair in seeds_of(self.run.config, self.regime):
            for client in members:
                tuner = self.run.tuner(lambda *_: rate, self.regime, *pair, client)
                tuner.folder = tuner.folder / self.where / f"{self.search.strategy}-{rate:g}"
                found.append(tuner)
        return found

    def _score(self, rate: float) -> float:
        systems, about = self.systems[rate], f"{self.regime}, {self.search.strategy}, {rate:g}"
        if any(isinstance(system, DivergenceError) for system in systems):
            print(f"{about}: diverged", flush=True)
            return -np.inf
        count = len(self.run.members(self.regime))
        parts = [self.examples[i::count] or self.examples for i in range(count)]
        judge = evaluate_retrieval  # answers take far longer, and a ranking does not depend on them
        if self.search.metric != "mrr":
            judge = functools.partial(evaluate, mode=self.run.config.mode)
        scores = [
            judge(system, parts[i % count])[self.search.metric] for i, system in enumerate(systems)
        ]
        scores = np.concatenate(scores)
        scores = scores[~np.isnan(scores)]
        score = 100 * float(np.mean(scores)) if len(scores) else np.nan
        print(f"{about}: validation {self.search.metric} {score:.1f}", flush=True)
        return score


# A factor of 4 apart; those for other models are of Lawton et al. 2025, a factor of 3, for both parts.
BUILT_IN = {
    "retriever": [1e-4, 4e-4, 1.6e-3, 6.4e-3],
    "generator": [2e-4, 8e-4, 3.2e-3, 1.28e-2],
}
LAWTON = [1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4]
# Of algorithms whose clients' steps are not scaled by Adam.
PLAIN_SGD = {
    "retriever": [4e-5, 1.6e-4, 6.4e-4, 2.56e-3],
    "generator": [2.5e-3, 1e-2, 4e-2, 0.16],
}


def usual_grid(config, part: str, regime: str) -> list[float]:
    """Returns the initial grid of a `retriever` or a `generator`."""
    if algorithm_of(config, regime)[0] in OWN_STEPS:
        return PLAIN_SGD[part]
    return BUILT_IN[part] if config.models[part].startswith("builtin:") else LAWTON


def search_regime(run: Lab, regime: str, grids: dict[str, list[float]], examples) -> dict:
    """`{name: {"chosen", "scores", "seconds", "at_edge"}}` of all that a regime searches."""
    config, found = run.config, {}
    pairs, count = seeds_of(config, regime), len(run.members(regime))
    strategies = strategies_of(config, regime, config.strategies)
    base = systems = [run.system(seed) for seed, _ in pairs for _ in range(count)]
    needed = {name for s in strategies for name in named(s).rates.values()}
    for search in SEARCHES:
        labelled = [any(e.positive_ids for e in some) for some in (run.dataset.train, examples)]
        if search.name not in needed:
            continue
        if search.metric == "mrr" and not all(labelled):
            continue
        start, where = base, ""
        if search.strategy == "second_phase":
            start, where = systems, f"after-{found['marginal_generator']['chosen']:g}"
        trials = Trials(run, regime, search, start, examples, where)
        path = run.folder / "searches" / f"{regime}-{search.name}.json"
        # What is trained already is read back, for the searches that start there.
        if kept(read_json, path) is not None:
            trials.judge([kept_rate(path)])
        grid = grids.get(search.name) or usual_grid(config, search.part, regime)
        what = f"{regime}, {search.name}"
        rate = chosen_rate(path, grid, trials.judge, what, pairs, len(examples))
        about = read_json(path)
        if "seconds" not in about:
            about["seconds"] = trials.seconds
            write_json(path, about)
        found[search.name], systems = about | {"at_edge": at_edge(path)}, trials.systems[rate]
    return found


def run(config, runs: str, grids: dict[str, list[float]], questions: int) -> pathlib.Path:
    """Searches every regime of the config; returns the folder of the results.

    Args:
      grids: rates to begin with of what is in `SEARCHES`, by name; the usual ones unless given.
      questions: of the validation set, which a system is judged on.
    """
    dataset = load_data(config)
    check(config)
    folder = pathlib.Path(runs) / f"{config.name}-rates"
    folder.mkdir(parents=True, exist_ok=True)
    free = (
        "learning_rates",
        "search_seconds",
        "regimes",
        "strategies",
        "limits",
        "wandb",
    )
    settled_config(config, folder, free=free)
    comparison = Lab(config, dataset, folder)
    examples = sample(comparison.dataset.validation, questions, config.data.sample_seed)
    found = {s: search_regime(comparison, s, grids, examples) for s in config.regimes}
    result = {
        "chosen": {s: {n: one["chosen"] for n, one in some.items()} for s, some in found.items()},
        "seconds": {
            s: {n: round(one["seconds"], 1) for n, one in some.items()} for s, some in found.items()
        },
        "at_edge": {
            s: [n for n, one in some.items() if one["at_edge"]] for s, some in found.items()
        },
        "validation": {
            s: {n: one["scores"] for n, one in some.items()} for s, some in found.items()
        },
    }
    write_json(folder / "learning_rates.json", result, indent=2)
    print(json.dumps({name: result[name] for name in ("chosen", "seconds", "at_edge")}, indent=2))
    return folder
