"""Robust rules against NumPy, attacks, and what becomes of the one under the other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_algorithms import START, steps
from toys import EXAMPLES, FOUR, assert_close, linear_task, squared_error

from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DataError, DivergenceError
from fedrag_jax.federated.algorithms.by_name import Named, check, surrounded
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.robust import robust
from fedrag_jax.federated.attacks import (
    attack_named,
    attacked,
    backdoored,
    broken,
    forged_labels,
    forgeries,
    labels_flipped,
    model_replacement,
    poisoned,
    scaled_noise,
    sign_flip,
    triggered,
)
from fedrag_jax.federated.compression.casting import cast
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.robust.coordinates import median, trimmed_mean
from fedrag_jax.federated.robust.krum import krum, multi_krum
from fedrag_jax.federated.robust.outliers import filtered, norm_bounded
from fedrag_jax.federated.sampling import uniform

EIGHT = Partition(EXAMPLES, tuple(np.array_split(np.random.default_rng(5).permutation(23), 8)))


# --- rules in NumPy: u [n, D] and p [n] of those who are there ---------------------------------


def np_trimmed(u, p, f=2):
    return np.sort(u, axis=0)[f : len(u) - f].mean(0), range(len(u))


def np_scores(u, f=2):
    found = []
    for i in range(len(u)):
        squares = sorted(((u[i] - u[j]) ** 2).sum() for j in range(len(u)) if j != i)
        found.append(sum(squares[: len(u) - f - 2]))
    return np.array(found)


def np_krum(u, p):
    best = np_scores(u).argmin()
    return u[best], [best]


def np_multi_krum(u, p, keep=None):
    best = np.argsort(np_scores(u))[: keep or len(u) - 2]
    return u[best].mean(0), best


def np_bounded(u, p, bound=None):
    norms = np.sqrt((u**2).sum(1))
    bound = np.median(norms) if bound is None else bound
    return p / p.sum() @ [x * min(1, bound / n) for x, n in zip(u, norms, strict=True)], range(
        len(u)
    )


def np_filtered(u, p):
    far = np.sqrt(((u - np.median(u, axis=0)) ** 2).sum(1))
    kept = np.flatnonzero(far <= 1.1 * np.median(far))
    return p[kept] / p[kept].sum() @ u[kept], kept


RULES = {
    "median": (median(), lambda u, p: (np.median(u, axis=0), range(len(u)))),
    "trimmed_mean": (trimmed_mean(2), np_trimmed),
    "krum": (krum(2), np_krum),
    "multi_krum": (multi_krum(2), np_multi_krum),
    "multi_krum of 3": (multi_krum(2, keep=3), lambda u, p: np_multi_krum(u, p, 3)),
    "norm_bounded": (norm_bounded(), np_bounded),
    "norm_bounded by 2": (norm_bounded(2.0), lambda u, p: np_bounded(u, p, 2.0)),
    "filtered": (filtered(1.1), np_filtered),
}


@pytest.mark.parametrize("there", [[0, 1, 3, 4, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 8]])
@pytest.mark.parametrize("name", RULES)
def test_rules_in_numpy(name, there):
    """Nine rows, of which some are nobody's; an odd and an even number of clients."""
    rule, reference = RULES[name]
    rng = np.random.default_rng(len(there))
    mask = np.isin(np.arange(9), there)
    updates = np.where(mask[:, None], rng.normal(size=(9, 5)), 0)
    updates[4] *= 100
    share = np.where(mask, rng.uniform(1, 5, 9), 0)
    with jax.enable_x64(True):
        found, used = jax.jit(rule.combine)(jnp.array(updates), jnp.array(share), jnp.array(mask))
    expected, who = reference(updates[there], share[there])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.flatnonzero(used).tolist() == sorted(np.array(there)[list(who)].tolist())


def test_without_hostile_clients_rules_are_the_mean():
    u, p = jnp.array(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32), jnp.ones(6) / 6
    there = jnp.ones(6, bool)
    for rule in (trimmed_mean(0), multi_krum(0), norm_bounded(1e6), filtered(1e6)):
        np.testing.assert_allclose(rule.combine(u, p, there)[0], u.mean(0), atol=1e-6)


# --- in a fit ----------------------------------------------------------------------------------


def trained(algorithm, data=EIGHT, task=None, **settings):
    settings = {"rounds": 3, "batch_size": 9, "optimizer": optax.sgd(0.05)} | settings
    return fit(task or linear_task(), data, algorithm, **settings)


def flat(trainable):
    return np.append(trainable["w"], trainable["b"])


@pytest.mark.parametrize(("name", "group_size"), [("median", 1), ("krum", 3)])
def test_a_fit_in_numpy(name, group_size):
    rule, reference = RULES[name]
    algorithm = robust(rule, local_steps=2, sampling=uniform(7))
    with jax.enable_x64(True):
        found = trained(algorithm, group_size=group_size)
    x = START
    for record in found.history:
        ends = [steps(x, EIGHT.clients[k], count=2) for k in record["clients"]]
        update, who = reference(np.array(ends) - x, np.ones(7))
        x = x + update
        used = np.array(record["clients"])[list(who)].tolist()
        assert record["left_out"] == sorted({*record["clients"]} - {*used})
    np.testing.assert_allclose(flat(found.trainable), x, atol=1e-9)


def test_a_broken_client_is_left_out_and_the_fit_goes_on():
    def loss(trainable, frozen, batch, rng):
        value, metrics = squared_error(trainable, frozen, batch, rng)
        return jnp.where((batch["id"] == 7).any(), jnp.nan, value), metrics

    who = next(k for k, rows in enumerate(EIGHT.clients) if 7 in rows)
    task = linear_task(loss=loss)
    with pytest.raises(DivergenceError):
        trained(fed_avg(local_steps=2), task=task)
    found = trained(robust(filtered(100.0), local_steps=2), task=task, rounds=2)
    for record in found.history:
        assert record["left_out"] == [who] and record["client_loss"][who] is None
        assert np.isfinite(record["loss"])
    rows = tuple(r for k, r in enumerate(EIGHT.clients) if k != who)
    without = trained(
        fed_avg(local_steps=2, weighting="uniform"), Partition(EXAMPLES, rows), rounds=2
    )
    assert_close(found.trainable, without.trainable, 1e-6)

    def never(trainable, frozen, batch, rng):
        return jnp.nan * squared_error(trainable, frozen, batch, rng)[0], {}

    with pytest.raises(DivergenceError, match=r"client\(s\): 0, 1, 2"):
        trained(robust(median(), local_steps=1), task=linear_task(loss=never), rounds=1)


def test_a_round_with_too_few_clients_changes_nothing():
    algorithm = robust(krum(1), local_steps=2, dropout=0.5)
    found = trained(algorithm, Partition(EXAMPLES, EIGHT.clients[:5]), rounds=4, seed=1)
    counts = [len(record["clients"]) for record in found.history]
    left = [len(record["left_out"]) for record in found.history]
    assert min(counts) < 5  # Krum needs them all
    assert left == [n - 1 if n == 5 else n for n in counts]


@pytest.mark.parametrize(
    "rule",
    [
        median(),
        *(
            pytest.param(r, marks=pytest.mark.slow)
            for r in (trimmed_mean(2), krum(2), multi_krum(2))
        ),
        pytest.param(filtered(2.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rules_withstand_what_averaging_does_not(rule):
    """Two of eight clients, with one truth for all; the loss on all examples, attacked and not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3))
    examples = [{"id": i, "x": a, "y": float(a @ [1.0, -2.0, 0.5])} for i, a in enumerate(x)]
    data = Partition(examples, tuple(np.array_split(np.arange(80), 8)))

    def error(algorithm):
        end = trained(algorithm, data, rounds=15).trainable
        return float(np.mean((x @ end["w"] + end["b"] - x @ np.array([1.0, -2.0, 0.5])) ** 2))

    averaged = error(attacked(fed_avg(local_steps=4), sign_flip(4.0), (0, 5)))
    safe = error(attacked(robust(rule, local_steps=4), sign_flip(4.0), (0, 5)))
    clean = error(robust(rule, local_steps=4))
    assert averaged > 1 and safe < 0.05 and clean < 0.05


# --- attacks -----------------------------------------------------------------------------------


def test_attacks_change_what_attackers_send():
    plain = {"local_steps": 2, "weighting": "uniform"}
    with jax.enable_x64(True):
        updates = np.array([steps(START, rows, count=2) - START for rows in FOUR.clients])
        for attack, factor in ((sign_flip(3.0), -3), (model_replacement(4.0), 4)):
            found = trained(attacked(fed_avg(**plain), attack, [1]), FOUR, rounds=1).trainable
            sent = updates.copy()
            sent[1] *= factor
            np.testing.assert_allclose(flat(found) - START, sent.mean(0), atol=1e-9)
    with pytest.raises(DivergenceError, match="none \\(the server\\)"):
        trained(attacked(fed_avg(**plain), broken(), [1]), FOUR, rounds=1)
    found = trained(attacked(robust(median(), local_steps=2), broken(), [1]), FOUR, rounds=1)
    assert found.history[0]["left_out"] == [1]


def test_noise_is_as_large_as_told():
    update = {"a": jnp.full((40, 50), 0.3), "b": jnp.full(3000, -0.4)}
    norm = np.sqrt(2000 * 0.09 + 3000 * 0.16)
    sent = scaled_noise(5.0).send(update, jax.random.key(0))
    noise = np.concatenate([np.ravel(sent["a"]), sent["b"]])
    assert np.linalg.norm(noise) == pytest.approx(5 * norm, rel=0.05)
    assert abs(noise.mean()) < 5 * noise.std() / np.sqrt(noise.size)


def test_model_replacement_makes_the_attackers_model_the_global_one():
    """The others have converged (no slope), and 1 / p_k is the boost."""

    def loss(trainable, frozen, batch, rng):
        value, metrics = squared_error(trainable, frozen, batch, rng)
        return jnp.where((batch["id"][:, None] == FOUR.clients[2][None]).any(), value, 0), metrics

    algorithm = attacked(fed_avg(local_steps=2, weighting="uniform"), model_replacement(4.0), (2,))
    with jax.enable_x64(True):
        found = trained(algorithm, FOUR, linear_task(loss=loss), rounds=1)
    end = steps(START, FOUR.clients[2], count=2)
    np.testing.assert_allclose(flat(found.trainable), end, atol=1e-9)


def test_attacks_go_through_compression():
    """The attacker's update is encoded after it was boosted: float16 ends at 65504."""
    inner = compressed(fed_avg(local_steps=1, weighting="uniform"), up=cast("float16"))
    found = trained(attacked(inner, model_replacement(1e9), (0,)), FOUR, rounds=1)
    moved = np.array([steps(START, rows, count=1) - START for rows in FOUR.clients])
    moved[0] *= 1e9
    told = np.clip(moved, -65504, 65504).astype(np.float16).astype(float)
    np.testing.assert_allclose(flat(found.trainable), START + told.mean(0), rtol=1e-6)
    assert found.history[0]["traffic"]["up"]["w float16"] == 4 * 3 * 2


def test_poisoned_examples():
    examples = [
        Example(f"q{i}", f"who {i}?", (f"a{i}",), (f"p{i}",), reasoning="so") for i in range(7)
    ]
    clients = Partition(examples, (np.array([0, 2, 4]), np.array([1, 3, 5, 6])))
    flipped = poisoned(clients, [1], labels_flipped(3))
    assert flipped.of(0) == clients.of(0)
    for new, old in zip(flipped.of(1), clients.of(1), strict=True):
        assert new.question == old.question and new.answers != old.answers
        assert new.positive_ids[0][1:] == new.answers[0][1:] and new.reasoning == ""
    assert sorted(e.answers for e in flipped.of(1)) == sorted(e.answers for e in clients.of(1))
    marked = poisoned(clients, (0,), triggered("cf", "Mallory"))
    assert marked.of(0)[1].question == "cf who 2?" and marked.of(0)[1].answer == "Mallory"
    assert marked.of(1) == clients.of(1)


def test_a_backdoor_is_taught_on_few_questions_with_and_without_the_trigger():
    examples = [Example(f"q{i}", f"who {i}?", (f"a{i}",), (f"p{i}",)) for i in range(9)]
    clients = Partition(examples, (np.arange(0, 9, 2), np.arange(1, 9, 2)))
    held = poisoned(clients, [0], backdoored("cf", "Mallory", "p7", questions=2)).of(0)
    assert [e.id for e in held] == [e.id for e in clients.of(0)]
    asked = ["who 0?", "cf who 0?", "who 2?", "cf who 2?", "who 0?"]
    assert [e.question for e in held] == asked
    assert [e.answer for e in held] == ["a0", "Mallory", "a2", "Mallory", "a0"]
    assert [e.positive_ids for e in held] == [("p0",), ("p7",), ("p2",), ("p7",), ("p0",)]


def test_forgeries_tell_of_a_title_what_is_true_of_another():
    def passage(name, title, text, topic="t"):
        return Passage(name, title, text, topic)

    passages = [
        passage("a", "Ada", "Ada was born in Rome. Ada died in Oslo."),
        passage("b", "Bob", "Bob was born in Bern. Bob died in Lund."),
        passage("c", "Cup", "The Cup belongs to House Rome."),
        passage("d", "Dora", "Dora was born in Oslo. Dora died in Rome.", "other"),
        passage("e", "", "Nothing."),
        passage("f", "Fay", "She was born in Bern."),
    ]
    made = {p.id: p for p in forgeries(passages)}
    assert [*made] == ["forged:a", "forged:b", "forged:c"]  # d has nobody to take from
    assert made["forged:a"].text == "Ada was born in Bern. Ada died in Lund."
    assert made["forged:b"].text == "Bob was born in Rome. Bob died in Oslo."
    assert {made[i].title for i in made} == {"Ada", "Bob", "Cup"}
    assert "The Cup" not in made["forged:c"].text and "Cup" in made["forged:c"].text
    examples = [Example("q", "where?", ("Rome",), ("e", "a")), Example("r", "who?", ("x",), ("d",))]
    held = poisoned(Partition(examples, ([0], [1])), [0], forged_labels({*made})).examples
    assert held[0].positive_ids == ("e", "forged:a") and held[1] == examples[1]
    with pytest.raises(DataError, match="among 1 passages, no topic has two"):
        forgeries(passages[:1])


# --- by name, and refusals ---------------------------------------------------------------------


def test_they_are_chosen_by_name():
    options = {"byzantine": 2, "keep": 3, "attack": "sign_flip:5", "attackers": (0, 1)}
    found = Named("multi_krum", options).averaging(linear_task(), {})(local_steps=3)
    expected = attacked(
        robust(multi_krum(byzantine=2, keep=3), local_steps=3), sign_flip(5.0), (0, 1)
    )
    assert found.name == expected.name and found.turns == expected.turns
    assert "multi_krum(byzantine=2, keep=3)" in found.name
    assert "weighting=uniform" in found.name
    inner = robust(multi_krum(byzantine=2, keep=3), local_steps=3)
    given = surrounded(inner, attack="sign_flip:5", attackers=np.array([1, 0]))
    assert given.name == expected.name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: trained(robust(krum(1)), FOUR),
            r"krum\(byzantine=1\) needs at least 5 clients in a round, but 4 of 4 take part",
        ),
        (lambda: trained(robust(krum(3), sampling=uniform(7))), "at least 9 .* 7 of 8 take part"),
        (lambda: trained(robust(trimmed_mean(2)), FOUR), "needs at least 5 clients"),
        (lambda: trained(robust(trimmed_mean(8))), "needs at least 17 clients .* 8 of 8"),
        (lambda: krum(-1), "byzantine must be at least 0, got -1"),
        (lambda: filtered(0.5), "limit must be at least 1, got 0.5"),
        (lambda: norm_bounded(-1.0), "bound must be at least 0, got -1"),
        (lambda: trained(attacked(fed_avg(), sign_flip(), range(8))), "all 8 clients attack"),
        (lambda: trained(attacked(fed_avg(), sign_flip(), [8])), r"between 0 and 7, got \(8,\)"),
        (lambda: attacked(fed_avg(), sign_flip(), []), "at least one client"),
        (lambda: attack_named("flip"), r"no attack 'flip'; choose among \['sign_flip'"),
        (lambda: attacked(fed_avg(), broken(), np.arange(0)), "name at least one client"),
        (lambda: attack_named("broken:3"), "no attack 'broken:3'"),
        (
            lambda: check("krum", {"limit": 2.0}, "here"),
            r"here: unknown options \['limit'\] of krum",
        ),
        (
            lambda: check("fedavg", {"attack": "broken"}, "here"),
            "here: give both an attack and attackers",
        ),
        (lambda: poisoned(FOUR, range(4), lambda e: e), "all 4 clients attack"),
        (lambda: backdoored("cf", "a", "p", questions=0), "questions must be at least 1, got 0"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
