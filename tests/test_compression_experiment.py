"""Quality against bytes: the experiment from one end to the other, and who is on its Pareto front."""

import csv

import pytest
from ml_collections import ConfigDict
from small import small_compression

from experiments import compression
from experiments.run import run
from fedrag_jax.errors import ConfigError


@pytest.mark.slow
def test_an_experiment_is_run_and_goes_on(tmp_path, capsys):
    folder = run(compression.EXPERIMENT, small_compression(), str(tmp_path))
    with open(folder / "compression.csv", newline="") as file:
        rows = {row["messages"]: row for row in csv.DictReader(file)}
    assert [*rows] == ["plain", "int4", "top_1"]
    size = {kind: float(row["bytes_up"]) for kind, row in rows.items()}
    values = size["plain"] / 4  # float32
    assert values / 2 < size["int4"] < 0.6 * values  # two in a byte, and scales
    assert 0.06 * values <= size["top_1"] < 0.09 * values  # one in a hundred, six or eight bytes
    assert float(rows["int4"]["bytes_down"]) < 0.3 * float(rows["plain"]["bytes_down"])
    assert rows["plain"]["recall_at_5_by_difference"] == ""
    assert any(row["pareto"] == "yes" for row in rows.values())
    assert (folder / "pareto.png").exists()
    capsys.readouterr()
    config = small_compression()
    config.messages = (*config.messages, "int8")
    run(compression.EXPERIMENT, config, str(tmp_path))
    told = capsys.readouterr().out
    assert "int8, retriever, federated" in told and "int4, retriever, federated" not in told


def test_the_pareto_front():
    rows = [
        {"strategy": "a", "em": em, "bytes": size}
        for em, size in ((50.0, 100), (50.0, 80), (40.0, 20), (39.0, 30), (None, 1))
    ]
    found = [compression.best_of_its_size(row, rows, "em") for row in rows]
    assert found == [False, True, True, False, False]
    alone = {"strategy": "b", "em": 1.0, "bytes": 1000}
    assert compression.best_of_its_size(alone, [*rows, alone], "em")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": ()}, "config.messages is empty"),
        ({"messages": ("odd",)}, r"config.messages: \['odd'\] unknown; choose among"),
        (
            {"messages": ("odd",), "codecs": ConfigDict({"odd": {"up": "int3"}})},
            r"config.codecs.odd: no compression 'int3'",
        ),
        ({"regimes": ("local",)}, r"config.regimes must be \('federated',\)"),
    ],
)
def test_what_cannot_be_is_refused(change, words, tmp_path):
    config = small_compression()
    for name, value in change.items():
        config[name] = value
    with pytest.raises(ConfigError, match=words):
        run(compression.EXPERIMENT, config, str(tmp_path))
