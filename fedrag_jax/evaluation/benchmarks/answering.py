"""Asks a batch of questions with the settings of a run, and returns the results as rows."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from fedrag_jax.data.examples import Passage
from fedrag_jax.data.hub_rows import Question
from fedrag_jax.evaluation.benchmarks import asking, choosing, reading, scoring, sets
from fedrag_jax.evaluation.benchmarks.record import Row
from fedrag_jax.generation.inference import SEARCH
from fedrag_jax.rag import RAGSystem


@dataclasses.dataclass
class Run:
    """Asks the questions of one run, a batch at a time.

    Attributes:
      corpus: ids of all searched passages; None if the store does not list them.
      shown: questions from which few-shot examples are drawn.
    """

    known: sets.BenchmarkSet
    settings: dict[str, Any]
    system: RAGSystem
    material: reading.Material
    corpus: set[str] | None
    shown: Sequence[Question]

    def __post_init__(self):
        self._passages = {p.id: p for p in self.material.passages}
        self._labelled = any(q.golds for q in self.material.asked)
        self._systems: dict[tuple[Question, ...], RAGSystem] = {}

    def rows(self, asked: Sequence[Question], seed: int) -> list[Row]:
        """Returns the result of each question, in order."""
        ranked, cosines = self._found(asked)
        read = [some[: self.system.top_k] for some in ranked]
        if self.settings["corpus"] == "gold":
            read = ranked
        ways = {"retrieval": self._ranked, "generation": self._written}
        ways |= dict.fromkeys(("likelihood", "letters"), self._chosen)
        if self.settings["mode"] == SEARCH:
            ways["generation"] = self._searched
        shots = self.settings["shots"]
        systems = [self._after(asking.examples_for(q, self.shown, shots, seed)) for q in asked]
        found = ways[self.settings["by"]](asked, read, cosines, systems)
        rows = []
        for q, some, passages, row in zip(asked, ranked, read, found, strict=True):
            scores, passages = row.pop("scores"), row.pop("passages", passages)
            if self.settings["corpus"] in ("own", "benchmark"):
                if self._labelled:
                    scores |= scoring.ranked(self.known, q, some, self.corpus or ())
                if self.known.kind == "open":
                    scores |= scoring.answer_in_passages(q, passages)
            scores = {n: None if math.isnan(score) else score for n, score in scores.items()}
            ids = [p.id for p in passages]
            rows.append({"id": q.id, "group": q.group} | row | {"scores": scores, "read": ids})
        return rows

    def _after(self, examples: tuple[Question, ...]) -> RAGSystem:
        if examples not in self._systems:
            self._systems[examples] = asking.after_examples(
                self.system, examples, self.known.kind, self.settings["by"]
            )
        return self._systems[examples]

    def _found(self, asked) -> tuple[list[list[Passage]], list[list[float]] | None]:
        """Returns the passages of each question, best first, and their scores if these are cosines."""
        corpus = self.settings["corpus"]
        if corpus == "none":
            return [[] for _ in asked], None
        if corpus == "gold":
            return [
                [self._passages[i] for i in q.golds if i in self._passages] for q in asked
            ], None
        system = self.system
        depth = scoring.DEPTH.get(self.known.kind, scoring.USUAL_DEPTH)
        depth = max(depth, system.top_k)
        if self.corpus is not None:
            depth = min(depth, len(self.corpus))
        found = (
            system.retrieve([q.question for q in asked], depth) if depth else [[] for _ in asked]
        )
        cosines = [[f.score for f in some] for some in found]
        by_cosine = system.store is None or system.store.cosines
        return [[f.passage for f in some] for some in found], cosines if by_cosine else None

    def _ranked(self, asked, read, cosines, systems) -> list[Row]:
        return [
            {
                "prediction": [p.id for p in some[:10]],
                "gold": [*q.golds],
                "cut": False,
                "scores": {},
            }
            for q, some in zip(asked, read, strict=True)
        ]

    def _written(self, asked, read, cosines, systems) -> list[Row]:
        known, settings = self.known, self.settings
        how = {n: settings[n] for n in ("mode", "beams", "max_new_tokens")}
        rows: list[Row] = []
        for _, some in itertools.groupby(range(len(asked)), key=lambda i: id(systems[i])):
            some = [*some]
            system = systems[some[0]]
            room = system.decoder.config.max_positions - how["max_new_tokens"]
            texts = [asking.words(asked[i], known.kind, "generation") for i in some]
            together = how["mode"] == "concatenated"
            contexts = [[read[i]] if together else [[p] for p in read[i]] for i in some]
            put = [_put(system, t, c, room) for t, c in zip(texts, contexts, strict=True)]
            scores = None if cosines is None else [cosines[i][: len(read[i])] for i in some]
            answers = system.answer(
                [text for text, _ in put], [read[i] for i in some], scores, **how
            )
            for i, answer, (_, cut) in zip(some, answers, put, strict=True):
                rows.append(self._answered(asked[i], answer) | {"cut": cut})
        return rows

    def _searched(self, asked, read, cosines, systems) -> list[Row]:
        """Returns answers of mode "search", which reads only the passages that the model looks up."""
        texts = [asking.words(q, self.known.kind, "generation") for q in asked]
        most = self.settings["max_new_tokens"]
        responses = self.system.batch_query(texts, mode=SEARCH, max_new_tokens=most)
        return [
            self._answered(q, response.answer)
            | {
                "cut": False,
                "searches": [search.query for search in response.searches],
                "passages": response.sources,
            }
            for q, response in zip(asked, responses, strict=True)
        ]

    def _answered(self, question: Question, answer: str) -> Row:
        if self.known.kind == "open":
            scores = scoring.open_answer(self.known, question, answer)
            return {"prediction": answer, "gold": [*question.answers], "scores": scores}
        choice = asking.parsed(answer, question, self.known.kind)
        scores = scoring.chosen(question, choice)
        return {"prediction": choice, "written": answer, "gold": question.label, "scores": scores}

    def _chosen(self, asked, read, cosines, systems) -> list[Row]:
        by = self.settings["by"]
        put, choices, cuts = [], [], []
        texts = [asking.continuations(q, by) for q in asked]
        for q, passages, system, some in zip(asked, read, systems, texts, strict=True):
            tokens = [choosing.choice_tokens(system.prompts, choice) for choice in some]
            room = system.decoder.config.max_positions - max(map(len, tokens))
            text = asking.words(q, self.known.kind, by)
            text, cut = _put(system, text, [passages], room)
            put.append(system.prompts.prompt(text, passages, room))
            choices.append(tokens)
            cuts.append(cut)
        found = choosing.log_likelihoods(self.system.writer, put, choices)
        rows = []
        for q, some, log_probs, tokens, cut in zip(asked, texts, found, choices, cuts, strict=True):
            lengths = [len(some) for some in tokens]
            rows.append(
                {
                    "prediction": int(log_probs.argmax()),
                    "gold": q.label,
                    "log_probs": [round(float(x), 6) for x in log_probs],
                    "tokens": lengths,
                    "cut": cut,
                    "scores": scoring.likeliest(q, some, log_probs, lengths),
                }
            )
        return rows


def _put(system: RAGSystem, text: str, contexts, room: int) -> tuple[str, bool]:
    """Returns the question fitted into `room` tokens, and whether the prompt was truncated."""
    fits = asking.fitted(system.prompts, text, room)
    longest = max((len(system.prompts.prompt(text, some)) for some in contexts), default=0)
    return fits, longest > room
