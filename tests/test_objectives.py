"""Every loss against a slow, obvious version; gradients reach what they should and nothing else."""

import dataclasses
import string
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.examples import Dataset, Example, Passage
from fedrag_jax.data.prompts import COMPACT
from fedrag_jax.errors import DataError
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.encoder import Encoder, EncoderConfig
from fedrag_jax.models.lora import LoraConfig, add_lora, init_adapters
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.generator import AnswerLoss, concatenated, ralt
from fedrag_jax.objectives.joint import (
    MarginalLoss,
    marginal_likelihood,
    rag_sequence,
    rag_token,
)
from fedrag_jax.objectives.likelihood import answer_log_probs
from fedrag_jax.objectives.retriever import (
    MultipleNegativesRanking,
    multiple_negatives_ranking,
)
from fedrag_jax.retrieval.retriever import Retriever

KEY = jax.random.key(0)


def characters():
    """A tokenizer of characters: enough for shapes and boundaries."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "?"]
    letters = sorted(set(string.printable) - {"?"})
    vocabulary = {piece: i for i, piece in enumerate(special + letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZER = characters()
PASSAGES = [Passage(f"p{i}", "", f"{name} was born in {city}.") for i, (name, city) in
            enumerate([("Ann", "Rome"), ("Bob", "Oslo"), ("Cy", "Lima"), ("Di", "Bonn")])]  # fmt: skip
EXAMPLES = [
    Example("a", "Where was Ann born?", ("Rome",), ("p0",)),
    Example("b", "Where was Bob born?", ("Oslo", "Christiania"), ("p1",)),
    Example("c", "Birthplace of Ann?", ("Rome",), ("p0",)),
    Example("d", "Where was Di?", ("Bonn town",), ("p3", "p2")),
]
DATASET = Dataset("toy", PASSAGES, EXAMPLES, [], [])


@pytest.fixture(scope="module")
def parts():
    """A tiny decoder with adapters that do something, a tiny encoder, prompts and a retriever."""
    decoder = Network.of(
        Decoder,
        DecoderConfig(
            vocab_size=104, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
            num_kv_heads=1, head_dim=8,
        ),
    )  # fmt: skip
    params = decoder.init(jax.random.key(1))
    decoder = add_lora(decoder, LoraConfig(2, 4.0, ("q_proj", "v_proj", "down_proj")))
    adapters = init_adapters(decoder, 3)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    encoder = Network.of(
        Encoder,
        EncoderConfig(
            vocab_size=104, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
            max_positions=64, max_length=64,
        ),
    )  # fmt: skip
    query = encoder.init(jax.random.key(2))

    @jax.jit
    def next_token(tokens, length):
        index = jnp.arange(160)
        hidden = decoder(
            params, tokens[None], index[None], (index < length)[None], adapters=adapters
        )
        return decoder(params, hidden[0, length - 1], method="logits")

    model = types.SimpleNamespace(
        network=encoder, tokenizer=TOKENIZER, params=query, name="toy", kind="encoder"
    )
    return types.SimpleNamespace(
        decoder=decoder,
        next_token=next_token,
        params=params,
        adapters=adapters,
        encoder=encoder,
        query=query,
        prompts=Prompts(TOKENIZER, COMPACT, PASSAGES, EXAMPLES),
        retriever=Retriever.build(model, PASSAGES),
    )


def rows(k):
    order = np.array([[0, 1, 2, 3], [2, 1, 0, 3], [1, 0, 3, 2], [3, 2, 1, 0]])
    return lambda examples: order[[EXAMPLES.index(e) for e in examples], :k]


def batch_of(task, weight=(1, 1, 1, 1)):
    retrieved = task.retrieve(EXAMPLES, task.trainable) if task.retrieve else None
    table = task.collate(EXAMPLES, retrieved)
    return {k: jnp.asarray(v) for k, v in table.items()} | {
        "weight": jnp.array(weight, jnp.float32)
    }


def slow_log_probs(parts, question, passages, answer):
    """log p of each answer token, one forward pass per token, nothing batched or gathered."""
    prompt = list(parts.prompts.prompt(question, passages))
    target = [int(t) for t in parts.prompts.answer_tokens(answer)]
    out = []
    for i, token in enumerate(target):
        so_far = prompt + target[:i]
        logits = parts.next_token(np.array(so_far + [0] * (160 - len(so_far))), len(so_far))
        logits = np.asarray(logits, np.float64)
        out.append(logits[token] - np.log(np.exp(logits).sum()))
    assert target[-1] == TOKENIZER.eos_token_id
    return np.array(out)


def test_answer_log_probs_are_those_of_one_token_after_another(parts):
    table = parts.prompts.training_table(EXAMPLES, rows(2)(EXAMPLES), per_passage=True)
    found = answer_log_probs(parts.decoder, parts.params, parts.adapters, table)
    assert found.shape == (4, 2, len(" Bonn town") + 1)
    for i, example in enumerate(EXAMPLES):
        for j, row in enumerate(rows(2)(EXAMPLES)[i]):
            slow = slow_log_probs(parts, example.question, [row], example.answers[0])
            np.testing.assert_allclose(found[i, j, : len(slow)], slow, atol=1e-4)
            assert table["answer_mask"][i].sum() == len(slow)


def test_only_the_answer_and_its_eos_are_scored(parts):
    table = parts.prompts.training_table(EXAMPLES, rows(2)(EXAMPLES), per_passage=False)
    for i, example in enumerate(EXAMPLES):
        positions = table["answer_positions"][i, 0][table["answer_mask"][i] > 0]
        scored = table["tokens"][i, 0][positions]
        np.testing.assert_array_equal(scored, parts.prompts.answer_tokens(example.answers[0]))
        assert scored[-1] == TOKENIZER.eos_token_id
        assert table["lengths"][i, 0] == positions[-1] + 1


def test_concatenated_is_the_mean_over_examples_of_the_summed_nll(parts):
    task = concatenated(parts.decoder, parts.params, parts.adapters, parts.prompts, rows(3))
    weight = (1, 1, 0, 1)
    loss, _ = task.loss(task.trainable, task.frozen, batch_of(task, weight), KEY)
    slow = [
        -slow_log_probs(parts, e.question, rows(3)([e])[0], e.answers[0]).sum() for e in EXAMPLES
    ]
    np.testing.assert_allclose(loss, np.average(slow, weights=weight), rtol=1e-4)


def test_ralt_sums_over_passages_and_is_concatenated_at_one(parts):
    arguments = parts.decoder, parts.params, parts.adapters, parts.prompts
    task = ralt(*arguments, rows(2))
    loss, _ = task.loss(task.trainable, task.frozen, batch_of(task), KEY)
    slow = [
        -sum(slow_log_probs(parts, e.question, [r], e.answers[0]).sum() for r in rows(2)([e])[0])
        for e in EXAMPLES
    ]
    np.testing.assert_allclose(loss, np.mean(slow), rtol=1e-4)
    one, same = ralt(*arguments, rows(1)), concatenated(*arguments, rows(1))
    np.testing.assert_allclose(
        one.loss(one.trainable, one.frozen, batch_of(one), KEY)[0],
        same.loss(same.trainable, same.frozen, batch_of(same), KEY)[0],
        rtol=1e-6,
    )


def slow_marginals(log_probs, scores, mask):
    token, sequence = [], []
    for ll, s, m in zip(log_probs, scores, mask, strict=True):
        p = np.exp(s) / np.exp(s).sum()
        sequence.append(np.log(sum(p[z] * np.exp((ll[z] * m).sum()) for z in range(len(p)))))
        per_token = [np.log((p * np.exp(ll[:, i])).sum()) for i in range(len(m)) if m[i]]
        token.append(sum(per_token))
    return np.array(token), np.array(sequence)


def test_marginals_against_numpy():
    rng = np.random.default_rng(0)
    log_probs = -rng.exponential(1.5, (5, 3, 4)).astype(np.float32)
    scores = rng.normal(size=(5, 3)).astype(np.float32)
    mask = np.arange(4) < rng.integers(1, 5, (5, 1))
    token, sequence = slow_marginals(log_probs, scores, mask)
    np.testing.assert_allclose(rag_token(log_probs, scores, mask), token, rtol=1e-5)
    np.testing.assert_allclose(rag_sequence(log_probs, scores, mask), sequence, rtol=1e-5)
    assert np.abs(token - sequence).max() > 1e-3


def test_marginals_coincide_where_they_must():
    rng = np.random.default_rng(1)
    log_probs = -rng.exponential(1.5, (5, 3, 4)).astype(np.float32)
    scores = rng.normal(size=(5, 3)).astype(np.float32)
    one = np.zeros((5, 4), np.float32)
    one[np.arange(5), rng.integers(0, 4, 5)] = 1  # exactly one position, not always the first
    np.testing.assert_allclose(
        rag_token(log_probs, scores, one), rag_sequence(log_probs, scores, one), rtol=1e-5
    )
    mask = np.ones((5, 4), np.float32)
    plain = log_probs[:, :1].sum((1, 2))
    for marginal in (rag_token, rag_sequence):
        np.testing.assert_allclose(
            marginal(log_probs[:, :1], scores[:, :1], mask), plain, rtol=1e-5
        )


def joint_task(parts, **options):
    return marginal_likelihood(
        parts.decoder,
        {"decoder": parts.params, "adapters": parts.adapters},
        parts.prompts,
        parts.retriever,
        EXAMPLES,
        **{"passages": 3} | options,
    )


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_joint_loss_against_numpy(parts, marginal):
    task = joint_task(parts, marginal=marginal)
    loss, _ = task.loss(task.trainable, task.frozen, batch_of(task), KEY)
    found, cosines = parts.retriever.search([e.question for e in EXAMPLES], 3)
    slow = []
    for e, retrieved, cosine in zip(EXAMPLES, found, cosines, strict=True):
        ll = np.stack([slow_log_probs(parts, e.question, [r], e.answers[0]) for r in retrieved])
        both = slow_marginals([ll], [20.0 * cosine], [np.ones(ll.shape[1])])
        slow.append(both[marginal == "sequence"][0])
    np.testing.assert_allclose(loss, -np.mean(slow), rtol=1e-4)


def test_joint_is_the_answer_nll_at_one_passage(parts):
    joint = joint_task(parts, passages=1)
    loss, _ = joint.loss(joint.trainable, joint.frozen, batch_of(joint), KEY)
    found = parts.retriever.search([e.question for e in EXAMPLES], 1)[0]
    plain = concatenated(
        parts.decoder, parts.params, parts.adapters, parts.prompts, lambda examples: found
    )
    np.testing.assert_allclose(
        loss, plain.loss(plain.trainable, plain.frozen, batch_of(plain), KEY)[0], rtol=1e-5
    )


@pytest.mark.parametrize("train", [("adapters",), ("query",), ("adapters", "query", "document")])
def test_what_is_frozen_is_computed_once_and_changes_nothing(parts, train):
    """Phases of two-phase training, and document-side training, start from the joint loss."""
    joint, phase = joint_task(parts), joint_task(parts, train=train)
    np.testing.assert_allclose(
        phase.loss(phase.trainable, phase.frozen, batch_of(phase), KEY)[0],
        joint.loss(joint.trainable, joint.frozen, batch_of(joint), KEY)[0],
        rtol=1e-4,
    )
    cached = batch_of(phase)
    assert ("answer_log_probs" in cached) == ("adapters" not in train)
    assert ("retrieval_scores" in cached) == (train == ("adapters",))


def slow_ranking(queries, documents, golds, weight, scale):
    losses = []
    for i in range(len(queries)):
        cos = [
            q @ d / np.linalg.norm(q) / np.linalg.norm(d)
            for q, d in ((queries[i], d) for d in documents)
        ]
        rivals = [
            j
            for j in range(len(queries))
            if j == i or (weight[j] and not set(golds[i]) & set(golds[j]))
        ]
        losses.append(-np.log(np.exp(scale * cos[i]) / sum(np.exp(scale * cos[j]) for j in rivals)))
    return np.average(losses, weights=weight)


@pytest.mark.parametrize("sides", ["query", "both"])
@pytest.mark.parametrize("weight", [(1, 1, 1, 1), (1, 1, 1, 0)])
def test_ranking_against_numpy(parts, sides, weight):
    document = jax.tree.map(lambda x: x + 0.01, parts.query)
    vectors = np.asarray(
        parts.retriever.vectors if sides == "query" else parts.retriever.refresh(document).vectors
    )
    options = {"document_vectors": vectors} if sides == "query" else {"document": document}
    task = multiple_negatives_ranking(
        parts.encoder, parts.query, TOKENIZER, DATASET, max_length=64, **options
    )
    loss, _ = task.loss(task.trainable, task.frozen, batch_of(task, weight), KEY)
    table = {k: jnp.asarray(v) for k, v in task.collate(EXAMPLES, None).items()}
    queries = np.asarray(
        parts.encoder(parts.query, table["question_tokens"], table["question_mask"])
    )
    golds = [e.positive_ids for e in EXAMPLES]
    slow = slow_ranking(queries, vectors[[0, 1, 0, 3]], golds, weight, 20.0)
    np.testing.assert_allclose(loss, slow, rtol=2e-4)


def test_ranking_refuses_questions_without_a_gold_passage(parts):
    task = multiple_negatives_ranking(
        parts.encoder,
        parts.query,
        TOKENIZER,
        DATASET,
        document_vectors=parts.retriever.vectors,
        max_length=64,
    )
    unlabelled = dataclasses.replace(EXAMPLES[0], id="z", positive_ids=())
    with pytest.raises(DataError, match="1 questions name no gold passage, 'z' first"):
        task.collate([*EXAMPLES, unlabelled], None)


def tasks(parts):
    arguments = parts.decoder, parts.params, parts.adapters, parts.prompts
    retriever = parts.encoder, parts.query, TOKENIZER, DATASET
    vectors = parts.retriever.vectors
    yield concatenated(*arguments, rows(2))
    yield ralt(*arguments, rows(2))
    yield multiple_negatives_ranking(*retriever, document_vectors=vectors, max_length=64)
    yield multiple_negatives_ranking(*retriever, document=parts.query, max_length=64)
    for marginal in ("token", "sequence"):
        for train in (("adapters", "query"), ("adapters",), ("query",), ("query", "document")):
            yield joint_task(parts, marginal=marginal, train=train)


def test_gradients_reach_every_trainable_leaf(parts):
    """A leaf with no gradient is a parameter nobody trains. Token type 1 is never looked up, and a
    key's bias shifts all scores of a query alike, which softmax does not see."""
    for task in tasks(parts):
        gradient_of = jax.jit(jax.grad(task.loss, has_aux=True))
        gradient = gradient_of(task.trainable, task.frozen, batch_of(task), KEY)[0]
        for path, g in jax.tree_util.tree_leaves_with_path(gradient):
            name = jax.tree_util.keystr(path)
            if "['k_proj']['bias']" in name:
                continue
            assert np.abs(g).max() > 1e-7, f"{task.name}: no gradient for {name}"


def test_training_moves_what_is_trainable_and_nothing_else(parts):
    from fedrag_jax.federated.fit import fit

    for task in list(tasks(parts))[::3]:
        before = jax.tree.map(np.array, (task.trainable, task.frozen))
        result = fit(task, EXAMPLES, rounds=1, batch_size=4)
        assert result.trainable.keys() == task.trainable.keys()
        moved = jax.tree.map(
            lambda a, b: float(np.abs(a - np.asarray(b)).max()), before[0], result.trainable
        )
        for name, part in moved.items():
            assert max(jax.tree.leaves(part)) > 0, f"{task.name}: {name} did not move"
        jax.tree.map(np.testing.assert_array_equal, before, (task.trainable, task.frozen))


def test_equal_tasks_have_equal_losses(parts):
    """So that one compiled program serves every client and seed."""
    for one, other in zip(tasks(parts), tasks(parts), strict=True):
        assert one.loss == other.loss and hash(one.loss) == hash(other.loss)
    losses = {AnswerLoss(parts.decoder), MultipleNegativesRanking(parts.encoder),
              MarginalLoss(parts.decoder, parts.encoder, "token"),
              MarginalLoss(parts.decoder, parts.encoder, "sequence")}  # fmt: skip
    assert len(losses) == 4


def test_document_vectors_move_and_the_index_is_refreshed(parts):
    """Training the document side: every round searches an index of re-embedded passages."""
    from fedrag_jax.federated.callbacks import Callback
    from fedrag_jax.federated.fit import fit

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
