"""Vectors of questions and passages inside a loss, whichever part of the retriever is trained.

Parts of a retriever, by name: `query` and `document`, the parameters of its two encoders; `head`, a
matrix after both of them; `document_vectors` [N, D] of a frozen document encoder; `passages`, the
tokens and mask [N, T] of the corpus, where the document encoder is trained. A large corpus is no part:
batches bring what they read of it (`Passages`).
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
    """What a loss needs of a retriever, `(trainable, frozen)`, if `train` is what moves.

    A head that is not there yet starts as the identity.

    Raises:
      ConfigError: a part that no retriever has, or none.
    """
    if not train or {*train} - {"query", "document", "head"}:
        raise ConfigError(
            f"a retriever trains its 'query', 'document' or 'head', one or several, got {train}"
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
    """The retriever with those of its parts that `trained` has, its index fresh or as it was."""
    trained = {name: trained[name] for name in ("query", "document", "head") if name in trained}
    if "head" in trained:
        trained["head"] = np.asarray(trained["head"])
    retriever = dataclasses.replace(retriever, **trained)
    if fresh and "document" in trained:
        return retriever.refresh(retriever.document)
    # What was searched is behind the head that was there.
    return retriever.with_head(retriever.head) if "head" in trained else retriever


def found_by(retriever: Retriever, examples, k: int, pool: Pool | None = None):
    """Corpus rows and similarities [N, k], best first; of `pool(example)` alone, where there is one."""
    questions = [e.question for e in examples]
    if pool is None:
        return retriever.search(questions, k)
    return retriever.search_within(questions, [pool(e) for e in examples], k)


def too_few(k: int) -> str:
    """Why a retriever learns nothing from the k best passages of each question; "" where it may."""
    if k > 1:
        return ""
    return (
        "a retriever learns from the differences between passages, so it needs two at least, got "
        f"{k}: raise `passages` (of a system `marginal_k`)"
    )


def searching(
    retriever: Retriever,
    train: tuple[str, ...],
    k: int,
    policy: Policy | None = None,
    pool: Pool | None = None,
) -> dict[str, Any]:
    """`retrieve`, `index`, `spent` of a `Task` that searches for the k best passages as it is trained.

    Args:
      train: what moves.
      policy: of keeping the index fresh; None where all is re-embedded each time.
      pool: `pool(example)`, the corpus rows that it may find; all, unless given.

    Raises:
      ConfigError: a policy that cannot be, or one with a pool or where no document vector moves.
    """
    if policy is None:
        return {
            "retrieve": lambda e, trained: found_by(as_trained(retriever, trained), e, k, pool)[0],
            "spent": retriever.spent,
        }
    policy.check()
    if "document" not in train or pool is not None:
        raise ConfigError(
            "a refresh policy is for one index of passages whose encoder moves: train 'document', and "
            f"give no pool, or leave `refresh` away; got train={train}"
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
    """Vectors [B, D] of the questions of a batch, whose inner products are similarities.

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
    """Vectors [M, D] of passages, for inner products.

    Args:
      names: columns of the batch with their corpus rows int [B, ...], -1 for none; M is how many there
        are in all of them, one column after another.
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
    """Vectors [N, D] of texts [N, T], `at_once` of them at a time; 0 takes all together.

    Memory for the backward pass is that of `at_once` texts and the vectors of all, because every chunk
    is encoded again for its own gradient: what GradCache (Gao et al. 2021, 2101.06983) does by hand.
    The gradient is that of the whole batch.
    """
    if not 0 < at_once < len(tokens):
        return encoder(params, tokens, mask)
    missing = -len(tokens) % at_once
    chunks = jnp.pad(tokens, ((0, missing), (0, 0))), jnp.pad(mask, ((0, missing), (0, 0)))
    chunks = jax.tree.map(lambda x: x.reshape(-1, at_once, x.shape[1]), chunks)
    vectors = jax.lax.map(jax.checkpoint(lambda chunk: encoder(params, *chunk)), chunks)
    return vectors.reshape(-1, vectors.shape[-1])[: len(tokens)]


def passage_scores(encoder: Network, parts: PyTree, batch, score_scale: float) -> jax.Array:
    """Scaled similarity [B, k] of each question with the passages `retrieved` int [B, k] for it."""
    queries = question_vectors(encoder, parts, batch)
    passages = passage_vectors(encoder, parts, batch, "retrieved")
    passages = passages.reshape(*batch["retrieved"].shape, -1)
    return score_scale * jnp.einsum("bd,bkd->bk", queries, passages)


class Questions:
    """Questions as the query encoder reads them, all of one width.

    Args:
      examples: all that may be trained on.
      frozen: whether nothing moves that their vectors depend on: these are then given instead.
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
            most = max_length or retriever.encoder.config.max_length
            texts = retriever.question_texts([e.question for e in examples])
            self._width = encoder_table(retriever.tokenizer, texts, most)["tokens"].shape[1]

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
        table = encoder_table(self._retriever.tokenizer, read, self._width)
        pad = ((0, 0), (0, self._width - table["tokens"].shape[1]))
        return {f"question_{name}": np.pad(array, pad) for name, array in table.items()}


class Passages:
    """Passages as a loss reads them: of a small corpus all, on the device; of a large one those of a
    batch, which come with it.

    Args:
      train: what moves; with "document" in it passages are read as tokens, else as their vectors.
    """

    def __init__(self, retriever: Retriever, train: tuple[str, ...]):
        self._retriever, self._tokens = retriever, "document" in train
        self._most = retriever.encoder.config.max_length
        one = self._most * (np.dtype(np.int32).itemsize + np.dtype(bool).itemsize)
        size = one * len(retriever.passages) if self._tokens else retriever.bare_vectors.nbytes
        self._on_device = size <= ON_DEVICE

    def parts(self) -> PyTree:
        """`passages` or `document_vectors` of the whole corpus; none of a large one."""
        if not self._on_device:
            return {}
        if not self._tokens:
            return {"document_vectors": jnp.asarray(self._retriever.bare_vectors)}
        table = self._table(self._retriever.passages)
        return {"passages": {name: jnp.asarray(array) for name, array in table.items()}}

    def __call__(self, **rows: np.ndarray) -> dict[str, np.ndarray]:
        """What a batch has to bring for corpus rows int [N, ...], -1 for none, by the column's name:
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
