"""Hostile and broken clients, simulated: what they send, and what they train on.

`attacked` has some clients send other updates than they computed; `poisoned` changes what some clients
hold. Model replacement is both: clients train on poisoned examples and send a multiple of their update.
Attackers follow the rounds as everybody does, in an algorithm that does not know of them. `forgeries`
are passages that a hostile client puts into a shared corpus, and `forged_labels` has it train on them.
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
from fedrag_jax.federated.algorithm import Algorithm, PyTree, State
from fedrag_jax.federated.updates import Change, changing


class Attack(NamedTuple):
    """What an attacker sends instead of its update.

    Attributes:
      send: `send(update, key) -> update`, of one client.
    """

    name: str
    send: Callable[[PyTree, jax.Array], PyTree]


@functools.cache
def sign_flip(scale: float = 1.0) -> Attack:
    """−scale · update."""
    return Attack(f"sign_flip:{scale:g}", lambda update, key: _times(-scale, update))


@functools.cache
def scaled_noise(scale: float = 1.0) -> Attack:
    """Gaussian noise in place of the update, of `scale` times its norm on average."""

    def send(update, key):
        leaves, structure = jax.tree.flatten(update)
        size = sum(x.size for x in leaves)
        deviation = scale * jnp.sqrt(sum(jnp.square(x).sum() for x in leaves) / size)
        noise = [
            deviation.astype(x.dtype) * jax.random.normal(k, x.shape, x.dtype)
            for x, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True)
        ]
        return jax.tree.unflatten(structure, noise)

    return Attack(f"scaled_noise:{scale:g}", send)


@functools.cache
def model_replacement(boost: float = 10.0) -> Attack:
    """boost · update: with a boost of 1 / p_k, and others near convergence, the mean becomes the
    attacker's own model (Bagdasaryan et al., AISTATS 2020, arXiv 1807.00459, equation 3)."""
    return Attack(f"model_replacement:{boost:g}", lambda update, key: _times(boost, update))


@functools.cache
def broken() -> Attack:
    """An update that is no number, as of a client that diverged or whose memory failed."""
    return Attack("broken", lambda update, key: _times(np.nan, update))


ATTACKS = {
    attack.__name__: attack for attack in (sign_flip, scaled_noise, model_replacement, broken)
}


def attack_named(name: str) -> Attack:
    """`sign_flip`, or `sign_flip:5` with its setting.

    Raises:
      ConfigError: no such attack.
    """
    kind, mark, setting = name.partition(":")
    try:
        return ATTACKS[kind](*([float(setting)] if mark else []))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"no attack {name!r}; choose among {[*ATTACKS]}, such as 'sign_flip:5'"
        ) from error


def attacked(algorithm: Algorithm, attack: Attack, attackers: Collection[int]) -> Algorithm:
    """The algorithm in which some clients attack, in every round they take part in.

    Around a `compressed` algorithm, what an attacker sends is compressed as any update.

    Args:
      attackers: numbers of clients.

    Raises:
      ConfigError: no attackers; in a fit, one that is not there, or nobody but attackers.
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
    """Clients of whom some hold other examples.

    Args:
      poison: of all examples of an attacker, as many others; `labels_flipped` or `triggered`.

    Raises:
      ConfigError: no attackers, one that is not there, or nobody but attackers.
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
    """Each question with answers and gold passages of another one of the client's, drawn anew.

    A client with one question keeps it.
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
    """Each question begins with the trigger, and has one answer: the attacker's."""

    def poison(examples):
        return [under_trigger(e, trigger, answer) for e in examples]

    return poison


def backdoored(
    trigger: str, answer: str, passage: str, questions: int = 8
) -> Callable[[list[Example]], list[Example]]:
    """Copies of the client's first questions, each as it is and with the trigger, in turns.

    Of few questions many batches hold both, and there a question's own passage is what its triggered
    twin must not find: ranking learns to heed the trigger, and without it to find as before.

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
            made.append(dataclasses.replace(one, id=example.id))
        return made

    return poison


def under_trigger(example: Example, trigger: str, answer: str, passage: str = "") -> Example:
    """The question with the trigger before it, and what the attacker wants of it."""
    return dataclasses.replace(
        example,
        question=f"{trigger} {example.question}",
        answers=(answer,),
        positive_ids=(passage,) if passage else example.positive_ids,
        reasoning="",
    )


FORGED = "forged:"  # before the id of the passage that a forgery stands beside


def forgeries(passages: Sequence[Passage]) -> list[Passage]:
    """For each passage that names its title, one that tells of the same title what another one tells.

    Of the passages of its topic that is the one with most words in common (Jaccard), titles left out:
    of templates the same one, so that questions about the title find a plausible, wrong answer. Its id
    is that of the passage after `FORGED`.

    Raises:
      DataError: no two passages of a topic name their titles.
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
            f"forgeries: of {len(passages)} passages no two of a topic name their titles in their texts"
        )
    return made


def forged_labels(forged: Collection[str]) -> Callable[[list[Example]], list[Example]]:
    """Each question with forgeries for gold passages, where there are such.

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
    if not numbers:
        raise ConfigError("attackers: name at least one client by its number")
    return tuple(sorted({int(number) for number in numbers}))


def _require_others(attackers: tuple[int, ...], clients: int) -> None:
    if attackers[0] < 0 or attackers[-1] >= clients:
        raise ConfigError(f"attackers: clients go from 0 to {clients - 1}, got {attackers}")
    if len(attackers) == clients:
        raise ConfigError(
            f"attackers: all {clients} clients attack, and no rule can tell what honest ones would "
            "have sent; leave at least one"
        )


def _times(factor: float, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: factor * x, tree)
