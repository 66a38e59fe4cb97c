"""Learning rates of the comparison, chosen on validation questions alone.

    python -m experiments.choose_learning_rates --config=configs/compare_strategies.py

As in Lawton et al. 2025: retriever, generator and the two phases search a grid each, in every
setting by itself; joint training reuses the rates of the two phases. So do the two parts of RA-DIT.
What none of the config's strategies trains is not searched. The retriever is judged by its MRR, the
others by exact match of answers in the config's mode. A grid has nine points unless a flag names them,
and they are trained at once. Prints what to put into the config and writes
runs/<name>-rates/learning_rates.json; finished grid points are not trained again.
"""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments.comparison import Comparison
from experiments.inputs import check, load_data, replicates
from experiments.launch import launch, settled_config
from fedrag_jax.errors import ConfigError, DataError, DivergenceError

# Nine points each; those for other models are of Lawton et al. 2025, for both parts.
BUILT_IN = {
    "retriever": [float(f"{rate:.3g}") for rate in np.logspace(-5, -2, 9)],
    "generator": [float(f"{rate:.3g}") for rate in np.logspace(-4, -1, 9)],
}
LAWTON = [1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4]

JOINT = ("two_phase", "joint_token", "joint_sequence")


class Search(NamedTuple):
    """A rate that is looked for.

    Attributes:
      name: in `config.learning_rates`.
      part: whose rate it is.
      strategy: that is trained with it, by name.
      metric: that judges it.
      users: strategies that train with it.
    """

    name: str
    part: str
    strategy: str
    metric: str
    users: tuple[str, ...]


SEARCHES = (
    Search("retriever", "retriever", "retriever", "mrr", ("retriever", "independent")),
    Search("generator", "generator", "generator", "em", ("generator", "independent")),
    Search("marginal_generator", "generator", "first_phase", "em", JOINT),
    Search("marginal_retriever", "retriever", "second_phase", "em", JOINT),
    Search("ralt", "generator", "ralt", "em", ("ralt", "ra_dit")),
    Search("lsr", "retriever", "lsr", "em", ("lsr", "ra_dit")),
)


def usual_grid(config, part: str) -> list[float]:
    """The rates to search of a `retriever` or a `generator`."""
    return BUILT_IN[part] if config.models[part].startswith("builtin:") else LAWTON


def search(
    comparison: Comparison, setting: str, strategy, metric: str, grid, bases, examples, where=""
):
    """Trains one strategy at all rates of a grid; `(best rate, its systems, {rate: metric})`.

    A rate at which training diverges is left out.

    In the local setting all clients train and each is judged on a share of the `examples`; one whose
    share is empty, on all. `where` tells bases apart that were themselves tuned.
    """
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.strategies.strategies import together
    from fedrag_jax.strategies.tuner import tune_together

    seeds = replicates(comparison.config)[0]
    local = setting.startswith("local")
    members = list(range(comparison.config.federated.clients)) if local else [None]
    tuners = []
    for rate in grid:
        for client in members:
            tuner = comparison.tuner(setting, *seeds, client, rate=lambda *_, rate=rate: rate)
            folder = tuner.folder / where / f"{strategy.__name__}-{rate:g}"
            tuners.append(dataclasses.replace(tuner, folder=folder))
    tuned = together(
        strategy,
        [*bases] * len(grid),
        comparison.dataset,
        lambda asked: tune_together([(tuners[i], task) for i, task in asked]),
    )
    found = {}
    for number, rate in enumerate(grid):
        systems = tuned[number * len(members) : (number + 1) * len(members)]
        if any(isinstance(system, DivergenceError) for system in systems):
            result = "diverged"
        else:
            parts = [examples[i :: len(members)] or examples for i in range(len(members))]
            scores = [
                np.nanmean(evaluate(system, some, mode=comparison.config.mode)[metric])
                for system, some in zip(systems, parts, strict=True)
            ]
            if np.isnan(scores).all():
                raise DataError(f"no validation question can be scored by {metric}; label some")
            found[rate] = 100 * float(np.nanmean(scores)), systems
            result = f"validation {metric} {found[rate][0]:.1f}"
        print(f"{setting:12s} {strategy.__name__:13s} lr {rate:<8g} {result}", flush=True)
    if not found:
        raise ConfigError(f"{strategy.__name__}, {setting}: every rate of {grid} diverged")
    best = max(found, key=lambda rate: found[rate][0])
    return best, found[best][1], {rate: score for rate, (score, _) in found.items()}


def run(config, runs: str, grids: dict[str, list[float]], questions: int) -> pathlib.Path:
    """Searches every setting of the config; returns the folder of the results.

    Args:
      grids: rates of what is in `SEARCHES`, by name.
      questions: of the validation set, which a system is judged on.
    """
    from fedrag_jax.strategies import strategies

    dataset = load_data(config)
    check(config)
    seed = config.seeds[0]
    folder = pathlib.Path(runs) / f"{config.name}-rates"
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=("learning_rates", "settings", "strategies", "wandb"))
    chosen, scores = {}, {}
    comparison = Comparison(config, dataset, folder)
    examples = dataset.validation[:questions]
    for setting in config.settings:
        count = config.federated.clients if setting.startswith("local") else 1
        base = [comparison.system(seed)] * count
        rates, found, systems = {}, {}, base
        for name, _, strategy, metric, users in SEARCHES:
            labelled = [any(e.positive_ids for e in some) for some in (dataset.train, examples)]
            if not {*users} & {*config.strategies} or (metric == "mrr" and not all(labelled)):
                continue
            start, where = base, ""
            if strategy == "second_phase":
                start, where = systems, f"after-{rates['marginal_generator']:g}"
            tune = getattr(strategies, strategy)
            rates[name], systems, found[name] = search(
                comparison, setting, tune, metric, grids[name], start, examples, where
            )
        chosen[setting], scores[setting] = rates, found
    result = {"chosen": chosen, "validation": scores}
    (folder / "learning_rates.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(chosen, indent=2))
    return folder


if __name__ == "__main__":
    given = {
        s: flags.DEFINE_list(s.name, None, f"rates of the {s.part} in {s.strategy}")
        for s in SEARCHES
    }
    questions = flags.DEFINE_integer("questions", 400, "validation questions to judge a system on")

    def with_flags(config, runs):
        grids = {
            s.name: [float(rate) for rate in flag.value or usual_grid(config, s.part)]
            for s, flag in given.items()
        }
        return run(config, runs, grids, questions.value)

    launch(with_flags, "configs/compare_strategies.py")
