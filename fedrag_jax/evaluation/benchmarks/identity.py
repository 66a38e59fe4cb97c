"""Hashes of everything that a system's answers depend on: equal hashes give equal answers."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from fedrag_jax.data.examples import Passage
from fedrag_jax.models.fingerprint import fingerprint
from fedrag_jax.models.network import Network
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore


def corpus_of(system: RAGSystem) -> list[Passage] | None:
    """Returns the passages that a system answers from, ordered by id; None if its store does not list
    them."""
    if system.store is None:
        passages = system.retriever.passages
    elif isinstance(system.store, KnowledgeStore):
        passages = system.store.passages()
    else:
        return None
    return sorted(passages, key=lambda passage: passage.id)


def identity(system: RAGSystem, searches: bool, corpus: Iterable[Passage] | None) -> dict[str, str]:
    """Returns 16 hex characters of the sha256 of generator, adapters, prompts and, if the system
    searches, of the retriever and the corpus.

    For a store, settings and passages count, but not vectors, which `system.embed` determines. For a
    store that does not list its passages only the settings count, so changes there are not noticed.

    Args:
      searches: whether the system searches.
      corpus: the result of `corpus_of`.
    """
    prompts, retriever = system.prompts, system.retriever
    parts = {
        "generator": _model(system.decoder, system.generator.params, prompts.tokenizer),
        "adapters": _model(system.decoder, system.adapters, prompts.tokenizer),
        "prompts": _hash([repr((prompts.style, prompts.max_passage_tokens)).encode()]),
    }
    if not searches:
        return parts
    vectors = retriever.vectors if system.store is None else None
    searched = retriever.query, retriever.document, retriever.head, vectors
    store = "corpus" if system.store is None else json.dumps(system.store.description())
    passages = (json.dumps(dataclasses.astuple(p)).encode() + b"\n" for p in corpus or ())
    return parts | {
        "retriever": _model(retriever.encoder, searched, retriever.tokenizer),
        "corpus": "not listed" if corpus is None else _hash(passages),
        "search": f"{store}, top_k {system.top_k}, score_scale {system.score_scale:g}",
    }


def _model(network: Network, params: Any, tokenizer: Any) -> str:
    return fingerprint(params, tokenizer, network.config, network.lora).hexdigest()[:16]


def _hash(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]
