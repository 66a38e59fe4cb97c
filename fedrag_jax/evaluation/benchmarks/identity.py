"""What a system's answers depend on, part by part, as hashes: systems that share them answer alike."""

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
    """The passages that a system answers from, in the order of their ids; None where it searches with
    somebody who does not list them."""
    if system.store is None:
        passages = system.retriever.passages
    elif isinstance(system.store, KnowledgeStore):
        passages = system.store.passages()
    else:
        return None
    return sorted(passages, key=lambda passage: passage.id)


def identity(system: RAGSystem, searches: bool, corpus: Iterable[Passage] | None) -> dict[str, str]:
    """16 hex characters of the sha256 of generator, adapters, prompts and, where it searches, of the
    retriever and the corpus.

    Of a store its settings and passages count, not their vectors: those are what `system.embed` gives.
    Of one that does not list passages, its settings alone: changes there go unseen.

    Args:
      searches: whether it does.
      corpus: what `corpus_of` gives.
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
    store = "corpus" if system.store is None else json.dumps(system.store.told())
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
