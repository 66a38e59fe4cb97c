"""A store whose results are reranked by a cross-encoder."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models.cross_encoder import CrossEncoder
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore
from fedrag_jax.retrieval.stores.over_others import OverOthers
from fedrag_jax.retrieval.stores.passage_source import Found
from fedrag_jax.retrieval.stores.registry import open_store


class RerankedStore(OverOthers):
    """Searches another store, and orders the results by the logits of a cross-encoder.

    Both stores share their passages: a change to one of them is a change to the other.
    """

    kind, cosines = "reranked", False

    def __init__(self, store: KnowledgeStore, cross_encoder: CrossEncoder, depth: int = 50):
        """Creates a reranked store over another store.

        Args:
          depth: number of passages per question for the cross-encoder; its time grows with them.

        Raises:
          ConfigError: a depth below 1, or a source that is not a `KnowledgeStore`.
        """
        super().__init__()
        if not isinstance(store, KnowledgeStore):
            raise ConfigError(
                f"a reranked store needs a KnowledgeStore, got {store!r}: for other sources, order the "
                "results with CrossEncoder.scores"
            )
        if depth < 1:
            raise ConfigError(f"a reranked store needs depth >= 1, got {depth}")
        self.store, self.cross_encoder, self.depth = store, cross_encoder, depth
        self.dimension, self.read_only = store.dimension, store.read_only
        self._changing, self._lock = store._changing, store._lock  # who changes one changes both

    def __len__(self) -> int:
        return len(self.store)

    def passages(self) -> Iterable[Passage]:
        """All passages, in the order of the other store."""
        return self.store.passages()

    def search(self, questions: Sequence[str], vectors=None, k: int = 5) -> list[list[Found]]:
        """Returns the k best of the `depth` passages that the other store finds, best first.

        Equal scores are ordered by id. More than `depth` passages are read only if k is larger.

        Args:
          vectors: question vectors, as the other store needs them.

        Raises:
          ConfigError: k below 1, vectors that are missing, too few or of another dimension.
          DataError: a vector that is not finite.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        # Changes need not wait for the cross-encoder, and equal scores are no reason to read more.
        found = self._search(questions, vectors, k)
        return [sorted(some, key=lambda f: (-f.score, f.passage.id))[:k] for some in found]

    def _search(self, questions, vectors, k: int) -> list[list[Found]]:
        near = self.store.search(questions, vectors, max(k, self.depth))
        pairs = [
            (question, found.passage)
            for question, some in zip(questions, near, strict=True)
            for found in some
        ]
        scores = self.cross_encoder.scores(
            [question for question, _ in pairs], [embedding_text(passage) for _, passage in pairs]
        )
        each = iter(scores.tolist())
        return [[Found(found.passage, next(each)) for found in some] for some in near]

    # --- as the other store ----------------------------------------------------------------------

    def _known(self, ids: Sequence[str]) -> set[str]:
        return self.store._known(ids)

    def _get(self, ids: Sequence[str]) -> list[Passage]:
        return self.store._get(ids)

    def _fault(self, passage: Passage) -> str:
        return self.store._fault(passage)

    def _put(self, passages: Sequence[Passage], vectors: np.ndarray | None) -> None:
        self.store._put(passages, vectors)

    def _delete(self, ids: Sequence[str]) -> None:
        self.store._delete(ids)

    def _fresh(self, passages: Sequence[Passage], vectors: np.ndarray):
        return self.store._fresh(passages, vectors)

    def emptied(self) -> Self:
        """Returns the same cross-encoder over an empty store of the same kind."""
        return RerankedStore(self.store.emptied(), self.cross_encoder, self.depth)

    def description(self) -> dict[str, Any]:
        """Its own settings, those of the other store, and a hash of the cross-encoder."""
        return super().description() | {
            "store": self.store.description(),
            "cross_encoder": self.cross_encoder.fingerprint(),
        }

    # --- on disk -------------------------------------------------------------------------------

    def _others(self) -> Sequence[KnowledgeStore]:
        return (self.store,)

    def _save(self, folder: pathlib.Path) -> None:
        self.store.save(folder / "store")
        self.cross_encoder.save(folder / "cross_encoder")

    @classmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        depth = settings["depth"]
        if type(depth) is not int or depth < 1:
            raise CheckpointError(f"{folder}: a reranked store of depth {depth!r}")
        # A store that lies elsewhere is opened only where the settings said so to whoever agreed.
        store = open_store(folder / "store", memory_map, cls.lies_elsewhere(settings))
        return cls(store, CrossEncoder.load(folder / "cross_encoder"), depth)
