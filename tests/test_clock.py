"""Seconds are counted once, however many things compile in them."""

import pytest

from fedrag_jax import clock


def test_compiling_within_or_beside_compiling_is_counted_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock, "_compiling", [0.0])
    clock._stretches.clear()
    lap = clock.Clock()

    def ends(at, seconds):
        now[0] = at
        clock._hear("/jax/core/compile/backend_compile_duration", seconds)

    ends(2.0, 1.0)  # from 1 to 2, within
    ends(4.0, 3.5)  # from 0.5 to 4, beside which
    ends(5.0, 2.0)  # another goes from 3 to 5
    ends(8.0, 1.0)
    now[0] = 10.0
    found = lap.lap()
    assert found.compiling == pytest.approx(4.5 + 1) and found.others == pytest.approx(4.5)


def test_what_is_told_to_one_clock_is_not_told_to_another(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    one, other = clock.Spent(), clock.Spent(embedding=3.0)
    first, second = clock.Clock(one), clock.Clock(other)
    one.searching += 2.0
    other.embedding += 1.5
    now[0] = 4.0
    assert first.lap() == clock.Lap(2.0, searching=2.0)
    assert second.lap() == clock.Lap(2.5, embedding=1.5)
    assert clock.Clock().lap() == clock.Lap(0.0)
