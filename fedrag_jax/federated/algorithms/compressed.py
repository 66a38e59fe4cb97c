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
    Messages,
    PyTree,
    State,
    Traffic,
    Turn,
    by_kind,
    difference,
    wide,
)
from fedrag_jax.federated.compression.codec import Codec, decoded, encoded, message_bytes
from fedrag_jax.federated.compression.feedback import (
    LABEL,
    leaves_of,
    nothing_left,
    packed,
    with_leaves,
)
from fedrag_jax.federated.updates import Change, changing, require_one_model


@functools.cache
def compressed(
    algorithm: Algorithm, *, up: Codec | None = None, down: Codec | None = None
) -> Algorithm:
    """Returns the algorithm with messages encoded by these codecs; None sends them unencoded.

    `bytes_up`, `bytes_down` and `traffic` of a round's record count the encoded messages. Other data of
    the algorithm (SCAFFOLD's control variates) is sent and counted unencoded.

        compressed(fed_avg(local_steps=10), up=quantised(bits=4), down=cast("bfloat16"))

    Raises:
      ConfigError: models stay with the clients; updates are masked; messages differ in size between
        clients; `down` or error feedback with a rule that creates new factors in every round.
    """
    if up is None and down is None:
        return algorithm
    require_one_model("compressed", algorithm)
    if algorithm.needs == "masked" and up is not None:
        raise ConfigError(
            f"compressed: updates of {algorithm.name} are masked integers, which no codec can shorten; "
            "leave out up"
        )
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
        made = changing(made, LABEL, _sending(up), nothing_left if up.feedback else None)
    if down is not None:
        made = _broadcasting(made, down)

    def traffic(trainable, drawn, answered, round):
        plain = algorithm.traffic(trainable, drawn, answered, round)
        sent = algorithm.sent(trainable, round % len(algorithm.turns))
        changed = moved(algorithm, trainable)
        return Traffic(
            down=_instead(plain.down, sent, down, changed, len(drawn)),
            up=_instead(plain.up, sent, up, sent, len(answered)),
        )

    needs = algorithm.needs if up is None else "updates"  # each is decoded by itself
    return made._replace(
        traffic=traffic,
        needs=needs,
        bounded=None,  # the server bounds the decoded update
        messages=Messages(algorithm, up, down),
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
        message, left = packed(codec, update, left, key)
        return decoded(codec, message, update, key), left

    return change


def _broadcasting(algorithm: Algorithm, codec: Codec) -> Algorithm:
    def init(trainable, client_init, client_count):
        state = algorithm.init(trainable, client_init, client_count)
        start = jax.tree.map(wide, moved(algorithm, state.trainable))
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
        _, w = announced(codec, x, w, client.key)
        start = heard(x, w)
        inner = State(start, state.server["inner"], state.population)
        inner, report = turn(inner, cohort, client)
        x = moved_on(x, start, inner.trainable)
        return State(x, {"inner": inner.server, "received": w}, inner.population), report

    return broadcast


def announced(codec: Codec, x: PyTree, w: PyTree, key: jax.Array) -> tuple[dict, PyTree]:
    """Returns the message of a round, and the sum of all messages including it.

    Args:
      x: the server's model.
      w: the sum of the earlier messages, of the parts that the algorithm moves.
      key: random key of the round.
    """
    message = encoded(codec, difference(with_leaves(w, leaves_of(x)), w), broadcast_key(key))
    return message, after_message(codec, message, w, key)


def after_message(codec: Codec, message: dict, w: PyTree, key: jax.Array) -> PyTree:
    """Returns w + decode(message), which receivers compute, too."""
    return jax.tree.map(jnp.add, w, decoded(codec, message, w, broadcast_key(key)))


def broadcast_key(key: jax.Array) -> jax.Array:
    """Returns the key of the server's message, from the key of the round."""
    return jax.random.fold_in(key, zlib.crc32(b"broadcast"))


def heard(x: PyTree, w: PyTree) -> PyTree:
    """Returns the start of the clients: w for the leaves that move, in the types of x."""
    at = leaves_of(x)
    return with_leaves(x, at | {n: leaf.astype(at[n].dtype) for n, leaf in leaves_of(w).items()})


def moved_on(x: PyTree, start: PyTree, new: PyTree) -> PyTree:
    """Returns x + (new − start): the server's model after updates that started elsewhere."""
    return jax.tree.map(
        lambda x, new, old: (wide(x) + (wide(new) - wide(old))).astype(x.dtype), x, new, start
    )


def moved(algorithm: Algorithm, trainable: PyTree) -> PyTree:
    """Returns the part of the model that any turn changes."""
    assert algorithm.sent is not None
    return algorithm.sent(trainable, 0) if len(algorithm.turns) == 1 else trainable
