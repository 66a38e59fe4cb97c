"""Federated training against a lone client: which regimes and seeds are compared."""

import numpy as np
import pytest
from test_tables import REGIMES, cell

from experiments.reporting import differences
from fedrag_jax.strategies.regimes import parse


def test_a_lone_client_is_compared_at_its_best():
    """Of ten points, four are a longer training of the client itself and six other clients' data."""
    right = {"local": 10, "local_converged": 14, "federated": 19, "federated_converged": 20}
    cells = [
        cell("retriever", regime, np.arange(100) < count, seed)
        for regime, count in right.items()
        for seed in range(2)
    ]
    (row,) = differences.headline_rows(cells, "em", REGIMES, 0.1)
    assert (row["regime"], row["against"]) == ("federated_converged", "local_converged")
    assert (row["difference"], row["compute"], row["data"]) == pytest.approx((6, 4, 6))
    assert (row["local"], row["federated"]) == pytest.approx((14, 20))
    # A long training that is worse is not what is compared with.
    worse = [c._replace(scores=cells[0].scores) if c.regime.endswith("ged") else c for c in cells]
    (row,) = differences.headline_rows(worse, "em", REGIMES, 0.1)
    assert row["against"] == "local" and "data" not in row
    # A strategy whose lone clients were stopped early, where others' were not, is not compared.
    early = [c._replace(strategy="generator") for c in cells if c.regime != "local_converged"]
    assert [
        r["strategy"] for r in differences.headline_rows([*cells, *early], "em", REGIMES, 0.1)
    ] == ["retriever"]
    (row,) = differences.headline_rows(early, "em", REGIMES, 0.1)
    assert (row["strategy"], row["against"]) == ("generator", "local")
    # Questions without gold passages have no ranking to compare.
    blank = [c._replace(scores=c.scores | {"mrr": np.full(100, np.nan)}) for c in cells]
    assert differences.headline_rows(blank, "mrr", REGIMES, 0.1) == []
    # Clients of another split are others.
    assert not differences.headline_rows(cells, "em", REGIMES, 1.0)


def test_regimes_of_a_headline_share_their_seeds():
    right = {
        "federated": {0: 40, 1: 50, 2: 60},
        "local": {0: 30, 1: 31, 2: 32},
        "local_converged": {0: 35},
    }
    cells = [
        cell("retriever", regime, np.arange(100) < count, seed, seed)
        for regime, by_seed in right.items()
        for seed, count in by_seed.items()
    ]
    (row,) = differences.headline_rows(cells, "em", REGIMES, 0.1)
    assert row["against"] == "local_converged"  # at the seed that both have
    assert (row["local"], row["federated"]) == pytest.approx((35, 40))
    assert (row["difference"], row["compute"], row["data"]) == pytest.approx((5, 5, 5))
    # A regime at other seeds alone is compared with nothing.
    elsewhere = [c._replace(seed=9) if c.regime == "local_converged" else c for c in cells]
    (row,) = differences.headline_rows(elsewhere, "em", REGIMES, 0.1)
    assert (row["against"], row["local"], row["federated"]) == ("local", 31, 50)


def test_federated_regimes_of_a_headline_are_not_chosen_by_their_score():
    regimes = REGIMES | {"federated:fedprox": parse("federated:fedprox", 0.1)}
    right = {"federated": 30, "federated_converged": 20, "federated:fedprox": 25, "local": 10}
    cells = [cell("retriever", name, np.arange(100) < n) for name, n in right.items()]
    rows = differences.headline_rows(cells, "em", regimes, 0.1)
    found = {row["regime"]: row["difference"] for row in rows}
    assert found == pytest.approx({"federated_converged": 10, "federated:fedprox": 15})
