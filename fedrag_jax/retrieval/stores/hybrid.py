"""A store that combines several stores over the same passages, such as vectors and words."""

import pathlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.retrieval.index.silos import RRF_K
from fedrag_jax.retrieval.stores.knowledge_store import Found, KnowledgeStore
from fedrag_jax.retrieval.stores.over_others import OverOthers
from fedrag_jax.retrieval.stores.registry import open_store


class HybridStore(OverOthers):
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009) of the results of several stores.

        score = sum over stores that found the passage: 1 / (60 + rank), ranks from 1

    Changes apply to all of the stores. No other code may change or save them.
    """

    kind, cosines = "hybrid", False

    def __init__(self, parts: Sequence[KnowledgeStore], depth: int = 100):
        """Creates a store over others that hold the same passages.

        Args:
          depth: number of ranked passages from each store; at least the number searched for.

        Raises:
          ConfigError: fewer than two stores, stores with different passages or dimensions, or a depth
            below 1.
        """
        super().__init__()
        if len(parts) < 2 or depth < 1:
            raise ConfigError(
                f"a hybrid needs two stores or more and depth >= 1, got {len(parts)} and {depth}"
            )
        dimensions = sorted({part.dimension for part in parts} - {None})
        if len(dimensions) > 1:
            raise ConfigError(f"stores of one hybrid have vectors of dimensions {dimensions}")
        held = [{p.id for p in part.passages()} for part in parts]
        if any(ids != held[0] for ids in held[1:]):
            raise ConfigError(
                f"stores of one hybrid hold the same passages, these hold {[*map(len, held)]}: add "
                "passages through the hybrid"
            )
        self.parts, self.depth = tuple(parts), depth
        self.dimension = next(iter(dimensions), None)
        self.read_only = any(part.read_only for part in parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def passages(self) -> Iterable[Passage]:
        """All passages, in the order of the first store."""
        return self.parts[0].passages()

    def _known(self, ids: Sequence[str]) -> set[str]:
        return self.parts[0]._known(ids)

    def _get(self, ids: Sequence[str]) -> list[Passage]:
        return self.parts[0]._get(ids)

    def _fault(self, passage: Passage) -> str:
        return next(filter(None, (part._fault(passage) for part in self.parts)), "")

    def _put(self, passages: Sequence[Passage], vectors: np.ndarray | None) -> None:
        known = self._known([p.id for p in passages])
        new = [p.id for p in passages if p.id not in known]
        for i, part in enumerate(self.parts):
            try:
                part._put(passages, None if part.dimension is None else vectors)
            except BaseException:
                # A server that went away: what is new is nowhere, what was replaced may be so in part.
                for earlier in self.parts[:i] if new else ():
                    earlier._delete(new)
                raise

    def _delete(self, ids: Sequence[str]) -> None:
        # The first store tells what the hybrid holds: after a failure, deleting again finds the rest.
        for part in reversed(self.parts):
            known = part._known(ids)
            part._delete([i for i in ids if i in known])

    @contextmanager
    def _fresh(self, passages: Sequence[Passage], vectors: np.ndarray):
        with ExitStack() as ready:
            commits = [
                ready.enter_context(part._fresh(passages, vectors))
                for part in self.parts
                if part.dimension is not None
            ]

            def commit():
                for each in commits:
                    each()

            yield commit

    def _search(self, questions, vectors, k: int) -> list[list[Found]]:
        scores = [defaultdict(float) for _ in questions]
        passages: dict[str, Passage] = {}
        for part in self.parts:
            for question, some in enumerate(part.search(questions, vectors, max(k, self.depth))):
                for rank, found in enumerate(some, start=1):
                    scores[question][found.passage.id] += 1 / (RRF_K + rank)
                    passages[found.passage.id] = found.passage
        return [[Found(passages[i], score) for i, score in some.items()] for some in scores]

    def emptied(self) -> Self:
        """Returns a hybrid of empty stores of the same kinds."""
        return HybridStore([part.emptied() for part in self.parts], self.depth)

    def description(self) -> dict[str, Any]:
        """Its own settings, and those of its stores."""
        return super().description() | {"parts": [part.description() for part in self.parts]}

    # --- on disk -------------------------------------------------------------------------------

    def _others(self) -> Sequence[KnowledgeStore]:
        return self.parts

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"parts": len(self.parts)}

    def _save(self, folder: pathlib.Path) -> None:
        for i, part in enumerate(self.parts):
            part.save(folder / f"part-{i}")

    @classmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        if not 2 <= settings["parts"] <= 100:
            raise CheckpointError(f"{folder}: a hybrid of {settings['parts']!r} stores")
        # A store that lies elsewhere is opened only where the settings said so to whoever agreed.
        parts = [
            open_store(folder / f"part-{i}", memory_map, cls.lies_elsewhere(settings))
            for i in range(settings["parts"])
        ]
        return cls(parts, settings["depth"])
