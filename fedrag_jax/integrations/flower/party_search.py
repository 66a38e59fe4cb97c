"""The party's side of retrieval over parties: searches its own index for the server's questions.

A party answers only if its node says so (`fedrag-share-passages`, off by default), because an answer
holds passages. It receives vectors of questions, not their texts.
"""

import hashlib
import json
from collections.abc import Callable

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedrag_jax.errors import ConfigError
from fedrag_jax.integrations.flower.party import NUMBER, answered
from fedrag_jax.integrations.flower.wire import from_record, to_record
from fedrag_jax.models.fingerprint import fingerprint
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.stores.passage_source import Found

SHARES = "fedrag-share-passages"  # in the configuration of a party's node


def share_passages(app: ClientApp, system: Callable[[Context], RAGSystem]) -> None:
    """Makes a party's app answer searches, if its node is told to.

    Args:
      system: function that returns the party's system; its store is searched.
    """

    @app.query("search")
    def search(message: Message, context: Context) -> Message:
        return answered(lambda: _found(message, context, system), message)


def encoder_of(retriever: Retriever) -> str:
    """Returns a hash of everything that passage vectors depend on but the passages."""
    model = fingerprint(retriever.document, retriever.tokenizer, retriever.encoder.config)
    head = b"" if retriever.head is None else np.ascontiguousarray(retriever.head).tobytes()
    return hashlib.sha256(model.digest() + head).hexdigest()[:16]


def _found(message: Message, context: Context, system_of) -> RecordDict:
    number = context.node_config.get(NUMBER)
    if not isinstance(number, int) or number < 0:
        raise ConfigError(f"{NUMBER} of the node's configuration must be a number, got {number!r}")
    if context.node_config.get(SHARES) is not True:
        raise ConfigError(
            f"party {number} does not share passages: fedrag federate join PARTY --share-passages"
        )
    system, order = system_of(context), message.content["order"]
    if system.store is None or system.store.dimension is None or not system.store.cosines:
        raise ConfigError(f"party {number} has no store of vectors: index its documents")
    if order["encoder"] != encoder_of(system.retriever):
        raise ConfigError(
            f"party {number} embeds passages with another encoder than the server: index them with "
            "the server's"
        )
    like = {"vectors": np.empty((int(order["questions"]), system.store.dimension), np.float32)}
    vectors = from_record(message.content["model"], like, "the server")["vectors"]
    found = system.store.search([""] * len(vectors), vectors, int(order["k"]))
    return _encoded(number, found)


def _encoded(number: int, found: list[list[Found]]) -> RecordDict:
    """An answer: each passage once, and for every question the places and scores of its k best.

    An approximate index may find fewer for some questions: their other places are -1.
    """
    depth = max(map(len, found), default=0)
    passages = [*dict.fromkeys(f.passage for some in found for f in some)]
    place = {passage: i for i, passage in enumerate(passages)}
    texts = json.dumps([[p.id, p.title, p.text] for p in passages], ensure_ascii=False)
    which = np.full((len(found), depth), -1, np.int32)
    scores = np.zeros((len(found), depth), np.float32)
    for row, some in enumerate(found):
        which[row, : len(some)] = [place[f.passage] for f in some]
        scores[row, : len(some)] = [f.score for f in some]
    answer = {
        "which": which,
        "scores": scores,
        "passages": np.frombuffer(texts.encode(), np.uint8),
    }
    about = {"client": number, "depth": depth, "bytes": len(answer["passages"])}
    return RecordDict({"model": to_record(answer), "about": ConfigRecord(about)})
