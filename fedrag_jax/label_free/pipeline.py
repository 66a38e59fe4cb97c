"""Label-free fine-tuning: a generator learns from questions that it writes about the user's texts.

The steps of ALoFTRAG (Devine, 2501.11929, section 3), each with its own file in a folder:

| step | function | file |
|---|---|---|
| 1 | `rate_texts`: selects texts with enough information | 1_texts.jsonl |
| 2 | `ask`: writes one or several questions with answers about each text | 2_questions.jsonl |
| 3 | `rate_questions`: selects good ones; the paper's ablation is better without | 3_ratings.jsonl |
| 4 | `add_hard_negatives`: mixes the text with similar texts that do not answer | 4_contexts.jsonl |
| 5 | `objectives.citing.citing`: training to cite the text and to answer | |

`generate` runs the first four. Each line of a file records an item that was kept, or the reason why it
was dropped; the generator's replies are in separate files.
"""

import collections
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedrag_jax.data.corpora import Pool
from fedrag_jax.data.examples import Example, Passage, answering_rows, ids_of, reading_text
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.generation.author import Author
from fedrag_jax.label_free.prompts import LabelFreePrompts
from fedrag_jax.label_free.replies import Read, replies, write_lines
from fedrag_jax.objectives.citing import Context
from fedrag_jax.objectives.encoding import found_by
from fedrag_jax.retrieval.retriever import Retriever

LEAST_WORDS = 3  # of a text that is worth a request
DRAWS = 1000  # seeds of one seed's draws; no text is worth as many questions
NEGATIVES = ("top", "random")


class Asking(NamedTuple):
    """The author, its prompts, and the folder of its replies.

    Attributes:
      folder: folder of stored replies, which no step or run requests again.
    """

    author: Author
    prompts: LabelFreePrompts
    folder: pathlib.Path

    def __call__(self, what: str, about, doing: str, file: str = "", **sampling) -> dict[str, Read]:
        """Returns the replies to one of the prompts, by its name."""
        path = self.folder / f"{file or what}.jsonl"
        return replies(self.author, getattr(self.prompts, what), about, path, doing, **sampling)


class Step(NamedTuple):
    """The result of a step.

    Attributes:
      kept: the kept passages, examples or contexts, by id.
      counts: number of items that were "kept", and by reason of those that were dropped.
      requests: number of requests that the step needs, also if their replies were stored before.
    """

    kept: dict[str, Any]
    counts: dict[str, int]
    requests: int = 0


def rate_texts(
    asking: Asking,
    passages: Sequence[Passage],
    folder: pathlib.Path,
    least: float = 8.0,
) -> Step:
    """Step 1: returns the passages that the author rates with at least `least` of 10 points.

    Empty texts, duplicates, and texts of fewer than 3 words and 20 characters are dropped without a
    request.
    """
    dropped, seen = {}, set()
    for passage in passages:
        text = " ".join(passage.text.split())
        if len(text.split()) < LEAST_WORDS and len(text) < 20:  # some scripts have no spaces
            dropped[passage.id] = "empty" if not text else "short"
        elif text in seen:
            dropped[passage.id] = "duplicate"
        seen.add(text)
    asked = {p.id: {"text": reading_text(p)} for p in passages if p.id not in dropped}
    rated = asking("rate_text", asked, "rate texts")
    found = {p.id: p for p in passages}
    reasons = {i: dropped.get(i) or _low(rated[i], least) for i in found}
    told = {i: (rated[i].said if i in rated else None) or {} for i in found}
    return _step(folder / "1_texts.jsonl", found, reasons, told, len(asked))


def ask(
    asking: Asking,
    passages: Iterable[Passage],
    folder: pathlib.Path,
    per_text: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> Step:
    """Step 2: returns questions with answers, as examples whose gold passage is the text.

    Args:
      per_text: number of questions per text. The first is decoded greedily; the others are sampled, and
        duplicates are dropped.
      temperature: sampling temperature of the others.
      seed: random seed of the others; two seeds have different draws.
    """
    if per_text < 1:
        raise ConfigError(f"per_text must be at least 1, got {per_text}")
    about = {p.id: p for p in passages}
    found, reasons, asked, count = {}, {}, set(), 0
    for draw in range(per_text):
        requests = {f"{i}#{draw}": {"text": reading_text(p)} for i, p in about.items()}
        sampling = {"temperature": temperature * (draw > 0), "seed": DRAWS * seed + draw}
        read = asking("ask", requests, "ask", f"ask_{draw}", **sampling)
        count += len(requests)
        if asking.prompts.answer:
            count += sum(reply.said is not None for reply in read.values())
            read |= _answers(asking, requests, read, f"answer_{draw}", **sampling)
        for identifier, reply in read.items():
            passage = about[identifier.rpartition("#")[0]]
            said = reply.said or {"question": "", "answer": ""}
            known = (passage.id, said["question"])
            found[identifier] = Example(
                identifier, said["question"], (said["answer"],), (passage.id,), passage.topic
            )
            reasons[identifier] = reply.fault or ("duplicate" if known in asked else "")
            asked.add(known)
    told = {
        # As it was written, for a reply in another form has none.
        e.id: {"text": e.positive_ids[0], "question": e.question, "answer": e.answers[0]}
        for e in found.values()
    }
    return _step(folder / "2_questions.jsonl", found, reasons, told, count)


def _answers(asking: Asking, requests, read: Mapping[str, Read], file: str, **sampling):
    """Returns questions with their answers, which a second request asks for."""
    asked = {i: reply.said for i, reply in read.items() if reply.said}
    about = {i: requests[i] | said for i, said in asked.items()}
    answered = asking("answer", about, "answer", file, **sampling)
    return {i: Read(a.said and asked[i] | a.said, a.fault) for i, a in answered.items()}


def rate_questions(
    asking: Asking,
    examples: Iterable[Example],
    passages: Sequence[Passage],
    folder: pathlib.Path,
    least: float = 8.0,
) -> Step:
    """Step 3: returns the examples whose question and answer are each rated with at least `least` of
    10."""
    text = {p.id: reading_text(p) for p in passages}
    found = {e.id: e for e in examples}
    parts = {
        e.id: {"text": text[e.positive_ids[0]], "question": e.question, "answer": e.answer}
        for e in found.values()
    }
    reasons, told = dict.fromkeys(found, ""), {i: {} for i in found}
    for part in ("question", "answer"):
        rated = asking(f"rate_{part}", parts, f"rate {part}s")
        for i, reply in rated.items():
            fault = _low(reply, least)
            reasons[i] = reasons[i] or (f"{part} {fault}" if fault else "")
            told[i][part] = reply.said and reply.said["score"]
    return _step(folder / "3_ratings.jsonl", found, reasons, told, 2 * len(found))


def add_hard_negatives(
    retriever: Retriever,
    examples: Sequence[Example],
    folder: pathlib.Path,
    n: int = 10,
    *,
    negatives: str = "top",
    unanswerable: float = 0.0,
    pool: Pool | None = None,
    seed: int = 0,
) -> Step:
    """Step 4: returns `n` passages in random order for each question, its own and near ones.

    Args:
      negatives: "top", the n - 1 nearest passages that are not gold, as in the paper; "random", n - 1
        of the n nearest, as in its code. Duplicates of a gold passage are not negatives.
      unanswerable: share of questions whose own passage is left out, so that none is to be cited.
      pool: `pool(example)`: the corpus rows to choose from; default: all.
      seed: random seed of order and draws, combined with each example's id.

    Returns:
      Contexts: rows int [n], and the numbers to cite.

    Raises:
      ConfigError: an unknown kind of negatives, n below 2, a share outside [0, 1], or fewer than n + 1
        passages.
      DataError: an example without a gold passage, or with one outside the retriever's corpus.
    """
    if negatives not in NEGATIVES:
        raise ConfigError(f"negatives must be one of {NEGATIVES}, got {negatives!r}")
    if n < 2 or not 0 <= unanswerable <= 1:
        raise ConfigError(
            f"contexts need n >= 2 and unanswerable from 0 to 1, got {n} and {unanswerable}"
        )
    there = {*ids_of(retriever.passages)}
    for example in examples:
        if not example.positive_ids or not {*example.positive_ids} <= there:
            raise DataError(
                f"question {example.id!r} needs a gold passage, all of them in the retriever's "
                f"corpus, got {[*example.positive_ids]}"
            )
    size = len(retriever.passages)
    if pool is not None:
        size = min((len(pool(e)) for e in examples), default=size)
    # A copy of the gold passage answers as well as it does: as a negative it would teach what is wrong.
    answering = answering_rows(retriever.passages, examples)
    most = max(map(len, answering), default=0)
    ranked, _ = found_by(retriever, examples, min(n + most, size), pool)
    least = n - 1 + (negatives == "random" or unanswerable > 0)
    found = {}
    for example, nearest, golds in zip(examples, ranked, answering, strict=True):
        rng = stream(seed, f"context of {example.id}")
        wrong = nearest[~np.isin(nearest, golds)][:n]
        if len(wrong) < least:
            raise ConfigError(
                f"contexts of {n} passages need {least} that are not gold, but question {example.id!r} "
                f"has {len(wrong)} among {size}: lower n, or give more texts"
            )
        hidden = rng.random() < unanswerable
        drawn = rng.permutation(n)[: n - 1] if negatives == "random" else range(n - 1)
        shown = wrong if hidden else [golds[0], *(wrong[i] for i in sorted(drawn))]
        shown = rng.permutation(shown)
        cites = () if hidden else tuple(int(i) + 1 for i in np.flatnonzero(np.isin(shown, golds)))
        found[example.id] = Context(shown.astype(np.int32), cites)
    ids = [p.id for p in retriever.passages]
    told = {
        e.id: {
            "question": e.question,
            "answer": e.answer,
            "passages": [ids[r] for r in found[e.id].rows],
            "cites": list(found[e.id].cites),
        }
        for e in examples
    }
    return _step(folder / "4_contexts.jsonl", found, dict.fromkeys(found, ""), told)


class Generated(NamedTuple):
    """Generated training data.

    Attributes:
      examples: questions with their answers and their texts.
      contexts: context of each example, by its id.
      steps: the result of each step, by its name.
    """

    examples: list[Example]
    contexts: dict[str, Context]
    steps: dict[str, Step]


def generate(
    asking: Asking,
    passages: Sequence[Passage],
    retriever: Retriever,
    folder: pathlib.Path,
    *,
    filter_texts: bool = True,
    filter_questions: bool = False,
    per_text: int = 1,
    **contexts,
) -> Generated:
    """Runs steps 1 to 4 for some texts.

    Args:
      passages: the texts for questions, all of them in the retriever's corpus.
      filter_texts: whether to run step 1.
      filter_questions: whether to run step 3.
      per_text: number of questions per text.
      contexts: options of `add_hard_negatives`. Its `seed` draws contexts alone: with every seed the
        generator writes the same questions.

    Raises:
      ConfigError: as the steps.
      DataError: nothing is left to train on; the error has the counts of all steps.
    """
    steps = {}
    if filter_texts:
        steps["texts"] = rate_texts(asking, passages, folder)
    kept = steps["texts"].kept.values() if filter_texts else passages
    steps["questions"] = ask(asking, kept, folder, per_text)
    if filter_questions:
        examples = steps["questions"].kept.values()
        steps["ratings"] = rate_questions(asking, examples, passages, folder)
    require_some(steps)
    *_, last = steps.values()
    examples = [*last.kept.values()]
    steps["contexts"] = add_hard_negatives(retriever, examples, folder, **contexts)
    return Generated(examples, steps["contexts"].kept, steps)


def summary(steps: Mapping[str, Step]) -> str:
    """Returns a summary with one line per step: numbers kept and dropped."""
    lines = []
    for name, step in steps.items():
        dropped = {why: n for why, n in step.counts.items() if why != "kept"}
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
        lines.append(
            f"{name}: {step.counts['kept']} of {sum(step.counts.values())}; dropped: {why}"
        )
    return "\n".join(lines)


def total_counts(runs: Iterable[Mapping[str, Step]]) -> dict[str, int]:
    """Returns the total counts of the steps of several runs, such as {"texts kept": 9}, and their
    "requests"."""
    total: collections.Counter[str] = collections.Counter()
    for steps in runs:
        for name, step in steps.items():
            total.update({f"{name} {what}": n for what, n in step.counts.items()})
        total.update({"requests": sum(step.requests for step in steps.values())})
    return dict(total)


def require_some(steps: Mapping[str, Step]) -> None:
    """Refuses to train on nothing.

    Raises:
      DataError: the last step kept nothing; the message has the summary.
    """
    *_, last = steps.values()
    if not last.kept:
        raise DataError(
            f"label-free fine-tuning: nothing is left to train on.\n{summary(steps)}\nLook at the "
            "replies in the files of each step; a generator that does not follow the format needs "
            "other prompts (label_free.prompts), one that rates all texts low a run without ratings "
            "(filter_texts=False)"
        )


def _low(reply: Read, least: float) -> str:
    """Returns the reason why a rating drops an item; "" if it does not."""
    if reply.fault:
        return reply.fault
    try:
        score = float(reply.said["score"])
    except ValueError:  # own prompts may match any text
        return "unparsable"
    if not 0 <= score <= 10:
        return "unparsable"
    return "" if score >= least else "low"


def _step(
    path: pathlib.Path,
    found: Mapping[str, Any],
    reasons: Mapping[str, str],
    told: Mapping[str, dict[str, Any]],
    requests: int = 0,
) -> Step:
    """Writes a line for each, with the reason of each that is dropped."""
    why = {i: {"kept": False, "reason": r} if r else {"kept": True} for i, r in reasons.items()}
    write_lines(path, ({"id": i, **why[i], **told[i]} for i in found))
    counts = collections.Counter(reasons[i] or "kept" for i in found)
    kept = {i: x for i, x in found.items() if not reasons[i]}
    return Step(kept, {"kept": 0} | counts, requests)
