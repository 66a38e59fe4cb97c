"""A store in PostgreSQL, searched by pgvector.

pip install 'fedrag-jax[postgres]'
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError, missing
from fedrag_jax.retrieval.stores.knowledge_store import Found, KnowledgeStore, StoreUnreachable

COLUMNS = ("id", "title", "text", "topic")
INDEXES = ("exact", "hnsw")
MOST_CANDIDATES = 1000  # pgvector's limit of hnsw.ef_search
MOST_DIMENSIONS = 2000  # pgvector's limit of an hnsw index


class PostgresStore(KnowledgeStore):
    """A store in one table (id, title, text, topic, vector), created if absent.

    Other programs may search and change the table at the same time: every change is one transaction.
    """

    kind = "postgres"

    def __init__(
        self,
        conninfo: str,
        table: str,
        dimension: int,
        index: str = "exact",
        effort: int = 64,
        *,
        create: bool = True,
    ):
        """Opens or creates a store in a database; the extension `vector` is created if necessary.

        Args:
          conninfo: libpq connection string, such as "postgresql://me@host/database"; keep passwords in
            PGPASSWORD or ~/.pgpass, because a saved store leaves them out.
          table: name of the table.
          dimension: dimension of the vectors.
          index: "exact", or "hnsw" for an approximate index.
          effort: candidates that hnsw keeps during a search; if more passages are requested, as many.
            pgvector's limit is 1,000: a search for more passages may find only 1,000.
          create: whether to create a table that does not exist.

        Raises:
          CheckpointError: the table does not exist and is not to be created.
          ConfigError: psycopg or pgvector is missing, an unknown index, more than 2,000 dimensions
            with hnsw, or a table of another dimension.
          StoreUnreachable: the database does not answer, or refuses.
        """
        super().__init__()
        if index not in INDEXES or dimension < 1 or effort < 1:
            raise ConfigError(
                f"a store needs dimension >= 1, effort >= 1 and an index of {INDEXES}, got "
                f"{dimension}, {effort} and {index!r}"
            )
        if index == "hnsw" and dimension > MOST_DIMENSIONS:
            raise ConfigError(
                f"table {table!r}: dimension must be at most {MOST_DIMENSIONS} for index 'hnsw', got "
                f"{dimension}: use index='exact', or cut the vectors (Retriever.cut)"
            )
        self.dimension, self.table, self.index, self.effort = dimension, table, index, effort
        self._conninfo, self._psycopg, self._connection = conninfo, _psycopg(), None
        with self._asking():
            self._connection = self._connect()
            try:
                self._prepare(create)
            except BaseException:
                self._connection.close()
                raise

    def __len__(self) -> int:
        with self._asking():
            return self._run("SELECT count(*) FROM {table}").fetchone()[0]

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def passages(self) -> Iterable[Passage]:
        """All passages, ordered by id."""
        with self._asking():
            rows = self._run("SELECT id, title, text, topic FROM {table} ORDER BY id").fetchall()
        return [Passage(*row) for row in rows]

    # --- of this kind --------------------------------------------------------------------------

    def _connect(self):
        from pgvector.psycopg import register_vector

        connection = self._psycopg.connect(self._conninfo, autocommit=True)
        try:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            register_vector(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, create: bool) -> None:
        if not create and self._run("SELECT to_regclass({name})").fetchone()[0] is None:
            raise CheckpointError(
                f"{self.place(self._settings())} does not exist: it was deleted, or the store was "
                "saved with another database"
            )
        self._run(
            "CREATE TABLE IF NOT EXISTS {table} (id text PRIMARY KEY, title text NOT NULL, "
            f"text text NOT NULL, topic text NOT NULL, vector vector({int(self.dimension)}) NOT NULL)"
        )
        held = self._run(
            "SELECT atttypmod FROM pg_attribute "
            "WHERE attrelid = {name}::regclass AND attname = 'vector'"
        ).fetchone()
        if held is None or held[0] != self.dimension:
            raise ConfigError(
                f"table {self.table!r} holds vectors of dimension {held and held[0]}, not "
                f"{self.dimension}: use another table, or the encoder that embedded its passages"
            )
        if self.index == "hnsw":
            self._run(
                "CREATE INDEX IF NOT EXISTS {index} ON {table} USING hnsw (vector vector_ip_ops)"
            )

    def _table(self, doubled: bool = True):
        """Returns the table's name as SQL; with parameters, a % must be doubled."""
        name = self._psycopg.sql.Identifier(self.table).as_string(self._connection)
        return self._psycopg.sql.SQL(name.replace("%", "%%") if doubled else name)

    def _run(self, command: str, parameters=None, connection=None):
        sql = self._psycopg.sql
        names = {
            "table": self._table(doubled=parameters is not None),
            "index": sql.Identifier(f"{self.table}_vector_ip"),
            "name": sql.Literal(sql.Identifier(self.table).as_string(self._connection)),
        }
        return (connection or self._connection).execute(
            sql.SQL(command).format(**names), parameters
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.Error as error:
            raise StoreUnreachable(
                f"PostgreSQL, table {self.table!r}: {error}; is the server running, and may this user "
                "use the database and its extension vector?"
            ) from error

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Holds the connection, and reconnects if it was lost."""
        with self._told(), self._lock:
            if self._connection is not None and self._connection.closed:
                self._connection = self._connect()
            yield

    def _known(self, ids: Sequence[str]) -> set[str]:
        with self._asking():
            rows = self._run("SELECT id FROM {table} WHERE id = ANY(%s)", [[*ids]])
            return {row[0] for row in rows}

    def _get(self, ids: Sequence[str]) -> list[Passage]:
        with self._asking():
            rows = self._run(
                "SELECT id, title, text, topic FROM {table} WHERE id = ANY(%s)", [[*ids]]
            ).fetchall()
        found = {row[0]: Passage(*row) for row in rows}
        return [found[i] for i in ids]

    def _fault(self, passage: Passage) -> str:
        if fault := super()._fault(passage):
            return fault
        nul = any("\0" in getattr(passage, column) for column in COLUMNS)
        return "has a NUL character, which PostgreSQL cannot hold" if nul else ""

    def _put(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        rows = [
            (p.id, p.title, p.text, p.topic, vector)
            for p, vector in zip(passages, vectors, strict=True)
        ]
        command = (
            "INSERT INTO {table} (id, title, text, topic, vector) VALUES (%s, %s, %s, %s, %s) "
            "ON CONFLICT (id) DO UPDATE SET title = EXCLUDED.title, text = EXCLUDED.text, "
            "topic = EXCLUDED.topic, vector = EXCLUDED.vector"
        )
        sql = self._psycopg.sql
        with self._asking(), self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(sql.SQL(command).format(table=self._table()), rows)

    def _delete(self, ids: Sequence[str]) -> None:
        with self._asking():
            self._run("DELETE FROM {table} WHERE id = ANY(%s)", [[*ids]])

    @contextmanager
    def _fresh(self, passages: Sequence[Passage], vectors: np.ndarray):
        # By a connection of its own: searches go on with the old vectors until it commits.
        with self._told(), self._connect() as connection, connection.cursor() as cursor:
            connection.autocommit = False
            connection.execute(
                f"CREATE TEMPORARY TABLE fresh (id text, vector vector({int(self.dimension)})) "
                "ON COMMIT DROP"
            )
            with cursor.copy("COPY fresh FROM STDIN") as copy:
                for passage, vector in zip(passages, vectors, strict=True):
                    copy.write_row((passage.id, vector))
            self._run(
                "UPDATE {table} SET vector = fresh.vector FROM fresh WHERE {table}.id = fresh.id",
                connection=connection,
            )
            yield connection.commit
            connection.rollback()

    def _search(self, questions, vectors: np.ndarray, k: int) -> list[list[Found]]:
        # One statement, so that all questions look at the same moment of the table.
        command = (
            "SELECT asked.number, near.* FROM unnest(%s::text[]) WITH ORDINALITY AS asked (v, number), "
            "LATERAL (SELECT id, title, text, topic, -(vector <#> asked.v::vector) FROM {table} "
            "ORDER BY vector <#> asked.v::vector LIMIT %s) AS near"
        )
        found: list[list[Found]] = [[] for _ in questions]
        told = [f"[{','.join(map(repr, vector.tolist()))}]" for vector in vectors]
        with self._asking(), self._connection.transaction():
            if self.index == "hnsw":
                self._run(f"SET LOCAL hnsw.ef_search = {min(max(self.effort, k), MOST_CANDIDATES)}")
            else:  # the table may have an approximate index, which PostgreSQL would use
                self._run("SET LOCAL enable_indexscan = off")
            for number, *row, score in self._run(command, [told, k]):
                found[number - 1].append(Found(Passage(*row), float(score)))
        return found

    # --- on disk -------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "conninfo": self.public(self._conninfo),
            "table": self.table,
            "dimension": self.dimension,
            "index": self.index,
            "effort": self.effort,
        }

    @staticmethod
    def public(conninfo: str) -> str:
        """Returns a connection string without its passwords."""
        psycopg = _psycopg()
        parts = psycopg.conninfo.conninfo_to_dict(conninfo)
        for secret in ("password", "sslpassword"):
            parts.pop(secret, None)
        return psycopg.conninfo.make_conninfo(**parts)

    @classmethod
    def lies_elsewhere(cls, settings: dict[str, Any]) -> bool:
        """Always true: the passages are in the database."""
        return True

    @classmethod
    def place(cls, settings: dict[str, Any]) -> str:
        """The address of the database, and the table."""
        return f"PostgreSQL at {settings['conninfo']}, table {settings['table']}"

    def _save(self, folder: pathlib.Path) -> None:
        """Saves only the location of the database."""

    @classmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        return cls(**settings, create=False)


def _psycopg():
    try:
        import pgvector.psycopg  # noqa: F401
        import psycopg
    except ImportError as error:
        raise missing("PostgreSQL needs psycopg and pgvector", "postgres") from error
    return psycopg
