"""Learning rates of the points of an experiment, by trial on validation questions."""

import json
import math
import pathlib
from collections.abc import Callable, Sequence

from fedrag_jax.errors import ConfigError, DivergenceError

BEYOND = 3  # rates tried beyond an end of a grid, as long as the outermost is the best


def chosen_rate(
    path: pathlib.Path, grid: Sequence[float], judge: Callable[[float], float], what: str
) -> float:
    """The rate, or factor of rates, with the highest score; kept in a file and read back.

    Args:
      path: JSON with `chosen` and the `scores` of all rates.
      grid: geometric; it is gone on beyond an end that is best.
      judge: trains at a rate and scores it; a DivergenceError rules the rate out.
      what: for people.

    Raises:
      ConfigError: every rate diverges.
    """
    from fedrag_jax.tracking.processes import everywhere

    if not everywhere(path.exists()):
        scores: dict[float, float] = {}

        def tried(rate):
            try:
                scores[rate] = judge(rate)
            except DivergenceError as error:
                print(f"{what}, rate {rate:g}: {error}")
                scores[rate] = -math.inf
            return scores[rate]

        best = max(grid, key=tried)
        for _ in range(BEYOND):
            ordered = sorted(scores)
            place = ordered.index(best)
            if len(ordered) == 1 or 0 < place < len(ordered) - 1:
                break
            tried(best * best / ordered[1 if place == 0 else place - 1])
            best = max(scores, key=scores.__getitem__)
        if scores[best] == -math.inf:
            raise ConfigError(f"{what}: training diverged at all rates of {sorted(scores)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {rate: score for rate, score in sorted(scores.items()) if score > -math.inf}
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps({"chosen": best, "scores": known}) + "\n")
        beside.replace(path)
    return kept_rate(path)


def kept_rate(path: pathlib.Path) -> float:
    """What `chosen_rate` left in a file."""
    return json.loads(path.read_text())["chosen"]
