"""`fedrag demo`: three systems, one table, and a system to ask."""

import numpy as np
import pytest
from documents import told

from fedrag_jax.cli.command_line import main
from fedrag_jax.data import synthetic
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.rag import RAGSystem

QUICK = ["--strategy", "retriever", "--questions", "40"]


@pytest.mark.slow
def test_it_prints_what_the_saved_system_scores(tmp_path, capsys):
    assert main(["demo", *QUICK, "--to", str(tmp_path / "tuned"), "--json"]) == 0
    (result,) = told(capsys)
    rows = result["rows"]
    assert [*rows] == ["untuned", "centralised", "federated", "federated - centralised"]
    for name in ("em", "f1", "recall_at_5"):
        assert rows["federated"][name][0] - rows["centralised"][name][0] == pytest.approx(
            rows["federated - centralised"][name][0]
        )
        for mean, low, high in (row[name] for row in rows.values()):
            assert low <= mean <= high
    assert rows["federated"]["recall_at_5"][0] > rows["untuned"]["recall_at_5"][0]
    asked = synthetic.generate().test[:40]
    scores = evaluate(RAGSystem.load(tmp_path / "tuned"), asked)
    for name, (mean, *_) in rows["federated"].items():
        assert 100 * np.mean(scores[name]) == pytest.approx(mean)
    assert main(["demo", *QUICK, "--to", str(tmp_path / "tuned")]) == 1
    assert "holds a system already" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_before_the_training(tmp_path, capsys, monkeypatch):
    def trained(*_, **__):
        raise AssertionError("it built a system first")

    monkeypatch.setattr(RAGSystem, "build", trained)
    (tmp_path / "file").write_text("")
    assert main(["demo", *QUICK, "--to", str(tmp_path / "file" / "tuned")]) == 1
    assert "file/tuned cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--questions", "1"], "--questions must be at least 2, got 1"),
        (["--alpha", "0"], "alpha must be > 0"),
    ],
)
def test_what_it_cannot_do_is_refused(options, words, capsys):
    assert main(["demo", *options]) == 1
    assert words in capsys.readouterr().err
