"""Schema, checks and loaders; the named sets against the counts the protocol fixes."""

import dataclasses
import gzip
import json
import os
from pathlib import Path

import pytest

from fedrag_jax.data.datasets import load
from fedrag_jax.data.examples import (
    Dataset,
    Example,
    Passage,
    check,
    content_hash,
    embedding_text,
)
from fedrag_jax.data.json_sets import load_passages, load_questions
from fedrag_jax.errors import DataError

REAL = Path(os.environ.get("FEDRAG_DATA", "../shared/data"))
needs_real_data = pytest.mark.skipif(
    not (REAL / "squad.questions.jsonl.gz").is_file(), reason=f"no real data in {REAL}: FEDRAG_DATA"
)


def question(i, **fields):
    return {
        "id": f"q{i}",
        "question": f"what {i}?",
        "answers": [f"a{i}"],
        "positive_ids": ["p0"],
    } | fields


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    splits = ["train"] * 3 + ["validation", "test"]
    rows = [question(i, split=split) for i, split in enumerate(splits)]
    (tmp_path / "questions.jsonl").write_text(lines(rows))
    passages = [
        {"id": "p0", "title": "T", "text": "body", "topic": "x"},
        {"id": "p1", "text": "b"},
    ]
    (tmp_path / "passages.jsonl").write_text(lines(passages))
    return tmp_path


def test_a_folder_becomes_a_dataset(folder):
    dataset = load(folder)
    assert dataset.passages == [Passage("p0", "T", "body", "x"), Passage("p1", "", "b", "")]
    assert [e.id for e in dataset.train] == ["q0", "q1", "q2"]
    assert [e.id for e in dataset.validation] == ["q3"]
    assert dataset.test == [Example("q4", "what 4?", ("a4",), ("p0",), "", 1)]
    assert dataset.name == folder.name


def test_optional_fields_are_read(folder):
    rows = [question(i, split=s) for i, s in enumerate(["train", "validation", "test"])]
    rows[0] |= {"topic": "films", "hops": 2, "reasoning": "p1 says so."}
    del rows[0]["positive_ids"]
    (folder / "questions.jsonl").write_text("\ufeff" + lines(rows) + "\n\n")
    assert load(folder).train == [Example("q0", "what 0?", ("a0",), (), "films", 2, "p1 says so.")]


def test_gzip_and_named_files_load_like_plain_ones(folder, tmp_path_factory, monkeypatch):
    plain = load(folder)
    other = tmp_path_factory.mktemp("sets")
    for kind in ("questions", "passages"):
        content = (folder / f"{kind}.jsonl").read_bytes()
        (other / f"mine.{kind}.jsonl.gz").write_bytes(gzip.compress(content))
    monkeypatch.setenv("FEDRAG_DATA", str(other))
    for name in (other, other / "mine", "mine"):
        dataset = load(name)
        assert content_hash(dataset) == content_hash(plain)
    for kind in ("questions", "passages"):
        (other / f"second.{kind}.jsonl").write_bytes((folder / f"{kind}.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"several sets.*mine.*second"):
        load(other)
    assert load(other / "second").name == "second"


def test_without_split_a_stable_hash_decides(folder):
    rows = [question(i) for i in range(2000)]
    (folder / "questions.jsonl").write_text(lines(rows[:1000]))
    first = load(folder)
    (folder / "questions.jsonl").write_text(lines(reversed(rows)))
    second = load(folder)
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        before = {e.id for e in getattr(first, split)}
        after = {e.id for e in getattr(second, split)}
        assert before < after  # more questions move none of the old ones
        assert len(after) / 2000 == pytest.approx(share, abs=0.03)
    # sha256("q0") begins 341c, "q1" c75d, "q2" bee9: 0.20, 0.78 and 0.75 of the range, everywhere.
    assert "q0" in {e.id for e in first.train}
    assert {"q1", "q2"} < {e.id for e in first.validation}


def test_validation_is_carved_from_train_where_nobody_named_one(folder):
    rows = [question(i, split="train" if i < 1000 else "test") for i in range(1200)]
    (folder / "questions.jsonl").write_text(lines(rows))
    dataset = load(folder)
    assert len(dataset.test) == 200
    assert len(dataset.train) + len(dataset.validation) == 1000
    assert 70 < len(dataset.validation) < 130


def test_a_question_without_an_id_is_named_by_its_line(folder):
    rows = [question(i, split=s) for i, s in enumerate(["train", "validation", "test"])]
    rows[1]["id"] = None
    del rows[2]["id"]
    (folder / "questions.jsonl").write_text(lines(rows))
    dataset = load(folder)
    assert [e.id for e in dataset.train + dataset.validation + dataset.test] == [
        "q0", "line 2", "line 3",
    ]  # fmt: skip


HALF = r"{}\.jsonl:1: '{}' holds half a character \('.ud"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("questions", '{"id": "q0", "quest\n', r"questions\.jsonl:1: not JSON.*quest"),
        ("questions", "[" * 200_000 + "\n", r"questions\.jsonl:1: nested too deeply: '\[\["),
        ("questions", lines([question(0)]) + "[1]\n", r"jsonl:2: not a JSON object: '\[1\]"),
        ("questions", '{"id": "q0", "question": "w"}\n', r":1: missing field 'answers'; found id"),
        (
            "questions",
            lines([question(0), question(1, answers=None)]),
            "jsonl:2: 'answers' is null;",
        ),
        ("questions", lines([question(0, question=None)]), "jsonl:1: 'question' is null; give it"),
        (
            "questions",
            lines([question(0, answers=["\ud83d!"])]),
            HALF.format("questions", "answers"),
        ),
        (
            "questions",
            lines([question(0, question="\ud83d")]),
            HALF.format("questions", "question"),
        ),
        ("passages", lines([{"id": "p0", "text": "a \udc00"}]), HALF.format("passages", "text")),
        ("passages", lines([{"id": "p\udc00", "text": "a"}]), HALF.format("passages", "id")),
        ("questions", lines([question(0, answers="a")]), "'answers' must be a list of strings"),
        ("questions", lines([question(0, answers=[3])]), "'answers' must be a list of strings"),
        ("questions", lines([question(0, id=7)]), "'id' must be a non-empty string, got 7"),
        ("questions", lines([question(0, question=" ")]), "'question' must be a non-empty string"),
        ("questions", lines([question(0, split="dev")]), "'dev' is none of train, validation"),
        ("questions", lines([question(0, hops=0)]), "'hops' must be a positive"),
        ("questions", lines([question(0, answers=[], split="train")]), "'q0' has no answer"),
        ("questions", lines([question(0, answers=[" "], split="train")]), "'q0' has no answer"),
        ("passages", '{"id": "p0"}\n', r"passages\.jsonl:1: missing field 'text'"),
        ("passages", '{"id": "p9", "text": "t"}\n', "'q0' has positive id 'p0'.*1 passages"),
        ("passages", '{"id": "p0", "text": "t"}\n' * 2, "passage id 'p0' occurs twice"),
        ("passages", "", "corpus is empty"),
    ],
)
def test_a_file_that_is_not_the_schema_is_refused(folder, file, content, message):
    (folder / f"{file}.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_characters_of_two_halves_are_whole(folder):
    rows = [question(0, answers=["\U0001f600"], split="test")]
    assert "\\ud83d\\ude00" in lines(rows)
    (folder / "questions.jsonl").write_text(lines(rows))
    assert load(folder, needed=("test",)).test[0].answers == ("\U0001f600",)


def test_unanswerable_questions_are_marked(folder):
    rows = [question(i, split=s) for i, s in enumerate(["train", "validation", "test", "train"])]
    path, passages = folder / "questions.jsonl", load(folder).passages
    rows[0] = {"id": "q0", "question": "Who?", "unanswerable": True, "split": "train"}
    rows[1] |= {"unanswerable": False}
    path.write_text(lines(rows))
    with pytest.raises(DataError, match="question 'q0' has no answer to train on"):
        load(folder)
    with pytest.warns(UserWarning, match=r"jsonl: 1 unanswerable questions have no .*; left out"):
        dataset = load_questions(path, passages)
    assert [e.id for e in dataset.train] == ["q3"] and dataset.validation[0].answers == ("a1",)
    for wrong, message in (
        ({"unanswerable": "yes"}, r"jsonl:1: 'unanswerable' must be true or false, got 'yes'"),
        (
            {"answers": ["a"]},
            r"jsonl:1: is marked unanswerable and has answers \['a'\]: choose one",
        ),
        ({"unanswerable": False}, "jsonl:1: missing field 'answers'"),
        ({"unanswerable": False, "answers": [""]}, r"jsonl:1: question 'q0' has no answer; give"),
    ):
        path.write_text(lines([rows[0] | wrong]))
        with pytest.raises(DataError, match=message):
            load_questions(path, passages)


def test_half_characters_are_refused_in_sets_that_are_made(folder):
    dataset = load(folder)
    (passage, *others), (example, *rest) = dataset.passages, dataset.train
    for part, half in (
        ("passages", [dataclasses.replace(passage, title="\ud83d"), *others]),
        ("train", [dataclasses.replace(example, answers=("a", "\ud83d")), *rest]),
        ("train", [dataclasses.replace(example, reasoning="\ud83d"), *rest]),
    ):
        with pytest.raises(DataError, match=r"(passage 'p0'|question 'q0') holds half a character"):
            check(dataclasses.replace(dataset, **{part: half}))


def test_damaged_files_are_refused(folder):
    path = folder / "questions.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match="jsonl:1: not UTF-8"):
        load(folder)
    path.unlink()
    whole = gzip.compress(lines([question(i) for i in range(500)]).encode())
    (folder / "questions.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read after line"):
        load(folder)


def test_files_not_found_says_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAG_DATA", str(tmp_path / "sets"))
    with pytest.raises(DataError, match=r"nowhere/questions\.jsonl.*sets/nowhere\.questions"):
        load("nowhere")
    with pytest.raises(DataError, match=r"sets/squad\.questions.*FEDRAG_DATA"):
        load("squad", source="local")
    with pytest.raises(DataError, match=r"of rajpurkar/squad cannot be read.*FEDRAG_DATA"):
        load("squad")  # from the hub, which tests do not reach


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_is_refused(folder, split):
    dataset = dataclasses.replace(load(folder), **{split: []})
    with pytest.raises(DataError, match=f"no question in split '{split}'"):
        check(dataset)
    assert check(dataset, needed=()) is dataset


def test_questions_may_be_for_the_test_alone(tmp_path):
    row = {"question": "Who?", "answers": ["Ann"], "split": "test"}
    questions = "".join(json.dumps({"id": str(i), **row}) + "\n" for i in range(3))
    (tmp_path / "questions.jsonl").write_text(questions)
    (tmp_path / "passages.jsonl").write_text('{"id": "p", "text": "Ann was here."}\n')
    dataset = load(tmp_path, needed=("test",))
    assert [len(some) for some in (dataset.train, dataset.validation, dataset.test)] == [0, 0, 3]
    with pytest.raises(DataError, match="no question in split 'train'"):
        load(tmp_path)


def test_a_question_may_not_be_in_two_splits(folder):
    dataset = load(folder)
    with pytest.raises(DataError, match="question id 'q0' occurs twice"):
        check(dataclasses.replace(dataset, test=dataset.test + dataset.train[:1]))


def test_content_hash_sees_every_field_that_is_asked_or_scored(folder):
    dataset = load(folder)
    assert content_hash(dataset) == content_hash(dataclasses.replace(dataset, name="other"))
    assert len(content_hash(dataset)) == 16
    example, passage = dataset.train[0], dataset.passages[0]
    changed = [
        {"train": dataset.train[::-1]},
        {"train": dataset.train[:2], "test": dataset.train[2:] + dataset.test},
        {"passages": dataset.passages[:1]},
    ]
    for field, value in (("id", "z"), ("title", "z"), ("text", "z"), ("topic", "z")):
        new = dataclasses.replace(passage, **{field: value})
        changed.append({"passages": [new, *dataset.passages[1:]]})
    for field, value in (
        ("id", "z"), ("question", "z"), ("answers", ("a0", "b")), ("positive_ids", ()),
        ("topic", "z"), ("hops", 2),
    ):  # fmt: skip
        new = dataclasses.replace(example, **{field: value})
        changed.append({"train": [new, *dataset.train[1:]]})
    told = [dataclasses.replace(example, reasoning="z"), *dataset.train[1:]]
    assert content_hash(dataset) == content_hash(dataclasses.replace(dataset, train=told))
    hashes = {content_hash(dataclasses.replace(dataset, **change)) for change in changed}
    assert len(hashes | {content_hash(dataset)}) == len(changed) + 1


def test_embedding_text():
    assert embedding_text(Passage("p", "Title", "text")) == "Title text"
    assert embedding_text(Passage("p", "", "text")) == "text"


@pytest.fixture(scope="module")
def real(request):
    patch = pytest.MonkeyPatch()
    patch.setenv("FEDRAG_DATA", str(REAL))
    yield {name: load(name) for name in ("squad", "hotpotqa")}
    patch.undo()


@needs_real_data
def test_squad_splits(real):
    squad: Dataset = real["squad"]
    assert len(squad.passages) == 7888
    assert len(squad.train) + len(squad.validation) == 11877 + 3745
    assert (len(squad.validation), len(squad.test)) == (1565, 10570)
    articles = {name: {e.topic for e in getattr(squad, name)} for name in ("validation", "test")}
    train = {e.topic for e in squad.train}
    assert len(articles["validation"]) == 7 and "" not in articles["validation"]
    assert not articles["validation"] & train and not articles["test"] & train
    gold = {i for e in squad.train for i in e.positive_ids}
    assert not gold & {i for e in squad.validation + squad.test for i in e.positive_ids}
    assert squad.test[0].answers == ("Denver Broncos",) and squad.test[0].topic == "Super Bowl 50"
    assert squad.passages[0].topic == "Super Bowl 50"


@needs_real_data
def test_hotpotqa_splits(real):
    hotpotqa: Dataset = real["hotpotqa"]
    assert len(hotpotqa.passages) == 31088
    assert [len(s) for s in (hotpotqa.train, hotpotqa.validation, hotpotqa.test)] == [
        1300, 200, 1039,
    ]  # fmt: skip
    assert {(e.topic, e.hops, len(e.positive_ids)) for e in hotpotqa.test} == {("", 2, 2)}


@needs_real_data
def test_real_sets_are_split_alike_everywhere(real):
    assert content_hash(real["squad"]) == "1b9386a340fda18b"
    assert content_hash(real["hotpotqa"]) == "20fba39c708f86f6"


@pytest.mark.skipif(
    not (REAL / "xquad.questions.jsonl.gz").is_file(), reason=f"no xquad in {REAL}: FEDRAG_DATA"
)
def test_xquad_keeps_a_question_and_its_translations_in_one_split():
    dataset = load("xquad")
    assert len(dataset.passages) == 2880 and len({p.topic for p in dataset.passages}) == 12
    splits = [{e.id.rpartition("-")[2] for e in s} for s in (dataset.train, dataset.test)]
    assert not splits[0] & splits[1] and {e.topic for e in dataset.test} == {
        p.topic for p in dataset.passages
    }
    assert len(dataset.test) == 12 * len(splits[1])


def test_passages_alone_are_read_and_checked(folder):
    path = next(p for p in folder.iterdir() if "passages" in p.name)
    assert load_passages(path) == load(folder).passages
    with pytest.raises(DataError, match=r"is not a file; give one such as passages\.jsonl"):
        load_passages(folder)
    path.write_bytes(lines([{"id": "p", "text": "One."}, {"id": "p", "text": "Two."}]).encode())
    with pytest.raises(DataError, match="passage id 'p' occurs twice"):
        load_passages(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="the corpus is empty"):
        load_passages(path)


def test_clusters_are_questions_about_one_article():
    from fedrag_jax.data.examples import clusters

    passages = [Passage("a1", "Ada", "x"), Passage("a2", "Ada", "y"), Passage("b", "", "z"),
                Passage("c", "Bob", "w")]  # fmt: skip

    def about(name, *golds):
        return Example(name, "?", ("x",), golds)

    asked = [about("1", "a1"), about("2", "a2"), about("3", "b"), about("4", "b", "c"),
             about("5"), about("6", "c"), about("7")]  # fmt: skip
    # Two passages of one article; a shared passage; what shares one with either; nothing shared.
    assert clusters([e.positive_ids for e in asked], passages).tolist() == [0, 0, 1, 1, 2, 1, 3]
    assert clusters([], passages).tolist() == []


@needs_real_data
def test_a_sample_of_a_sorted_file_is_of_many_articles():
    from fedrag_jax.data.examples import clusters, sample

    squad = load("squad")
    some = sample(squad.test, 500, seed=0)
    first = [e.positive_ids for e in squad.test[:500]]
    assert len({*clusters(first, squad.passages)}) == 1  # one article: Super Bowl 50
    assert len({*clusters([e.positive_ids for e in some], squad.passages)}) > 40
    place = {e.id: i for i, e in enumerate(squad.test)}
    assert [place[e.id] for e in some] == sorted({place[e.id] for e in some})
    assert some == sample(squad.test, 500, seed=0) != sample(squad.test, 500, seed=1)
    assert sample(squad.test, 0, seed=0) == squad.test == sample(squad.test, 20_000, seed=0)
