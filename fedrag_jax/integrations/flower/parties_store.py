"""The server's side of retrieval over parties: a source of passages that asks all of them.

    store = PartiesStore(grid, system.retriever, parties=3)
    system.over(store).query("...")

Each party that shares passages searches its own index and answers with its k best passages and their
scores; the server merges them as `retrieval.index.silos` does. So the same passages are found as in the
simulation, and, merged by score, as in one index of all documents.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.errors import ConfigError
from fedrag_jax.integrations.flower.party_search import encoder_of
from fedrag_jax.integrations.flower.roll import LONGEST, Asked, Mail
from fedrag_jax.integrations.flower.wire import WireError, add_sizes, from_record, sizes, to_record
from fedrag_jax.retrieval.index.silos import MERGES, fuse
from fedrag_jax.retrieval.index.vector_index import finite
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable
from fedrag_jax.retrieval.stores.passage_source import Found, PassageSource


class Searched(NamedTuple):
    """A search over parties.

    Attributes:
      found: the k best passages for each question, best first.
      holders: numbers of the parties that found each of these passages.
      answered: numbers of the parties whose answers count.
      refused: {party or node: reason} of the others.
      down, up: bytes by part and type, of the messages as they were sent.
    """

    found: list[list[Found]]
    holders: list[list[list[int]]]
    answered: list[int]
    refused: dict[str, str]
    down: dict[str, int]
    up: dict[str, int]


class _Answer(NamedTuple):
    """Passages of one party; places in them, -1 for none, and scores, [Q, k'] each."""

    passages: list[Passage]
    which: np.ndarray
    scores: np.ndarray


class PartiesStore(PassageSource):
    """Searches all connected parties for vectors of questions; read-only.

    Args:
      grid: Flower's, of the run.
      retriever: the server's; parties must have embedded their passages with its document encoder.
      parties: number of parties to wait for before the first search.
      patience: seconds to wait, for the parties and for their answers.
      merge: "score", or "rrf" for reciprocal rank fusion, as in `SiloIndex`.
      listen: function called with every `Searched`.

    Raises:
      ConfigError: an unknown merge, or no parties.
    """

    kind = "parties"

    def __init__(
        self,
        grid: Grid,
        retriever: Retriever,
        parties: int,
        patience: float = 600.0,
        merge: str = "score",
        listen: Callable[[Searched], None] | None = None,
    ):
        super().__init__()
        if merge not in MERGES:
            raise ConfigError(f"merge must be one of {MERGES}, got {merge!r}")
        if parties < 1:
            raise ConfigError(f"parties must be at least 1, got {parties}")
        self.grid, self.parties, self.patience = grid, parties, patience
        self.merge, self.listen = merge, listen
        self.dimension = int(retriever.vectors.shape[1])
        self._encoder = encoder_of(retriever)

    def search(self, questions: Sequence[str], vectors=None, k: int = 5) -> list[list[Found]]:
        """As `PassageSource.search`; a party is asked for its k best passages.

        Raises:
          ConfigError: k below 1, or vectors that are missing or of another dimension.
          DataError: a vector that is not finite.
          StoreUnreachable: no party answers.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        if not len(questions):
            return []
        if vectors is None or np.shape(vectors) != (len(questions), self.dimension):
            raise ConfigError(
                f"parties are asked with vectors [{len(questions)}, {self.dimension}], got "
                f"{None if vectors is None else np.shape(vectors)}"
            )
        searched = self.ask(finite(vectors, "question"), k)
        if self.listen is not None:
            self.listen(searched)
        return searched.found

    def ask(self, vectors: np.ndarray, k: int) -> Searched:
        """Asks all parties for the passages nearest to vectors float32 [Q, D].

        Raises:
          StoreUnreachable: no party answers.
        """
        mail = Mail(self.grid)
        order = {"k": k, "questions": len(vectors), "encoder": self._encoder}
        model = to_record({"vectors": np.asarray(vectors, np.float32)})
        answers: dict[int, _Answer] = {}
        refused: dict[str, str] = {}
        down: dict[str, int] = {}
        up: dict[str, int] = {}
        content = RecordDict({"model": model, "order": ConfigRecord(order)})
        nodes = self._there()
        sent = mail.send("query.search", dict.fromkeys(nodes, content), self.patience)
        for _ in sent:
            add_sizes(down, sizes(model))
        refused |= {f"node {node}": "it cannot be reached" for node in {*nodes} - sent}

        def take(asked: Asked, message: Message) -> None:
            try:
                if message.has_error():
                    raise WireError(message.error.reason)
                number, answer = _read(message.content, len(vectors), k)
                if number in answers:
                    raise WireError(f"its number is {number}, which another node has already")
            except Exception as error:  # nothing that a party sends ends the run
                refused[f"node {asked.node}"] = str(error)
                return
            answers[number] = answer
            add_sizes(up, sizes(message.content.array_records["model"]))

        mail.until(lambda: not mail.waiting, self.patience, take)
        for asked in mail.waiting.values():
            refused[f"node {asked.node}"] = f"no answer in {self.patience:g} s"
        if not answers:
            raise StoreUnreachable(f"no party has answered: {refused or 'no node has come'}")
        found, holders = _merged(dict(sorted(answers.items())), len(vectors), k, self.merge)
        return Searched(found, holders, sorted(answers), refused, down, up)

    def _there(self) -> list[int]:
        """Nodes that are there, once there are enough of them or patience has ended."""
        end = time.monotonic() + self.patience
        while True:
            nodes = sorted(map(int, self.grid.get_node_ids()))
            if len(nodes) >= self.parties or time.monotonic() >= end:
                return nodes
            time.sleep(LONGEST)

    def _settings(self) -> dict[str, Any]:
        return {"merge": self.merge}

    def _save(self, folder) -> None:
        raise ConfigError("a store over parties lasts as long as the run: it cannot be saved")

    @classmethod
    def _load(cls, folder, settings, memory_map):
        raise ConfigError("a store over parties lasts as long as the run: it cannot be loaded")


def _read(content: RecordDict, questions: int, k: int) -> tuple[int, _Answer]:
    """A party's number and its answer, checked."""
    about: Any = content["about"]
    number, depth, size = (int(about[name]) for name in ("client", "depth", "bytes"))
    if not 0 <= depth <= k or size < 0:
        raise WireError(f"client {number} answers with {depth} passages of {size} bytes, k is {k}")
    like = {
        "which": jax.ShapeDtypeStruct((questions, depth), np.int32),
        "scores": jax.ShapeDtypeStruct((questions, depth), np.float32),
        "passages": jax.ShapeDtypeStruct((size,), np.uint8),
    }
    arrays = from_record(content.array_records["model"], like, f"client {number}")
    try:
        rows = json.loads(arrays["passages"].tobytes())
    except ValueError as error:
        raise WireError(f"passages of client {number} are no JSON ({error})") from error
    words = [
        isinstance(row, list) and len(row) == 3 and all(isinstance(x, str) for x in row)
        for row in (rows if isinstance(rows, list) else [None])
    ]
    which = arrays["which"]
    if not all(words) or (which.size and not -1 <= which.min() <= which.max() < len(rows)):
        raise WireError(f"passages of client {number} are not lists of id, title and text")
    return number, _Answer([Passage(*row) for row in rows], which, arrays["scores"])


def _merged(answers: dict[int, _Answer], questions: int, k: int, merge: str):
    """Passages by question, and the parties of each; equal texts are one passage."""
    # Rows as of one corpus: by party, then by id, which is how a store orders equal scores.
    ordered = {
        (number, place): passage
        for number, answer in answers.items()
        for place, passage in sorted(enumerate(answer.passages), key=lambda pair: pair[1].id)
    }
    row_of_text: dict[str, int] = {}
    rows, passages = {}, []
    for where, passage in ordered.items():
        text = embedding_text(passage)
        if text not in row_of_text:
            row_of_text[text] = len(passages)
            passages.append(passage)
        rows[where] = row_of_text[text]
    found, holders = [], []
    for question in range(questions):
        of = [
            (number, rows[number, int(place)], score, rank)
            for number, answer in answers.items()
            for rank, (place, score) in enumerate(
                zip(answer.which[question], answer.scores[question], strict=True), 1
            )
            if place >= 0
        ]
        if not of:
            found.append([])
            holders.append([])
            continue
        numbers, row, score, rank = (np.array(x) for x in zip(*of, strict=True))
        most = min(k, len(np.unique(row)))
        one = np.zeros(len(row), np.int64)
        best, scores = fuse(one, row, score, rank, questions=1, k=most, merge=merge)
        found.append(
            [Found(passages[r], float(s)) for r, s in zip(best[0], scores[0], strict=True)]
        )
        holders.append([sorted({*numbers[row == r].tolist()}) for r in best[0]])
    return found, holders
