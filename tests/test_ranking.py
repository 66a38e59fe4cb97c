"""Learning from labels: ranking among negatives, mined or not, in one go or by chunks, cut short."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_rag import DATASET, EXAMPLES, KEY, PASSAGES, batch_of, toy_parts

from fedrag_jax.data.corpora import own_passages
from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.fit import fit
from fedrag_jax.objectives.distillation import distillation
from fedrag_jax.objectives.encoding import encode
from fedrag_jax.objectives.joint import marginal_likelihood
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.retrieval.mining import Mining, hard_negatives

GOLDS = np.array([[0, -1], [1, -1], [0, -1], [3, 2]])
EASY = Mining(count=2, share=1.0)


@pytest.fixture(scope="module")
def retriever():
    return toy_parts().retriever


def loss_of(task, batch):
    return jax.jit(task.loss)(task.trainable, task.frozen, batch, KEY)[0]


def unit(vectors):
    return np.asarray(vectors) / np.linalg.norm(vectors, axis=-1, keepdims=True)


def slow_ranking(queries, documents, rows, golds, weight, scale, dimensions):
    """The loss, and how often the positive is first with all dimensions.

    `rows` are corpus rows: of the positives first, then of mined negatives.
    """
    count, by_dimension = len(queries), []
    for d in dimensions:
        losses, first = [], []
        for i in range(count):
            own = {g for g in golds[i] if g >= 0}
            terms = []
            for j, row in enumerate(rows):
                if j < count and j != i and (not weight[j] or own & {*golds[j]}):
                    continue
                if j >= count and (row < 0 or row in own):
                    continue
                a, b = unit(queries[i, :d]), unit(documents[row, :d])
                terms.append(np.exp(scale * a @ b))
                if j == i:
                    positive = terms[-1]
            losses.append(-np.log(positive / sum(terms)))
            first.append(positive == max(terms))
        by_dimension.append(np.average(losses, weights=weight))
    return np.mean(by_dimension), np.average(first, weights=weight)


@pytest.mark.parametrize("train", [("query",), ("query", "document"), ("document",), ("head",)])
@pytest.mark.parametrize("mining", [None, EASY])
def test_ranking_against_numpy(retriever, train, mining):
    weight = 1, 1, 1, 0
    head = np.eye(16, dtype=np.float32) + np.random.default_rng(0).normal(0, 0.1, (16, 16))
    retriever = retriever.with_head(head) if "head" in train else retriever
    task = multiple_negatives_ranking(
        retriever, DATASET, train=train, mining=mining, dimensions=(16, 5), score_scale=7.0
    )
    batch = batch_of(task, weight)
    queries = retriever.embed_questions([e.question for e in EXAMPLES])
    rows = [0, 1, 0, 3]
    if mining:
        mined = np.where(np.array(weight)[:, None] > 0, batch["negatives"], -1)
        rows = [*rows, *mined.reshape(-1)]
        assert (mined >= 0).any()
    slow = slow_ranking(queries, retriever.vectors, rows, GOLDS, weight, 7.0, (5, 16))
    loss, told = task.loss(task.trainable, task.frozen, batch, KEY)
    np.testing.assert_allclose([loss, told["first"]], slow, rtol=2e-4)


@pytest.mark.slow
def test_chunks_have_the_loss_and_gradient_of_the_whole_batch(retriever):
    """GradCache's promise."""
    for train in (("query",), ("query", "document")):
        with jax.enable_x64(True):
            found = []
            for at_once in (0, 3):
                task = multiple_negatives_ranking(retriever, DATASET, train=train, at_once=at_once)
                trainable = jax.tree.map(lambda x: jnp.asarray(x, float), task.trainable)
                gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
                found.append(gradient(trainable, task.frozen, batch_of(task), KEY))
        ((whole, _), of_whole), ((chunked, _), of_chunks) = found
        np.testing.assert_allclose(chunked, whole, rtol=1e-9)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), of_chunks, of_whole)


def test_chunks_need_less_memory(retriever):
    tokens = jnp.ones((64, 40), jnp.int32)

    def scratch(at_once):
        def loss(params):
            return encode(retriever.encoder, params, tokens, tokens > 0, at_once).sum()

        compiled = jax.jit(jax.grad(loss)).lower(retriever.query).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(8) < scratch(0) / 3


def test_the_last_dimension_alone_is_the_plain_loss(retriever):
    plain, cut = (multiple_negatives_ranking(retriever, DATASET, dimensions=d) for d in ((), (16,)))
    np.testing.assert_allclose(
        loss_of(cut, batch_of(cut)), loss_of(plain, batch_of(plain)), rtol=1e-6
    )
    with pytest.raises(ConfigError, match=r"between 1 and 16, got \(17,\)"):
        multiple_negatives_ranking(retriever, DATASET, dimensions=(17,))


def test_a_head_learns_from_vectors_that_are_made_once(retriever):
    task = multiple_negatives_ranking(retriever, DATASET, train=("head",))
    batch = batch_of(task)
    assert "question_tokens" not in batch and "passages" not in task.frozen
    plain = multiple_negatives_ranking(retriever, DATASET)
    np.testing.assert_allclose(loss_of(task, batch), loss_of(plain, batch_of(plain)), rtol=1e-4)
    tuned = fit(task, EXAMPLES, rounds=30, batch_size=4).trainable["head"]
    trained = dataclasses.replace(task, trainable={"head": tuned})
    assert loss_of(trained, batch) < 0.5 * loss_of(task, batch)
    # What the loss saw is what is searched with.
    behind = retriever.with_head(tuned)
    _, scores = behind.search([EXAMPLES[0].question], 4)
    query = np.asarray(retriever.embed_questions([EXAMPLES[0].question]) @ tuned)
    expected = unit(query) @ unit(np.asarray(retriever.bare_vectors @ tuned)).T
    np.testing.assert_allclose(scores[0], -np.sort(-expected[0]), rtol=1e-4)


def slow_negatives(retriever, golds, mining, pools):
    found = []
    for i, example in enumerate(EXAMPLES):
        query = retriever.embed_questions([example.question])[0]
        cosine = [float(query @ v) for v in retriever.vectors]
        own = [g for g in golds[i] if g >= 0]
        positive = max(cosine[g] for g in own)
        highest = positive - max(abs(positive) * (1 - mining.share), mining.margin)
        near = sorted(pools[i], key=lambda row: (-cosine[row], row))[: mining.depth]
        usable = [row for row in near if row not in own and cosine[row] <= highest]
        found.append((usable + [-1] * mining.count)[: mining.count])
    return np.array(found)


@pytest.mark.parametrize(
    "mining",
    [
        EASY,
        Mining(3, share=0.999),
        Mining(3, share=1.0, margin=1e-3),
        Mining(3, depth=2, share=1.0),
    ],
)
@pytest.mark.parametrize("pools", [None, ([0, 1], [2, 3], [1, 2, 3], [0, 1, 2])])
def test_mined_negatives_against_numpy(retriever, mining, pools):
    pool = None if pools is None else lambda e: np.array(pools[EXAMPLES.index(e)])
    found = hard_negatives(retriever, EXAMPLES, GOLDS, mining, pool)
    everywhere = [range(4)] * 4
    np.testing.assert_array_equal(
        found, slow_negatives(retriever, GOLDS, mining, pools or everywhere)
    )


def test_a_share_of_a_negative_cosine_is_farther_away():
    cosines = np.array([[-0.5, -0.52, -0.9]])
    stub = types.SimpleNamespace(
        passages=PASSAGES[:3],
        vectors=np.stack([cosines[0], np.sqrt(1 - cosines[0] ** 2)], 1),
        embed_questions=lambda questions: np.array([[1.0, 0.0]]),
        index=types.SimpleNamespace(search=lambda queries, depth: (np.arange(3)[None], cosines)),
    )
    found = hard_negatives(stub, EXAMPLES[:1], np.array([[0]]), Mining(2, share=0.9))
    assert found.tolist() == [[2, -1]]  # beyond -0.55


def test_filters_leave_out_what_is_nearer_than_the_gold_passage(retriever):
    """Otherwise the test above could compare nothing but gaps."""
    loose, strict = (
        hard_negatives(retriever, EXAMPLES, GOLDS, Mining(3, share=share)) for share in (1.0, 0.9)
    )
    assert (loose >= 0).sum() > (strict >= 0).sum()
    with pytest.raises(ConfigError, match="0 < share <= 1"):
        hard_negatives(retriever, EXAMPLES, GOLDS, Mining(share=1.1))


@pytest.mark.parametrize("train", [("query",), ("query", "document"), ("document",), ("head",)])
def test_negatives_are_mined_again_with_what_is_trained(retriever, train):
    task = multiple_negatives_ranking(retriever, DATASET, train=train, mining=EASY)
    moved = jax.tree.map(lambda x: x + 0.3 * jnp.sin(1e3 * x + jnp.arange(x.size).reshape(x.shape)),
                         task.trainable)  # fmt: skip
    current = retriever.with_query(moved.get("query", retriever.query))
    current = current.refresh(moved.get("document", retriever.document))
    current = current.with_head(moved.get("head"))
    expected = hard_negatives(current, EXAMPLES, GOLDS, EASY)
    found = task.retrieve(EXAMPLES, moved)
    np.testing.assert_array_equal(found, expected)
    assert (found != task.retrieve(EXAMPLES, task.trainable)).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", ["ranking", "distillation", "RAG-Token", "RAG-Token, adapters"]
)
def test_clients_find_passages_of_their_own_alone(objective):
    parts = toy_parts()
    own = Partition(EXAMPLES, (np.array([0, 2]), np.array([1, 3])))
    held = Partition(PASSAGES, (np.array([0, 2]), np.array([1, 3])))
    pool, found = own_passages(own, held), []
    where = {"passages": 2, "pool": pool}
    generator = parts.decoder, {"decoder": parts.params, "adapters": parts.adapters}, parts.prompts
    task = {
        "ranking": lambda: multiple_negatives_ranking(
            parts.retriever, DATASET, mining=EASY, pool=pool
        ),
        "distillation": lambda: distillation(
            "pdist", *generator, parts.retriever, EXAMPLES, **where
        ),
        "RAG-Token": lambda: marginal_likelihood(*generator, parts.retriever, EXAMPLES, **where),
        "RAG-Token, adapters": lambda: marginal_likelihood(
            *generator, parts.retriever, EXAMPLES, train=("adapters",), **where
        ),
    }[objective]()

    def collate(examples, rows):
        table = task.collate(examples, rows)
        rows = table.get("negatives", rows)
        if rows is None:  # the generator alone moves: told by the scores of what was found
            cosines = table["retrieval_scores"] / 20.0
            every = parts.retriever.similarities(
                [e.question for e in examples], [np.arange(4)] * len(examples)
            )
            rows = np.abs(every[:, None] - cosines[:, :, None]).argmin(-1)
        found.extend(zip(examples, rows, strict=True))
        return table

    watched = dataclasses.replace(task, collate=collate)
    fit(watched, own, fed_avg(local_steps=1), rounds=2, batch_size=2)
    assert {e.id for e, _ in found} == {e.id for e in EXAMPLES}
    for example, rows in found:
        client = EXAMPLES.index(example) % 2
        assert {*np.asarray(rows).tolist()} - {-1} <= {*held.clients[client].tolist()}


@pytest.mark.slow
def test_mining_follows_the_rounds(retriever):
    task = multiple_negatives_ranking(retriever, DATASET, mining=EASY)
    history = fit(task, EXAMPLES, rounds=4, batch_size=4, refresh_every=2).history
    assert [r["refreshed"] for r in history] == [True, False, True, False]


def test_ranking_refuses_questions_without_a_gold_passage(retriever):
    task = multiple_negatives_ranking(retriever, DATASET)
    unlabelled = dataclasses.replace(EXAMPLES[0], id="z", positive_ids=())
    with pytest.raises(DataError, match="1 questions name no gold passage, 'z' first"):
        task.collate([*EXAMPLES, unlabelled], None)


def test_ranking_without_negatives_is_told(retriever, recwarn):
    task = multiple_negatives_ranking(retriever, DATASET)
    with pytest.raises(ConfigError, match="batch_size must be at least 2, got 1; or give mined"):
        fit(task, EXAMPLES, rounds=1, batch_size=1)
    fit(task, EXAMPLES, rounds=1, batch_size=2)
    mined = multiple_negatives_ranking(retriever, DATASET, mining=EASY)
    fit(mined, EXAMPLES[:1], rounds=1, batch_size=1)
    assert not recwarn.list
    alone = Partition(EXAMPLES, (np.arange(2), np.array([3]), np.array([2])))
    with pytest.warns(UserWarning) as told:
        history = fit(task, alone, fed_avg(local_steps=1), rounds=1, batch_size=2).history
    first, *others = history[0]["client_loss"]
    rounding = float(4 * np.spacing(np.float32(20)))  # of cosines times 20
    assert first > 0.1 and others == pytest.approx([0, 0], abs=rounding)
    (message,) = {str(warning.message) for warning in told}
    assert "2 of 3 clients learn nothing from 'multiple_negatives_ranking', client 1" in message
    assert "client 1 first: it holds one question, so there are no negatives" in message
    each = Partition(EXAMPLES, tuple(np.arange(4)[:, None]))
    with pytest.raises(DataError, match="4 of 4 clients learn nothing"):
        fit(task, each, fed_avg(local_steps=1), rounds=1, batch_size=2)
    with pytest.warns(UserWarning, match="1 of 1 clients .* its 2 questions share a passage, so"):
        fit(task, [EXAMPLES[0], EXAMPLES[2]], rounds=1, batch_size=2)


def test_a_retriever_does_not_learn_from_one_passage():
    parts = toy_parts()
    generator = parts.decoder, {"decoder": parts.params, "adapters": parts.adapters}, parts.prompts
    given = *generator, parts.retriever, EXAMPLES
    fault = "it needs at least two, got 1: raise `passages`"
    with pytest.raises(ConfigError, match=fault):
        distillation("pdist", *given, passages=1)
    with pytest.raises(ConfigError, match=fault):
        marginal_likelihood(*given, train=("query",), passages=1)
    with pytest.warns(UserWarning, match=f"only the adapters learn: .*{fault}"):
        marginal_likelihood(*given, train=("adapters", "query"), passages=1)


def test_a_part_that_no_retriever_has_is_refused(retriever):
    for train in (("encoder",), ()):
        with pytest.raises(
            ConfigError, match="trains one or several of 'query', 'document' and 'head'"
        ):
            multiple_negatives_ranking(retriever, DATASET, train=train)


def test_negatives_that_are_given_are_those_of_the_batch(retriever):
    given = {e.id: [(i + 1) % 3, (i + 2) % 3] for i, e in enumerate(EXAMPLES)}
    task = multiple_negatives_ranking(retriever, DATASET, negatives=given)
    assert task.retrieve is None
    table = task.table(EXAMPLES[:2])
    assert table["negatives"].tolist() == [given[e.id] for e in EXAMPLES[:2]]
    with pytest.raises(ConfigError, match="leave out one of them"):
        multiple_negatives_ranking(retriever, DATASET, negatives=given, mining=Mining())


def test_held_out_questions_may_have_more_gold_passages(retriever):
    more = dataclasses.replace(
        EXAMPLES[0], positive_ids=[p.id for p in DATASET.passages[:3]], id="with more"
    )
    assert len(more.positive_ids) > max(len(e.positive_ids) for e in EXAMPLES)
    task = multiple_negatives_ranking(retriever, dataclasses.replace(DATASET, validation=[more]))
    assert task.table([more])["positive"].shape == task.table(EXAMPLES[:1])["positive"].shape


def test_held_out_questions_are_not_cut_to_the_length_of_those_of_training(retriever):
    task = multiple_negatives_ranking(retriever, DATASET)
    before = task.collate(EXAMPLES, None)
    long = dataclasses.replace(
        EXAMPLES[1], id="v", question="Where on this wide earth was Bob born?"
    )
    read = task.collate([EXAMPLES[0], long], None)["question_tokens"][1]
    assert "".join(retriever.tokenizer.convert_ids_to_tokens(read)).endswith("born?")
    jax.tree.map(np.testing.assert_array_equal, task.collate(EXAMPLES, None), before)
    short = multiple_negatives_ranking(retriever, DATASET, max_question_tokens=8)
    assert short.collate([long], None)["question_tokens"].shape == (1, 8)
