"""Rows of public sets in the hub's own columns, read by `datasets`; and local JSON lines."""

import gzip
import json
import os
import pathlib

import datasets
import pytest

from fedrag_jax.data.hub_rows import Question
from fedrag_jax.data.pubmedqa_ids import TEST_IDS
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation.benchmarks import sets
from fedrag_jax.evaluation.benchmarks.reading import read

REAL = pathlib.Path(os.environ.get("FEDRAG_DATA", "../shared/data"))
with_data = pytest.mark.skipif(
    not (REAL / "mmlu.jsonl.gz").is_file(), reason=f"no real data in {REAL}: FEDRAG_DATA"
)
NFL = (
    "The Denver Broncos defeated the Carolina Panthers 24–10 to earn their third Super Bowl title."
)
SQUAD = {
    "id": "56be4db0acb8001400a502ec",
    "title": "Super_Bowl_50",
    "context": NFL,
    "question": " Which NFL team won Super Bowl 50?",
    "answers": {
        "text": ["Denver Broncos", "Denver Broncos", "Broncos"],
        "answer_start": [4, 4, 11],
    },
}
HELLASWAG = {
    "ind": 4,
    "activity_label": "Removing ice",
    "ctx_a": "Then, the man writes over the snow covering the window of a car.",
    "ctx_b": "then",
    "ctx": "Then, the man writes over the snow covering the window of a car. then",
    "endings": [
        ", the man adds wax.",
        "Wait. [title] He [step] boards.",
        ", the man cuts.",
        ", he walks.",
    ],
    "label": "3",
}
TRIVIA_ANSWER = {
    "value": "Sinclair Lewis",
    "aliases": ["Sinclair Lewis", "Harry Sinclair Lewis", ""],
}
HUB = {  # split by split: rows of the real sets, shortened
    "cais/mmlu": {
        "test": [
            {
                "question": "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.",
                "subject": "abstract_algebra",
                "choices": ["0", "1", "2", "3"],
                "answer": 1,
            }
        ]
    },
    "Rowan/hellaswag": {"validation": [HELLASWAG], "test": [HELLASWAG | {"label": ""}]},
    "google/boolq": {
        "validation": [
            {"question": "does ethanol take more", "answer": False, "passage": "Ethanol is fuel."},
            {"question": "is house tax a tax", "answer": True, "passage": "House tax is a local tax."},
        ]
    },
    "qiaojin/PubMedQA": {
        "train": [
            {
                "pubid": pubid,
                "question": "Do mitochondria play a role?",
                "context": {"contexts": ["Cells die.", "We looked."], "labels": ["B", "M"]},
                "long_answer": "They do.",
                "final_decision": decision,
            }
            for pubid, decision in ((21645374, "yes"), (16418930, "no"), (1, "maybe"))
        ]
    },
    "google-research-datasets/nq_open": {
        "validation": [
            {"question": "when was the last time on the moon", "answer": ["1972", "December 1972"]}
        ]
    },
    "mandarjoshi/trivia_qa": {
        "validation": [
            {"question_id": "tc_2", "question": "Who was the first American?", "answer": TRIVIA_ANSWER}
        ],
        "test": [
            {"question_id": "tc_3", "question": "Who?", "answer": {"value": "<unk>", "aliases": []}}
        ],
    },
    "akariasai/PopQA": {
        "test": [
            {
                "id": 4222362,
                "prop": "occupation",
                "question": "What is George Rankin's occupation?",
                "possible_answers": '["politician", "political leader"]',
            }
        ]
    },
    "hotpotqa/hotpot_qa": {
        "validation": [
            {
                "id": "5a8b57f25542995d1e6f1371",
                "question": "Were Scott Derrickson and Ed Wood of the same nationality?",
                "answer": "yes",
                "supporting_facts": {"title": ["Scott Derrickson", "Ed Wood"], "sent_id": [0, 0]},
                "context": {
                    "title": ["Ed Wood", "Woodson", "Scott Derrickson"],
                    "sentences": [["Wood was", " American."], ["A place."], ["Scott is American."]],
                },
            }
        ]
    },
    "rajpurkar/squad": {"validation": [SQUAD, SQUAD | {"id": "another"}]},
    "rajpurkar/squad_v2": {
        "validation": [SQUAD, SQUAD | {"id": "none", "answers": {"text": [], "answer_start": []}}]
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """Copies of the hub's repositories, in the files that `datasets` itself writes."""
    root = tmp_path_factory.mktemp("hub")
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    datasets.disable_progress_bars()
    for repo, splits in HUB.items():
        for split, rows in splits.items():
            path = root / repo / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(path)
    beir = root / "mteb/scifact"
    beir.mkdir(parents=True)
    tables = {
        "corpus": [
            {"_id": "4983", "title": "White matter", "text": "Brains."},
            {"_id": "5836", "title": "", "text": "B."},
        ],
        "queries": [{"_id": "1", "text": "A claim."}, {"_id": "2", "text": "Of train."}],
        "test": [
            {"query-id": "1", "corpus-id": "5836", "score": 1.0},
            {"query-id": "1", "corpus-id": "4983", "score": 0.0},
        ],
    }  # fmt: skip
    for name, rows in tables.items():
        (beir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [("default", "test", "test"), ("corpus",) * 3, ("queries",) * 3]
    (beir / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {file}.jsonl\n"
            for config, split, file in configs
        )
        + "---\n"
    )
    return root


def asked(name, mirror, **how):
    return read(sets.SETS[name], source=mirror, **how).asked


def test_a_row_of_each_set_of_the_hub_is_the_question_it_is(mirror):
    assert asked("mmlu", mirror) == [
        Question("test-0", "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.", (),
                 ("0", "1", "2", "3"), 1, (), "abstract_algebra")
    ]  # fmt: skip
    assert asked("hellaswag", mirror) == [
        Question("validation-0",
                 "Removing ice: Then, the man writes over the snow covering the window of a car. Then",
                 (), (", the man adds wax.", "Wait.. He boards.", ", the man cuts.", ", he walks."), 3)
    ]  # fmt: skip
    no, yes = asked("boolq", mirror)
    assert no.question == "Does ethanol take more?" and no.choices == ("yes", "no")
    assert (no.label, yes.label) == (1, 0)
    assert [(q.id, q.choices[q.label]) for q in asked("pubmedqa", mirror)] == [
        ("21645374", "yes"), ("16418930", "no")
    ]  # fmt: skip
    assert [q.id for q in asked("pubmedqa", mirror, split="train")] == ["1"]
    (nq,) = asked("nq", mirror)
    assert nq.answers == ("1972", "December 1972")
    (trivia,) = asked("triviaqa", mirror)
    assert trivia.id == "tc_2" and trivia.answers == ("Sinclair Lewis", "Harry Sinclair Lewis")
    (popqa,) = asked("popqa", mirror)
    assert popqa == Question(
        "4222362", "What is George Rankin's occupation?", ("politician", "political leader"),
        topic="occupation",
    )  # fmt: skip
    first, other = asked("squad", mirror)
    assert first.answers == ("Denver Broncos", "Broncos") and first.golds == other.golds
    assert first.question == "Which NFL team won Super Bowl 50?"
    assert [q.answers for q in asked("squad_v2", mirror)] == [("Denver Broncos", "Broncos"), ()]


def test_passages_come_once_and_golds_are_among_them(mirror):
    squad = read(sets.SETS["squad"], source=mirror)
    assert [(p.title, p.text) for p in squad.passages] == [("Super Bowl 50", NFL)]
    hotpotqa = read(sets.SETS["hotpotqa"], source=mirror)
    text = {p.id: f"{p.title}: {p.text}" for p in hotpotqa.passages}
    assert [text[i] for i in hotpotqa.asked[0].golds] == [
        "Ed Wood: Wood was American.", "Scott Derrickson: Scott is American."
    ]  # fmt: skip
    assert len(text) == 3 and hotpotqa.asked[0].answers == ("yes",)
    pubmedqa = read(sets.SETS["pubmedqa"], source=mirror)
    assert {p.id: p.text for p in pubmedqa.passages}[
        pubmedqa.asked[0].golds[0]
    ] == "Cells die. We looked."
    scifact = read(sets.SETS["scifact"], source=mirror)
    assert scifact.asked == [Question("1", "A claim.", golds=("5836",))]
    assert [p.id for p in scifact.passages] == ["4983", "5836"]


def test_every_set_can_be_scored_on_its_own_split(mirror):
    for name, known in sets.SETS.items():
        assert read(known, source=mirror).asked, name
        assert known.shown != known.split
    for name in ("hellaswag", "triviaqa"):
        with pytest.raises(DataError, match="without labels; ask split 'validation'"):
            read(sets.SETS[name], "test", source=mirror)
    with pytest.raises(ConfigError, match="come from split 'train', so ask another"):
        read(sets.SETS["squad"], "train", source=mirror, shown=True)


def test_what_cannot_be_read_is_told(mirror, tmp_path):
    datasets.Dataset.from_list([{"text": "?"}]).to_parquet(
        tmp_path / "google/boolq/validation.parquet"
    )
    with pytest.raises(
        DataError, match=r"boolq, split 'validation', row 0: .*'passage'.*columns are text"
    ):
        read(sets.SETS["boolq"], source=tmp_path)
    with pytest.raises(
        DataError, match=r"split 'dev' of .*cais/mmlu cannot be read.*dev.*Mend this in"
    ):
        read(sets.SETS["mmlu"], source=mirror, shown=True)
    with pytest.raises(
        DataError, match=r"no set 'nq' in .*looked for nq\.questions\.jsonl.*source='hub'"
    ):
        read(sets.SETS["nq"], source=tmp_path)
    with pytest.raises(ConfigError, match=r"benchmark must be one of .*'mmlu'.*got 'glue'"):
        sets.named("glue")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_local_files_have_the_same_questions(tmp_path, monkeypatch):
    choice = {
        "id": "a",
        "question": "2 + 2?",
        "choices": ["3", "4"],
        "answer": 1,
        "subject": "sums",
    }
    write(
        tmp_path / "mmlu.jsonl", [choice | {"split": "test"}, choice | {"id": "b", "split": "dev"}]
    )
    monkeypatch.setenv("FEDRAG_DATA", str(tmp_path))
    found = read(sets.SETS["mmlu"], shown=True)
    assert found.asked == [Question("a", "2 + 2?", (), ("3", "4"), 1, (), "sums")]
    assert [q.id for q in found.shown] == ["b"] and found.origin.endswith("mmlu.jsonl")
    yes = {"id": "a", "question": "Is it?", "answers": ["yes"], "positive_ids": ["p"]}
    write(tmp_path / "boolq.questions.jsonl", [yes])
    write(tmp_path / "boolq.passages.jsonl", [{"id": "p", "text": "It is."}])
    found = read(sets.SETS["boolq"], source="local")
    assert found.asked == [Question("a", "Is it?", (), ("yes", "no"), 0, ("p",))]
    assert [p.text for p in found.passages] == ["It is."]
    before = found.content
    write(tmp_path / "boolq.passages.jsonl", [{"id": "p", "text": "It was."}])
    assert read(sets.SETS["boolq"]).content != before
    for row, words in (
        (yes | {"answers": ["maybe"]}, r"jsonl:1: 'answers' must be one of \['yes', 'no'\]"),
        (yes | {"split": "train"}, r"no question in split 'validation', only in \['train'\]"),
    ):
        write(tmp_path / "boolq.questions.jsonl", [row])
        with pytest.raises(DataError, match=words):
            read(sets.SETS["boolq"])
    write(tmp_path / "mmlu.jsonl", [choice | {"answer": 2}])
    with pytest.raises(
        DataError, match=r"mmlu\.jsonl:1: 'answer' must be the position of one of 2 choices"
    ):
        read(sets.SETS["mmlu"])
    write(tmp_path / "mmlu.jsonl", [choice, choice])
    with pytest.raises(DataError, match="question id 'a' occurs twice"):
        read(sets.SETS["mmlu"])


def test_all_of_ones_own_questions_may_be_asked(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"question": f"{i}?", "answers": ["yes"]} for i in range(40)]
    write(path, rows)
    held_out = read(sets.own(path), source=path).asked
    assert 0 < len(held_out) < 40
    every = read(sets.own(path, everything=True), source=path).asked
    # Without ids, lines name them.
    assert [q.id for q in every] == [f"line {i + 1}" for i in range(40)]
    marked = [
        row | {"split": split}
        for row, split in zip(rows, ["train", "test"] * 20, strict=True)
    ]  # fmt: skip
    write(path, marked)
    assert len(read(sets.own(path), source=path).asked) == 20
    assert len(read(sets.own(path, everything=True), source=path).asked) == 40
    write(path, marked[::2])  # for training alone
    assert len(read(sets.own(path, everything=True), source=path).asked) == 20
    with pytest.raises(DataError, match=r"no question in split 'test', only in \['train'\]"):
        read(sets.own(path), source=path)


def test_the_sample_of_a_seed_is_stable():
    questions = [Question(str(i), f"{i}?") for i in range(200)]
    order = sets.in_order(questions, seed=0)
    without = sets.in_order(questions[:150], seed=0)
    assert [q for q in order if int(q.id) < 150] == without
    assert order != questions and order != sets.in_order(questions, seed=1)
    assert sorted(order, key=lambda q: int(q.id)) == questions


@pytest.mark.slow
@with_data
def test_real_sets_have_their_known_sizes():
    size = {}
    for name in ("mmlu", "popqa", "squad", "pubmedqa", "scifact", "hotpotqa"):
        found = read(sets.SETS[name], source=REAL)
        size[name] = len(found.asked), len(found.passages)
        ids = {p.id for p in found.passages}
        assert all(gold in ids for q in found.asked for gold in q.golds), name
    assert size == {
        "mmlu": (14_042, 0), "popqa": (14_267, 1_475), "squad": (10_570, 7_888),
        "pubmedqa": (500, 1_000), "scifact": (300, 5_183), "hotpotqa": (2_339, 31_088),
    }  # fmt: skip
    # BEIR counts the cited documents: 919 pairs of train, as many as its own qrels have.
    train = read(sets.SETS["scifact"], "train", source=REAL).asked
    assert sum(len(q.golds) for q in train) == 919


@with_data
def test_the_ids_of_the_test_of_pubmedqa_are_the_official_ones():
    with gzip.open(REAL / "pubmedqa.questions.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    official = {row["id"].removeprefix("pubmedqa-") for row in rows if row["split"] == "test"}
    assert official == TEST_IDS
