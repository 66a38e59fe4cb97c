"""Makes a third built-in checkpoint: the decoder that reads goes on to cite, and to judge questions.

    python -m experiments.pretrain_citing          # writes fedrag_jax/models/builtin/citing

It starts from the built-in decoder and sees the same pretraining worlds, which share no name with the
test world. Most batches are contexts of numbered passages with several questions, each answered after
the number of the passage that holds the answer, or 0 where none does; two passages at first and more,
up to ten, when half of the rows are right or enough steps have passed. Half of the contexts are all
namesakes, as those are that a search finds. The other batches rate texts, questions and answers, ask
about a text, or answer as before. What makes the test world harder: documents in their topic's chatter
(`chatty_world`), which no pretraining world has, and questions in its jargon.
"""

import collections
import functools
import pathlib
import time

import numpy as np
from absl import app, flags, logging

from experiments.pretraining import WORLDS, decoder_loss, trainer
from experiments.pretraining_rows import Reader, pack
from fedrag_jax.data import synthetic
from fedrag_jax.models import fetching, hub

_OUT = flags.DEFINE_string("out", str(fetching.BUILTIN / "citing"), "folder of the checkpoint")
_STEPS = flags.DEFINE_integer("steps", 2600, "number of batches of 8 to 24 rows")

# Numbers of sentences or passages, rows in a batch, and the largest number of steps.
LEVELS = (
    ("sentences", 2, 32, 400),
    ("sentences", 4, 24, 200),
    ("passages", 2, 24, 400),
    ("passages", 3, 20, 200),
    ("passages", 5, 14, 200),
    ("passages", 10, 8, None),
)
EARLIER = 0.25  # of the batches come from a level already left behind
LEARNING_RATE = 1e-3
KINDS = {"cite": 0.6, "ask and rate": 0.3, "read": 0.1}


def rows_of(kind: str, readers, what: str, count: int):
    """A training row of each reader."""
    if kind == "cite":
        return [reader.cite_several(count, what == "sentences") for reader in readers]
    if kind == "read":
        return [reader.read(min(count, 5)) for reader in readers]
    ways = [(r.ask, r.ask, r.rate, r.rate_pair, r.rate_pair) for r in readers]
    return [of_one[i % 5]() for i, of_one in enumerate(ways)]


def train(base: hub.Pretrained, worlds, steps: int, rng) -> hub.Pretrained:
    """Returns the decoder after this many steps."""
    loss = functools.partial(decoder_loss, base.network)
    init, step = trainer(loss, LEARNING_RATE, steps, b2=0.98)
    readers, params = [Reader(world, base.tokenizer, rng) for world in worlds], base.params
    state, level, since, began = init(params), 0, 0, time.perf_counter()
    recent = collections.deque(maxlen=10)
    for i in range(steps):
        able = len(recent) == recent.maxlen and np.mean(recent) > 0.5
        if level < len(LEVELS) - 1 and (able or i - since >= LEVELS[level][3]):
            level, since = level + 1, i
            recent.clear()
        at = int(rng.integers(level + 1)) if rng.random() < EARLIER else level
        what, passages, count, _ = LEVELS[at]
        kind = str(rng.choice([*KINDS], p=[*KINDS.values()]))
        some = [readers[rng.integers(len(readers))] for _ in range(count)]
        batch = pack(rows_of(kind, some, what, passages), base.tokenizer.pad_token_id)
        params, state, value, right = step(params, state, batch)
        if kind == "cite" and at == level:
            recent.append(float(right.mean()))
        if i % 50 == 0 or i == steps - 1:
            print(
                f"step {i:5d}  {passages:2d} {what}, {kind:12s}  loss {float(value):.3f}  rows cited "
                f"right {100 * np.mean(recent or [0]):.0f}%  {time.perf_counter() - began:.0f}s",
                flush=True,
            )
    return hub.Pretrained(base.network, params, base.tokenizer, "builtin:citing")


def main(_):
    base = hub.load("builtin:decoder")
    worlds = [synthetic.generate(config._replace(crowding=4.0)) for config in WORLDS]
    made = train(base, worlds, _STEPS.value, np.random.default_rng(3))
    hub.save(made, pathlib.Path(_OUT.value), dtype="float16")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # libraries tell a lot about themselves
    app.run(main)
