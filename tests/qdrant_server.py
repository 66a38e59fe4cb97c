"""Qdrant's REST interface over its embedded engine, for what crosses the wire: requests are parsed by
the types of Qdrant's own interface, and replies are of them.

Qdrant's server is no package of PyPI or Debian; FEDRAG_QDRANT names a real one to the tests.
"""

import contextlib
import importlib.metadata
import os
import threading

import pydantic
import qdrant_client
import uvicorn
from qdrant_client.http import models
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from fedrag_jax.server.address import listening

VERSION = importlib.metadata.version("qdrant-client")


def application() -> Starlette:
    """An ASGI application with a database of its own, in memory."""
    database = qdrant_client.QdrantClient(":memory:", force_disable_check_same_thread=True)
    alone = threading.Lock()

    def route(path: str, method: str, body, work):
        """A route whose body is of a type, and whose work takes a collection's name and the body."""

        async def answer(request: Request):
            raw = await request.body()
            parsed = pydantic.TypeAdapter(body).validate_json(raw) if body else None
            try:
                with alone:
                    result = work(request.path_params.get("name"), parsed)
            except ValueError as error:
                missing = "not found" in str(error)
                told = {"status": {"error": str(error)}, "time": 0.0}
                return JSONResponse(told, 404 if missing else 400)
            plain = pydantic.TypeAdapter(type(result)).dump_python(result, mode="json")
            return JSONResponse({"result": plain, "status": "ok", "time": 0.0})

        return Route(path, answer, methods=[method])

    def create(name, told):
        return database.create_collection(name, told.vectors)

    def aliases(_, told):
        return database.update_collection_aliases(told.actions)

    def upsert(name, told):
        return database.upsert(name, told.points)

    def scroll(name, told):
        points, following = database.scroll(
            name,
            limit=told.limit,
            offset=told.offset,
            with_payload=told.with_payload,
            with_vectors=told.with_vector,
        )
        return models.ScrollResult(points=points, next_page_offset=following)

    def query(name, told):
        return database.query_batch_points(name, told.searches)

    def retrieve(name, told):
        return database.retrieve(name, told.ids, told.with_payload, told.with_vector)

    name = "/collections/{name}"
    return Starlette(
        routes=[
            Route("/", lambda _: JSONResponse({"title": "qdrant", "version": VERSION})),
            route("/collections/aliases", "POST", models.ChangeAliasesOperation, aliases),
            route("/aliases", "GET", None, lambda *_: database.get_aliases()),
            route(name, "GET", None, lambda n, _: database.get_collection(n)),
            route(name, "PUT", models.CreateCollection, create),
            route(name, "DELETE", None, lambda n, _: database.delete_collection(n)),
            route(f"{name}/exists", "GET", None,
                  lambda n, _: models.CollectionExistence(exists=database.collection_exists(n))),
            route(f"{name}/points", "PUT", models.PointsList, upsert),
            route(f"{name}/points", "POST", models.PointRequest, retrieve),
            route(f"{name}/points/scroll", "POST", models.ScrollRequest, scroll),
            route(f"{name}/points/count", "POST", models.CountRequest,
                  lambda n, told: database.count(n, exact=told.exact)),
            route(f"{name}/points/delete", "POST", models.PointIdsList,
                  lambda n, told: database.delete(n, told)),
            route(f"{name}/points/query/batch", "POST", models.QueryRequestBatch, query),
        ]
    )  # fmt: skip


@contextlib.contextmanager
def served():
    """The address of a server: the one that FEDRAG_QDRANT names, or the engine behind its interface."""
    if address := os.environ.get("FEDRAG_QDRANT"):
        yield address
        return
    with listening("127.0.0.1", 0) as (listener, address):
        server = uvicorn.Server(uvicorn.Config(application(), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield address
        server.should_exit = True
        thread.join()
