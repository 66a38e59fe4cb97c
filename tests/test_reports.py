"""What is written about a run: a page that stands alone, tables and figures for a paper."""

import csv
import dataclasses
import json
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from small import small_aggregation, small_heterogeneity

from experiments import heterogeneity, lora_aggregation, report
from experiments.loading import validation_sample
from experiments.rates import chosen_rate, kept_rate, one_by_one
from experiments.reporting import tables
from experiments.reporting.cells import load
from experiments.reporting.page import Report, Section
from experiments.run import run
from fedrag_jax.errors import ConfigError, DataError, DivergenceError


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- any report --------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    fig, ax = plt.subplots(figsize=(2, 2))
    ax.plot([0, 1])
    table = tables.Table([tables.words("who", "who")], [{"who": "<one> & 'two'"}])
    sections = [
        Section("First & foremost", "first", "It's 5 < 6.", table),
        Section("A plot", "plot", "Of a line.", figure=fig),
        Section("Nothing", "empty", "Not shown.", tables.Table([], [])),
    ]
    (tmp_path / "config.json").write_text('{"name": "</script>"}')
    session = {"command": "python -m x --y='(0, 1)'", "device": "1 x cpu", "time": "now"}
    (tmp_path / "manifest.json").write_text(json.dumps({"sessions": [session]}))
    return tmp_path, Report("title", "About.", sections).write(tmp_path)


def test_the_files_of_a_report(written):
    folder, names = written
    assert names == ["report.html", "table.md", "first.tex", "plot.png", "plot.pdf"]
    assert (folder / "plot.pdf").read_bytes().startswith(b"%PDF")
    assert r"<one> \& 'two'" in (folder / "first.tex").read_text().replace(
        r"\ensuremath{<}", "<"
    ).replace(r"\ensuremath{>}", ">")
    text = (folder / "table.md").read_text()
    assert text.startswith("# title\n\nAbout.\n\n## First & foremost\n\nIt's 5 < 6.\n\n| who")
    assert "![A plot](plot.png)" in text and "Nothing" not in text


def test_the_page_loads_nothing_and_escapes_what_it_shows(written):
    page = (written[0] / "report.html").read_text()
    loads = re.findall(r"<link|<img|@import|src\s*=|url\(\s*[\"']?\w+:|href=\"(?!#)", page)
    assert [x for x in loads if "href" not in x] == []
    assert set(re.findall(r'(?:xlink:)?href="([^"#][^"]*)"', page)) == set()
    assert page.count("<svg") == page.count("</svg>") == 1 and page.count("<script>") == 1
    assert "<td>&lt;one&gt; &amp; &#x27;two&#x27;</td>" in page and "It&#39;s 5 &lt; 6." in page
    assert "python -m x --y=&#39;(0, 1)&#39;" in page and "&lt;/script&gt;" in page
    assert 'href="#first"' in page and 'id="first"' in page and "Nothing" not in page


def test_rows_are_written_whole_whatever_columns_come_first(tmp_path):
    for name in ("config", "manifest"):
        (tmp_path / f"{name}.json").write_text('{"sessions": []}')
    rows = [{"who": "a", "em": 1.5}, {"who": "b", "em": 2.0, "em_low": 1.0, "by": {"p": 0.5}}]
    Report("title", "", [], {"rows.csv": rows}, {"rows.csv": ("em", "f1")}).write(tmp_path)
    lines = (tmp_path / "rows.csv").read_text().split()
    assert lines == ["em,f1,who,em_low,by_p", "1.5,,a,,", "2.0,,b,1.0,0.5"]


def test_a_folder_without_a_run_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: .*config.json is missing"):
        report.rebuild(tmp_path)
    command = [sys.executable, "-m", "experiments.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("ConfigError: ")


# --- heterogeneity -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    return run(
        heterogeneity.EXPERIMENT, small_heterogeneity(), str(tmp_path_factory.mktemp("runs"))
    )


@pytest.mark.slow
def test_points_differ_in_one_factor_and_train_on_as_much(skewed):
    rows = [r for r in read(skewed / "heterogeneity.csv") if r["strategy"] == "retriever"]
    assert [(r["factor"], r["value"], r["rounds"]) for r in rows] == [
        ("alpha", "1.0", "2"), ("alpha", "inf", "2"), ("local_steps", "1", "2"),
        ("local_steps", "2", "1"), ("participation", "0.5", "4"), ("participation", "1.0", "2"),
    ]  # fmt: skip
    assert {r["examples"] for r in rows} == {"16.0"}  # 2 rounds, 2 clients, batches of 4
    part = next((skewed / "points").glob("*part0.5/rates-x1/tuned/*/*/rounds.jsonl"))
    assert {json.loads(line)["drawn"] for line in part.read_text().splitlines()} == {1}
    apart = [r for r in rows if r["em_by_difference"]]
    usual = {json.dumps({k: r[k] for k in ("em", "seconds")}) for r in rows if r not in apart}
    assert len(usual) == 1 and len(apart) == 3  # one point in three rows
    for metric in ("em", "f1", "recall_at_5", "mrr"):
        for p in (f"{metric}_by_p", f"{metric}_by_p_e"):
            assert all(float(r[f"{p}_holm"]) >= float(r[p]) for r in apart)


@pytest.mark.slow
def test_one_set_of_mixtures_judges_all_points(skewed):
    """The untuned system has one worst client, wherever it stands: that of the usual point."""
    from experiments.lab import Lab

    config = small_heterogeneity()
    run = Lab(config, heterogeneity.load_data(config), skewed / "mixtures")
    even = run.like(heterogeneity.at_point(config, "alpha", float("inf")), skewed / "even")
    held = [[c.tolist() for c in r.mixtures("federated", 0).clients] for r in (run, even)]
    assert held[0] == held[1]
    assert held[0] != [c.tolist() for c in even.clients("federated", 0).clients]
    assert even.mixtures("local", 0) is None and run.mixtures("local", 0) is not None


@pytest.mark.slow
def test_rates_of_a_point_are_those_that_validation_likes_best(skewed):
    for path in (skewed / "points").glob("*/rates-retriever.json"):
        found = json.loads(path.read_text())
        assert {"0.25", "1.0"} < set(found["scores"])  # the lower is better, so others are tried
        assert found["scores"][str(found["chosen"])] == max(found["scores"].values())


@pytest.mark.slow
def test_rates_that_are_judged_are_those_that_train(skewed, monkeypatch):
    """On validation questions, and so that their mean does not depend on the number of rounds."""
    from experiments.lab import Lab
    from fedrag_jax.evaluation import evaluator

    config, judged, rates = small_heterogeneity(), [], []
    plain = config.learning_rates.federated.retriever
    dataset = heterogeneity.load_data(config)

    def tuned_systems(self, *_):
        rates.append(self.config.learning_rates.federated.retriever)
        return [self.system(0)], []

    def rank_scores(retriever, examples, rows):
        judged.append(examples)
        return {"mrr": np.array([0.5])}

    monkeypatch.setattr(Lab, "tuned_systems", tuned_systems)
    monkeypatch.setattr(evaluator, "rank_scores", rank_scores)
    run = Lab(heterogeneity.at_point(config, "local_steps", 2), dataset, skewed / "other")
    best = heterogeneity.at_best_rates(run, "retriever")
    # One round at the full rate, where two rounds have it and half of it.
    # Each with two pairs of seeds.
    assert rates[:4] == pytest.approx([0.25 * 0.75 * plain] * 2 + [0.75 * plain] * 2)
    assert best.config.learning_rates.federated.retriever in rates
    asked = validation_sample(config, dataset)
    assert len(asked) == 40 and all(some == asked for some in judged) and len(judged) > 2


def test_an_alpha_has_the_rates_that_were_chosen_for_it():
    config = small_heterogeneity()
    known = config.learning_rates.federated_inf.marginal_generator
    found = heterogeneity.at_point(config, "alpha", float("inf")).learning_rates.federated
    assert found.marginal_generator == known != config.learning_rates.federated.marginal_generator
    other = heterogeneity.at_point(config, "alpha", 0.3).learning_rates.federated
    assert other.marginal_generator == config.learning_rates.federated.marginal_generator


@pytest.mark.parametrize(
    "scores, tried, best",
    [
        ({1.0: 1, 2.0: 3, 4.0: 2}, {1.0, 2.0, 4.0}, 2.0),
        ({1.0: 1, 2.0: 2, 4.0: 3, 8.0: 4, 16.0: 0}, {1.0, 2.0, 4.0, 8.0, 16.0}, 8.0),
        ({1.0: 3, 2.0: 2, 4.0: 1, 0.5: None}, {0.5, 1.0, 2.0, 4.0}, 1.0),  # diverges beyond
    ],
)
def test_rates_beyond_an_end_that_is_best_are_tried(tmp_path, scores, tried, best):
    judged = []

    def judge(rate):
        judged.append(rate)
        if scores[rate] is None:
            raise DivergenceError("too high")
        return scores[rate]

    path = tmp_path / "deep" / "rates.json"
    grid, seeds = (1.0, 2.0, 4.0), [(0, 0)]
    assert chosen_rate(path, grid, one_by_one(judge, "here"), "here", seeds) == best
    assert set(judged) == tried and len(judged) == len(tried)
    again = chosen_rate(path, grid, one_by_one(judge, "here"), "here", seeds)
    assert again == kept_rate(path) == best  # read back
    assert len(judged) == len(tried)
    scores = dict.fromkeys([0.125, 0.25, 0.5, *scores])
    with pytest.raises(ConfigError, match="here: training diverged at all rates"):
        chosen_rate(tmp_path / "other.json", (1.0, 2.0), one_by_one(judge, "here"), "here", seeds)


def test_a_rate_chosen_with_something_else_is_refused(tmp_path):
    def judge(rates):
        return [*rates]

    path = tmp_path / "rates.json"
    first = chosen_rate(path, (1.0, 2.0), judge, "here", [(0, 0)], 200)
    assert chosen_rate(path, (1.0, 2.0), judge, "here", [(0, 0)], 200) == first
    for grid, seeds, questions, words in (
        ((1.0, 4.0), [(0, 0)], 200, r"grid \[1.0, 2.0\], now with \[1.0, 4.0\]"),
        ((1.0, 2.0), [(0, 0), (1, 1)], 200, r"seeds \[\[0, 0\]\], now with .*\[1, 1\]\]"),
        ((1.0, 2.0), [(0, 0)], 400, "questions 200, now with 400"),
    ):
        with pytest.raises(ConfigError, match=f"here: the rate in .* chosen with {words}"):
            chosen_rate(path, grid, judge, "here", seeds, questions)
    # Files of older versions tell nothing but the rate.
    path.write_text('{"chosen": 2.0, "scores": {"2.0": 1.0}, "diverged": []}')
    assert chosen_rate(path, (1.0, 4.0), judge, "here", [(5, 5)]) == 2.0


def test_questions_that_cannot_be_scored_choose_no_rate(tmp_path):
    path = tmp_path / "rates.json"
    with pytest.raises(DataError, match="here: no validation question can be scored; label some"):
        chosen_rate(path, (1.0, 2.0), lambda rates: [float("nan")] * len(rates), "here", [(0, 0)])
    assert not path.exists()


@pytest.mark.slow
def test_a_point_that_is_missing_is_computed_alone(skewed):
    before = read(skewed / "heterogeneity.csv")
    cells, done = sorted((skewed / "points").glob("*/cells/*")), []
    gone = cells[-1]
    (gone / "cell.json").unlink()

    def watched(lab, point):
        done.append(skewed / point.folder)
        return heterogeneity.compute(lab, point)

    watching = dataclasses.replace(heterogeneity.EXPERIMENT, compute=watched)
    run(watching, small_heterogeneity(), str(skewed.parent))
    assert done == [gone.parent.parent]
    after = read(skewed / "heterogeneity.csv")
    assert [r["em"] for r in after] == [r["em"] for r in before]


@pytest.mark.slow
def test_a_report_is_made_again_from_what_lies_there(skewed):
    page = (skewed / "report.html").read_text()
    for name in ("report.html", "heterogeneity.csv"):
        (skewed / name).unlink()
    assert "heterogeneity.pdf" in report.rebuild(skewed)
    assert (skewed / "report.html").read_text() == page
    assert (skewed / "heterogeneity.csv").exists()


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("factors.clients", (3,), r"clients: 3 leaves 1.33333 rounds; .* must divide 4"),
        ("factors.participation", (1.5,), r"participation must be in \(0, 1\], got 1.5"),
        ("factors.alpha", (-1.0,), r"alpha must be > 0, got -1.0"),
        ("factors.local_steps", (1.5,), r"local_steps must be whole and at least 1, got 1.5"),
        ("factors.clients", (0,), r"clients must be whole and at least 1, got 0"),
        ("factors.participation", (0.3,), r"participation 0.3 of 2 clients is 0.6"),
        ("rate_factors", (), r"rate_factors must be positive"),
        ("regimes", ("local",), r"regimes must be \('federated',\), got"),
    ],
)
def test_bad_factors_are_named(tmp_path, setting, value, message):
    config = small_heterogeneity()
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(ConfigError, match=message):
        run(heterogeneity.EXPERIMENT, config, str(tmp_path))
    assert not list(tmp_path.rglob("config.json"))


# --- aggregation of adapters -------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    return run(
        lora_aggregation.EXPERIMENT, small_aggregation(), str(tmp_path_factory.mktemp("runs"))
    )


@pytest.mark.slow
def test_rules_side_by_side(averaged):
    rows = {r["rule"]: r for r in read(averaged / "lora_aggregation.csv")}
    assert list(rows) == ["fedit", "fedex"]
    up = {rule: int(float(row["bytes_up"])) for rule, row in rows.items()}
    down = {rule: int(float(row["bytes_down"])) for rule, row in rows.items()}
    assert up["fedit"] == up["fedex"] == down["fedit"] < down["fedex"]
    for rule, row in rows.items():
        assert float(row["nll_low"]) < float(row["nll"]) < float(row["nll_high"])
        found = json.loads((averaged / "rates" / f"{rule}-rank2-alpha1.json").read_text())
        assert float(row["learning_rate"]) == found["chosen"]
        assert found["scores"][row["learning_rate"]] == max(found["scores"].values())
        assert (row["nll_against_difference"] == "") == (rule == "fedit")
        assert float(row["evaluate_seconds"]) > 0 < float(row["bytes_passages"])
        assert float(row["client_em_worst"]) <= float(row["client_em_mean"])
    untuned = json.loads((averaged / "untuned.json").read_text())
    assert untuned["em"] > 50 and 0 < untuned["nll"] < 10


@pytest.mark.slow
def test_every_prompt_holds_the_gold_passages(averaged):
    from experiments.loading import load_data
    from fedrag_jax.models import hub
    from fedrag_jax.retrieval.retriever import Retriever

    dataset = load_data(small_aggregation())
    retriever = Retriever.build(hub.load("builtin:encoder"), dataset.passages)
    rows = lora_aggregation.with_gold(retriever, dataset.test, 5)
    number = {p.id: i for i, p in enumerate(dataset.passages)}
    places = []
    for example, read in zip(dataset.test, rows.tolist(), strict=True):
        assert len(set(read)) == 5
        places += [read.index(number[i]) for i in example.positive_ids]
    assert {places.count(k) > len(places) / 10 for k in range(5)} == {True}  # anywhere


@pytest.mark.slow
def test_a_rule_that_is_missing_is_computed_alone(averaged):
    config, computed = small_aggregation(), []
    before = load(averaged, "fedex", "rank2-alpha1", 1, 1).scores["nll"]

    def watched(lab, point):
        computed.append((point.about["rank"], point.about["alpha"], point.name, point.seed))
        return lora_aggregation.compute(lab, point)

    watching = dataclasses.replace(lora_aggregation.EXPERIMENT, compute=watched)
    (averaged / "cells" / "fedex-rank2-alpha1-seed1" / "cell.json").unlink()
    run(watching, config, str(averaged.parent))
    assert computed == [(2, 1.0, "fedex", 1)]
    assert load(averaged, "fedex", "rank2-alpha1", 1, 1).scores["nll"] == pytest.approx(before)


@pytest.mark.slow
def test_systems_are_those_that_the_rules_have_made(tmp_path):
    """FedEx moves the base and is read with it; FedSA leaves one system a client."""
    import jax

    from experiments.lab import Lab
    from fedrag_jax.models.network import flatten

    config = lora_aggregation.at_point(small_aggregation(), 3, 1.0)
    run = Lab(config, lora_aggregation.load_data(config), tmp_path)
    untuned = run.system(0)
    rows = lora_aggregation.with_gold(untuned.retriever, run.dataset.train, 5)
    read = dict(zip((e.id for e in run.dataset.train), rows, strict=True))
    systems = {
        rule: lora_aggregation.tuned(run, read, rule, 0, 0, 0.05)[0] for rule in ("fedex", "fedsa")
    }
    assert {rule: len(some) for rule, some in systems.items()} == {"fedex": 1, "fedsa": 2}
    factors = dict(flatten(untuned.adapters))
    assert all(x.shape[-1] == 3 for path, x in factors.items() if path[-1] == "lora_a")
    for rule, (system, *_) in systems.items():
        pairs = zip(
            jax.tree.leaves(system.generator.params),
            jax.tree.leaves(untuned.generator.params),
            strict=True,
        )
        moved = any(not np.array_equal(a, b) for a, b in pairs)
        assert moved == (rule == "fedex"), rule
    one, other = (dict(flatten(s.adapters)) for s in systems["fedsa"])
    for path in one:
        assert np.array_equal(one[path], other[path]) == (path[-1] == "lora_a")


@pytest.mark.parametrize(
    "setting, value, error, message",
    [
        ("rules", ("mean",), ConfigError, r"rules: \['mean'\] unknown; choose among"),
        ("ranks", (), ConfigError, r"config.ranks is empty"),
        ("ranks", (0,), ConfigError, r"config.ranks must be positive, got \(0,\)"),
        ("split_seeds", (1,), ConfigError, r"split_seeds has 1 seeds, config.seeds has 2"),
        (
            "models.quantize",
            "nf4",
            ConfigError,
            r"rules: \['fedex'\] change the base, which .* nf4",
        ),
        ("data.labels", False, DataError, r"160 questions name no gold passage"),
    ],
)
def test_bad_rules_are_named(tmp_path, setting, value, error, message):
    config = small_aggregation()
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(error, match=message):
        run(lora_aggregation.EXPERIMENT, config, str(tmp_path))
    assert not list(tmp_path.rglob("config.json"))
