"""When and how an index follows a document encoder that is being trained.

Re-embedding a corpus is what training both encoders costs most (Atlas, 2208.03299, section 2.4; REALM,
2002.08909, section 3.3). A policy says how much of it is done before the questions are searched again.

| policy | re-embeds | a question sees |
|---|---|---|
| `Policy(every=1)` | all, each time | the fresh index |
| `Policy(every=R)` | all, each R-th time | an index up to R times old |
| `NEVER` | nothing | the index of the beginning |
| `Policy(staleness=s)` | all, when s of a probe's passages would be others | an index not too old |
| `Policy(every=0, candidates=L)` | the L passages nearest to each question | these, ranked anew |
| `Policy(every=0, candidates=L, keep=True)` | the same | these, and they stay in the index |

Query-side tuning needs none: no document vector moves. Whatever the index, it only chooses the
passages; scores inside a loss are those of the current encoders.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedrag_jax.clock import Clock
from fedrag_jax.errors import ConfigError
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.similarity import passage_side


class Policy(NamedTuple):
    """See the table above; what is set acts together.

    Attributes:
      every: retrievals from one re-embedding of the corpus to the next; 0 for never.
      staleness: in [0, 1]; re-embed the corpus when a larger share of the passages that probe questions
        find is not what they would find with fresh vectors. It is estimated from the `candidates` of
        the probe, or 4 times as many as it finds. Takes the place of `every`.
      probe: questions it is measured on, the first of those in use.
      candidates: passages retrieved for each question from the index, re-embedded and ranked anew.
      keep: whether these fresh vectors are put into the index.
    """

    every: int = 1
    staleness: float | None = None
    probe: int = 64
    candidates: int = 0
    keep: bool = False

    def check(self) -> "Policy":
        """The policy.

        Raises:
          ConfigError: a number out of its range, `keep` without candidates, or candidates of an index
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
                "a refresh policy that re-embeds all each time (every=1) leaves no candidates to rank "
                "anew: set every to 0, or above 1"
            )
        return self


NEVER = Policy(every=0)


class Index(NamedTuple):
    """The vectors that are searched, and what became of them.

    Attributes:
      vectors: float32 [N, D], of the document encoder, each as old as it is.
      age: retrievals since all were fresh; -1 before the first, which finds them so.
      embedded: passages re-embedded since the beginning.
      stale: the share of a probe's passages that were others when last measured; NaN if never.
    """

    vectors: np.ndarray
    age: np.ndarray
    embedded: np.ndarray
    stale: np.ndarray


def first_index(retriever: Retriever) -> Index:
    """That of the untrained retriever."""
    return Index(
        np.asarray(retriever.bare_vectors),
        np.array(-1),
        np.array(0),
        np.array(np.nan),
    )


def next_index(
    policy: Policy, retriever: Retriever, questions: Sequence[str], k: int, before: Index
) -> Index:
    """The index that questions are to be searched in next.

    Args:
      retriever: with current parameters; its own index is not looked at.
      questions: in use; the probe is taken from them, and so are candidates to be kept.
      k: passages that are retrieved for each.
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
    """`(rows, embedded)`: corpus rows int32 [Q, k], best first, and how many passages were re-embedded.

    Args:
      vectors: [N, D] of an `Index`; what is searched, and ranked anew if the policy says so.
    """
    old = retriever.with_vectors(vectors)
    if not policy.candidates or policy.keep:
        return old.search(questions, k)[0], 0
    return _reranked(old, questions, k, policy.candidates)[1:]


def staleness(
    retriever: Retriever, questions: Sequence[str], k: int, candidates: int
) -> tuple[float, int]:
    """`(share, embedded)`: of the k passages of each question, those that fresh vectors would replace.

    The fresh ones are looked for among so many candidates of the old index, of which `embedded` are
    re-embedded; an underestimate where a passage comes from further down.
    """
    stale, fresh, embedded = _reranked(retriever, questions, k, candidates)
    kept = [np.isin(a, b).mean() for a, b in zip(stale, fresh, strict=True)]
    return float(1 - np.mean(kept)), embedded


def _reranked(retriever, questions, k, candidates) -> tuple[np.ndarray, np.ndarray, int]:
    """The best k under the index' vectors, the best k of the candidates under fresh ones, and how many
    passages were re-embedded."""
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
