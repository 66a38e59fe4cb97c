"""Vectors of questions and passages inside a loss, for any trained part of the retriever.

The parts of a retriever are: `query` and `document`, the parameters of its two encoders; `head`, a
matrix after both of them; `document_vectors` [N, D] of a frozen document encoder; and `passages`, the
tokens and mask [N, T] of the corpus, if the document encoder is trained. A large corpus is not a part:
its vectors or tokens come with each batch (`Passages`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.data.corpora import Pool
from fedrag_jax.data.padding import encoder_table
from fedrag_jax.errors import ConfigError
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.task import PyTree
from fedrag_jax.retrieval.refresh import Index, Policy, first_index, next_index, search
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.similarity import passage_side, question_side

ON_DEVICE = (
    2**30
)  # bytes of a corpus, its vectors or its tokens, that a task holds on the device at most


def trained_parts(retriever: Retriever, train: tuple[str, ...]) -> tuple[PyTree, PyTree]:
    """Returns the parts of a retriever for a loss, `(trainable, frozen)`, if `train` names the trained
    ones.

    A missing head starts as the identity.

    Raises:
      ConfigError: an unknown part, or none.
    """
    if not train or {*train} - {"query", "document", "head"}:
        raise ConfigError(
            f"a retriever trains one or several of 'query', 'document' and 'head', got {train}"
        )
    head = retriever.head
    if "head" in train and head is None:
        head = np.eye(retriever.bare_vectors.shape[1], dtype=np.float32)
    parts = {"query": retriever.query, "document": retriever.document, "head": head}
    trainable = {name: parts[name] for name in train}
    frozen = {} if head is None or "head" in train else {"head": jnp.asarray(head)}
    if "document" in train and "query" not in train:
        frozen["query"] = retriever.query
    return trainable, frozen | Passages(retriever, train).parts()


def as_trained(retriever: Retriever, trained: PyTree, fresh: bool = True) -> Retriever:
    """Returns the retriever with the parts in `trained`, and with a fresh or the old index."""
    trained = {name: trained[name] for name in ("query", "document", "head") if name in trained}
    if "head" in trained:
        trained["head"] = np.asarray(trained["head"])
    retriever = dataclasses.replace(retriever, **trained)
    if fresh and "document" in trained:
        return retriever.refresh(retriever.document)
    # What was searched is behind the head that was there.
    return retriever.with_head(retriever.head) if "head" in trained else retriever


def found_by(retriever: Retriever, examples, k: int, pool: Pool | None = None):
    """Returns corpus rows and similarities [N, k], best first; only from `pool(example)`, if given."""
    questions = [e.question for e in examples]
    if pool is None:
        return retriever.search(questions, k)
    return retriever.search_within(questions, [pool(e) for e in examples], k)


def too_few(k: int) -> str:
    """Returns the reason why a retriever learns nothing from k passages per question; "" if it can."""
    if k > 1:
        return ""
    return (
        "a retriever learns from the differences between passages, so it needs at least two, got "
        f"{k}: raise `passages` (for a system, `marginal_k`)"
    )


def searching(
    retriever: Retriever,
    train: tuple[str, ...],
    k: int,
    policy: Policy | None = None,
    pool: Pool | None = None,
) -> dict[str, Any]:
    """Returns `retrieve`, `index`, `spent` for a `Task` that retrieves the k best passages during
    training.

    Args:
      train: the trained parts.
      policy: the refresh policy of the index; None re-embeds everything each time.
      pool: `pool(example)`: the corpus rows that an example may find; default: all.

    Raises:
      ConfigError: an invalid policy, or a policy together with a pool or with fixed document vectors.
    """
    if policy is None:
        return {
            "retrieve": lambda e, trained: found_by(as_trained(retriever, trained), e, k, pool)[0],
            "spent": retriever.spent,
        }
    policy.check()
    if "document" not in train or pool is not None:
        raise ConfigError(
            "a refresh policy needs one index whose document encoder is trained: train 'document' and "
            f"give no pool, or leave `refresh` out; got train={train}"
        )

    def retrieve(examples, trained, before):
        current = as_trained(retriever, trained, fresh=False)
        questions = [e.question for e in examples]
        index = next_index(policy, current, questions, k, Index(**before))
        rows, embedded = search(policy, current, questions, k, index.vectors)
        return rows, index._replace(embedded=index.embedded + embedded)._asdict()

    index = first_index(retriever)._asdict()
    return {"retrieve": retrieve, "index": index, "spent": retriever.spent}


def question_vectors(encoder: Network, parts: PyTree, batch, at_once: int = 0) -> jax.Array:
    """Returns vectors [B, D] of a batch's questions, whose inner products are similarities.

    The batch holds `question_tokens`, `question_mask` [B, T], or `question_vectors` [B, D] of a frozen
    query encoder.
    """
    if "question_vectors" in batch:
        vectors = batch["question_vectors"]
    else:
        tokens, mask = batch["question_tokens"], batch["question_mask"]
        vectors = encode(encoder, parts["query"], tokens, mask, at_once)
    return question_side(vectors, encoder.config, parts.get("head"))


def passage_vectors(
    encoder: Network, parts: PyTree, batch, *names: str, at_once: int = 0
) -> jax.Array:
    """Returns vectors [M, D] of passages, for inner products.

    Args:
      names: columns of the batch with corpus rows int [B, ...], -1 for none; M is the total number of
        entries, one column after another.
    """
    if "document" in parts:
        read = [_read(parts, batch, name) for name in names]
        tokens, mask = (jnp.concatenate(arrays) for arrays in zip(*read, strict=True))
        vectors = encode(encoder, parts["document"], tokens, mask, at_once)
    else:
        vectors = jnp.concatenate([_known(parts, batch, name) for name in names])
        # They may be kept in half precision.
        vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    return passage_side(vectors, encoder.config, parts.get("head"))


def _rows(batch, name: str) -> jax.Array:
    return jnp.maximum(batch[name].reshape(-1), 0)


def _read(parts: PyTree, batch, name: str) -> tuple[jax.Array, jax.Array]:
    """Tokens and mask [M, T] of a column of passages."""
    if "passages" in parts:
        rows = _rows(batch, name)
        return parts["passages"]["tokens"][rows], parts["passages"]["mask"][rows]
    tokens, mask = batch[f"{name}_tokens"], batch[f"{name}_mask"]
    return tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1])


def _known(parts: PyTree, batch, name: str) -> jax.Array:
    """Frozen vectors [M, D] of a column of passages."""
    if "document_vectors" in parts:
        return parts["document_vectors"][_rows(batch, name)]
    vectors = batch[f"{name}_vectors"]
    return vectors.reshape(-1, vectors.shape[-1])


def encode(encoder: Network, params: PyTree, tokens, mask, at_once: int = 0) -> jax.Array:
    """Returns vectors [N, D] of texts [N, T], encoding `at_once` of them at a time; 0 encodes all
    together.

    The backward pass needs memory for `at_once` texts and for all vectors, because every chunk is
    encoded again for its own gradient, as in GradCache (Gao et al. 2021, 2101.06983). The gradient is
    that of the whole batch.
    """
    if not 0 < at_once < len(tokens):
        return encoder(params, tokens, mask)
    missing = -len(tokens) % at_once
    chunks = jnp.pad(tokens, ((0, missing), (0, 0))), jnp.pad(mask, ((0, missing), (0, 0)))
    chunks = jax.tree.map(lambda x: x.reshape(-1, at_once, x.shape[1]), chunks)
    vectors = jax.lax.map(jax.checkpoint(lambda chunk: encoder(params, *chunk)), chunks)
    return vectors.reshape(-1, vectors.shape[-1])[: len(tokens)]


def passage_scores(encoder: Network, parts: PyTree, batch, score_scale: float) -> jax.Array:
    """Returns the scaled similarity [B, k] of each question with its `retrieved` passages, int [B,
    k]."""
    queries = question_vectors(encoder, parts, batch)
    passages = passage_vectors(encoder, parts, batch, "retrieved")
    passages = passages.reshape(*batch["retrieved"].shape, -1)
    return score_scale * jnp.einsum("bd,bkd->bk", queries, passages)


class Questions:
    """Collates questions for the query encoder, those of training in one width.

    Args:
      examples: all training examples. Longer questions, which may be held out, are collated in a width
        of their own instead of being truncated.
      frozen: whether the questions' vectors are fixed; then vectors are returned instead of tokens.
    """

    def __init__(self, retriever: Retriever, examples, frozen: bool = False, max_length: int = 0):
        # Without what comes after these vectors in the loss: a head, and what is added for distances.
        bare = dataclasses.replace(retriever, head=None)
        if retriever.encoder.config.similarity == "euclidean":
            config = dataclasses.replace(bare.encoder.config, similarity="dot")
            encoder = dataclasses.replace(bare.encoder, config=config)
            bare = dataclasses.replace(bare, encoder=encoder)
        self._retriever, self._frozen = bare, frozen
        self._known: dict[str, np.ndarray] = {}
        if not frozen:
            self._most = max_length or retriever.encoder.config.max_length
            texts = retriever.question_texts([e.question for e in examples])
            self._width = encoder_table(retriever.tokenizer, texts, self._most)["tokens"].shape[1]

    def __call__(self, examples) -> dict[str, np.ndarray]:
        """`question_tokens`, `question_mask` [N, width], or `question_vectors` [N, D]."""
        texts = [e.question for e in examples]
        if self._frozen:
            missing = list(dict.fromkeys(t for t in texts if t not in self._known))
            if missing:
                vectors = self._retriever.embed_questions(missing)
                self._known.update(zip(missing, vectors, strict=True))
            return {"question_vectors": np.stack([self._known[t] for t in texts])}
        read = self._retriever.question_texts(texts)
        table = encoder_table(self._retriever.tokenizer, read, self._most)
        pad = ((0, 0), (0, max(0, self._width - table["tokens"].shape[1])))
        return {f"question_{name}": np.pad(array, pad) for name, array in table.items()}


class Passages:
    """Provides passages for a loss: a small corpus is completely on the device; for a large one, the
    passages come with each batch.

    Args:
      train: the trained parts; with "document", passages are tokens, otherwise vectors.
    """

    def __init__(self, retriever: Retriever, train: tuple[str, ...]):
        self._retriever, self._tokens = retriever, "document" in train
        self._most = retriever.encoder.config.max_length
        one = self._most * (np.dtype(np.int32).itemsize + np.dtype(bool).itemsize)
        size = one * len(retriever.passages) if self._tokens else retriever.bare_vectors.nbytes
        self._on_device = size <= ON_DEVICE

    def parts(self) -> PyTree:
        """Returns `passages` or `document_vectors` of the whole corpus; nothing for a large one."""
        if not self._on_device:
            return {}
        if not self._tokens:
            return {"document_vectors": jnp.asarray(self._retriever.bare_vectors)}
        table = self._table(self._retriever.passages)
        return {"passages": {name: jnp.asarray(array) for name, array in table.items()}}

    def __call__(self, **rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the batch columns for corpus rows int [N, ...] (-1 for none), by the column's name:
        `<name>_vectors` [N, ..., D], or `<name>_tokens` and `<name>_mask` [N, ..., T]."""
        if self._on_device:
            return {}
        found = {}
        for name, wanted in rows.items():
            unique, inverse = np.unique(np.maximum(wanted, 0), return_inverse=True)
            inverse = inverse.reshape(wanted.shape)
            if not self._tokens:
                found[f"{name}_vectors"] = np.asarray(self._retriever.bare_vectors[unique])[inverse]
                continue
            for part, array in self._table(
                [self._retriever.passages[int(i)] for i in unique]
            ).items():
                room = ((0, 0), (0, self._most - array.shape[1]))  # one width for all batches
                found[f"{name}_{part}"] = np.pad(array, room)[inverse]
        return found

    def _table(self, passages) -> dict[str, np.ndarray]:
        texts = self._retriever.passage_texts(passages)
        return encoder_table(self._retriever.tokenizer, texts, self._most)
