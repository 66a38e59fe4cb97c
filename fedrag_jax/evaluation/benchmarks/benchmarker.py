"""Runs public benchmarks on a system: `Benchmarker(system, folder).run("mmlu")`."""

import dataclasses
import hashlib
import os
import pathlib
import tempfile
import time
import warnings
from collections.abc import Collection, Sequence

from tqdm import tqdm

from fedrag_jax.data.examples import Passage, clusters
from fedrag_jax.data.golds import golds
from fedrag_jax.data.hub_rows import Question
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.benchmarks import asking, reading, sets
from fedrag_jax.evaluation.benchmarks.answering import Run
from fedrag_jax.evaluation.benchmarks.identity import corpus_of, identity
from fedrag_jax.evaluation.benchmarks.record import Record
from fedrag_jax.evaluation.benchmarks.results import BenchmarkResult, summed
from fedrag_jax.generation.inference import SEARCH
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.vector_index import VectorIndex
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore

CORPORA = ("own", "benchmark", "gold", "none")


class Benchmarker:
    """Runs benchmarks on a system and stores the results.

    Args:
      folder: folder of the results, one subfolder per run; a stopped run resumes from it. None stores
        nothing.
      batch_size: number of questions between two writes; answers do not depend on it.
      seed: random seed of the sample of questions and of the few-shot examples.
      progress: shows questions and time left on stderr.
    """

    def __init__(
        self,
        system: RAGSystem,
        folder: str | os.PathLike | None = None,
        *,
        batch_size: int = 32,
        seed: int = 0,
        progress: bool = True,
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ConfigError(f"seed must be at least 0, got {seed}")
        self.system, self.folder = system, None if folder is None else pathlib.Path(folder)
        self.batch_size, self.seed, self.progress = batch_size, seed, progress

    def run(
        self,
        name: str | sets.BenchmarkSet,
        *,
        split: str = "",
        source: str | os.PathLike | None = None,
        limit: int | None = None,
        shots: int = 0,
        by: str = "",
        corpus: str = "own",
        exclude: Collection[str] = (),
        mode: str = "concatenated",
        beams: int | None = None,
        max_new_tokens: int | None = None,
        rule: str = "",
    ) -> BenchmarkResult:
        """Scores a system on a benchmark with greedy decoding; finished questions are not asked again.

        A row of the result has the question's `id`, the `prediction` (a text, or the position of a
        choice from 0), the `gold` answer, its `scores`, the ids of the passages `read`, whether the
        prompt was `cut`, and the `seconds`; by likelihood also `log_probs` and `tokens` of each choice;
        in mode "search" also the queries of its `searches`.
        In a data set with only one split (PopQA), a hundredth of the questions is set aside for
        few-shot examples, if there are any.

        Systems tuned on local data sets of `data.datasets` may have seen a benchmark's questions in
        another split, as with HotpotQA: `exclude` these questions.

        Args:
          name: one of `sets.SETS`, or your own `BenchmarkSet`.
          split: the split to ask; "" for the benchmark's own split with labels.
          source: "hub", "local" or a folder; None for "local" if available (`reading.read`).
          limit: size of a random sample. A larger sample of the same seed contains a smaller one.
          shots: few-shot examples before each question, without passages.
          by: "generation" writes the answer (the letter of a choice, a label); "likelihood" takes the
            choice whose text has the highest log p, in total, per token and per byte; "letters" shows
            all choices and takes the most likely letter, as MMLU's authors and lm-evaluation-harness
            do; "" is the benchmark's usual method.
          corpus: the passages to read: top-k of the system's "own" passages or store, top-k of all
            passages of the "benchmark" split in a store of the same kind, the question's "gold"
            passages, or "none" (closed book).
          exclude: ids of questions to leave out.
          mode, beams, max_new_tokens: as in `RAGSystem.batch_query`, for generated answers. In mode
            "search" the model reads what it looks up, so there are no few-shot examples.
          rule: rule of `metrics.f1` for open answers in another language, such as "zh"; "" is the
            benchmark's own.

        Raises:
          ConfigError: a value out of its range, or a folder with another run.
          DataError: a data set that cannot be read, or gold ids of your own set that name no passages.
        """
        known = sets.named(name)
        if rule:
            known = sets.scored_by(known, rule)
        by = by or known.by or sets.KINDS[known.kind][0]
        self._check(known, by, corpus, limit, shots, mode, beams, max_new_tokens)
        material = reading.read(known, split, source, shown=shots > 0)
        asked, shown = material.asked, material.shown
        if shots and not known.shown:
            shown, asked = asking.set_aside(asked, shots)
        left_out = {*exclude}
        asked = sets.in_order([q for q in asked if q.id not in left_out], self.seed)
        if not asked:
            why = f"{shots} few-shot examples leave" if not left_out else "exclude leaves"
            raise ConfigError(f"{known.name}: {why} no question to ask; choose fewer")
        system = self._placed(material, corpus)
        searches = corpus in ("own", "benchmark")
        searched = corpus_of(system) if searches else None
        if searched is not None:
            asked = _placed_golds(known, asked, searched)
        settings = {
            "split": split or known.split,
            "by": by,
            "shots": shots,
            "corpus": corpus,
            "seed": self.seed,
            "mode": mode,
            "beams": beams,
            "max_new_tokens": (
                system.prompts.max_answer_tokens if max_new_tokens is None else max_new_tokens
            ),
            "excluded": _hash(sorted(left_out)) if left_out else "",
        }
        if rule:
            settings["rule"] = rule
        if mode == SEARCH:
            settings["searching"] = system.searching.as_dict()
        origin = {
            "source": material.origin,
            "questions": len(material.asked),
            "content": material.content,
        }
        identified = identity(system, searches, searched)
        stem = f"{known.name}-{settings['split']}-{by}-{shots}shot-{corpus}"
        with tempfile.TemporaryDirectory() as nowhere:
            folder = (self.folder or pathlib.Path(nowhere)) / stem
            # Where a set lies may change; what is in it may not.
            header = {"settings": settings, "content": material.content, "system": identified}
            record = Record(folder / "rows.jsonl", header)
            ids = None if searched is None else {p.id for p in searched}
            run = Run(known, settings, system, material, ids, shown)
            self._ask(run, asked[:limit], record)
            rows = [record.rows[q.id] for q in asked[:limit]]
            known_passages = [*material.passages, *(searched or ())]
            together = clusters([q.golds for q in asked[:limit]], known_passages)
            asked_for = [len(row["searches"]) for row in rows if "searches" in row]
            written = [len(row["prediction"].split()) for row in rows if known.kind == "open"]
            result = BenchmarkResult(
                name=known.name,
                first=known.first,
                settings=settings | {"limit": limit},
                origin=origin,
                system=identified,
                metrics=summed(rows, together),
                answer_words=sum(written) / len(written) if written else None,
                share_cut=sum(row["cut"] for row in rows) / len(rows),
                searches=sum(asked_for) / len(asked_for) if asked_for else None,
                seconds=sum(row["seconds"] for row in rows),
                rows=rows,
            )
            result.write(folder / "result.json")
        return result

    def _check(self, known, by, corpus, limit, shots, mode, beams, max_new_tokens) -> None:
        ways = sets.KINDS[known.kind]
        faults = {
            f"by must be one of {[*ways]} for {known.name}, got {by!r}": by not in ways,
            f"corpus must be one of {[*CORPORA]}, got {corpus!r}": corpus not in CORPORA,
            f"limit must be at least 1, got {limit}": limit is not None and limit < 1,
            f"shots must be at least 0, got {shots}": shots < 0,
            f"{known.name} asks for a ranking: shots must be 0, corpus 'own' or 'benchmark'": (
                by == "retrieval" and (shots or corpus not in CORPORA[:2])
            ),
            f"mode {SEARCH!r} looks up its own passages: use corpus 'own' or 'benchmark', and neither "
            "shots nor beams": (mode == SEARCH and (shots or beams or corpus not in CORPORA[:2])),
            f"by {by!r} reads all passages together: mode and beams cannot be chosen": (
                by != "generation" and (mode, beams) != ("concatenated", None)
            ),
            f"max_new_tokens must be at least 1, got {max_new_tokens}": (
                max_new_tokens is not None and max_new_tokens < 1
            ),
            f"by {by!r} writes no answer of {known.name}: leave out max_new_tokens": (
                by != "generation" and max_new_tokens is not None
            ),
            "likelihood scores answers only, but the prompt style begins with reasoning or citation: "
            "use by='generation', or another style": (
                by in ("likelihood", "letters") and bool(self.system.prompts.style.final)
            ),
        }
        for fault, found in faults.items():
            if found:
                raise ConfigError(fault)

    def _placed(self, material: reading.Material, corpus: str) -> RAGSystem:
        """Returns the system over the passages of the run."""
        if corpus in ("benchmark", "gold") and not material.passages:
            raise ConfigError(
                f"{material.origin} has no passages: use corpus='own', or 'none' for closed book"
            )
        if corpus != "benchmark":
            return self.system
        retriever, store = self.system.retriever, self._empty_store()
        if store.dimension is None:
            store.add(material.passages)
            return self.system.over(store)
        store.add(material.passages, retriever.embed_kept(material.passages, self.progress))
        return self.system.over(store)

    def _empty_store(self) -> KnowledgeStore:
        """Returns an empty store that searches as the system does.

        Raises:
          ConfigError: a retriever over silos, an external store, or a read-only source.
        """
        retriever, store = self.system.retriever, self.system.store
        if store is None and isinstance(retriever.index, VectorIndex):
            return FaissStore(retriever.vectors.shape[1])
        if isinstance(store, KnowledgeStore):
            return store.emptied()
        searched = "silos" if store is None else f"a store of kind {store.kind!r}"
        raise ConfigError(
            f"corpus 'benchmark' is searched as the system searches its own passages, and {searched} "
            "cannot be filled with others: use corpus='own', or put the system over another store"
        )

    def _ask(self, run: Run, asked: Sequence[Question], record: Record) -> None:
        missing = [q for q in asked if q.id not in record.rows]
        # Questions that share their examples are asked together.
        missing.sort(key=lambda q: q.group)
        bar = tqdm(
            total=len(asked), initial=len(asked) - len(missing), desc=run.known.name,
            unit=" questions", disable=not self.progress,
        )  # fmt: skip
        with bar:
            for start in range(0, len(missing), self.batch_size):
                some = missing[start : start + self.batch_size]
                began = time.perf_counter()
                rows = run.rows(some, self.seed)
                each = (time.perf_counter() - began) / len(some)
                record.add([row | {"seconds": round(each, 6)} for row in rows])
                bar.update(len(some))


def _placed_golds(
    known: sets.BenchmarkSet, asked: Sequence[Question], searched: Sequence[Passage]
) -> list[Question]:
    """Returns the questions with gold ids of searched passages.

    If an id of a question names no passage, the question keeps its ids, and its ranking is not scored.
    """
    found = golds(((q.golds, q.answers) for q in asked), searched)
    if not known.repo:  # those of public sets are of the set's passages
        found.require_some(known.name)
    if message := found.message():
        warnings.warn(f"{known.name}: {message}: these rankings are not scored", stacklevel=3)
    return [
        q if missing else dataclasses.replace(q, golds=ids)
        for q, ids, missing in zip(asked, found.found, found.missing, strict=True)
    ]


def _hash(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
