"""The experiment on learning to search: its config, its rows, and a run of all variants."""

import csv
import types

import numpy as np
import pytest

from configs import research as settings
from experiments import research
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.errors import ConfigError
from fedrag_jax.tracking.ledger import Cost


def test_as_many_questions_of_each_kind_are_trained_on():
    world = synthetic.generate(synthetic.WorldConfig(people=20, works=20, questions=(80, 20, 20)))
    found = research.as_many_of_each(world).train
    assert [e.hops for e in found] == [1, 2] * 20 and {*found} <= {*world.train}
    unknown = Dataset("x", [], [Example("q", "Who?", ("a",), ())], [], [])
    assert research.as_many_of_each(unknown) is unknown


def test_what_there_is_not_is_refused(tmp_path):
    config = settings.get_config()
    config.variants = {"centralised": ("none", "surf")}
    with pytest.raises(ConfigError, match="unknown strategy 'surf'"):
        research.lab(config, tmp_path)
    config.variants = {"central": ("none",)}
    with pytest.raises(ConfigError, match="regime 'central' unknown"):
        research.lab(config, tmp_path)
    config = settings.get_config()
    config.pairs = {"search_unmask": 1}
    with pytest.raises(ConfigError, match="unknown strategy 'search_unmask'"):
        research.lab(config, tmp_path)
    config.pairs = {"search": -1}
    with pytest.raises(ConfigError, match=r"config\.pairs\.search is -1"):
        research.lab(config, tmp_path)


def test_a_variant_may_have_fewer_pairs_of_seeds():
    config = settings.get_config()
    config.seeds, config.pairs = (3, 4, 5), {"search_unmasked": 1, "search": 0}
    config.variants = {"centralised": ("none", "search", "search_unmasked")}
    found = [(p.name, p.seed) for p in research.points(types.SimpleNamespace(config=config))]
    assert found == [
        ("none", 3), ("search", 3), ("search_unmasked", 3),
        ("none", 4), ("search", 4), ("none", 5), ("search", 5),
    ]  # fmt: skip


def cell(variant, seed, one_hop, two_hop, searches, collapsed=0.0, questions=40):
    """A cell with a given share of right answers of each kind."""
    hops = np.arange(questions) % 2
    scores = {}
    for name, kind, right, count in (
        ("one_hop", 0, one_hop, 1.0), ("two_hop", 1, two_hop, searches),
    ):  # fmt: skip
        own = hops == kind
        em = np.where(own, np.cumsum(own) <= right, np.nan)
        scores |= {f"{name}_em": em, f"{name}_f1": em}
        scores[f"{name}_searches"] = np.where(own, count, np.nan)
    controls = {"policy_collapsed_at": collapsed} if variant == "search" else {}
    about = np.arange(questions)
    return cells.Cell(
        variant, "centralised", seed, seed, scores, controls, [], Cost(), {}, about
    )  # fmt: skip


def test_rows_compare_with_the_best_that_retrieves_once(tmp_path):
    config = settings.get_config()
    config.seeds, config.variants = (0, 1), {"centralised": ("none", "generator", "search")}
    for seed in (0, 1):
        for made in (
            cell("none", seed, 8, 1, 1.0), cell("generator", seed, 12, 2, 1.0),
            cell("search", seed, 14, 12 + 2 * seed, 1.9, collapsed=7.0 * seed),
        ):  # fmt: skip
            cells.save(tmp_path, made)
    none, generator, search = research.rows_of(config, tmp_path)
    assert (none["one_hop_em"], none["two_hop_em"], none["seeds"]) == (40.0, 5.0, 2)
    assert (generator["one_hop_em"], generator["two_hop_em"]) == (60.0, 10.0)
    assert search["two_hop_em"] == pytest.approx(65.0) and search[
        "searches_two_hop"
    ] == pytest.approx(1.9)
    assert search["searches_one_hop"] == 1 and search["collapsed"] == 1
    assert none["collapsed"] is None  # there is no policy to watch
    assert search["two_hop_by_difference"] == pytest.approx(55.0)
    assert none["two_hop_by_difference"] == pytest.approx(-5.0)
    assert "two_hop_by_difference" not in generator and search["against"] == "generator"
    assert search["two_hop_by_p_holm"] < 0.05

    # Where the same variants are trained federated, they are compared with each other.
    config.variants = {
        "centralised": ("none", "generator", "search"),
        "federated": ("none", "search"),
    }
    for seed in (0, 1):
        for made in (cell("none", seed, 8, 4, 1.0), cell("search", seed, 14, 10, 1.9)):
            cells.save(tmp_path, made._replace(regime="federated"))
    *others, none, search = research.rows_of(config, tmp_path)
    assert [row.get("against") for row in others] == ["generator", None, "generator"]
    assert "against" not in none and search["against"] == "none"
    assert search["two_hop_by_difference"] == pytest.approx(30.0)


@pytest.mark.slow
def test_all_variants_run(tmp_path):
    config = settings.get_config("federated")
    config.wandb.mode = "disabled"
    config.federated.clients, config.data.test_questions = 2, 16
    config.training.rounds, config.training.batch_size, config.policy.group = 1, 2, 2
    config.training.converged.every, config.training.converged.questions = 1, 4
    config.variants = {
        "centralised": ("none", "generator", "search_form", "search", "search_unmasked"),
        "federated": ("search",),
        "local_converged": ("search",),
    }
    folder = run(research.EXPERIMENT, config, str(tmp_path))
    with open(folder / "research.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]][: len(research.COLUMNS)] == [*research.COLUMNS]
    assert {"two_hop_em_low", "two_hop_by_p_holm", "flops"} <= {*rows[0]}
    assert [(r["variant"], r["regime"]) for r in rows] == [
        ("none", "centralised"), ("generator", "centralised"), ("search_form", "centralised"),
        ("search", "centralised"), ("search_unmasked", "centralised"), ("search", "federated"),
        ("search", "local_converged"),
    ]  # fmt: skip
    assert (folder / "policy_curves.png").stat().st_size > 10_000
    text = (folder / "table.md").read_text()
    assert "two-hop EM" in text and "rollouts and retrieval" in text
    federated = cells.load(folder, "search", "federated", 0, 0)
    assert federated.cost.bytes_up > 0 and federated.cost.retrieve_seconds > 0
    assert {*federated.curves} == {"search_format", "policy"}
    run(research.EXPERIMENT, config, str(tmp_path))  # nothing is computed again
    with open(folder / "research.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows
