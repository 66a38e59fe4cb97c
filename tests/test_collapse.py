"""Which records end a fit of a policy, and what is kept of it."""

import numpy as np
import pytest

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import State
from fedrag_jax.federated.callbacks import FitState
from fedrag_jax.federated.collapse import CollapseWatch


def records(**columns):
    rows = zip(*columns.values(), strict=True)
    return tuple({"loss": 0.0, "metrics": dict(zip(columns, row, strict=True))} for row in rows)


def watched(watch, **columns):
    """What ended a fit with these metrics, and after how many rounds."""
    usual = {"reward": 0.5, "no_variance": 0.2, "malformed": 0.1, "entropy": 1.0}
    count = len(next(iter(columns.values())))
    history = records(**{n: columns.get(n, [x] * count) for n, x in usual.items()})
    state = State({"x": np.zeros(2)}, (), ())
    watch.start(FitState(0, state, None, (), {}))
    for end in range(1, count + 1):
        if watch.round_end(FitState(end, state, None, history[:end], {}), history[end - 1]):
            return watch.why, end
    return watch.why, None


@pytest.mark.parametrize(
    ("columns", "why", "rounds"),
    [
        ({"reward": [0.5] * 9}, "", None),
        ({"reward": [0.4, 0.6, 0.4, 0.3, 0.5, 0.6]}, "", None),
        ({"reward": [0.4, 0.6, 0.3, 0.1, 0.1]}, "the reward fell from 0.500 to 0.200", 4),
        ({"reward": [-0.5] * 3 + [-0.6] * 3}, "", None),
        ({"reward": [-0.5] * 3 + [-0.8] * 3}, "the reward fell from -0.500 to -0.800", 5),
        (
            {"reward": [0.5, 0.5, 0.4, 0.4], "no_variance": [0.2, 0.2, 1, 1]},
            "100% of the groups have equal rewards",
            4,
        ),
        ({"reward": [0.5, 0.9, 1, 1], "no_variance": [0.2, 0.5, 1, 1]}, "", None),
        (
            {"reward": [0.5, 0.5, 0.4, 0.4], "malformed": [0.1, 0.1, 0.9, 0.95]},
            "92% of the rollouts are malformed",
            4,
        ),
        (
            {"reward": [0.5, 0.5, 0.4, 0.4], "entropy": [1, 1, 0.001, 0.001]},
            "the entropy is 0.0010 nats per token",
            4,
        ),
        ({"no_variance": [0.2, 0.2, 1, 1], "entropy": [1, 1, 0.001, 0.001]}, "", None),
        ({"malformed": [0.95] * 4}, "", None),
    ],
)
def test_signs_of_collapse(tmp_path, columns, why, rounds):
    watch = CollapseWatch(tmp_path, window=2)
    for _ in range(2):  # a second fit begins afresh
        told, ended = watched(watch, **columns)
        assert ended == rounds and told.startswith(why) and bool(told) == bool(why)
    watched(watch, reward=[0.1, 0.1])
    assert not watch.stopped and watch.trainable()


def test_rounds_that_nobody_answers_are_not_looked_at(tmp_path):
    usual = records(
        reward=[0.4, 0.6], no_variance=[0.2] * 2, malformed=[0.1] * 2, entropy=[1.0] * 2
    )
    nobody = {"loss": None, "metrics": dict.fromkeys(usual[0]["metrics"])}
    watch = CollapseWatch(tmp_path, window=2)
    assert not watch.signs.look_back([usual[0], nobody, usual[1], nobody]) and not watch.stopped
    with pytest.raises(
        ConfigError, match="no metric 'reward'; it watches tasks of search policies"
    ):
        watch.signs.look([{"loss": 1.0, "metrics": {"id": 2.0}}] * 2)


def test_a_watch_keeps_nothing_of_another_fit(tmp_path):
    watched(CollapseWatch(tmp_path, window=2), reward=[0.4, 0.6, 0.5])
    assert CollapseWatch(tmp_path).trainable()
    watched(CollapseWatch(tmp_path, window=2), reward=[0.4])
    with pytest.raises(ConfigError, match="no parameters are kept"):
        CollapseWatch(tmp_path).trainable()


def test_what_is_no_watch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fall must be in \(0, 1\], got 0"):
        CollapseWatch(tmp_path, fall=0)
    with pytest.raises(ConfigError, match="window must be at least 1"):
        CollapseWatch(tmp_path, window=0)
    with pytest.raises(ConfigError, match="fewer rounds than the window of 5"):
        CollapseWatch(tmp_path).trainable()
