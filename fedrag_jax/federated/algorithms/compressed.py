"""Any algorithm with compressed messages, from clients to server and back.

Up, a client sends its encoded update. With codecs that need it, the values that a message dropped are
added to the client's next one (error feedback; Karimireddy et al., ICML 2019, arXiv 1901.09847,
Algorithm 1).

Down, the server sends the encoded difference between its model x and the sum w of its past messages:

    w ← w + decode(encode(x − w)),

which corrects every error automatically (Tang et al., DoubleSqueeze, ICML 2019, arXiv 1905.05957).
Clients start from w. The simulation assumes that every client has received all past messages.
"""

import functools
import zlib
from collections import Counter

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import (
    Algorithm,
    State,
    Traffic,
    Turn,
    by_kind,
    difference,
    wide,
)
from fedrag_jax.federated.compression.codec import Codec, message_bytes, received
from fedrag_jax.federated.updates import Change, changing

LABEL = "compression"


@functools.cache
def compressed(
    algorithm: Algorithm, *, up: Codec | None = None, down: Codec | None = None
) -> Algorithm:
    """Returns the algorithm with messages encoded by these codecs; None sends them unencoded.

    `bytes_up`, `bytes_down` and `traffic` of a round's record count the encoded messages. Other data of
    the algorithm (SCAFFOLD's control variates) is sent and counted unencoded.

        compressed(fed_avg(local_steps=10), up=quantised(bits=4), down=cast("bfloat16"))

    Raises:
      ConfigError: models stay with the clients; messages differ in size between clients; `down` or
        error feedback with a rule that creates new factors in every round.
    """
    if up is None and down is None:
        return algorithm
    codecs = {"up": up, "down": down}
    named = ", ".join(f"{way}={codec.name}" for way, codec in codecs.items() if codec is not None)
    if algorithm.sent is None:
        raise ConfigError(
            f"compressed: clients of {algorithm.name} send messages of different sizes; leave out ranks"
        )
    if algorithm.needs == "factors" and (down is not None or (up is not None and up.feedback)):
        raise ConfigError(
            f"compressed: {algorithm.name} creates new factors in each round, so the error of the last "
            f"message cannot be added to them, as {named} would; use a codec without error "
            "feedback, and only up"
        )
    made = algorithm
    if up is not None:
        made = changing(made, LABEL, _sending(up), _nothing if up.feedback else None)
    if down is not None:
        made = _broadcasting(made, down)

    def traffic(trainable, drawn, answered, round):
        plain = algorithm.traffic(trainable, drawn, answered, round)
        sent = algorithm.sent(trainable, round % len(algorithm.turns))
        moved = _moved(algorithm, trainable)
        return Traffic(
            down=_instead(plain.down, sent, down, moved, len(drawn)),
            up=_instead(plain.up, sent, up, sent, len(answered)),
        )

    needs = algorithm.needs if up is None else "updates"  # each is to be decoded
    return made._replace(
        traffic=traffic,
        needs=needs,
        simulated="its messages are encoded and decoded within the round, and would be sent unencoded",
        name=f"compressed({algorithm.name}, {named})",
    )


def _instead(plain, raw, codec, tree, messages: int) -> dict[str, int]:
    """Returns the bytes in one direction, with the encoded `tree` in each message instead of `raw`."""
    sizes = Counter(plain)
    if codec is not None:
        for kind, size in by_kind(raw).items():
            sizes[kind] -= messages * size
        for kind, size in message_bytes(codec, tree).items():
            sizes[kind] += messages * size
    return {kind: size for kind, size in sizes.items() if size}


@functools.cache
def _sending(codec: Codec) -> Change:
    def change(update, left, client, key):
        if not codec.feedback:
            return received(codec, update, key), ()
        # Some turns train some leaves alone: what is left of the others waits.
        now = {name: left[name] for name in _leaves(update)}
        whole = jax.tree.map(jnp.add, update, _like(update, now))
        seen = received(codec, whole, key)
        rest = jax.tree.map(jnp.subtract, whole, seen)
        return seen, left | _leaves(rest)

    return change


def _nothing(trainable) -> dict:
    """Returns the error memory before the first message."""
    return {name: jnp.zeros_like(wide(x)) for name, x in _leaves(trainable).items()}


def _broadcasting(algorithm: Algorithm, codec: Codec) -> Algorithm:
    def init(trainable, client_init, client_count):
        state = algorithm.init(trainable, client_init, client_count)
        start = jax.tree.map(wide, _moved(algorithm, state.trainable))
        return state._replace(server={"inner": state.server, "received": start})

    turns = tuple(_hearing(turn, codec) for turn in algorithm.turns)
    return algorithm._replace(
        init=init,
        turns=turns,
        frozen=lambda state, frozen: algorithm.frozen(
            state._replace(server=state.server["inner"]), frozen
        ),
    )


@functools.cache
def _hearing(turn: Turn, codec: Codec) -> Turn:
    def broadcast(state, cohort, client):
        x, w = state.trainable, state.server["received"]
        key = jax.random.fold_in(client.key, zlib.crc32(b"broadcast"))
        names = _leaves(w)
        moved = _like(w, {name: leaf for name, leaf in _leaves(x).items() if name in names})
        told = received(codec, difference(moved, w), key)
        w = jax.tree.map(jnp.add, w, told)
        start = jax.tree.map(lambda w, x: w.astype(x.dtype), w, moved)
        start = _like(x, _leaves(x) | _leaves(start))
        inner = State(start, state.server["inner"], state.population)
        inner, report = turn(inner, cohort, client)
        x = jax.tree.map(
            lambda x, new, old: (wide(x) + (wide(new) - wide(old))).astype(x.dtype),
            x,
            inner.trainable,
            start,
        )
        return State(x, {"inner": inner.server, "received": w}, inner.population), report

    return broadcast


def _moved(algorithm: Algorithm, trainable):
    """Returns the part of the model that any turn changes."""
    assert algorithm.sent is not None
    return algorithm.sent(trainable, 0) if len(algorithm.turns) == 1 else trainable


def _leaves(tree) -> dict:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _like(tree, leaves: dict):
    """The tree with these leaves, by path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[jax.tree_util.keystr(path)], tree
    )
