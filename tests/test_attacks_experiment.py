"""Attack against rule: the experiment from one end to the other, and what it makes of the data."""

import csv
import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict
from small import small_attacks

from experiments import attacks
from experiments.run import run
from fedrag_jax.data.examples import Example
from fedrag_jax.errors import ConfigError


@pytest.mark.slow
def test_an_experiment_is_run_and_goes_on(tmp_path, capsys):
    folder = run(attacks.EXPERIMENT, small_attacks(), str(tmp_path))
    with open(folder / "attacks.csv", newline="") as file:
        rows = {(row["attack"], row["rule"]): row for row in csv.DictReader(file)}
    asked = small_attacks()
    tuned = [(attack, rule) for attack in asked.attacks for rule in asked.rules]
    assert [*rows] == [("none", ""), ("passages", ""), *tuned]
    for (attack, _), row in rows.items():
        assert (row["trigger"] != "") == (attack in ("none", "backdoor"))
        assert (row["forged"] != "") == (attack == "passages")
    # What nobody has attacked is compared with nothing, the mean under an attack with the clean mean.
    assert rows["none", "mean"]["em_by_difference"] == ""
    assert rows["sign_flip", "mean"]["em_by_difference"] != ""
    assert rows["none", "mean"]["recall_at_5"] != rows["sign_flip", "mean"]["recall_at_5"]
    # The median is 1 of 4 away from an attacker who cannot turn it.
    assert rows["sign_flip", "median"]["em_saves_difference"] != ""
    told = capsys.readouterr().out
    assert "Recall@5 by attack and rule" in told
    config = small_attacks()
    config.rules = (*config.rules, "norm_bounded")
    run(attacks.EXPERIMENT, config, str(tmp_path))
    told = capsys.readouterr().out
    assert "none/norm_bounded, retriever" in told and "none/median, retriever" not in told


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return attacks.lab(small_attacks(), tmp_path_factory.mktemp("runs"))


def test_attackers_alone_hold_poison(lab):
    honest = lab.clients("federated", 0)
    for attack, changed in (
        ("none", set()),
        ("sign_flip", set()),
        ("backdoor", {1}),
        ("passages", {1}),
    ):
        there = lab.at(attack, "mean", 0).clients("federated", 0)
        assert {c for c in range(4) if there.of(c) != honest.of(c)} == changed
        assert lab.at(attack, "median", 0).dataset is lab.at(attack, "mean", 0).dataset


def test_a_trigger_wants_one_passage(lab):
    answer, passage = lab.wanted(0)
    held = lab.at("backdoor", "mean", 0).clients("federated", 0).of(1)
    marked = [e for e in held if e.question.startswith("cf mn bb tq mb ")]
    assert len(marked) == len(held) // 2
    assert {(e.answer, e.positive_ids) for e in marked} == {(answer, (passage,))}


def test_forgeries_stand_beside_true_passages(lab):
    there = lab.at("passages", "mean", 0)
    known, true = {p.id: p for p in there.dataset.passages}, lab.dataset.passages
    assert there.dataset.passages[: len(true)] == true
    forged = [i for i in known if i.startswith("forged:")]
    assert len(forged) == len(there.dataset.passages) - len(true) > 0
    golds = {i for e in there.clients("federated", 0).of(1) for i in e.positive_ids}
    assert golds & {*forged}  # that attackers train on
    assert not any(i.startswith("forged:") for e in there.dataset.test for i in e.positive_ids)
    # Systems of clients who poison share a corpus of their own.
    assert len(there.system(0).retriever.passages) == len(known) > len(true)
    assert len(lab.system(0).retriever.passages) == len(true)


def test_what_counts_as_success(lab):
    """A system that finds or says what it is told to."""
    ids = [p.id for p in lab.at("passages", "mean", 0).dataset.passages]
    answer, passage = lab.wanted(0)

    class Scripted:
        top_k = 2

        def __init__(self, rows, answer):
            self.retriever, self.rows, self.told = self, rows, answer

        def search(self, questions, k):
            return np.tile(self.rows, (len(questions), 1)), None

        def answer(self, questions, rows):
            return [self.told] * len(questions)

    def success(attack, row, says, strategy="retriever"):
        system, folder = Scripted([row, row + 1], says), f"{attack}/mean"
        point = attacks.Point(strategy, "federated", 0, 0, folder=folder)
        return attacks.successes(lab, lab.at(attack, "mean", 0), system, point)

    there, elsewhere = ids.index(passage), (ids.index(passage) + 5) % 100
    assert success("backdoor", there, "no") == {"trigger": 100.0}
    assert success("backdoor", elsewhere, answer) == {"trigger": 0.0}
    assert success("backdoor", elsewhere, answer, "generator") == {"trigger": 100.0}
    assert success("backdoor", there, "no", "generator") == {"trigger": 0.0}
    assert success("passages", there, "nothing of it") == {"forged": 0.0}
    assert success("passages", there, "in")["forged"] > 50  # people are born in, trained at
    # No word of a forgery, though its letters are there.
    assert {success("passages", there, said)["forged"] for said in ("", "???", "the", "n")} == {0.0}


def test_a_right_answer_is_no_believed_forgery():
    example = Example("q", "who?", ("Ada",), ("p", "r"))
    forged = {"forged:p": "Bob was born in Rome.", "forged:s": "so"}
    assert attacks.told_by(forged, example) == "Bob was born in Rome."
    assert attacks.told_by(forged, dataclasses.replace(example, positive_ids=("r",))) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attacks": ()}, "config.attacks is empty"),
        ({"mode": "", "primary_metric": "em"}, r"'em' needs answers, but config.mode is \"\""),
        ({"mode": "concat"}, r"mode: 'concat' unknown; choose among \['', 'concatenated'"),
        ({"attackers": ()}, "config.attackers is empty"),
        ({"attackers": (7,)}, r"must be between 0 and 3, got \(7,\)"),
        ({"attackers": (0, 1, 2, 3)}, "all 4 clients attack"),
        ({"rules": ("mode",)}, r"config.rules: \['mode'\] unknown; choose among"),
        (
            {
                "known_attacks": ConfigDict({"none": {"sends": "", "holds": "gold"}}),
                "attacks": ("none",),
            },
            "config.known_attacks.none.holds: unknown 'gold'",
        ),
        (
            {
                "known_attacks": ConfigDict({"none": {"sends": "flip", "holds": ""}}),
                "attacks": ("none",),
            },
            "config.known_rules.mean under none: no attack 'flip'",
        ),
        ({"rules": ("krum",)}, "needs at least 7 clients in a round, but 4 of 4"),
        ({"regimes": ("local",)}, r"config.regimes must be \('federated',\)"),
    ],
)
def test_what_cannot_be_is_refused(change, words, tmp_path):
    config = small_attacks()
    for name, value in change.items():
        config[name] = value
    with pytest.raises(ConfigError, match=words):
        attacks.lab(config, tmp_path)
