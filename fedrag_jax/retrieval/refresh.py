"""Refresh policies: when and how an index follows a document encoder in training.

Re-embedding the corpus is the main cost of training both encoders (Atlas, 2208.03299, section 2.4;
REALM, 2002.08909, section 3.3). A policy sets how much is re-embedded before the next retrieval.

| policy | re-embeds | a question sees |
|---|---|---|
| `Policy(every=1)` | all, at every retrieval | a fresh index |
| `Policy(every=R)` | all, at every R-th retrieval | an index up to R retrievals old |
| `NEVER` | nothing | the initial index |
| `Policy(staleness=s)` | all, when s of a probe's passages would change | an index not too old |
| `Policy(every=0, candidates=L)` | the L passages nearest to each question | these, reranked |
| `Policy(every=0, candidates=L, keep=True)` | the same | these, and they stay in the index |

Query-side tuning needs no policy, because document vectors do not change. The index only selects the
passages; scores inside a loss always come from the current encoders.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedrag_jax.clock import Clock
from fedrag_jax.errors import ConfigError
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.similarity import passage_side


class Policy(NamedTuple):
    """A refresh policy, see the table above; its settings can be combined.

    Attributes:
      every: number of retrievals between two re-embeddings of the corpus; 0 for never.
      staleness: in [0, 1]; the corpus is re-embedded when a larger share of the passages found by probe
        questions would be replaced with fresh vectors. The share is estimated from the `candidates` of
        the probe, or from 4 times as many passages as it finds. Replaces `every`.
      probe: number of probe questions, the first of those in use.
      candidates: number of passages per question that are retrieved, re-embedded and reranked.
      keep: whether these fresh vectors are stored in the index.
    """

    every: int = 1
    staleness: float | None = None
    probe: int = 64
    candidates: int = 0
    keep: bool = False

    def check(self) -> "Policy":
        """Returns the policy if it is valid.

        Raises:
          ConfigError: a number out of its range, `keep` without candidates, or candidates with an index
            that is always fresh.
        """
        share = 0 if self.staleness is None else self.staleness
        if self.every < 0 or self.candidates < 0 or self.probe < 1 or not 0 <= share <= 1:
            raise ConfigError(
                "a refresh policy needs every >= 0, candidates >= 0, probe >= 1 and a staleness from 0 "
                f"to 1, got {self}"
            )
        if self.keep and not self.candidates:
            raise ConfigError("a refresh policy that keeps candidates needs some: set `candidates`")
        if self.candidates and self.every == 1 and self.staleness is None:
            raise ConfigError(
                "a refresh policy that re-embeds everything at every retrieval (every=1) leaves no "
                "candidates to rerank: set every to 0, or above 1"
            )
        return self


NEVER = Policy(every=0)


class Index(NamedTuple):
    """The searched vectors and their history.

    Attributes:
      vectors: float32 [N, D] of the document encoder, of different ages.
      age: retrievals since all vectors were fresh; -1 before the first retrieval.
      embedded: number of passages re-embedded since the start.
      stale: share of stale passages in the last probe; NaN if never measured.
    """

    vectors: np.ndarray
    age: np.ndarray
    embedded: np.ndarray
    stale: np.ndarray


def first_index(retriever: Retriever) -> Index:
    """Returns the index of the untrained retriever."""
    return Index(
        np.asarray(retriever.bare_vectors),
        np.array(-1),
        np.array(0),
        np.array(np.nan),
    )


def next_index(
    policy: Policy, retriever: Retriever, questions: Sequence[str], k: int, before: Index
) -> Index:
    """Returns the index for the next retrieval.

    Args:
      retriever: the retriever with current parameters; its own index is ignored.
      questions: the questions in use, for the probe and for kept candidates.
      k: number of passages per question.
    """
    vectors, age, embedded = before.vectors, before.age + 1, before.embedded
    due, stale = policy.every > 0 and age >= policy.every, before.stale
    if age == 0:
        return before._replace(age=np.asarray(age))
    if policy.staleness is not None:
        old, probe = retriever.with_vectors(vectors), questions[: policy.probe]
        share, count = staleness(old, probe, k, policy.candidates or 4 * k)
        due, stale, embedded = share > policy.staleness, np.array(share), embedded + count
    if due:
        vectors = retriever.embed_passages(retriever.document)
        age, embedded = np.zeros((), np.int64), embedded + len(vectors)
    elif policy.keep:
        old = retriever.with_vectors(vectors)
        rows = np.unique(old.search(questions, _at_most(old, policy.candidates))[0])
        vectors = vectors.copy()
        vectors[rows] = retriever.embed_passages(retriever.document, rows)
        embedded = embedded + len(rows)
    return Index(vectors, np.asarray(age), np.asarray(embedded), stale)


def search(
    policy: Policy, retriever: Retriever, questions: Sequence[str], k: int, vectors: np.ndarray
) -> tuple[np.ndarray, int]:
    """Returns corpus rows int32 [Q, k], best first, and the number of re-embedded passages.

    Args:
      vectors: [N, D] of an `Index`, to search, and to rerank if the policy says so.
    """
    old = retriever.with_vectors(vectors)
    if not policy.candidates or policy.keep:
        return old.search(questions, k)[0], 0
    return _reranked(old, questions, k, policy.candidates)[1:]


def staleness(
    retriever: Retriever, questions: Sequence[str], k: int, candidates: int
) -> tuple[float, int]:
    """Returns the share of each question's k passages that fresh vectors would replace, and the number
    of re-embedded passages.

    Fresh results are searched among the `candidates` of the old index. The share is an underestimate if
    a passage would come from further down.
    """
    stale, fresh, embedded = _reranked(retriever, questions, k, candidates)
    kept = [np.isin(a, b).mean() for a, b in zip(stale, fresh, strict=True)]
    return float(1 - np.mean(kept)), embedded


def _reranked(retriever, questions, k, candidates) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the best k by the index's vectors, the best k of the candidates by fresh vectors, and the
    number of re-embedded passages."""
    clock = Clock()
    queries = retriever.embed_questions(questions)
    rows, _ = retriever.index.search(queries, _at_most(retriever, max(candidates, k)))
    retriever.spent.searching += clock.lap().others
    used, place = np.unique(rows, return_inverse=True)
    fresh = retriever.embed_passages(retriever.document, used)
    fresh = passage_side(fresh, retriever.encoder.config, retriever.head)
    scores = np.einsum("qd,qkd->qk", queries, fresh[place.reshape(rows.shape)])
    order = np.lexsort((rows, -scores))[:, :k]
    return rows[:, :k], np.take_along_axis(rows, order, 1), len(used)


def _at_most(retriever: Retriever, count: int) -> int:
    return min(count, len(retriever.passages))
