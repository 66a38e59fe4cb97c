"""Sets by name out of copies of the hub's repositories, and any table by its columns."""

import csv
import dataclasses
import json

import datasets as hub
import hub_copies
import pytest

from fedrag_jax.data import hub_tables, outside_corpora
from fedrag_jax.data.columns import Columns
from fedrag_jax.data.datasets import Corpus, load
from fedrag_jax.data.examples import content_hash
from fedrag_jax.data.named_sets import NAMED_SETS
from fedrag_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    hub.config.HF_DATASETS_CACHE = root / "cache"
    hub_copies.write(root)
    return root


@pytest.fixture(autouse=True)
def no_shared_data(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDRAG_DATA", str(tmp_path / "none"))


def of(copies, name, **how):
    return load(name, source=str(copies), **how)


def test_sets_with_passages_load_by_name(copies):
    for name, (train, test, passages) in {
        "hotpotqa": (40, 10, 3),
        "2wiki": (40, 10, 3),
        "squad": (40, 10, 25),
        "musique": (40, 10, 150),
        "boolq": (40, 10, 50),
        "pubmedqa": (40, 1, 41),
        "triviaqa": (40, 10, 1),
    }.items():
        dataset = of(copies, name)
        assert len(dataset.train) + len(dataset.validation) == train, name
        assert (len(dataset.test), len(dataset.passages)) == (test, passages), name
        assert dataset.name == name and dataset.origin.startswith(str(copies)), name
        assert all(e.positive_ids and e.answer for e in dataset.train), name
        assert dataset.validation, name


def test_questions_are_what_the_hub_says(copies):
    dataset = of(copies, "hotpotqa")
    text = {p.id: f"{p.title}: {p.text}" for p in dataset.passages}
    example = dataset.test[0]
    assert (example.id, example.answers, example.hops) == ("h40", ("London",), 2)
    assert {text[i] for i in example.positive_ids} == {
        "Ada Lovelace: Ada was born in London.", "Byron: Byron wrote."
    }  # fmt: skip
    squad = of(copies, "squad")
    assert squad.train[0].topic.startswith("Article ") and squad.test[0].topic == "Other"
    topics = [{e.topic for e in some} for some in (squad.train, squad.validation)]
    assert not topics[0] & topics[1], "whole articles are held out"
    assert of(copies, "boolq").test[0].answers == ("yes",)
    assert of(copies, "boolq").test[1].answers == ("no",)
    musique = of(copies, "musique").test[0]
    assert musique.hops == 2 and len(musique.positive_ids) == 2
    assert musique.answers == ("Second", "2nd")
    assert [e.id for e in of(copies, "pubmedqa").test] == ["21645374"]


def test_translations_of_a_question_are_on_one_side(copies):
    dataset = of(copies, "xquad")
    everybody = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    assert sum(map(len, everybody.values())) == 12 * 40
    assert {e.topic for e in dataset.train} >= {"de", "zh"}
    numbers = {name: {e.id.split("-")[1] for e in some} for name, some in everybody.items()}
    assert not numbers["train"] & numbers["test"] and not numbers["train"] & numbers["validation"]
    assert "all configurations" in dataset.origin


def test_sets_without_passages_want_a_corpus(copies, tmp_path):
    for name in ("nq", "popqa"):
        with pytest.raises(DataError, match=r"has no passages of its own: give a corpus"):
            of(copies, name)
    rows = [
        {"id": "a", "title": "george rankin", "text": "A judge."},
        {"id": "b", "title": "George_Rankin", "text": "He was a politician, too."},
        {"id": "c", "title": "Other", "text": "politician"},
    ]
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match=r"of 40 questions 40 name a page, 40 find it .* 40 with"):
        dataset = of(copies, "popqa", corpus=Corpus(str(path)))
    assert all(e.positive_ids == ("b",) for e in dataset.train)
    assert {e.topic for e in dataset.train} == {"occupation", "religion"}
    with pytest.warns(UserWarning, match=r"of 50 questions 0 name a page, 0 find it"):
        assert not of(copies, "nq", corpus=Corpus(str(path))).train[0].positive_ids


def test_a_hub_that_cannot_be_asked_is_an_error_of_one_line(monkeypatch):
    class Strange(Exception):
        """Of a library that nobody here knows."""

    def broken(*_, **__):
        raise Strange("no such name")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", broken)
    assert hub_tables.commit("owner/set") == ""
    assert hub_tables.commit("owner/set", "c0ffee") == "c0ffee"  # not the newest in the cache
    monkeypatch.setattr(hub, "load_dataset", broken)
    with pytest.raises(DataError, match=r"of dgslibisey/MuSiQue cannot be read \(Strange: no such"):
        load("musique")


def test_the_commit_that_was_read_is_told(monkeypatch, copies):
    asked, read = [], hub.load_dataset

    class Info:
        sha = "c0ffee"

    def info(self, repo, revision=None):
        asked.append((repo, revision))
        return Info

    def load_dataset(source, config, split, revision):
        assert revision == "c0ffee"
        return read(str(copies / source), None, split=split)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    dataset = load("musique", revision="main")
    assert dataset.origin == "dgslibisey/MuSiQue @ c0ffee"
    assert asked == [("dgslibisey/MuSiQue", "main")]


def test_every_named_set_is_tried_here():
    here = {repo for repo, _ in hub_copies.REPOSITORIES}
    assert {known.repo for known in NAMED_SETS.values()} == here


MAPPED = Columns(
    question="asked", answers="right.text", passages="context.text", titles="context.title",
    gold="gold", topic="kind",
)  # fmt: skip


def row(number, **fields):
    context = [{"title": "T", "text": f"One {number}."}, {"title": "U", "text": "Two."}]
    about = {"asked": f"What {number}?", "right": {"text": ["1", "one"]}, "context": context}
    return about | {"gold": [1], "kind": "k"} | fields


def table(folder, rows, name="train"):
    folder.mkdir(exist_ok=True)
    hub.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder


def test_any_table_by_its_columns(tmp_path):
    table(tmp_path / "own", [row(i) for i in range(30)])
    table(tmp_path / "own", [row(i) for i in range(30, 40)], "validation")
    dataset = load(str(tmp_path / "own"), columns=MAPPED)
    assert len(dataset.train) + len(dataset.validation) == 30 and len(dataset.test) == 10
    example = dataset.test[0]
    assert (example.question, example.answers, example.topic) == ("What 30?", ("1", "one"), "k")
    (gold,) = example.positive_ids
    assert {p.id: (p.title, p.text) for p in dataset.passages}[gold] == ("U", "Two.")
    for number, gold in enumerate(([False, True], ["U"])):
        folder = tmp_path / f"other{number}"
        table(folder, [row(i, gold=gold) for i in range(30)])
        table(folder, [row(i, gold=gold) for i in range(30, 40)], "validation")
        other = load(str(folder), columns=MAPPED)
        assert other.test == dataset.test


@pytest.mark.parametrize(
    ("passages", "golds", "positions"),
    [
        # As in MS MARCO; also [0, 1], which alone could be two positions.
        ([2, 4, 4, 2], [[0, 1], [0, 0, 1, 0], [0, 0, 0, 0], []], [[1], [2], [], []]),
        ([2, 4, 4, 2], [[0, 1], [2], [3, 0], []], [[0, 1], [2], [0, 3], []]),
        ([2, 2], [[0, 1], [1, 0]], [[0, 1], [0, 1]]),
        ([2, 2], [[True, False], []], [[0], []]),
    ],
)
def test_gold_passages_by_numbers(tmp_path, passages, golds, positions):
    texts = [[f"{i}, {j}." for j in range(size)] for i, size in enumerate(passages)]
    rows = [
        {"q": "Is it?", "a": "x", "p": some, "g": gold, "side": "test"}
        for some, gold in zip(texts, golds, strict=True)
    ]
    columns = Columns(question="q", answers="a", passages="p", gold="g", split="side")
    dataset = load(str(table(tmp_path / "own", rows)), (), columns=columns)
    text = {p.id: p.text for p in dataset.passages}
    found = [sorted(text[i] for i in e.positive_ids) for e in dataset.test]
    assert found == [[texts[i][j] for j in some] for i, some in enumerate(positions)]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "jsonl.gz", "parquet", "arrow"])
def test_a_file_is_a_table(tmp_path, ending):
    rows = [
        {"q": f"Is {i}?", "a": f"it is {i}", "p": f"text {i}", "side": "train"} for i in range(9)
    ]
    rows += [rows[0] | {"q": "Is it?", "side": side} for side in ("dev", "test")]
    path, made = tmp_path / f"own.{ending}", hub.Dataset.from_list(rows)
    if ending == "arrow":
        made.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    elif "json" in ending:
        made.to_json(path)
    elif ending == "parquet":
        made.to_parquet(path)
    else:
        made.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    columns = Columns(question="q", answers="a", passages="p", split="side")
    dataset = load(str(path), columns=columns)
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [9, 1, 1]
    assert dataset.train[3].answers == ("it is 3",) and len(dataset.passages) == 9
    assert dataset.passages[3].text == "text 3"


@pytest.mark.parametrize("place", ["own.csv", "own.tsv", "own/train.csv"])
def test_values_of_csv_are_texts(tmp_path, place):
    rows = [
        ("007", "Is it?", "NA", '["One.", "Two."]', "1", "0"),
        ("008", "Is it so?", "True", '["Three.", "Four."]', "[0, 1]", "1"),
        ("009", "Is it still?", '["1.50", "x"]', "[5] Alone [6]", "[true]", "0"),
        ("010", "Is it more?", "10", '["Five.", "Six."]', "", ""),
    ]
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if place.endswith("tsv") else ",")
        writer.writerows([("i", "q", "a", "p", "g", "t"), *rows])
    columns = Columns(question="q", answers="a", passages="p", gold="g", topic="t", id="i")
    source = tmp_path / place.partition("/")[0]
    dataset = load(str(source), (), columns=columns)
    text = {p.id: p.text for p in dataset.passages}
    examples = [*dataset.train, *dataset.validation, *dataset.test]
    found = {e.id: (e.answers, [text[i] for i in e.positive_ids], e.topic) for e in examples}
    assert found == {
        "007": (("NA",), ["Two."], "0"),
        "008": (("yes",), ["Three.", "Four."], "1"),
        "009": (("1.50", "x"), ["[5] Alone [6]"], "0"),
        "010": (("10",), [], ""),
    }
    corpus = outside_corpora.read(str(source), columns={"id": "i", "text": "q", "topic": "t"})
    assert [(p.id, p.topic) for p in corpus] == [
        ("007", "0"), ("008", "1"), ("009", "0"), ("010", "")
    ]  # fmt: skip


ASKED = Columns(question="q", answers="a")


@pytest.mark.parametrize("place", ["own.csv", "own/train.csv"])
def test_a_comma_at_the_end_of_every_row_of_csv_shifts_nothing(tmp_path, place):
    (tmp_path / "own").mkdir()
    (tmp_path / place).write_text("q,a\nWho?,Ada,\nWhen?,1843,\n")
    read = ASKED.read(str(tmp_path / place.partition("/")[0]))
    found = {e.question: e.answers for some in read.split.values() for e in some}
    assert found == {"Who?": ("Ada",), "When?": ("1843",)}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"q,a\nWho?,Ada,\nWell, who?,Ada\n",
            r"own.csv, row 1: has more fields .* has 2: put texts",
        ),
        (b"q\nWell, then, who?\nWho?\n", "own.csv, row 0: has more fields"),
        (
            b"q,a\nWho?,Ada\nWell, who?,Ada\n",
            "Expected 2 fields in line 3, saw 3.* Mend this in the local files",
        ),
        ("q,a\nWo?,Köln\n".encode("latin-1"), "'utf-8' codec can't .* texts are UTF-8"),
        (b"q,a\n", "corresponds to no data.* CSV has a header and rows"),
        (b"", "No columns to parse .* CSV has a header and rows"),
    ],
)
def test_csv_that_cannot_be_read_says_why(tmp_path, content, told):
    (tmp_path / "own.csv").write_bytes(content)
    with pytest.raises(DataError, match=told) as error:
        ASKED.read(str(tmp_path / "own.csv"))
    assert "network" not in str(error.value)


def test_nulls_are_no_texts(tmp_path):
    rows = [
        row(0, right={"text": [None, "1"]}, gold=[0]),
        row(1, context=[{"title": None, "text": "One."}], gold=[0]),
        row(2, right={"text": None}, gold=None),
    ]
    columns = dataclasses.replace(MAPPED, topic="", split="kind")
    rows = [x | {"kind": "test"} for x in rows]
    read = columns.read(str(table(tmp_path / "own", rows)))
    assert [e.answers for e in read.split["test"]] == [("1",), ("1", "one"), ()]
    gold = {p.id: p for p in read.passages}[read.split["test"][1].positive_ids[0]]
    assert (gold.title, gold.text) == ("", "One.")
    pages = Columns(question="asked", answers="right.text", gold="pages")
    read = pages.read(str(table(tmp_path / "pages", [row(0, pages=[None, "Ada"])])))
    assert read.titles == {"train-0": ("Ada",)}


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ({"question": "query"}, [row(0)], r"row 0: .*columns\.question is 'query'.*asked, right"),
        ({"answers": "right.texts"}, [row(0)], r"row 0: .*'right\.texts'.*has text"),
        ({"answers": "kind.text"}, [row(0)], r"columns\.answers is 'kind\.text'.*has no columns"),
        ({}, [row(0, gold=[2])], r"train-0: gold is 2 of 2 passages, from 0"),
        ({}, [row(0, gold=["V"])], r"no passage has the title 'V' of gold"),
        ({}, [row(0, gold=[True])], r"0 and 1, for each of the 2 passages, got \[True\]"),
        ({}, [row(0, gold=[1, 1]), row(1, gold=[0])], r"train-1: gold .* passages, got \[0\]"),
        ({}, [row(0), row(1, gold=[1, 1])], r"train-1: gold has a position twice in \[1, 1\]"),
        (
            {},
            [row(0), row(1, context=[{"title": None, "text": None}])],
            r"train-1: passage 0 of 1.*empty",
        ),
        (
            {},
            [row(0, context=[{"title": "", "text": " "}])],
            r"train-0: passage 0 .* leave it out",
        ),
        ({"id": "kind"}, [row(0), row(1, kind=None)], r"train-1: the id in column 'kind' is empty"),
        ({"split": "kind"}, [row(0)], r"split 'k' is none of train, validation"),
        ({"question": "kind"}, [row(0, kind=" ")], r"column 'kind' must be a question, got ' '"),
        ({}, [row(0, right={"text": [""]})], r"'train-0' has no answer to train on"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, rows, message):
    table(tmp_path / "own", rows)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "own"), (), columns=dataclasses.replace(MAPPED, **columns))


def test_columns_need_questions_and_answers():
    with pytest.raises(ConfigError, match=r"columns\.answers is empty"):
        Columns(question="q")


@pytest.mark.parametrize(
    ("name", "how", "told"),
    [
        ("world", {"source": "hub"}, r"'world' is generated, so leave out source \('hub'\)"),
        ("chatty_world", {"revision": "v1"}, r"so leave out revision \('v1'\)"),
        ("world", {"config": "a", "columns": MAPPED}, r"leave out config \('a'\), columns"),
        ("world", {"corpus": Corpus("c.jsonl", tokens=9)}, "corpus .*c.jsonl.*, passage_tokens"),
        (
            "world",
            {"corpus": Corpus(revision="v1")},
            "no other corpus, so leave out corpus_revision",
        ),
        ("own", {"revision": "v1"}, r"read from own/questions.jsonl .*leave out revision"),
        ("own", {"config": "a", "source": "local"}, "leave out config"),
        ("own", {"corpus": Corpus("own/passages.jsonl", "a")}, "has no configurations"),
        (
            "own",
            {"corpus": Corpus("own/passages.jsonl", "", "v1")},
            "local and has no revision 'v1'",
        ),
        ("table", {"columns": MAPPED, "revision": "v1"}, "table is local and has no revision 'v1'"),
        ("table", {"columns": MAPPED, "source": "hub"}, r"leave out source \('hub'\)"),
        ("musique", {"config": "a"}, "own configurations, so leave out config"),
    ],
)
def test_what_a_data_set_does_not_use_is_refused(tmp_path, monkeypatch, name, how, told):
    monkeypatch.chdir(tmp_path)
    lines = {
        "questions": {"question": "Who?", "answers": ["Ada"], "positive_ids": ["a"]},
        "passages": {"id": "a", "text": "Ada."},
    }
    (tmp_path / "own").mkdir()
    for kind, line in lines.items():
        (tmp_path / "own" / f"{kind}.jsonl").write_text(json.dumps(line))
    table(tmp_path / "table", [row(0)])
    with pytest.raises(ConfigError, match=told):
        load(name, (), **how)


def test_content_decides_whether_data_changed(tmp_path):
    rows = [row(i) for i in range(40)]
    table(tmp_path / "own", rows)
    before = content_hash(load(str(tmp_path / "own"), columns=MAPPED))
    table(tmp_path / "own", [*rows[:-1], row(39, kind="other")])
    assert content_hash(load(str(tmp_path / "own"), columns=MAPPED)) != before
