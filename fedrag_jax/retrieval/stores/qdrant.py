"""A store in Qdrant, embedded in this process or on a server.

pip install 'fedrag-jax[qdrant]'
"""

import dataclasses
import os
import pathlib
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError, missing
from fedrag_jax.retrieval.stores.knowledge_store import Found, KnowledgeStore, StoreUnreachable
from fedrag_jax.retrieval.stores.passage_lines import read_pairs, write_pairs

AT_ONCE = 256  # points of one request
MEMORY = ":memory:"
NAMES = uuid.UUID("a0bb2d5c-0a43-4ac0-9f0b-3c7c1b6f7e2d")  # Qdrant's ids are numbers or UUIDs


class QdrantStore(KnowledgeStore):
    """A store in one collection behind an alias, created if absent.

    Search is exact if Qdrant is embedded, and uses Qdrant's HNSW on a server. Many processes may search
    the collection; only one at a time may change it.
    """

    kind = "qdrant"

    def __init__(
        self, collection: str, dimension: int, location: str = MEMORY, *, create: bool = True
    ):
        """Opens or creates a collection.

        Args:
          collection: name of the collection.
          dimension: dimension of the vectors.
          location: ":memory:"; a folder of an embedded Qdrant, which only one process at a time may
            open; or a server's address ("http://localhost:6333"), with its key in QDRANT_API_KEY.
          create: whether to create a collection that does not exist.

        Raises:
          CheckpointError: the collection does not exist and is not to be created.
          ConfigError: qdrant-client is missing, a collection of another dimension, or one that another
            program created.
          StoreUnreachable: the server does not answer, or refuses.
        """
        super().__init__()
        if dimension < 1:
            raise ConfigError(f"a store needs dimension >= 1, got {dimension}")
        remote = location.startswith(("http://", "https://"))
        if not remote and location != MEMORY:
            # A saved store is opened from any working directory.
            location = str(pathlib.Path(location).absolute())
            if not create and not pathlib.Path(location).is_dir():
                raise CheckpointError(f"the Qdrant folder {location} does not exist")
        self.dimension, self.collection, self.location = dimension, collection, location
        qdrant = _qdrant()
        self._models = qdrant.models
        with self._asking():
            if remote:
                key = os.environ.get("QDRANT_API_KEY")
                self._client = qdrant.QdrantClient(url=location, api_key=key)
            elif location == MEMORY:
                self._client = qdrant.QdrantClient(location)
            else:
                self._client = qdrant.QdrantClient(path=location)
            if self._pointed_to() is None:
                if self._client.collection_exists(collection):  # a store's name is an alias
                    raise ConfigError(
                        f"Qdrant at {location} has a collection {collection!r} that is no store of "
                        "this package: choose another name"
                    )
                if not create:
                    raise CheckpointError(
                        f"Qdrant at {location} has no collection {collection!r}: it was deleted, or "
                        "the store was saved with another server"
                    )
                self._point_to(self._begin())
            held = self._client.get_collection(collection).config.params.vectors.size
        if held != dimension:
            raise ConfigError(
                f"collection {collection!r} holds vectors of dimension {held}, not {dimension}: use "
                "another collection, or the encoder that embedded its passages"
            )

    def __len__(self) -> int:
        with self._asking():
            return self._client.count(self.collection, exact=True).count

    def close(self) -> None:
        """Closes the folder or the connection."""
        self._client.close()

    def passages(self) -> Iterable[Passage]:
        """All passages, in no particular order."""
        return [_passage(point) for point in self._points()]

    # --- of this kind --------------------------------------------------------------------------

    def _points(self, **how) -> Iterator:
        start = None
        while True:
            with self._asking():
                points, start = self._client.scroll(
                    self.collection, limit=AT_ONCE, offset=start, with_payload=True, **how
                )
            yield from points
            if start is None:
                return

    def _pointed_to(self) -> str | None:
        aliases = self._client.get_aliases().aliases
        found = (a.collection_name for a in aliases if a.alias_name == self.collection)
        return next(found, None)

    def _begin(self) -> str:
        """Creates an empty collection under an unused name."""
        models, name = self._models, f"{self.collection}-{uuid.uuid4()}"
        self._client.create_collection(
            name, models.VectorParams(size=self.dimension, distance=models.Distance.DOT)
        )
        return name

    def _point_to(self, name: str, former: bool = False) -> None:
        """Moves the alias in one step."""
        models = self._models
        create = models.CreateAlias(collection_name=name, alias_name=self.collection)
        changes = [models.CreateAliasOperation(create_alias=create)]
        if former:
            gone = models.DeleteAlias(alias_name=self.collection)
            changes.insert(0, models.DeleteAliasOperation(delete_alias=gone))
        self._client.update_collection_aliases(change_aliases_operations=changes)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Its errors have no class in common: of HTTP, of gRPC, of a folder that is in use.
            if isinstance(error, CheckpointError | ConfigError | StoreUnreachable):
                raise
            raise StoreUnreachable(
                f"Qdrant at {self.location}, collection {self.collection!r}: {error!r}; is it running, "
                "and is no other process using the folder?"
            ) from error

    def _retrieve(self, ids: Sequence[str], **how) -> list:
        with self._asking():
            return self._client.retrieve(self.collection, [_key(i) for i in ids], **how)

    def _known(self, ids: Sequence[str]) -> set[str]:
        return {p.payload["id"] for p in self._retrieve(ids, with_payload=["id"])} if ids else set()

    def _get(self, ids: Sequence[str]) -> list[Passage]:
        found = {p.payload["id"]: _passage(p) for p in self._retrieve(ids, with_payload=True)}
        return [found[i] for i in ids]

    def _put(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        known = self._known([p.id for p in passages])
        try:
            self._upsert(self.collection, passages, vectors)
        except BaseException:
            # What is new is nowhere; what was to be replaced may be so in part.
            if new := [p.id for p in passages if p.id not in known]:
                self._delete(new)
            raise

    def _upsert(self, name: str, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        points = [
            self._models.PointStruct(
                id=_key(p.id), vector=vector.tolist(), payload=dataclasses.asdict(p)
            )
            for p, vector in zip(passages, vectors, strict=True)
        ]
        with self._asking():
            for start in range(0, len(points), AT_ONCE):
                self._client.upsert(name, points[start : start + AT_ONCE], wait=True)

    def _delete(self, ids: Sequence[str]) -> None:
        keys = self._models.PointIdsList(points=[_key(i) for i in ids])
        with self._asking():
            self._client.delete(self.collection, keys, wait=True)

    @contextmanager
    def _fresh(self, passages: Sequence[Passage], vectors: np.ndarray):
        with self._asking():
            former, name = self._pointed_to(), self._begin()
        kept = former

        def commit():
            nonlocal kept
            self._point_to(name, former=True)
            kept = name

        try:
            self._upsert(name, passages, vectors)
            with self._asking():
                yield commit
        finally:
            gone = former if kept == name else name
            if gone.startswith(f"{self.collection}-"):  # one of ours
                with self._asking():
                    self._client.delete_collection(gone)

    def _search(self, questions, vectors: np.ndarray, k: int) -> list[list[Found]]:
        request = self._models.QueryRequest
        requests = [request(query=v.tolist(), limit=k, with_payload=True) for v in vectors]
        with self._asking():
            responses = self._client.query_batch_points(self.collection, requests)
        return [[Found(_passage(p), p.score) for p in response.points] for response in responses]

    # --- on disk -------------------------------------------------------------------------------

    @staticmethod
    def public(location: str) -> str:
        """Returns an address without its password, or the whole path of a folder."""
        if location.startswith(("http://", "https://")):
            return re.sub(r"//[^/@]*@", "//", location)
        return str(pathlib.Path(location).absolute())

    @classmethod
    def lies_elsewhere(cls, settings: dict[str, Any]) -> bool:
        """True unless the collection is in memory; then the saved folder holds everything."""
        return settings["location"] != MEMORY

    @classmethod
    def place(cls, settings: dict[str, Any]) -> str:
        """The address or folder."""
        return f"Qdrant at {settings['location']}"

    def _settings(self) -> dict[str, Any]:
        return {
            "collection": self.collection,
            "dimension": self.dimension,
            "location": self.location,
        }

    def _save(self, folder: pathlib.Path) -> None:
        if self.location == MEMORY:
            points = [*self._points(with_vectors=True)]
            vectors = np.array([p.vector for p in points], np.float32).reshape(-1, self.dimension)
            write_pairs(folder, [_passage(p) for p in points], vectors)

    @classmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        store = cls(**settings, create=settings["location"] == MEMORY)
        if store.location == MEMORY:
            store.add(*read_pairs(folder, store.dimension))
        return store


def _key(identifier: str) -> str:
    return str(uuid.uuid5(NAMES, identifier))


def _passage(point) -> Passage:
    return Passage(**point.payload)


def _qdrant():
    try:
        import qdrant_client
    except ImportError as error:
        raise missing("Qdrant needs qdrant-client", "qdrant") from error
    return qdrant_client
