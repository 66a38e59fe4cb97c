"""One battery for all objectives: gradients, padding, the order of passages, training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_rag import DATASET, EXAMPLES, KEY, batch_of, joint_task, rows, toy_parts

from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.fit import fit
from fedrag_jax.objectives import encoding
from fedrag_jax.objectives.distillation import METHODS, distillation, distilled
from fedrag_jax.objectives.generator import concatenated, ralt
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.retrieval.mining import Mining


@pytest.fixture(scope="module")
def parts():
    return toy_parts()


def overlap(questions, texts):
    """A teacher: how many letters question and passage share."""
    return [len({*q} & {*t}) / 3 for q, t in zip(questions, texts, strict=True)]


def ranking(**options):
    return lambda parts: multiple_negatives_ranking(parts.retriever, DATASET, **options)


def generating(make, k):
    return lambda parts: make(parts.decoder, parts.params, parts.adapters, parts.prompts, rows(k))


def joint(*train, marginal):
    return lambda parts: joint_task(parts, marginal=marginal, train=train)


def taught(method, **options):
    options = {"passages": 3, "train": ("query",)} | options
    if method == "teacher":
        return lambda parts: distilled(overlap, parts.retriever, EXAMPLES, **options)
    # Answers of a random decoder are all but impossible: probabilities would teach nothing.
    kind = {"signal": "log_probability"} if method in ("lsr", "replug") else {}
    return lambda parts: distillation(
        method,
        parts.decoder,
        {"decoder": parts.params, "adapters": parts.adapters},
        parts.prompts,
        parts.retriever,
        EXAMPLES,
        **kind | options,
    )


SIDES = ("query",), ("query", "document"), ("head",)
OBJECTIVES = {
    "concatenated": generating(concatenated, 2),
    "ralt": generating(ralt, 2),
    **{f"ranking {'+'.join(train)}": ranking(train=train) for train in SIDES},
    "ranking, mined": ranking(mining=Mining(2, share=1.0)),
    "ranking, chunks": ranking(at_once=3),
    "ranking, Matryoshka": ranking(dimensions=(4, 16)),
    **{
        f"RAG-{marginal} {'+'.join(train)}": joint(*train, marginal=marginal)
        for marginal in ("token", "sequence")
        for train in (("adapters", "query"), ("adapters",), *SIDES)
    },
    **{method: taught(method) for method in (*METHODS, "emdr", "teacher")},
    "lsr query+document": taught("lsr", train=("query", "document")),
    "pdist head": taught("pdist", train=("head",)),
}
# Losses that score each passage by itself, and sum over passages whatever their order.
ONE_BY_ONE = [
    name for name in OBJECTIVES if name.split()[0] not in ("concatenated", "ranking", "ranking,",
                                                           "adist")
]  # fmt: skip


@functools.cache
def objective(name):
    """`(task, batch)`."""
    task = OBJECTIVES[name](toy_parts())
    return task, batch_of(task)


@functools.cache
def program(loss):
    """One for values and gradients, of all tasks with an equal loss."""
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def value(task, batch):
    return program(task.loss)(task.trainable, task.frozen, batch, KEY)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_numbers_are_finite_and_padding_changes_nothing(name):
    task, batch = objective(name)
    loss, metrics = value(task, batch)
    assert np.isfinite([loss, *metrics.values()]).all()
    # A padded row weighs nothing, whatever it holds: here a copy of another.
    padded = {k: jnp.concatenate([v, v[1:3]]) for k, v in batch.items()}
    padded["weight"] = jnp.array([1, 1, 1, 1, 0, 0], jnp.float32)
    found, told = value(task, padded)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for metric, x in metrics.items():
        np.testing.assert_allclose(told[metric], x, rtol=1e-5, err_msg=metric)


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_the_order_of_passages_changes_nothing(name):
    task, batch = objective(name)
    k = 2 if name == "ralt" else 3
    order = np.array([2, 0, 1] if k == 3 else [1, 0])
    turned = {}
    for column, x in batch.items():
        by_passage = x.ndim > 1 and x.shape[1] == k and not column.startswith("question")
        turned[column] = x[:, order] if by_passage else x
    assert any((turned[c] != batch[c]).any() for c in batch)
    np.testing.assert_allclose(value(task, turned)[0], value(task, batch)[0], rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_reach_every_trainable_leaf(name):
    """A leaf with no gradient is a parameter nobody trains. A key's bias shifts all scores of a query
    alike, which softmax does not see."""
    task, batch = objective(name)
    _, gradient = program(task.loss)(task.trainable, task.frozen, batch, KEY)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        leaf = jax.tree_util.keystr(path)
        if "['k_proj']['bias']" not in leaf:
            assert np.abs(g).max() > 1e-7, f"{name}: no gradient for {leaf}"


@pytest.mark.parametrize(
    "name", ["ranking query+document", "ranking, mined", "RAG-token head", "lsr query+document"]
)
def test_a_large_corpus_stays_off_the_device(name, monkeypatch):
    task, batch = objective(name)
    loss, gradient = program(task.loss)(task.trainable, task.frozen, batch, KEY)
    monkeypatch.setattr(encoding, "ON_DEVICE", 0)
    large = OBJECTIVES[name](toy_parts())
    assert {*task.frozen} - {*large.frozen} == {"document_vectors"} or "document" in task.trainable
    assert not {"document_vectors", "passages"} & {*large.frozen}
    brought = batch_of(large)
    found, ours = program(large.loss)(large.trainable, large.frozen, brought, KEY)
    np.testing.assert_allclose(found[0], loss[0], rtol=1e-5)
    # Wider padding rounds otherwise; the largest entries are above 4.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, gradient
    )
    # Costs too are those of what is read, though padded to the longest there may be.
    assert large.cost.flops(large, brought) >= task.cost.flops(task, batch) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OBJECTIVES][::4])
def test_training_moves_what_is_trainable_and_nothing_else(name):
    task, _ = objective(name)
    before = jax.tree.map(np.array, (task.trainable, task.frozen))
    result = fit(task, EXAMPLES, rounds=1, batch_size=4)
    assert result.trainable.keys() == task.trainable.keys()
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - np.asarray(b)).max()), before[0], result.trainable
    )
    for part, changes in moved.items():
        assert max(jax.tree.leaves(changes)) > 0, f"{task.name}: {part} did not move"
    jax.tree.map(np.testing.assert_array_equal, before[1], result.frozen)


def test_equal_tasks_have_equal_losses():
    """So that one compiled program serves every client and seed."""
    losses = {}
    for name, make in OBJECTIVES.items():
        one, other = objective(name)[0].loss, make(toy_parts()).loss
        assert one == other and hash(one) == hash(other)
        losses.setdefault(one, []).append(name)
    # What is trained is no part of a loss, nor is where its prompts or negatives come from.
    kinds = {frozenset(name.split()[0].rstrip(",") for name in names) for names in losses.values()}
    assert {"concatenated", "ralt"} in kinds and {"RAG-sequence", "emdr"} in kinds
    assert len(losses) == 12


@pytest.mark.slow
def test_document_vectors_move_and_the_index_is_refreshed(parts):
    """Training the document side: every round searches an index of re-embedded passages."""

    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def round_end(self, state, record):
            self.seen.append(jax.tree.map(np.array, state.state.trainable))

    task = joint_task(parts, train=("query", "document"), passages=2)
    asked = []

    def retrieve(examples, trainable):
        asked.append((jax.tree.map(np.array, trainable), task.retrieve(examples, trainable)))
        return asked[-1][1]

    watch = Watch()
    fit(
        dataclasses.replace(task, retrieve=retrieve),
        EXAMPLES,
        rounds=3,
        batch_size=4,
        callbacks=[watch],
    )
    assert len(asked) == 3
    vectors = [parts.retriever.refresh(seen["document"]).vectors for seen in watch.seen]
    assert np.abs(vectors[0] - parts.retriever.vectors).max() > 1e-3
    assert np.abs(vectors[1] - vectors[0]).max() > 1e-3
    for (trainable, found), own in zip(asked[1:], watch.seen, strict=False):
        # Asked with what the round before had made, and answered from its own index.
        jax.tree.map(np.testing.assert_array_equal, trainable, own)
        current = parts.retriever.refresh(own["document"]).with_query(own["query"])
        expected = current.search([e.question for e in EXAMPLES], 2)[0]
        np.testing.assert_array_equal(found, expected)
