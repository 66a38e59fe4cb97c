"""What is written about a run: a page that stands alone, tables and figures for a paper."""

import csv
import json
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from small import small_aggregation, small_heterogeneity

from experiments import heterogeneity, lora_aggregation, report
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.tracking import tables
from fedrag_jax.tracking.cells import load
from fedrag_jax.tracking.report import Report, Section


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
    (tmp_path / "manifest.json").write_text('{"commands": ["python -m x --y=\'(0, 1)\'"]}')
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


def test_a_folder_without_a_run_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: .*config.json is missing"):
        report.rebuild(tmp_path)
    command = [sys.executable, "-m", "experiments.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("ConfigError: ")


# --- heterogeneity -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    return heterogeneity.run(small_heterogeneity(), str(tmp_path_factory.mktemp("runs")))


def test_points_differ_in_one_factor_and_train_on_as_much(skewed):
    rows = [r for r in read(skewed / "heterogeneity.csv") if r["strategy"] == "retriever"]
    assert [(r["factor"], r["value"], r["rounds"]) for r in rows] == [
        ("alpha", "1.0", "2"), ("alpha", "inf", "2"), ("local_steps", "1", "2"),
        ("local_steps", "2", "1"), ("participation", "0.5", "2"), ("participation", "1.0", "2"),
    ]  # fmt: skip
    assert len({r["flops"] for r in rows}) == 1
    examples = []
    for point in (skewed / "points").glob("*"):
        for tuned in point.glob("rates-x1/tuned/*/multiple_negatives_ranking/rounds.jsonl"):
            examples.append(json.loads(tuned.read_text().splitlines()[-1])["examples"])
    assert len(examples) >= 4 and len(set(examples)) == 1
    part = next((skewed / "points").glob("*part0.5/rates-x1/tuned/*/*/rounds.jsonl"))
    assert {json.loads(line)["drawn"] for line in part.read_text().splitlines()} == {1}
    usual = {json.dumps({k: r[k] for k in ("em", "seconds")}) for r in rows if not r["difference"]}
    assert len(usual) == 1  # one point in three rows
    assert all(float(r["p_holm"]) >= float(r["p"]) for r in rows if r["difference"])


def test_rates_of_a_point_are_those_that_validation_likes_best(skewed):
    for path in (skewed / "points").glob("*/rates-retriever.json"):
        found = json.loads(path.read_text())
        assert set(found["validation"]) == {"0.25", "1.0"} and found["metric"] == "mrr"
        assert found["validation"][str(found["factor"])] == max(found["validation"].values())


def test_a_point_that_is_missing_is_computed_alone(skewed, monkeypatch):
    before = read(skewed / "heterogeneity.csv")
    cells, done = sorted((skewed / "points").glob("*/rates-x*/cells/*")), []
    gone = cells[-1]
    (gone / "cell.json").unlink()
    real = heterogeneity.compute_cell

    def watched(run, *cell, **how):
        done.append((run.folder, cell))
        return real(run, *cell, **how)

    monkeypatch.setattr(heterogeneity, "compute_cell", watched)
    heterogeneity.run(small_heterogeneity(), str(skewed.parent))
    assert [folder for folder, _ in done] == [gone.parent.parent]
    after = read(skewed / "heterogeneity.csv")
    assert [r["em"] for r in after] == [r["em"] for r in before]


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
        ("settings", ("local",), r"settings must be \('federated',\) here"),
    ],
)
def test_bad_factors_are_named(tmp_path, setting, value, message):
    config = small_heterogeneity()
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(ConfigError, match=message):
        heterogeneity.run(config, str(tmp_path))
    assert not list(tmp_path.rglob("config.json"))


# --- aggregation of adapters -------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    return lora_aggregation.run(small_aggregation(), str(tmp_path_factory.mktemp("runs")))


def test_rules_side_by_side(averaged):
    rows = {r["rule"]: r for r in read(averaged / "lora_aggregation.csv")}
    assert list(rows) == ["fedit", "fedex", "fedsa"]
    up = {rule: int(float(row["bytes_up"])) for rule, row in rows.items()}
    down = {rule: int(float(row["bytes_down"])) for rule, row in rows.items()}
    assert up["fedit"] == up["fedex"] == down["fedit"] < down["fedex"]
    assert up["fedsa"] == down["fedsa"] < up["fedit"]
    for rule, row in rows.items():
        assert float(row["nll_low"]) < float(row["nll"]) < float(row["nll_high"])
        chosen = json.loads((averaged / "rates" / f"{rule}-rank2-alpha1.json").read_text())
        assert float(row["learning_rate"]) == chosen["rate"]
        assert (row["difference"] == "") == (rule == "fedit")
    untuned = json.loads((averaged / "untuned.json").read_text())
    assert untuned["em"] > 50 and 0 < untuned["nll"] < 10


def test_every_prompt_holds_the_gold_passages(averaged):
    from experiments.inputs import load_data
    from fedrag_jax.models import hub
    from fedrag_jax.retrieval.retriever import Retriever

    dataset = load_data(small_aggregation())
    retriever = Retriever.build(hub.load("builtin:encoder"), dataset.passages)
    rows = lora_aggregation.with_gold(retriever, dataset.test, 5)
    number = {p.id: i for i, p in enumerate(dataset.passages)}
    places = []
    for example in dataset.test:
        read = rows[example.id].tolist()
        assert len(set(read)) == 5
        places += [read.index(number[i]) for i in example.positive_ids]
    assert {places.count(k) > len(places) / 10 for k in range(5)} == {True}  # anywhere


def test_a_rule_that_is_missing_is_computed_alone(averaged, monkeypatch):
    config, computed = small_aggregation(), []
    before = load(averaged, "fedsa", "rank2-alpha1", 1, 1).scores["nll"]
    real = lora_aggregation.Aggregation.cell

    def watched(self, *cell):
        computed.append(cell)
        return real(self, *cell)

    monkeypatch.setattr(lora_aggregation.Aggregation, "cell", watched)
    (averaged / "cells" / "fedsa-rank2-alpha1-seed1" / "cell.json").unlink()
    lora_aggregation.run(config, str(averaged.parent))
    assert computed == [("fedsa", 2, 1.0, 1, 1)]
    assert load(averaged, "fedsa", "rank2-alpha1", 1, 1).scores["nll"] == pytest.approx(before)


@pytest.mark.parametrize(
    "setting, value, error, message",
    [
        ("rules", ("mean",), ConfigError, r"rules: \['mean'\] unknown; choose among"),
        ("ranks", (), ConfigError, r"config.ranks is empty"),
        ("data.labels", False, DataError, r"160 of 260 questions name no gold passage"),
    ],
)
def test_bad_rules_are_named(tmp_path, setting, value, error, message):
    config = small_aggregation()
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(error, match=message):
        lora_aggregation.run(config, str(tmp_path))
    assert not list(tmp_path.rglob("config.json"))
