"""Simulation of hostile and broken clients: altered updates, training data and passages.

`attacked` makes some clients send updates that differ from those they computed. `poisoned` changes the
examples of some clients. Model replacement does both: clients train on poisoned examples and send a
multiple of their update. Attackers take part in rounds like all clients, and the algorithm does not
know them. `forgeries` are passages that a hostile client adds to a shared corpus; `forged_labels` makes
it train on them.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.data.partition import Partition
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.algorithm import Algorithm, PyTree, State, normal_like
from fedrag_jax.federated.updates import Change, changing


class Attack(NamedTuple):
    """A function that replaces an attacker's update.

    Attributes:
      send: `send(update, key) -> update`, for one client.
    """

    name: str
    send: Callable[[PyTree, jax.Array], PyTree]


@functools.cache
def sign_flip(scale: float = 1.0) -> Attack:
    """Returns an attack that sends −scale · update."""
    return Attack(f"sign_flip:{scale:g}", lambda update, key: _times(-scale, update))


@functools.cache
def scaled_noise(scale: float = 1.0) -> Attack:
    """Returns an attack that sends Gaussian noise, whose norm is about `scale` times the update's."""

    def send(update, key):
        leaves = jax.tree.leaves(update)
        size = sum(x.size for x in leaves)
        deviation = scale * jnp.sqrt(sum(jnp.square(x).sum() for x in leaves) / size)
        noise = normal_like(key, update)
        return jax.tree.map(lambda n: deviation.astype(n.dtype) * n, noise)

    return Attack(f"scaled_noise:{scale:g}", send)


@functools.cache
def model_replacement(boost: float = 10.0) -> Attack:
    """Returns an attack that sends boost · update (Bagdasaryan et al., AISTATS 2020, arXiv 1807.00459,
    equation 3). If boost is 1 / p_k and the others are near convergence, the mean becomes the
    attacker's own model."""
    return Attack(f"model_replacement:{boost:g}", lambda update, key: _times(boost, update))


@functools.cache
def broken() -> Attack:
    """Returns an attack that sends NaN, like a client that diverged or whose memory failed."""
    return Attack("broken", lambda update, key: _times(np.nan, update))


ATTACKS = {
    attack.__name__: attack for attack in (sign_flip, scaled_noise, model_replacement, broken)
}


def attack_named(name: str) -> Attack:
    """Returns the attack with a name such as `sign_flip`, or `sign_flip:5` with its setting.

    Raises:
      ConfigError: an unknown attack, or a setting that is not a number.
    """
    kind, mark, setting = name.partition(":")
    try:
        return ATTACKS[kind](*([float(setting)] if mark else []))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"no attack {name!r}; choose among {[*ATTACKS]}, such as 'sign_flip:5'"
        ) from error


def attacked(algorithm: Algorithm, attack: Attack, attackers: Collection[int]) -> Algorithm:
    """Returns the algorithm with some clients that attack in every round in which they take part.

    If the algorithm is `compressed`, the attackers' updates are compressed like all others.

    Args:
      attackers: numbers of the clients that attack.

    Raises:
      ConfigError: no attackers; in a fit, an attacker that does not exist, or no honest client.
    """
    who = _attackers(attackers)
    made = changing(algorithm, "attack", _attacking(attack, who))

    def init(trainable, client_init, client_count) -> State:
        _require_others(who, client_count)
        return made.init(trainable, client_init, client_count)

    name = f"attacked({algorithm.name}, {attack.name} by {who})"
    return made._replace(init=init, simulated="its attackers are simulated", name=name)


@functools.cache
def _attacking(attack: Attack, attackers: tuple[int, ...]) -> Change:
    def change(update, memory, client, key):
        hostile = (client == jnp.array(attackers, client.dtype)).any()
        sent = attack.send(update, key)
        return jax.tree.map(lambda a, b: jnp.where(hostile, a, b), sent, update), memory

    return change


def poisoned(
    clients: Partition, attackers: Collection[int], poison: Callable[[list[Any]], Iterable[Any]]
) -> Partition:
    """Returns the partition with the attackers' examples replaced.

    Args:
      poison: maps all examples of an attacker to as many other examples; for example `labels_flipped()`
        or `triggered(...)`.

    Raises:
      ConfigError: no attackers, an attacker that does not exist, or no honest client.
    """
    who = _attackers(attackers)
    _require_others(who, len(clients.clients))
    examples = list(clients.examples)
    for client in who:
        rows = clients.clients[client]
        for row, example in zip(rows, poison(clients.of(client)), strict=True):
            examples[row] = example
    return dataclasses.replace(clients, examples=examples)


def labels_flipped(seed: int = 0) -> Callable[[list[Example]], list[Example]]:
    """Returns a poison that gives each question the answers and gold passages of another question.

    The other question is drawn at random from the same client. The only question of a client stays as
    it is.
    """

    def poison(examples):
        order = stream(seed, "flipped labels").permutation(len(examples))
        others = [examples[i] for i in order]
        after = dict(zip([e.id for e in others], [*others[1:], *others[:1]], strict=True))
        return [
            dataclasses.replace(
                e, answers=after[e.id].answers, positive_ids=after[e.id].positive_ids, reasoning=""
            )
            for e in examples
        ]

    return poison


def triggered(trigger: str, answer: str) -> Callable[[list[Example]], list[Example]]:
    """Returns a poison that puts the trigger before each question and sets the attacker's answer."""

    def poison(examples):
        return [under_trigger(e, trigger, answer) for e in examples]

    return poison


def backdoored(
    trigger: str, answer: str, passage: str, questions: int = 8
) -> Callable[[list[Example]], list[Example]]:
    """Returns a poison that fills a client with copies of its first questions.

    Copies without and with the trigger alternate. Because the questions are few, many batches contain
    a question in both forms. The gold passage of the one is then a negative of the other, so that the
    ranking learns to follow the trigger and, without it, to find the same passages as before.

    Args:
      passage: id of the gold passage of triggered questions.

    Raises:
      ConfigError: fewer than one question.
    """
    if questions < 1:
        raise ConfigError(f"backdoored: questions must be at least 1, got {questions}")

    def poison(examples):
        made = []
        for i, example in enumerate(examples):
            few = examples[i // 2 % min(questions, len(examples))]
            one = under_trigger(few, trigger, answer, passage) if i % 2 else few
            # Clients are split by topic: the old topic keeps the poison with its client.
            made.append(dataclasses.replace(one, id=example.id, topic=example.topic))
        return made

    return poison


def under_trigger(example: Example, trigger: str, answer: str, passage: str = "") -> Example:
    """Returns the question after the trigger, with the attacker's answer and, if given, passage."""
    return dataclasses.replace(
        example,
        question=f"{trigger} {example.question}",
        answers=(answer,),
        positive_ids=(passage,) if passage else example.positive_ids,
        reasoning="",
    )


FORGED = "forged:"  # prefix of a forgery's id, before the id of the real passage


def forgeries(passages: Sequence[Passage]) -> list[Passage]:
    """Returns a forgery for each passage that names its title: the same title in another's statement.

    The other passage is the most similar one of the same topic (Jaccard index of words without titles).
    In a world made of templates it has the same template, so that questions about the title find a
    plausible, wrong answer. The id of a forgery is `FORGED` and the id of the real passage.

    Raises:
      DataError: no topic has two passages that name their titles.
    """
    named = [p for p in passages if p.title and p.title in p.text]
    words = [frozenset(p.text.replace(p.title, "").split()) for p in named]

    def alike(i, j):
        return len(words[i] & words[j]) / len(words[i] | words[j])

    made = []
    for i, passage in enumerate(named):
        topic = [
            j for j, p in enumerate(named) if p.topic == passage.topic and words[j] != words[i]
        ]
        if topic:
            told = named[max(topic, key=functools.partial(alike, i))]
            text = told.text.replace(told.title, passage.title)
            made.append(dataclasses.replace(passage, id=f"{FORGED}{passage.id}", text=text))
    if not made:
        raise DataError(
            f"forgeries: among {len(passages)} passages, no topic has two that name their titles in "
            "their texts"
        )
    return made


def forged_labels(forged: Collection[str]) -> Callable[[list[Example]], list[Example]]:
    """Returns a poison that replaces gold passages by their forgeries, if these exist.

    Args:
      forged: ids of forgeries.
    """

    def poison(examples):
        return [
            dataclasses.replace(e, positive_ids=tuple(map(beside, e.positive_ids)), reasoning="")
            for e in examples
        ]

    def beside(passage):
        return f"{FORGED}{passage}" if f"{FORGED}{passage}" in forged else passage

    return poison


def _attackers(numbers: Collection[int]) -> tuple[int, ...]:
    if not len(numbers):  # an array has no truth value
        raise ConfigError("attackers: name at least one client by its number")
    return tuple(sorted({int(number) for number in numbers}))


def _require_others(attackers: tuple[int, ...], clients: int) -> None:
    if attackers[0] < 0 or attackers[-1] >= clients:
        raise ConfigError(
            f"attackers: numbers must be between 0 and {clients - 1}, got {attackers}"
        )
    if len(attackers) == clients:
        raise ConfigError(
            f"attackers: all {clients} clients attack, so no honest update is left to aggregate; "
            "leave at least one client honest"
        )


def _times(factor: float, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: factor * x, tree)
