"""Every attack succeeds on a model that was made to leak, and guesses on one that has seen nothing.

An attack that finds nothing in a trained model says something only if it finds what is there. Questions
have passages at random for gold ones: they can be learned by heart, and nothing else can.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.data.partition import Partition
from fedrag_jax.evaluation.evaluator import answer_nll
from fedrag_jax.evaluation.leakage import extraction, inversion, membership, users
from fedrag_jax.evaluation.leakage.roc import auc, tpr_at_fpr
from fedrag_jax.evaluation.leakage.signals import ranking_nll
from fedrag_jax.federated.algorithms.centralised import centralised
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.sweep import sweep
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.objectives.generator import closed_book
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.objectives import OBJECTIVES

COUNT, EACH = 60, 5  # questions, and how many of them a user has
USER = np.arange(COUNT) // EACH
MEMBER = USER % 2 == 0
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARN = {"batch_size": 15, "optimizer": optax.adam(3e-3), "group_size": 1}


@functools.cache
def world() -> Dataset:
    """Sixty questions and the passages that they are about."""
    whole = synthetic.generate()
    by_gold = {e.positive_ids[0]: e for e in whole.train if e.hops == 1}
    asked = [*by_gold.values()][:COUNT]
    golds = {e.positive_ids[0] for e in asked}
    passages = [p for p in whole.passages if p.id in golds]
    return Dataset("part", passages, asked, [], [])


@functools.cache
def by_heart() -> Dataset:
    """The same with gold passages at random."""
    others = np.random.default_rng(1).permutation(COUNT)
    golds = [(world().passages[i].id,) for i in others]
    asked = [
        dataclasses.replace(e, positive_ids=gold)
        for e, gold in zip(world().train, golds, strict=True)
    ]
    return dataclasses.replace(world(), train=asked)


@functools.cache
def system() -> RAGSystem:
    return RAGSystem.build(world().passages, world().train)


@functools.cache
def ranking(**options):
    return multiple_negatives_ranking(system().retriever, by_heart(), **options)


def trained_on(*which):
    """Retrievers that know questions by heart, one for each choice of them, bool [N]."""
    fits = [
        {"task": ranking(), "data": Partition(by_heart().train, (np.flatnonzero(some),)), "rounds": 1,
         "algorithm": centralised(local_steps=50)} | LEARN
        for some in which
    ]  # fmt: skip
    return [system().replace(**fitted.trainable).retriever for fitted in sweep(fits)]


@functools.cache
def losses():
    """Of an overfit retriever, the untrained one and shadows; what the shadows were trained on."""
    halves, asked = membership.halves(COUNT, 4, seed=0), by_heart().train
    target, *shadows = (ranking_nll(one, asked) for one in trained_on(MEMBER, *halves))
    return target, ranking_nll(system().retriever, asked), np.stack(shadows), halves


def told(scores):
    return auc(scores[MEMBER], scores[~MEMBER])


def test_members_of_an_overfit_retriever_are_told():
    target, untrained, shadows, halves = losses()
    assert told(membership.by_loss(target)) > 0.95
    assert told(membership.calibrated(target, untrained)) > 0.8
    ratio = membership.likelihood_ratio(target, shadows, halves)
    assert told(ratio) > 0.95
    assert tpr_at_fpr(ratio[MEMBER], ratio[~MEMBER]) > 0.5


def test_members_of_an_untrained_retriever_are_not():
    _, untrained, shadows, halves = losses()
    assert 0.3 < told(membership.by_loss(untrained)) < 0.7
    assert 0.3 < told(membership.likelihood_ratio(untrained, shadows, halves)) < 0.7


def test_users_of_an_overfit_retriever_are_told():
    target, untrained, *_ = losses()
    names, scores = users.took_part(membership.calibrated(target, untrained), USER)
    assert auc(scores[names % 2 == 0], scores[names % 2 == 1]) == 1.0
    _, blind = users.took_part(membership.calibrated(untrained, untrained), USER)
    assert auc(blind[::2], blind[1::2]) == 0.5


@pytest.mark.slow
def test_members_and_users_of_an_overfit_generator_are_told():
    asked = by_heart().train
    answers = [e.answers for e in asked]  # of each other, which only memory can give
    wrong = [dataclasses.replace(e, answers=answers[(i + 7) % COUNT]) for i, e in enumerate(asked)]
    dataset = dataclasses.replace(world(), train=wrong)
    built = RAGSystem.build(
        world().passages, wrong, top_k=2, adapters=LoraConfig(32, 64.0, EVERYWHERE)
    )
    rows, halves = (
        built.retriever.search([e.question for e in wrong], 2)[0],
        membership.halves(COUNT, 4, 0),
    )
    fits = [
        {"task": OBJECTIVES["concatenated"].task(built, dataset), "rounds": 1,
         "data": Partition(wrong, (np.flatnonzero(some),)), "algorithm": centralised(local_steps=60),
         "batch_size": 15, "optimizer": optax.adam(5e-3), "group_size": 1}
        for some in (MEMBER, *halves)
    ]  # fmt: skip
    systems = [built.replace(**fitted.trainable) for fitted in sweep(fits)]
    target, untrained, *shadows = (
        answer_nll(one, wrong, rows) for one in (systems[0], built, *systems[1:])
    )
    assert told(membership.by_loss(target)) > 0.95
    assert told(membership.calibrated(target, untrained)) > 0.95
    assert told(membership.likelihood_ratio(target, np.stack(shadows), halves)) > 0.95
    names, scores = users.took_part(membership.calibrated(target, untrained), USER)
    assert auc(scores[names % 2 == 0], scores[names % 2 == 1]) == 1.0
    assert 0.3 < told(membership.by_loss(untrained)) < 0.7
    assert 0.3 < told(membership.likelihood_ratio(untrained, np.stack(shadows), halves)) < 0.7


@pytest.mark.slow
def test_a_server_tells_whose_questions_they_are():
    asked = by_heart().train
    clients = Partition(asked, tuple(np.flatnonzero(k == USER % 3) for k in range(3)))
    fitted = fit(ranking(), clients, local_only(local_steps=40), rounds=1, **LEARN)
    models = [jax.tree.map(lambda x, k=k: x[k], fitted.trainable) for k in range(3)]
    found = [ranking_nll(system().replace(**model).retriever, asked) for model in models]
    assert np.mean(users.source(found) == USER % 3) > 0.9
    start = ranking_nll(system().retriever, asked)
    assert np.mean(users.source([start] * 3) == USER % 3) == pytest.approx(1 / 3)


# --- what a client's update tells ----------------------------------------------------------------


def batch_of(rows):
    table = ranking().table([by_heart().train[i] for i in rows])
    return {name: jnp.asarray(x) for name, x in table.items()} | {"weight": jnp.ones(len(rows))}


def gradient_of(rows):
    gradient = jax.jit(jax.grad(ranking().loss, has_aux=True))
    inputs = ranking().trainable, ranking().frozen, batch_of(rows), jax.random.key(0)
    return gradient(*inputs)[0]["query"]


def tokens_of(rows):
    """bool [V], and the (place, token) pairs."""
    batch = batch_of(rows)
    mask, tokens = np.array(batch["question_mask"], bool), np.array(batch["question_tokens"])
    read = np.zeros(system().retriever.encoder.config.vocab_size, bool)
    read[tokens[mask]] = True
    return read, {(int(place), int(tokens[b, place])) for b, place in np.argwhere(mask)}


@pytest.mark.parametrize("count", [2, 16])
def test_words_stand_in_the_gradient_of_the_embedding(count):
    gradient, (read, _) = gradient_of(range(count)), tokens_of(range(count))
    gradient = np.array(gradient["embed"]["embedding"])
    assert inversion.r_precision(inversion.touched(gradient), read) == 1.0
    noise = np.random.default_rng(0).normal(size=gradient.shape)
    assert inversion.r_precision(inversion.touched(noise), read) < 0.2


@pytest.mark.slow
def test_words_stand_in_an_update_of_several_steps():
    rows = np.arange(12)
    fitted = fit(
        ranking(), Partition(by_heart().train, (rows,)), centralised(local_steps=9), rounds=1,
        **LEARN | {"batch_size": 4},
    )  # fmt: skip
    update = inversion.moved(fitted.trainable, ranking().trainable)["query"]["embed"]["embedding"]
    assert inversion.r_precision(inversion.touched(update), tokens_of(rows)[0]) == 1.0


@pytest.mark.parametrize(("count", "share"), [(2, 1.0), (4, 0.9)])
def test_a_small_batch_is_read_word_by_word(count, share):
    """Of fewer tokens than the encoder is wide, these and where they stand."""
    gradient, (_, there) = gradient_of(range(count)), tokens_of(range(count))
    encoder, params = system().retriever.encoder, system().retriever.query
    assert len(there) < encoder.config.hidden_size
    every = np.arange(encoder.config.vocab_size)
    inputs = inversion.first_inputs(encoder, params, every, 1 + max(place for place, _ in there))
    outside = inversion.placed(inversion.first_gradient(gradient), inputs)
    truth = np.zeros(outside.shape, bool)
    truth[tuple(np.array([*there]).T)] = True
    assert inversion.r_precision(-outside.ravel(), truth.ravel()) >= share


def test_a_step_of_sgd_is_read_in_spite_of_rounding():
    before = ranking().trainable["query"]
    gradient, (_, there) = gradient_of([0, 1]), tokens_of([0, 1])
    after = jax.tree.map(lambda y, g: y - np.float32(0.1) * g, before, gradient)
    update = inversion.first_gradient(inversion.moved(after, before))
    noise = inversion.rounding(before)
    exact = -0.1 * inversion.first_gradient(jax.tree.map(lambda g: np.array(g, float), gradient))
    assert 0.3 * noise < np.linalg.norm(update - exact, 2) <= noise
    encoder, places = system().retriever.encoder, 1 + max(place for place, _ in there)
    inputs = inversion.first_inputs(encoder, before, np.arange(encoder.config.vocab_size), places)
    truth = np.zeros(inputs.shape[:2], bool)
    truth[tuple(np.array([*there]).T)] = True
    outside = inversion.placed(update, inputs, noise=noise)
    assert inversion.r_precision(-outside.ravel(), truth.ravel()) > 0.5


def test_a_short_prompt_is_read_from_the_gradient_of_adapters():
    """Of no more tokens than the first layer's adapters have ranks together, once B is not zero."""
    lora = LoraConfig(16, 32.0, ("q_proj", "k_proj", "v_proj"))
    built = RAGSystem.build(world().passages, world().train, adapters=lora)
    task = closed_book(built.decoder, built.generator.params, built.adapters, built.prompts)
    gradient = jax.jit(jax.grad(task.loss, has_aux=True))
    some, other = (task.table(world().train[i : i + 1]) for i in (0, 1))

    def of(adapters, table):
        batch = {**table, "weight": np.ones(1, np.float32)}
        return gradient({"adapters": adapters}, task.frozen, batch, jax.random.key(0))[0][
            "adapters"
        ]

    fresh = of(built.adapters, some)
    assert not inversion.first_gradient(fresh).any()  # B is zero
    moved = jax.tree.map(lambda y, g: y - g, built.adapters, of(built.adapters, other))
    read = np.zeros(len(built.generator.params["embed"]["embedding"]), bool)
    read[np.asarray(some["tokens"])[0, 0, : int(some["lengths"][0, 0])]] = True
    assert read.sum() <= 3 * 16
    inputs = inversion.first_inputs_of_decoder(
        built.decoder, built.generator.params, np.arange(len(read))
    )
    outside = inversion.placed(inversion.first_gradient(of(moved, some)), inputs)
    assert inversion.r_precision(-outside, read) >= 0.9
    assert np.median(outside[read]) < 1e-3 < outside[~read].min()  # they lie in the span
    blind = inversion.placed(inversion.first_gradient(of(moved, other)), inputs)
    assert inversion.r_precision(-blind, read) < 0.7


@pytest.mark.slow
@pytest.mark.parametrize(("count", "least"), [(1, 1.0), (4, 0.8)])
def test_known_questions_are_told_by_their_gradients(count, least):
    asked, rng = by_heart().train, np.random.default_rng(0)
    negatives = {e.id: rng.choice(COUNT, 8, replace=False) for e in asked}
    task = multiple_negatives_ranking(system().retriever, by_heart(), negatives=negatives)
    table = {name: jnp.asarray(x) for name, x in task.table(asked[:count]).items()}
    batch = table | {"weight": jnp.ones(count)}
    gradient = jax.jit(jax.grad(task.loss, has_aux=True))
    found, _ = gradient(task.trainable, task.frozen, batch, jax.random.key(0))
    update = jax.tree.map(lambda x: -np.asarray(x), found)
    cosines = inversion.matched(task, task.trainable, asked[:40], update)
    assert auc(cosines[:count], cosines[count:]) >= least
    if count == 1:
        assert cosines[0] == pytest.approx(1.0, abs=1e-3)
    noise = jax.tree.map(lambda x: rng.normal(size=x.shape), update)
    blind = inversion.matched(task, task.trainable, asked[:40], noise)
    assert np.abs(blind).max() < 0.05


# --- what a system says --------------------------------------------------------------------------


@pytest.mark.slow
def test_passages_learned_by_heart_are_said_and_told():
    passages = world().passages[:16]
    asked = [Example(p.id, f"What is known of {p.title}?", (p.text,), ()) for p in passages]
    built = RAGSystem.build(
        world().passages,
        asked,
        max_answer_tokens=48,
        adapters=LoraConfig(32, 64.0, EVERYWHERE),
    )
    task = closed_book(built.decoder, built.generator.params, built.adapters, built.prompts)
    fitted = fit(
        task, Partition(asked, (np.arange(8),)), centralised(local_steps=150), rounds=1,
        batch_size=8, optimizer=optax.adam(5e-3), group_size=1,
    )  # fmt: skip
    overfit = built.replace(**fitted.trainable)

    def said(one):
        texts = one.answer([e.question for e in asked], [()] * 16, max_new_tokens=48)
        return extraction.said(texts, passages)

    assert said(overfit)[:8].mean() > 0.9 and not said(overfit)[8:].any()
    assert not said(built).any()
    nll = [answer_nll(one, asked, np.zeros((16, 0), int)) for one in (overfit, built)]
    assert auc(-nll[0][:8], -nll[0][8:]) > 0.95
    assert 0.2 < auc(-nll[1][:8], -nll[1][8:]) < 0.8


@pytest.mark.slow
def test_a_system_that_reads_tells_what_it_has():
    held = np.zeros(len(world().passages), bool)
    held[::2] = True
    row = {p.id: i for i, p in enumerate(world().passages)}
    there = held[[row[e.positive_ids[0]] for e in world().train]]
    f1 = extraction.answered_from(system(), world().train, held)["f1"]
    assert auc(f1[there], f1[~there]) > 0.7
    everything = extraction.answered_from(system(), world().train, held | True)["f1"]
    assert 0.3 < auc(everything[there], everything[~there]) < 0.7
