"""Indexes of different age: what each policy re-embeds, and what questions then find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_rag import EXAMPLES, PASSAGES, joint_task, toy_parts

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.fit import fit
from fedrag_jax.objectives.encoding import as_trained
from fedrag_jax.retrieval.refresh import (
    NEVER,
    Index,
    Policy,
    first_index,
    next_index,
    search,
    staleness,
)
from fedrag_jax.tracking.checkpoints import Checkpointer

QUESTIONS = [e.question for e in EXAMPLES]
ALL, K = len(PASSAGES), 2


@pytest.fixture(scope="module")
def moved():
    """The untrained retriever, and one with a document encoder that has moved far: index as it was."""
    retriever = toy_parts().retriever
    document = jax.tree.map(lambda x: x + 0.5 * jnp.sin(1e3 * x), retriever.document)
    return retriever, as_trained(retriever, {"document": document}, fresh=False)


def fresh(retriever):
    return retriever.refresh(retriever.document).search(QUESTIONS, K)[0]


def after(policy, retriever, times=1):
    before = first_index(retriever)
    for _ in range(times + 1):  # the first finds it as it was made
        before = next_index(policy, retriever, QUESTIONS, K, before)
    return before


def test_what_has_moved_is_found_elsewhere(moved):
    """Or no policy could be told from another."""
    start, trained = moved
    assert (fresh(trained) != start.search(QUESTIONS, K)[0]).any()


def test_every_so_often_all_is_embedded_anew(moved):
    start, trained = moved
    whole = trained.refresh(trained.document).bare_vectors
    for times, age, embedded in ((1, 1, 0), (2, 2, 0), (3, 0, ALL), (4, 1, ALL), (6, 0, 2 * ALL)):
        index = after(Policy(every=3), trained, times)
        assert (index.age, index.embedded) == (age, embedded)
        expected = whole if times >= 3 else start.bare_vectors
        np.testing.assert_allclose(index.vectors, expected, atol=1e-6)
    np.testing.assert_array_equal(after(NEVER, trained, 5).vectors, start.bare_vectors)


@pytest.mark.parametrize("keep", [False, True])
def test_candidates_are_ranked_by_fresh_vectors(moved, keep):
    start, trained = moved
    policy = Policy(every=0, candidates=ALL, keep=keep)
    index = after(policy, trained)
    found, embedded = search(policy, trained, QUESTIONS, K, index.vectors)
    assert (index.embedded, embedded) == ((ALL, 0) if keep else (0, ALL))
    np.testing.assert_array_equal(found, fresh(trained))
    # Of as many candidates as are wanted, only the order can change.
    narrow = Policy(every=0, candidates=K)
    found, _ = search(narrow, trained, QUESTIONS, K, start.bare_vectors)
    stale = start.search(QUESTIONS, K)[0]
    np.testing.assert_array_equal(np.sort(found), np.sort(stale))


def test_only_candidates_enter_an_index_that_keeps_them(moved):
    start, trained = moved
    before = first_index(trained)._replace(age=np.array(0))
    policy = Policy(every=0, candidates=1, keep=True)
    index = next_index(policy, trained, QUESTIONS[:1], K, before)
    (row,) = start.search(QUESTIONS[:1], 1)[0][0]
    changed = np.abs(index.vectors - start.bare_vectors).max(1) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(changed), [row])
    whole = trained.refresh(trained.document).bare_vectors
    np.testing.assert_allclose(index.vectors[row], whole[row], atol=1e-6)
    assert index.embedded == 1


def test_staleness_is_the_share_of_passages_that_others_would_replace(moved):
    start, trained = moved
    stale, now = start.search(QUESTIONS, K)[0], fresh(trained)
    slow = np.mean([len({*a} - {*b}) / K for a, b in zip(stale, now, strict=True)])
    assert slow > 0
    share, embedded = staleness(trained, QUESTIONS, K, ALL)
    np.testing.assert_allclose(share, slow)
    assert embedded == ALL
    assert staleness(start, QUESTIONS, K, ALL)[0] == 0


def test_a_stale_index_is_replaced_and_a_fresh_one_is_not(moved):
    start, trained = moved
    share, _ = staleness(trained, QUESTIONS, K, 4 * K)
    for threshold, replaced in ((share - 0.01, True), (share, False)):
        index = after(Policy(every=0, staleness=threshold), trained)
        assert (index.age == 0) == replaced
        assert index.stale == share
    assert after(Policy(every=0, staleness=0.0), start).age == 1


# --- in training -------------------------------------------------------------------------------


class Watch(Callback):
    """What each round retrieved, and from which index."""

    def __init__(self):
        self.indexes, self.retrieved = [], []

    def round_end(self, state, record):
        self.indexes.append(state.index and Index(**state.index))
        self.retrieved.append(state.retrieved)


def trained_with(policy, rounds=3, callbacks=(), **settings):
    task = joint_task(toy_parts(), train=("query", "document"), passages=K, refresh=policy)
    return fit(task, EXAMPLES, rounds=rounds, batch_size=4, callbacks=callbacks, **settings)


def test_refreshing_every_time_is_what_happens_without_a_policy():
    watches = Watch(), Watch()
    plain, same = (
        trained_with(policy, callbacks=[watch])
        for policy, watch in zip((None, Policy()), watches, strict=True)
    )
    jax.tree.map(np.testing.assert_array_equal, plain.trainable, same.trainable)
    assert [i.embedded for i in watches[1].indexes] == [0, ALL, 2 * ALL]
    # What is ranked anew has been embedded, too.
    reranked = Watch()
    trained_with(Policy(every=0, candidates=ALL), callbacks=[reranked])
    assert [i.embedded for i in reranked.indexes] == [ALL, 2 * ALL, 3 * ALL]
    assert watches[0].indexes == [None] * 3


def test_an_index_that_is_never_refreshed_stays_as_it_was_and_changes_training():
    watch = Watch()
    never = trained_with(NEVER, callbacks=[watch])
    start = toy_parts().retriever.bare_vectors
    for index in watch.indexes:
        np.testing.assert_array_equal(index.vectors, start)
    always = trained_with(None)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), never.trainable, always.trainable)
    assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("policy", [Policy(every=2), Policy(every=0, candidates=3, keep=True)])
def test_a_resumed_fit_searches_the_index_it_had(policy, tmp_path):
    whole = trained_with(policy, rounds=4)
    trained_with(policy, rounds=2, callbacks=[Checkpointer(tmp_path)])
    resumed = trained_with(policy, rounds=4, callbacks=[Checkpointer(tmp_path)])
    jax.tree.map(np.testing.assert_array_equal, resumed.trainable, whole.trainable)


def test_models_of_their_own_cannot_share_an_index():
    clients = Partition(EXAMPLES, (np.arange(2), np.arange(2, 4)))
    task = joint_task(toy_parts(), train=("query", "document"), passages=K, refresh=NEVER)
    with pytest.raises(ConfigError, match="keeps one index for all"):
        fit(task, clients, local_only(), rounds=1)


@pytest.mark.parametrize(
    "policy, words",
    [
        (Policy(every=-1), "every >= 0"),
        (Policy(staleness=1.5), "staleness from 0 to 1"),
        (Policy(every=0, keep=True), "set `candidates`"),
        (Policy(candidates=3), "set every to 0"),
    ],
)
def test_policies_that_cannot_be_are_refused(policy, words):
    with pytest.raises(ConfigError, match=words):
        trained_with(policy)
