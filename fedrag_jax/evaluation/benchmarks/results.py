"""The results of benchmarks: means with intervals, as JSON and as a table."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from fedrag_jax import files
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.metrics import percent
from fedrag_jax.evaluation.significance import bootstrap_interval

FORMS = {"markdown": "pipe", "text": "simple", "latex": "latex_booktabs"}


class Mean(NamedTuple):
    """The mean of a score in percent, with its 95% bootstrap interval over questions; questions about
    one article are resampled together.

    Attributes:
      n: number of questions with this score; if it is 0, the other fields are None.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """The result of a system on a benchmark.

    Attributes:
      first: the metric that the benchmark's paper reports.
      settings: all settings, by the names of `Benchmarker.run`.
      origin: `source`, number of `questions`, and the sha256 of the `content`.
      system: hashes of the system's parts.
      metrics: means by name.
      rows: one row per question: `id`, `prediction`, `gold`, `scores` and more, see `Benchmarker.run`.
      answer_words: mean length of generated answers, needed to interpret "substring"; None without
        open answers.
      share_cut: share of prompts that were truncated (passages, examples or words).
      searches: mean number of searches per question; None unless the mode is "search".
      seconds: total seconds for the questions in all sessions, including compilation.
    """

    name: str
    first: str
    settings: dict[str, Any]
    origin: dict[str, Any]
    system: dict[str, str]
    metrics: dict[str, Mean]
    answer_words: float | None
    share_cut: float
    searches: float | None
    seconds: float
    rows: list[dict[str, Any]] = dataclasses.field(repr=False)

    @property
    def n(self) -> int:
        """Number of questions asked."""
        return len(self.rows)

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, for JSON."""
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"
        }
        fields["metrics"] = {name: mean._asdict() for name, mean in self.metrics.items()}
        return fields | {"n": self.n}

    def write(self, path: pathlib.Path) -> None:
        """Writes the summary as JSON, atomically."""
        text = json.dumps(self.summary(), indent=2, allow_nan=False, ensure_ascii=False)
        files.write_text(path, text + "\n")


def summed(rows: Sequence[Mapping[str, Any]], clusters: np.ndarray) -> dict[str, Mean]:
    """Returns the means of the rows' `scores`, each over the questions that have it.

    Args:
      clusters: [N], from `data.examples.clusters`.
    """
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    return {name: _mean([row["scores"].get(name) for row in rows], clusters) for name in names}


def _mean(scores: Sequence[float | None], clusters: np.ndarray) -> Mean:
    values = np.array([math.nan if score is None else score for score in scores], np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return Mean(None, None, None, 0)
    low, high = bootstrap_interval(values[known], clusters[known])
    return Mean(percent(values[known]), 100 * low, 100 * high, int(known.sum()))


def table(
    results: Sequence[BenchmarkResult], form: str = "markdown", metrics: Sequence[str] = ()
) -> str:
    """Returns a table with a line per metric and result, the benchmark's own metric first.

    "–" marks a metric that no question has.

    Args:
      form: one of `FORMS`.
      metrics: names of the metrics to show; default: all.

    Raises:
      ConfigError: an unknown form.
    """
    if form not in FORMS:
        raise ConfigError(f"a table's form must be one of {[*FORMS]}, got {form!r}")
    lines = []
    for result in results:
        how, order = result.settings, sorted(result.metrics, key=lambda name: name != result.first)
        for name in order:
            if metrics and name not in metrics:
                continue
            mean = result.metrics[name]
            shown = (
                "–" if mean.mean is None else f"{mean.mean:.1f} [{mean.low:.1f}, {mean.high:.1f}]"
            )
            starred = name + " *" * (name == result.first)
            lines.append(
                [
                    result.name,
                    how["split"],
                    how["by"],
                    how["shots"],
                    how["corpus"],
                    starred,
                    shown,
                    mean.n,
                ]
            )
    heads = ["set", "split", "by", "shots", "passages", "metric", "% [95%]", "n"]
    text = tabulate(lines, heads, tablefmt=FORMS[form], disable_numparse=True)
    return text.replace("–", "--") if form == "latex" else text
