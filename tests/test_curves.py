"""Learning curves from the records of trainings."""

import numpy as np
import pytest

from experiments.curves import curve


def record(round, loss):
    metrics = {"reward": None if loss is None else 2 * loss}
    return {"round": round, "loss": loss, "metrics": metrics, "examples": 4 * round, "seconds": 1.0}


def test_points_are_means_over_clients_and_rounds():
    histories = [[record(i, float(i)) for i in (1, 2, 3, 4)], [record(1, 5.0), record(2, 7.0)]]
    first, last = curve(histories, 2)
    assert first["loss"] == (1 + 2 + 5 + 7) / 4 and first["metrics"] == {"reward": 7.5}
    # The second client stays where it was.
    assert last["loss"] == pytest.approx((3 + 4 + 7) / 3) and last["examples"] == 16 + 8
    assert (first["seconds"], last["seconds"]) == (4.0, 2.0)


def test_a_round_that_nobody_answers_keeps_what_was():
    found = curve([[record(1, None), record(2, 2.0), record(3, None), record(4, 4.0)]], 1)
    assert [point["loss"] for point in found] == [2.0, 2.0, 2.0, 4.0]
    assert [point["metrics"]["reward"] for point in found] == [4.0, 4.0, 4.0, 8.0]
    (point,) = curve([[record(1, None)]], 1)
    assert np.isnan(point["loss"]) and point["metrics"] == {}
