"""The public benchmarks: repository, splits with labels, and scoring.

| name | hub | asked split | few-shot examples | kind |
|---|---|---|---|---|
| mmlu | cais/mmlu, all | test | dev, of the same subject | choices |
| hellaswag | Rowan/hellaswag | validation (test has no labels) | train | choices |
| boolq | google/boolq | validation (there is no test) | train | labels |
| pubmedqa | qiaojin/PubMedQA, pqa_labeled | the 500 official test ids | the other 500 | labels |
| nq | google-research-datasets/nq_open | validation (there is no test) | train | open |
| triviaqa | mandarjoshi/trivia_qa, unfiltered.nocontext | validation (test: no labels) | train | open |
| popqa | akariasai/PopQA | test (there is nothing else) | set aside, see `Benchmarker.run` | open |
| hotpotqa | hotpotqa/hotpot_qa, distractor | validation (test has no labels) | train | open |
| squad, squad_v2 | rajpurkar/squad, rajpurkar/squad_v2 | validation (there is no test) | train | open |
| scifact | mteb/scifact: BEIR's, without its loading script | test | nothing | retrieval |
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from fedrag_jax.data import hub_rows, pubmedqa_ids, splits
from fedrag_jax.data.examples import Passage
from fedrag_jax.data.hub_rows import Question
from fedrag_jax.data.json_lines import json_rows
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation import metrics

KINDS = {  # and how they can be answered, by default in the first way
    "open": ("generation",),
    "choices": ("likelihood", "letters", "generation"),
    "labels": ("generation", "likelihood"),
    "retrieval": ("retrieval",),
}


@dataclasses.dataclass(frozen=True)
class BenchmarkSet:
    """One benchmark; pass one of your own to `Benchmarker.run` instead of a name.

    Attributes:
      repo, config: repository and configuration on the hub; no repo for your own data.
      split: default split, which has labels.
      shown: the split of few-shot examples; "" for none.
      kind: one of `KINDS`. For "choices" one choice is correct, and by generation its letter is
        written; "labels" are short choices, the same for all questions, that are written themselves.
      convert: function from a row and a default id to a question and its passages.
      labels: the labels of the kind "labels".
      by: how it is usually answered; "" for the first way of its kind.
      rule: rule of `metrics.f1`, for the kind "open".
      first: the metric that the benchmark's paper reports.
      also: additional scores: "substring", "answerable", "recall_all".
      side: function from a question's id to its split, if the hub has all in `only`, or local files
        do not name the split.
      known_as: names of splits in local files, if they differ.
      golds: the field of local files with the ids of gold passages.
      group: the field of local files with the group of few-shot examples.
    """

    name: str
    repo: str
    split: str
    shown: str
    kind: str
    convert: Callable[[Mapping[str, Any], str], tuple[Question, list[Passage]]]
    config: str | None = None
    labels: tuple[str, ...] = ()
    by: str = ""
    rule: str = "squad"
    first: str = "em"
    also: tuple[str, ...] = ()
    only: str = ""
    side: Callable[[str], str] | None = None
    known_as: Mapping[str, str] = dataclasses.field(default_factory=dict)
    golds: str = "positive_ids"
    group: str = ""


_ALL = (
    BenchmarkSet(
        "mmlu", "cais/mmlu", "test", "dev", "choices", hub_rows.mmlu, "all",
        by="letters", first="accuracy", known_as={"val": "validation"}, group="subject",
    ),
    BenchmarkSet(
        "hellaswag", "Rowan/hellaswag", "validation", "train", "choices", hub_rows.hellaswag,
        first="accuracy_per_byte",
    ),
    BenchmarkSet(
        "boolq", "google/boolq", "validation", "train", "labels", hub_rows.boolq,
        labels=hub_rows.YES_NO, first="accuracy",
    ),
    BenchmarkSet(
        "pubmedqa", "qiaojin/PubMedQA", "test", "train", "labels", hub_rows.pubmedqa, "pqa_labeled",
        labels=hub_rows.YES_NO_MAYBE, first="accuracy", only="train", side=pubmedqa_ids.side,
    ),
    BenchmarkSet(
        "nq", "google-research-datasets/nq_open", "validation", "train", "open", hub_rows.nq, "nq_open"
    ),
    BenchmarkSet(
        "triviaqa", "mandarjoshi/trivia_qa", "validation", "train", "open", hub_rows.triviaqa,
        "unfiltered.nocontext", rule="triviaqa",
    ),
    # Mallen et al. 2023 (2212.10511) count an answer that has a gold answer somewhere in it as right.
    BenchmarkSet(
        "popqa", "akariasai/PopQA", "test", "", "open", hub_rows.popqa,
        first="substring", also=("substring",),
    ),
    BenchmarkSet(
        "hotpotqa", "hotpotqa/hotpot_qa", "validation", "train", "open", hub_rows.hotpotqa,
        "distractor", rule="hotpotqa", first="f1", also=("recall_all",),
        known_as={"dev": "validation"},
    ),
    BenchmarkSet(
        "squad", "rajpurkar/squad", "validation", "train", "open", hub_rows.squad,
        known_as={"dev": "validation", "train_44articles": "train", "train_sample": "train"},
    ),
    BenchmarkSet(
        "squad_v2", "rajpurkar/squad_v2", "validation", "train", "open", hub_rows.squad,
        rule="squad_v2", also=("answerable",), known_as={"dev": "validation"},
    ),
    # BEIR counts the documents that a claim cites as relevant, also where they settle nothing.
    BenchmarkSet(
        "scifact", "mteb/scifact", "test", "", "retrieval", hub_rows.beir_query,
        first="ndcg_at_10", known_as={"validation": "test"}, golds="cited_ids",
    ),
)  # fmt: skip
SETS = {known.name: known for known in _ALL}


def named(name: str | BenchmarkSet) -> BenchmarkSet:
    """Returns a benchmark by its name.

    Raises:
      ConfigError: an unknown name.
    """
    if isinstance(name, BenchmarkSet):
        return name
    if name not in SETS:
        raise ConfigError(f"benchmark must be one of {[*SETS]}, got {name!r}")
    return SETS[name]


def scored_by(known: BenchmarkSet, rule: str) -> BenchmarkSet:
    """Returns the benchmark with another rule of `metrics.f1`.

    Raises:
      ConfigError: an unknown rule, or a benchmark that is not of the kind "open".
    """
    metrics.require_rule(rule)
    if known.kind != "open":
        raise ConfigError(
            f"a rule applies to open answers, but {known.name} has none: leave it out"
        )
    return dataclasses.replace(known, rule=rule)


def own(path: pathlib.Path, everything: bool = False) -> BenchmarkSet:
    """Returns the benchmark of a user's file of questions, NAME.jsonl or NAME.questions.jsonl (.gz).

    Its test questions are those that training does not use (`data.datasets.load`). If some are marked
    `"unanswerable": true`, it is scored as SQuAD v2.

    Args:
      everything: whether to ask all questions, whatever their split.
    """
    name = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".questions")
    rows = [row for row, _ in json_rows(path)]
    how: dict[str, Any] = {"side": splits.side}
    if everything:
        how = {"known_as": dict.fromkeys((str(row.get("split")) for row in rows), "test")}
    if any(row.get("unanswerable") for row in rows):
        how |= {"rule": "squad_v2", "also": ("answerable",)}
    return BenchmarkSet(name, "", "test", "", "open", hub_rows.nq, **how)


def in_order(questions: list[Question], seed: int) -> list[Question]:
    """Returns the questions in a random order by the seed, independent of other questions: the first n
    are a random sample, and the first n + 1 contain it."""
    return sorted(questions, key=lambda q: hashlib.sha256(f"{seed} {q.id}".encode()).digest())
