"""What a system's answers depend on, part by part, as hashes: systems that share them answer alike."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.models.network import Network
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.knowledge import KnowledgeStore


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

    Of a store the passages count, not their vectors: those are what `system.embed` gives. Of one that
    does not list them, its kind alone: changes there go unseen.

    Args:
      searches: whether it does.
      corpus: what `corpus_of` gives.
    """
    prompts, retriever = system.prompts, system.retriever
    parts = {
        "generator": _model(system.decoder, system.generator.params, prompts.tokenizer),
        "adapters": _hash(_arrays(system.adapters)),
        "prompts": _hash([repr((prompts.style, prompts.max_passage_tokens)).encode()]),
    }
    if not searches:
        return parts
    vectors = retriever.vectors if system.store is None else None
    searched = retriever.query, retriever.document, retriever.head, vectors
    store = "corpus" if system.store is None else system.store.kind
    passages = (json.dumps(dataclasses.astuple(p)).encode() + b"\n" for p in corpus or ())
    return parts | {
        "retriever": _model(retriever.encoder, searched, retriever.tokenizer),
        "corpus": "not listed" if corpus is None else _hash(passages),
        "search": f"{store}, top_k {system.top_k}, score_scale {system.score_scale:g}",
    }


def _model(network: Network, params: Any, tokenizer: Any) -> str:
    # What the last call cut and padded to are states of the tokenizer's object, not of the tokenizer.
    settings = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": 0, "padding": 0}
    how = repr((network.config, network.lora)) + json.dumps(settings, sort_keys=True)
    return _hash([how.encode(), *_arrays(params)])


def _arrays(tree: Any) -> Iterable[bytes | np.ndarray]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        leaf = np.asarray(leaf)
        yield f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode()
        yield np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _hash(pieces: Iterable[bytes | np.ndarray]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]
