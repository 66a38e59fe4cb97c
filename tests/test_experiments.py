"""The programs a newcomer runs, small, and what they say to bad input."""

import csv
import dataclasses
import json
import pathlib
import re
import shutil
import time

import jax
import nbformat
import numpy as np
import pytest
from ml_collections import ConfigDict
from nbclient import NotebookClient
from small import read, small

from experiments import compare_strategies, loading, report
from experiments.launch import settled_config
from experiments.reporting import cells, figures
from experiments.reporting.comparison import COLUMNS
from experiments.run import run
from fedrag_jax.errors import CheckpointError, ConfigError, DataError

WANTED = [
    "strategy", "regime", "alpha", "labels", "seeds", "em", "em_low", "em_high", "em_sd", "f1",
    "recall_at_5", "mrr", "epochs", "at_cap", "seconds", "device_seconds", "search_seconds", "flops",
    "bytes_up", "bytes_down",
]  # fmt: skip


COSTS = (
    "seconds",
    "tokens",
    "bytes_passages",
    "peak_bytes",
    "refreshes",
    "bytes_vectors",
    "bytes_questions",
)


# Computes a whole comparison: whatever looks at it is slow.
@pytest.fixture(scope="module", params=[pytest.param("", marks=pytest.mark.slow)])
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return run(compare_strategies.EXPERIMENT, small(), str(runs))


def test_what_a_comparison_leaves_behind(finished):
    rows = read(finished)
    assert list(COLUMNS[: len(WANTED)]) == WANTED == list(rows[0])[: len(WANTED)]
    assert [(r["strategy"], r["regime"]) for r in rows] == [
        (strategy, regime)
        for regime in ("federated", "local")
        for strategy in ("none", "retriever", "two_phase")
    ]
    for row in rows:
        assert 0 <= float(row["em_low"]) <= float(row["em"]) <= float(row["em_high"]) <= 100
        sends = row["regime"] == "federated" and row["strategy"] != "none"
        assert (int(row["bytes_up"]) > 0) == sends
        assert (float(row["seconds"]) > 0) == (row["strategy"] != "none")
        if float(row["flops"]):
            assert 0.9 < float(row["flops_compiler"]) / float(row["flops"]) < 1.2
    for name in ("table.md", "comparisons.csv", "controls.csv", "metrics.jsonl"):
        assert (finished / name).stat().st_size > 0
    for name in ("quality_cost.png", "learning_curves.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["data"]["passages"] == 2000 and manifest["versions"]["jax"]
    assert json.loads((finished / "config.json").read_text())["federated"]["clients"] == 2


def test_a_notebook_reads_the_run(finished, monkeypatch):
    root = pathlib.Path(__file__).parent.parent
    notebook = nbformat.read(root / "notebooks" / "reading_a_run.ipynb", as_version=4)
    monkeypatch.setenv("FEDRAG_RUN", str(finished))
    here = {"metadata": {"path": root / "notebooks"}}
    NotebookClient(notebook, timeout=300, resources=here).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    tables = [o["data"]["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
    (row,) = (r for r in read(finished) if (r["strategy"], r["regime"]) == ("two_phase", "local"))
    assert f"| {float(row['em']):.1f} [{float(row['em_low']):.1f}, " in re.sub(" +", " ", tables[0])


def wandb_records(path):
    """Protocol buffers of an offline run: a LevelDB log after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += 7 + size
        if at > len(data):  # not all of it is written
            return
        whole += data[at - size : at]
        if kind in (1, 4):  # full, last
            yield Record.FromString(whole)
            whole = b""


def test_weights_and_biases_can_compare_cells(finished, tmp_path):
    from experiments.reporting.weights_and_biases import log_cell

    cell = cells.load(finished, "two_phase", "federated", 0, 0)
    about = {"federated": {"alpha": 1.0}}
    log_cell(cell, tmp_path, "a-group", "offline", "a-project", about, rank=8)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for _ in range(300):  # another process writes it
        records = list(wandb_records(file))
        if any(r.HasField("exit") for r in records):
            break
        time.sleep(0.2)
    (run,) = (r.run for r in records if r.HasField("run"))
    assert (run.run_group, run.job_type, run.project) == ("a-group", "two_phase", "a-project")
    assert [*run.tags] == ["two_phase", "federated", "rank=8", "seed0"]
    assert run.display_name == "two_phase-federated-rank=8-seed0"
    told = {}
    for record in records:
        for item in (*record.history.item, *record.summary.update):
            told[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    assert told["test/em_percent"] == pytest.approx(100 * cell.scores["em"].mean())
    assert told["cost/seconds"] == cell.cost.seconds and told["cost/bytes_up"] == cell.cost.bytes_up
    (last,) = cell.curves["rag_token_query"]
    assert told["rag_token_query/examples_seen"] == last["examples"]
    assert all("/" in name or name == "round" or name.startswith("_") for name in told), told
    steps = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert steps["*"] == "round"  # one x axis for all panels


def test_a_comparison_that_was_killed_has_a_report(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "killed", ignore=shutil.ignore_patterns("tuned"))
    page = (folder / "report.html").read_text()
    assert "report.html" in report.rebuild(folder)
    assert (folder / "report.html").read_text() == page.replace(">small<", ">killed<")
    (folder / "no_op.json").unlink()
    shutil.rmtree(folder / "cells" / "two_phase-federated-seed0")
    report.rebuild(folder)
    text = (folder / "table.md").read_text()
    assert "learning rate zero" not in text and "two_phase" in text
    shutil.rmtree(folder / "cells")
    report.rebuild(folder)  # nothing is finished, nothing fails
    assert "two_phase" not in (folder / "table.md").read_text()
    manifest = json.loads((folder / "manifest.json").read_text()) | {"experiment": "other"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"names none of .*, but 'other'"):
        report.rebuild(folder)


def test_results_of_another_version_are_refused(finished, tmp_path):
    shutil.copytree(finished / "cells", tmp_path / "cells")
    path = tmp_path / "cells" / "none-local-seed0" / "cell.json"
    path.write_text(path.read_text().replace('"tokens"', '"refresh_seconds"'))
    with pytest.raises(DataError, match=r"cell.json was written by another version"):
        cells.load(tmp_path, "none", "local", 0, 0)


def test_learning_rate_zero_changes_nothing(finished):
    assert "learning rate zero changed scores by 0.0" in (finished / "table.md").read_text()


def test_bytes_are_those_of_the_trainable_leaves(finished):
    from fedrag_jax.federated.algorithm import nbytes
    from fedrag_jax.models import hub

    encoder = nbytes(hub.load("builtin:encoder").params)
    row = next(r for r in read(finished) if r["strategy"] == "retriever")
    assert int(row["bytes_up"]) == int(row["bytes_down"]) == encoder * 2  # clients, one round


def test_finished_cells_are_kept_and_a_deleted_one_comes_back_the_same(finished):
    before = read(finished)
    computed = []

    def watched(lab, point):
        computed.append((point.name, point.regime, point.seed, point.split))
        return compare_strategies.compute(lab, point)

    watching = dataclasses.replace(compare_strategies.EXPERIMENT, compute=watched)
    shutil.rmtree(finished / "cells" / "retriever-federated-seed0")
    run(watching, small(), str(finished.parent))
    assert computed == [("retriever", "federated", 0, 0)]
    anew = ("evaluate_seconds", "compile_seconds")  # what was trained is read back
    for row, old in zip(read(finished), before, strict=True):
        assert {k: v for k, v in row.items() if k not in anew} == {
            k: v for k, v in old.items() if k not in anew
        }


def test_the_ledger_of_a_comparison(finished):
    for row in read(finished):
        # Nobody searched rates for this config; untuned needs none.
        assert row.pop("search_seconds") == ("0.0" if row["strategy"] == "none" else "")
        cost = {k: float(v) for k, v in row.items() if k.endswith("_seconds") or k in COSTS}
        parts = ("retrieve", "collate", "train", "aggregate")
        assert cost["seconds"] == pytest.approx(sum(cost[f"{p}_seconds"] for p in parts))
        assert cost["evaluate_seconds"] > 0 and cost["embed_seconds"] > 0
        searches = row["strategy"] == "two_phase"
        assert (cost["retrieve_seconds"] > 0) == searches and cost["bytes_passages"] > 2e5
        trains = row["strategy"] != "none"
        assert (cost["tokens"] > 0) == (cost["peak_bytes"] > 0) == trains
        assert (cost["aggregate_seconds"] > 0) == trains
        searched = {"none": 0, "retriever": 0, "two_phase": 1}[row["strategy"]]  # rounds, clients
        assert cost["refreshes"] == searched * (2 if row["regime"] == "local" else 1)
        assert cost["bytes_vectors"] == 2 * 2000 * 64 * 4 and cost["bytes_questions"] == 0
    with open(finished / "traffic.csv", newline="") as file:
        traffic = list(csv.DictReader(file))
    kinds = {(r["strategy"], r["direction"], r["part"], r["dtype"]) for r in traffic}
    assert kinds == {
        (strategy, direction, part, "float32")
        for strategy, part in (
            ("retriever", "query"), ("two_phase", "query"), ("two_phase", "adapters")
        )
        for direction in ("up", "down")
    }  # fmt: skip
    for row in (r for r in read(finished) if r["regime"] == "federated"):
        sent = [r for r in traffic if (r["strategy"], r["direction"]) == (row["strategy"], "up")]
        assert sum(int(r["bytes"]) for r in sent) == int(row["bytes_up"])


@pytest.mark.slow
def test_strategies_that_need_no_labels_do_not_read_them(finished, tmp_path):
    from fedrag_jax.models.tensors import load_arrays

    config = small()
    config.data.labels = False
    config.regimes, config.strategies = ("federated",), ("two_phase",)
    folder = run(compare_strategies.EXPERIMENT, config, str(tmp_path))
    tasks = [p.relative_to(folder) for p in folder.glob("tuned/federated-seed0/*/*.safetensors")]
    assert len(tasks) == 2
    for task in tasks:
        jax.tree.map(
            np.testing.assert_array_equal, load_arrays(folder / task), load_arrays(finished / task)
        )


@pytest.mark.slow
def test_alphas_and_splits_of_a_comparison(tmp_path):
    config = small()
    config.strategies, config.regimes = ("none", "retriever"), ("federated_inf", "federated")
    config.seeds, config.split_seeds = (0, 0, 1), (0, 1, 0)
    folder = run(compare_strategies.EXPERIMENT, config, str(tmp_path))
    rows = {(r["strategy"], r["regime"]): r for r in read(folder)}
    assert rows["retriever", "federated_inf"]["alpha"] == "inf"
    assert rows["retriever", "federated"]["alpha"] == "1.0"
    assert (
        rows["retriever", "federated"]["em_split_sd"] and rows["none", "federated"]["em_model_sd"]
    )
    cells = {p.name for p in (folder / "cells").iterdir()}
    assert {"retriever-federated-seed0-split1", "none-federated_inf-seed1-split0"} <= cells
    assert len(cells) == 12
    assert figures.regime_name("federated_inf") == "federated, α = ∞"


def test_another_config_does_not_mix_with_old_results(finished):
    config = small()
    config.federated.alpha = 0.5
    with pytest.raises(ConfigError, match=r"federated was .*Choose another --config.name"):
        run(compare_strategies.EXPERIMENT, config, str(finished.parent))


@pytest.mark.parametrize(
    ("setting", "value", "error", "message"),
    [
        ("federated.alpha", 0.0, ConfigError, r"alpha must be > 0, got 0.0"),
        ("federated.alpha", -1.0, ConfigError, r"alpha must be > 0, got -1.0"),
        ("federated.clients", 161, ConfigError, r"161 clients"),
        (
            "strategies",
            ("magic",),
            ConfigError,
            r"strategies: unknown strategy 'magic'; choose among",
        ),
        (
            "strategies",
            ("none", "ralt"),
            ConfigError,
            r"has none for 'adapters' of 'ralt': search it",
        ),
        ("regimes", ("here",), ConfigError, r"regime 'here' unknown; choose among"),
        ("regimes", ("federated_0",), ConfigError, r"regime 'federated_0' unknown"),
        ("regimes", ("centralised_1",), ConfigError, r"regime 'centralised_1' unknown"),
        ("split_seeds", (1, 2), ConfigError, r"split_seeds has 2 seeds, config.seeds has 1"),
        ("seeds", (1, 1), ConfigError, r"the pair \(1, 1\) occurs twice"),
        ("primary_metric", "bleu", ConfigError, r"_metric: 'bleu' unknown; choose among"),
        ("retrieval.top_k", 2001, ConfigError, r"corpus' 2000 passages, got 2001"),
        ("models.generator", "/nowhere", CheckpointError, "/nowhere"),
        ("data.name", "/nowhere", DataError, "/nowhere"),
        ("lora.targets", ("nose_proj",), ConfigError, "nose_proj"),
        ("strategies", (), ConfigError, r"config.strategies is empty"),
        ("models.dtype", "int8", ConfigError, r"models.dtype: 'float32' or 'bfloat16', got 'int8'"),
        ("models.quantize", "int3", ConfigError, r"got 'int3'"),
        ("models.devices", 1000, ConfigError, r"models.devices: there are \d+, asked for 1000"),
        ("regimes", (), ConfigError, r"config.regimes is empty"),
    ],
)
def test_bad_settings_are_named(tmp_path, setting, value, error, message):
    config = small()
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(error, match=message):
        run(compare_strategies.EXPERIMENT, config, str(tmp_path))
    assert not list(tmp_path.rglob("config.json"))  # the name is still free


def test_the_generator_comes_as_the_config_wants_it():
    import jax
    import jax.numpy as jnp

    from fedrag_jax.models.quantized import is_quantized

    models = small().models
    plain = loading.load_generator(models)
    assert {x.dtype for x in jax.tree.leaves(plain.params)} == {jnp.dtype("float32")}
    pytest.importorskip("qwix", reason="qwix is absent")
    models.dtype, models.quantize = "bfloat16", "int8"
    few = loading.load_generator(models)
    assert is_quantized(few.params) and few.params["norm"]["scale"].dtype == jnp.bfloat16


def test_what_the_backward_pass_recomputes_is_a_setting():
    models = small().models
    assert loading.load_generator(models).network.config.remat == "selective"
    models.remat = "full"
    assert loading.load_generator(models).network.config.remat == "full"
    models.remat = "some"
    with pytest.raises(ConfigError, match=r"config.models.remat must be one of .*'full'.*'some'"):
        loading.load_generator(models)


def test_an_unknown_regime_is_refused_on_the_command_line():
    import subprocess
    import sys

    command = [sys.executable, "-m", "experiments", "compare_strategies"]
    command += ["--config=configs/compare_strategies.py", "--config.federated.client=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "client" in done.stderr


@pytest.mark.parametrize("free", [(), ("rates",)])
def test_a_folder_of_other_results_is_refused(tmp_path, free):
    settled_config(ConfigDict({"rounds": 5, "rates": (1.0, 2.0)}), tmp_path, free)
    settled_config(ConfigDict({"rounds": 5, "rates": (1.0, 2.0)}), tmp_path, free)
    with pytest.raises(ConfigError, match=r"config\.rounds was 5, is 6"):
        settled_config(ConfigDict({"rounds": 6, "rates": (1.0, 2.0)}), tmp_path, free)
    other = ConfigDict({"rounds": 5, "rates": (3.0,)})
    if free:
        settled_config(other, tmp_path, free)
    else:
        with pytest.raises(ConfigError, match=r"config\.rates was"):
            settled_config(other, tmp_path, free)


def test_a_name_whose_cells_are_kept_keeps_its_definition(tmp_path):
    def settle(**codecs):
        config = ConfigDict({"codecs": codecs, "messages": tuple(codecs)})
        settled_config(config, tmp_path, ("messages",), defined=("codecs",))

    settle(plain={"up": ""}, int4={"up": "int4"})
    settle(plain={"up": ""}, int8={"up": "int8"})
    with pytest.raises(ConfigError, match=r"config\.codecs\.int4 was .*'int4'.*, is .*'int8'"):
        settle(int4={"up": "int8"})  # which a call before has left out
    kept = json.loads((tmp_path / "config.json").read_text())["codecs"]
    assert sorted(kept) == ["int4", "int8", "plain"]
