"""Learning rates of the comparison, chosen on validation questions alone.

    python -m experiments.choose_learning_rates --config=configs/compare_strategies.py

As in Lawton et al. 2025: retriever, generator and the two phases search a grid each, in every
setting by itself; joint training reuses the rates of the two phases. So do the two parts of RA-DIT.
What none of the config's strategies trains is not searched. The retriever is judged by its MRR, the
others by F1 of answers in the config's mode, over the first two pairs of seeds. A grid begins with
rates that are a factor of 4 apart, goes on beyond an end that is best, and is refined to a factor of 2
around the best. Prints what to put into the config and writes runs/<name>-rates/learning_rates.json;
a search that is finished is not made again.
"""

import json
import pathlib

from absl import flags

from experiments.comparison import Comparison
from experiments.inputs import algorithm_of, check, load_data
from experiments.launch import launch, settled_config
from experiments.rates import at_edge, chosen_rate, kept_rate
from experiments.search import SEARCHES, Trials, seeds_of
from fedrag_jax.files import kept, read_json, write_json

# A factor of 4 apart; those for other models are of Lawton et al. 2025, a factor of 3, for both parts.
BUILT_IN = {
    "retriever": [1e-4, 4e-4, 1.6e-3, 6.4e-3],
    "generator": [2e-4, 8e-4, 3.2e-3, 1.28e-2],
}
LAWTON = [1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4]
PLAIN_SGD = [0.01, 0.04, 0.16, 0.64]  # of algorithms whose clients' steps are not scaled by Adam


def usual_grid(config, part: str, setting: str) -> list[float]:
    """The rates to begin with of a `retriever` or a `generator`."""
    from fedrag_jax.federated.by_name import OWN_STEPS

    if algorithm_of(config, setting)[0] in OWN_STEPS:
        return PLAIN_SGD
    return BUILT_IN[part] if config.models[part].startswith("builtin:") else LAWTON


def search_setting(run: Comparison, setting: str, grids: dict[str, list[float]], examples) -> dict:
    """`{name: {"chosen", "scores", "seconds", "at_edge"}}` of all that a setting searches."""
    from fedrag_jax.strategies.own import named

    config, found = run.config, {}
    pairs, count = seeds_of(config, setting), len(run.members(setting))
    strategies = [*config.strategies]
    if setting.startswith("local") and config.local_strategies:
        strategies = [name for name in strategies if name in config.local_strategies]
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
        trials = Trials(run, setting, search, start, examples, where)
        path = run.folder / "searches" / f"{setting}-{search.name}.json"
        # What is trained already is read back, for the searches that start there.
        if kept(read_json, path) is not None:
            trials.judge([kept_rate(path)])
        grid = grids.get(search.name) or usual_grid(config, search.part, setting)
        rate = chosen_rate(path, grid, trials.judge, f"{setting}, {search.name}")
        about = read_json(path)
        if "seconds" not in about:
            about["seconds"] = trials.seconds
            write_json(path, about)
        found[search.name], systems = about | {"at_edge": at_edge(path)}, trials.systems[rate]
    return found


def run(config, runs: str, grids: dict[str, list[float]], questions: int) -> pathlib.Path:
    """Searches every setting of the config; returns the folder of the results.

    Args:
      grids: rates to begin with of what is in `SEARCHES`, by name; the usual ones unless given.
      questions: of the validation set, which a system is judged on.
    """
    from fedrag_jax.data.examples import sample

    dataset = load_data(config)
    check(config)
    folder = pathlib.Path(runs) / f"{config.name}-rates"
    folder.mkdir(parents=True, exist_ok=True)
    free = (
        "learning_rates",
        "search_seconds",
        "settings",
        "strategies",
        "local_strategies",
        "wandb",
    )
    settled_config(config, folder, free=free)
    comparison = Comparison(config, dataset, folder)
    examples = sample(dataset.validation, questions, config.data.sample_seed)
    found = {s: search_setting(comparison, s, grids, examples) for s in config.settings}
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


if __name__ == "__main__":
    given = {
        s: flags.DEFINE_list(s.name, None, f"rates of the {s.part} in {s.strategy}")
        for s in SEARCHES
    }
    questions = flags.DEFINE_integer("questions", 400, "validation questions to judge a system on")

    def with_flags(config, runs):
        grids = {
            s.name: [float(rate) for rate in flag.value] for s, flag in given.items() if flag.value
        }
        return run(config, runs, grids, questions.value)

    launch(with_flags, "configs/compare_strategies.py")
