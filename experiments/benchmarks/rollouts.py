"""Tokens per second of rollouts that search, compared with plain decoding of as many tokens.

    python -m experiments.benchmarks.rollouts
    python -m experiments.benchmarks.rollouts --model=smollm2 --batch=16

Prompts are random, and tokens are sampled at temperature 1. A character that the model writes about
once in --every tokens takes the place of the closing tag, so no trained policy is needed; a search
returns random tokens. Plain decoding reads the same prompts. It writes either as many tokens per row as
the rollouts write on average (`ratio`: retrieved tokens are read but not counted), or as many as
written and retrieved tokens together (`ratio_of_length`). All variants take turns; the first turn of
each (compilation, warm-up) is not counted, and medians are printed as a line of JSON.
"""

import collections
import json
import statistics
import time

import numpy as np
from absl import app, flags

_MODEL = flags.DEFINE_string("model", "builtin:decoder", "name, folder or file of a decoder")
_BATCH = flags.DEFINE_integer("batch", 32, "number of rollouts written together", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 32, "tokens per prompt", lower_bound=2)
_EVERY = flags.DEFINE_integer("every", 24, "tokens written between two searches", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 2, "searches per rollout", lower_bound=0)
_WRITTEN = flags.DEFINE_integer("written", 64, "maximum tokens between two searches", lower_bound=2)
_FOUND = flags.DEFINE_integer("found", 64, "tokens that a search returns", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "number of turns per variant", lower_bound=1)


def main(argv):
    del argv
    import jax

    from fedrag_jax.generation.decoding import generate
    from fedrag_jax.generation.rollouts import Budget, Tags
    from fedrag_jax.generation.searching import roll_out
    from fedrag_jax.models import hub

    model, rng = hub.load(_MODEL.value), np.random.default_rng(0)
    vocabulary, tokenizer = model.network.config.vocab_size, model.tokenizer
    prompts = rng.integers(0, vocabulary, (_BATCH.value, _PROMPT.value)).astype(np.int32)
    parts = model.network, model.params
    drawn = {"temperature": 1.0, "key": jax.random.key(0)}

    def plain(count):
        return generate(*parts, prompts, np.ones_like(prompts), max_new_tokens=count, **drawn)

    texts = tokenizer.batch_decode(plain(_WRITTEN.value).tokens)
    tags = Tags(search=("\0", closing(texts)), answer=("\0", "\0\0"))
    found = tokenizer.decode(rng.integers(0, vocabulary, _FOUND.value))
    budget = Budget(_TURNS.value, _WRITTEN.value, _FOUND.value)

    def searching():
        return roll_out(
            *parts, None, tokenizer, [*prompts], lambda queries, _: [found] * len(queries),
            tags=tags, budget=budget, **drawn,
        )  # fmt: skip

    rollouts = searching()
    written = sum(len(p.tokens) for r in rollouts for p in r.parts if p.written) / len(prompts)
    read = sum(len(p.tokens) for r in rollouts for p in r.parts if not p.written) / len(prompts)
    count, length = max(round(written), 1), max(round(written + read), 1)
    runs = {
        "searching": searching,
        "plain": lambda: plain(count),
        "plain_of_length": lambda: plain(length),
    }
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for _ in range(_REPEATS.value):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    counts = {"searching": written, "plain": count, "plain_of_length": length}
    speed = {n: _BATCH.value * counts[n] / statistics.median(s) for n, s in seconds.items()}
    report = {f"{name}_tokens_per_second": round(s, 1) for name, s in speed.items()} | {
        "ratio": round(speed["searching"] / speed["plain"], 2),
        "ratio_of_length": round(
            speed["searching"] * (written + read) / written / speed["plain_of_length"], 2
        ),
        "written_tokens": round(written, 1),
        "found_tokens": round(read, 1),
        "searches": sum(len(r.queries) for r in rollouts) / len(rollouts),
        "closing": tags.search[1],
        "batch": _BATCH.value,
        "model": _MODEL.value,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(report))


def closing(texts: list[str]) -> str:
    """A character that comes about once in `every` tokens of these texts."""
    counts = collections.Counter("".join(texts))
    wanted = len(texts) * _WRITTEN.value / _EVERY.value
    return min(sorted(counts), key=lambda character: abs(counts[character] - wanted))


if __name__ == "__main__":
    app.run(main)
