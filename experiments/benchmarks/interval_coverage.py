"""How often intervals over few seeds contain the truth, and how often equivalence is claimed falsely.

    python -m experiments.benchmarks.interval_coverage

Draws scores of paired comparisons, in points: score = seed's effect + question's effect + noise, all
normal with mean 0. `coverage` is the share of 95% intervals that contain 0. `false_equivalence` is the
share of comparisons with p < 0.05 of equivalence whose true difference is the margin. Prints a table,
then a line of JSON.
"""

import json

import numpy as np
from absl import app, flags
from tabulate import tabulate

from fedrag_jax.evaluation.significance import bootstrap_interval, equivalence_test

_SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3", "5", "10"], "numbers of seeds")
_SPREADS = flags.DEFINE_list("spreads", ["0", "1", "2"], "standard deviations of a seed's effect")
_QUESTIONS = flags.DEFINE_integer("questions", 400, "number of questions", lower_bound=1)
_QUESTION = flags.DEFINE_float("question", 20.0, "standard deviation of a question's effect")
_NOISE = flags.DEFINE_float("noise", 30.0, "standard deviation of the noise")
_MARGIN = flags.DEFINE_float("margin", 4.0, "margin of equivalence", lower_bound=0.0)
_REPEATS = flags.DEFINE_integer("repeats", 1000, "number of comparisons drawn", lower_bound=1)


def main(argv):
    del argv
    rows = [measured(int(s), float(x)) for s in _SEEDS.value for x in _SPREADS.value]
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    print(json.dumps({"rows": rows, "repeats": _REPEATS.value}))


def measured(seeds: int, spread: float) -> dict[str, float]:
    """Returns the row of a number of seeds and a spread between them."""
    rng, covered, claimed = np.random.default_rng(0), 0, 0
    for _ in range(_REPEATS.value):
        shape = seeds, _QUESTIONS.value
        scores = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, _QUESTION.value, shape[1])
        scores = scores + rng.normal(0, _NOISE.value, shape)
        low, high = bootstrap_interval(scores, resamples=1000)
        covered += low <= 0 <= high
        zero, margin = np.zeros(shape), _MARGIN.value
        claimed += equivalence_test(scores + margin, zero, margin, resamples=1000) < 0.05
    shares = {"coverage": covered, "false_equivalence": claimed}
    found = {name: count / _REPEATS.value for name, count in shares.items()}
    return {"seeds": seeds, "spread": spread} | found


if __name__ == "__main__":
    app.run(main)
