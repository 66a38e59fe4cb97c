"""Searches learning rates: grids, and the choice by trial on validation questions."""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedrag_jax import files
from fedrag_jax.errors import ConfigError, DataError, DivergenceError

BEYOND = 4  # rates tried beyond an end of a grid, as long as the outermost is the best
FINE = 2.0  # neighbours of the chosen rate are at most this factor away


class Search(NamedTuple):
    """A learning rate to search for.

    Attributes:
      name: name in `config.learning_rates`.
      part: part that the rate trains.
      strategy: name of the strategy trained with it.
      metric: metric that judges it; F1 and MRR are less noisy than EM.
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


def chosen_rate(
    path: pathlib.Path,
    grid: Sequence[float],
    judge: Callable[[Sequence[float]], Sequence[float]],
    what: str,
    seeds: Sequence[tuple[int, int]],
    questions: int = 0,
) -> float:
    """Returns the rate (or factor of rates) with the highest score; keeps it in a file.

    The grid is extended if the best rate is at an end, then refined until the neighbours of the best
    are within a factor of 2. A best rate that is still the outermost is reported (`at_edge`).

    Args:
      path: JSON with `chosen`, the `scores` of rates and those that `diverged`, and what it was chosen
        with: `grid`, `seeds`, `questions`.
      grid: initial rates, geometric.
      judge: trains at some rates and scores each; -inf rules a rate out.
      what: description for messages.
      seeds: pairs of seeds that a score is a mean over.
      questions: number of validation questions, if it is not a setting of the config.

    Raises:
      ConfigError: every rate diverges; a kept rate was chosen with something else.
      DataError: no validation question can be scored.
    """
    from fedrag_jax.tracking.processes import everywhere

    rates = [float(rate) for rate in grid]
    used = {"grid": rates, "seeds": [[*pair] for pair in seeds], "questions": questions}
    if not everywhere(files.kept(files.read_json, path) is not None):
        scores: dict[float, float] = {}

        def tried(rates) -> float:
            scores.update(zip(rates, judge(rates), strict=True))
            if any(map(math.isnan, scores.values())):
                raise DataError(f"{what}: no validation question can be scored; label some")
            return max(scores, key=scores.__getitem__)

        best = tried(rates)
        for _ in range(BEYOND):
            ordered = sorted(scores)
            if len(ordered) == 1 or best not in (ordered[0], ordered[-1]):
                break
            best = tried([best * best / ordered[1 if best == ordered[0] else -2]])
        while len(scores) > 1 and (between := _between(best, sorted(scores))):
            best = tried(between)
        if scores[best] == -math.inf:
            raise ConfigError(f"{what}: training diverged at all rates of {sorted(scores)}")
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        known = {rate: score for rate, score in sorted(scores.items()) if score > -math.inf}
        found = {"chosen": best, "scores": known, "diverged": sorted({*scores} - {*known})}
        files.write_json(path, found | used)
        if at_edge(path):
            print(f"{what}: the best rate {best:g} is the outermost that was tried", flush=True)
    kept = files.read_json(path)
    for name, now in used.items():
        if kept.get(name, now) != now:  # files of older versions do not have it
            raise ConfigError(
                f"{what}: the rate in {path} was chosen with {name} {kept[name]}, now with {now}; "
                "choose another --config.name"
            )
    return kept["chosen"]


def _between(best: float, ordered: Sequence[float]) -> list[float]:
    """Geometric means of the best rate and neighbours that are too far away."""
    place = ordered.index(best)
    beside = [*ordered[max(place - 1, 0) : place], *ordered[place + 1 : place + 2]]
    return [math.sqrt(best * r) for r in beside if max(best / r, r / best) > FINE * 1.01]


def one_by_one(judge: Callable[[float], float], what: str):
    """The `judge` of `chosen_rate` that scores one rate after the other; one that diverges is told."""

    def scored(rate: float) -> float:
        try:
            return judge(rate)
        except DivergenceError as error:
            print(f"{what}, rate {rate:g}: {error}")
            return -math.inf

    return lambda rates: [scored(rate) for rate in rates]


def kept_rate(path: pathlib.Path) -> float:
    """Reads the rate that `chosen_rate` wrote."""
    return files.read_json(path)["chosen"]


def at_edge(path: pathlib.Path) -> bool:
    """Whether the chosen rate was the lowest or the highest of several that were tried."""
    kept = files.read_json(path)
    rates = [*map(float, kept["scores"]), *kept["diverged"]]
    return len(rates) > 1 and kept["chosen"] in (min(rates), max(rates))
