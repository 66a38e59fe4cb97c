"""Passages that do not come with the questions: read, cut, kept in tables, and searched for golds."""

import json

import datasets as hub
import numpy as np
import pytest

from fedrag_jax.data import outside_corpora
from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.datasets import Corpus, load, load_over
from fedrag_jax.data.documents import split
from fedrag_jax.data.examples import (
    Dataset,
    Example,
    Passage,
    check,
    clusters,
    content_hash,
    embedding_text,
)
from fedrag_jax.data.file_kinds import Document
from fedrag_jax.data.outside_corpora import find_golds, read
from fedrag_jax.data.passage_table import PassageTable
from fedrag_jax.data.prompts import named_style
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models import hub as models
from fedrag_jax.retrieval.retriever import Retriever

PASSAGES = [Passage(f"p{i}", f"Page {i // 3}", f"Text {i} tells {i}. " * 3) for i in range(30)]
COLUMNS = {"id": "_id", "title": "title", "text": "text"}


@pytest.fixture
def rows():
    return [{"_id": p.id, "title": p.title, "text": p.text, "vector": [0.0]} for p in PASSAGES]


@pytest.fixture
def table(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.disable_progress_bars()
    path = tmp_path / "corpus.parquet"
    hub.Dataset.from_list(rows).to_parquet(path)
    return read(str(path), columns=COLUMNS)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load("builtin:encoder").tokenizer


def test_a_table_is_a_list_of_passages(table):
    assert isinstance(table, PassageTable) and len(table) == 30
    assert [*table] == PASSAGES and table[3] == PASSAGES[3] and table[-1] == PASSAGES[-1]
    assert table[2:5] == PASSAGES[2:5] and table[np.int64(4)] == PASSAGES[4]
    assert table[::-7] == PASSAGES[::-7] and PASSAGES[9] in table
    assert [*table.column("title")] == [p.title for p in PASSAGES]
    assert [*table.column("topic")] == [""] * 30
    with pytest.raises(IndexError):
        table[30]


def test_what_reads_a_corpus_reads_a_table(table):
    golds = [("p3",), ("p4",), ("p8", "p9")]
    assert clusters(golds, table).tolist() == clusters(golds, PASSAGES).tolist()
    examples = [Example("q", "what?", ("a",), ("p3",))]
    both = [Dataset("d", some, examples, [], []) for some in (table, PASSAGES)]
    assert content_hash(check(both[0], ("train",))) == content_hash(both[1])
    wrong = Dataset("d", table, [Example("q", "what?", ("a",), ("p30",))], [], [])
    with pytest.raises(DataError, match=r"'p30', which none of the 30 passages has"):
        check(wrong, ())


def test_tables_without_ids_count_their_rows(rows):
    bare = [{"text": row["text"]} for row in rows]
    table = PassageTable(hub.Dataset.from_list(bare), {"text": "text"}, "here")
    assert [p.id for p in table] == [*map(str, range(30))] == [*table.column("id")]
    assert table[7] == Passage("7", "", PASSAGES[7].text)


def test_numbers_are_texts_also_zero():
    rows = hub.Dataset.from_list([{"id": i, "text": f"Text {i}.", "topic": i} for i in range(3)])
    table = PassageTable(rows, {field: field for field in ("id", "text", "topic")}, "here")
    assert [(p.id, p.topic) for p in table] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert [*table.column("id")] == ["0", "1", "2"]


def test_tables_that_do_not_fit_are_refused(rows):
    made = hub.Dataset.from_list(rows)
    for columns, message in (
        ({"text": "body"}, r"here has no column 'body'; its columns are _id, title, text, vector"),
        ({"title": "title"}, r"columns need 'text'"),
        ({"text": "text", "name": "title"}, r"may have \('id', 'title'"),
    ):
        with pytest.raises(DataError, match=message):
            PassageTable(made, columns, "here")
    with pytest.raises(DataError, match="corpus is empty"):
        PassageTable(made.select([]), COLUMNS, "here")
    twice = hub.Dataset.from_list([*rows, rows[4]])
    with pytest.raises(DataError, match="here: passage id 'p4' occurs twice"):
        PassageTable(twice, COLUMNS, "here")


@pytest.mark.parametrize("field", ["id", "text"])
@pytest.mark.parametrize("value", [None, ""])
def test_empty_ids_and_texts_of_tables_are_refused(rows, field, value):
    rows[7][COLUMNS[field]] = value
    columns = {name: COLUMNS[name] for name in ("id", "text")}
    with pytest.raises(DataError, match=f"here, row 7: the {field} in column '.*' is empty"):
        PassageTable(hub.Dataset.from_list(rows), columns, "here")
    if field == "text":  # a passage may have its title alone
        passage = PassageTable(hub.Dataset.from_list(rows), COLUMNS, "here")[7]
        assert passage.title and passage.text == ""
    other = [{"id": number, "text": f"Text {number}."} for number in (0, 1, None)]
    if field == "id" and value is None:
        with pytest.raises(DataError, match="here, row 2: the id in column 'id' is empty"):
            PassageTable(hub.Dataset.from_list(other), {"id": "id", "text": "text"}, "here")


def test_texts_are_cut_as_documents_are(table, tokenizer):
    cut = table.cut(tokenizer, 10)
    wanted = [
        piece
        for p in PASSAGES
        for piece in split(Document(p.id, p.title, p.text, named=True), tokenizer, 10, 2)
    ]
    assert [*cut] == wanted and len(wanted) > 60
    assert outside_corpora.cut(PASSAGES, tokenizer, 10) == wanted
    again = table.cut(tokenizer, 10)
    assert again.rows.cache_files == cut.rows.cache_files != []
    assert len(table.cut(tokenizer, 12)) < len(wanted)
    assert outside_corpora.cut(table, None, 0) is table
    with pytest.raises(ConfigError, match="give its tokenizer"):
        outside_corpora.cut(table, None, 10)


def test_all_documents_that_cannot_be_read_are_named_together(tmp_path, tokenizer):
    (tmp_path / "good.txt").write_text("One text.")
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 and no more")
    (tmp_path / "worse.pdf").write_bytes(b"no PDF")
    with pytest.raises(DataError, match=r"2 files cannot be read(.|\n)*bad.pdf(.|\n)*worse.pdf"):
        read(str(tmp_path), tokenizer=tokenizer)


def test_corpora_are_read_wherever_they_lie(tmp_path, tokenizer, table):
    lines = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert read(str(path)) == PASSAGES == [*table]
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "ada.txt").write_text("Ada wrote programs. " * 100)
    found = read(str(notes), tokenizer=tokenizer)
    assert found[0].id == "ada.txt#0" and found[0].title == "ada" and len(found) > 1
    assert len(read(str(notes), tokenizer=tokenizer, tokens=50)) > len(found)
    with pytest.raises(ConfigError, match="give its tokenizer"):
        read(str(notes))


@pytest.mark.parametrize("other", ["a.json", "b.jsonl", ".hidden.csv", ".git/c.csv"])
def test_a_table_does_not_hide_the_documents_of_a_folder(tmp_path, tokenizer, other):
    (tmp_path / "ada.md").write_text("---\ntitle: Ada\n---\nAda wrote programs.")
    (tmp_path / "README.md").write_text("---\ntitle: Notes\n---\nNotes about Ada.")
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text('{"text": "A line."}\n')
    if other == "a.json":
        with pytest.warns(
            UserWarning, match=r"1 files are left out; the first is .*/a.json: .json"
        ):
            found = read(str(tmp_path), tokenizer=tokenizer)
    else:
        found = read(str(tmp_path), tokenizer=tokenizer)
    lines = ["b.jsonl:1#0"] if other == "b.jsonl" else []
    assert [p.id for p in found] == ["README.md#0", "ada.md#0", *lines]


def test_a_copy_of_a_repository_has_tables_or_the_hubs_readme(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.disable_progress_bars()
    folder = tmp_path / "copy"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.csv").write_text("text\nOne text.\n")
    assert [p.text for p in read(str(folder), columns={"text": "text"})] == ["One text."]
    (folder / "licence.txt").write_text("You may.")
    with pytest.raises(DataError, match=r"tables \(train.csv\) and documents \(licence.txt\)"):
        read(str(folder), columns={"text": "text"}, tokenizer=tokenizer)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\nA data set.")
    assert [p.text for p in read(str(folder), columns={"text": "text"})] == ["One text."]


@pytest.mark.parametrize("name", ["compact", "raft"])
def test_prompts_of_a_table_are_those_of_a_list(table, tmp_path, monkeypatch, name):
    monkeypatch.setenv("FEDRAG_CACHE", str(tmp_path / "kept"))
    tokenizer = models.load("builtin:decoder").tokenizer
    style, examples = named_style(name, tokenizer), [Example("q", "what?", ("a",), ("p3",))]
    made = [Prompts(tokenizer, style, some, examples, 12) for some in (PASSAGES, table)]
    rows = np.array([[3, 29]])
    whole, mapped = (prompts.training_table(examples, rows, False) for prompts in made)
    for column, values in whole.items():
        np.testing.assert_array_equal(values, mapped[column])
    assert made[0].share_cut == made[1].share_cut > 0
    (folder,) = (tmp_path / "kept" / "tokens").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["starts.npy", "tokens.bin"]
    before = (folder / "tokens.bin").stat().st_mtime_ns
    again = Prompts(tokenizer, style, table, examples, 12)
    assert (folder / "tokens.bin").stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.prompt("what?", [5]), made[0].prompt("what?", [5]))
    Prompts(tokenizer, style, table, examples, 11)
    assert len([*(tmp_path / "kept" / "tokens").iterdir()]) == 2


def test_a_table_is_embedded_and_searched_as_a_list(table, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAG_CACHE", str(tmp_path / "kept"))
    encoder = models.load("builtin:encoder")
    whole = Retriever.build(encoder, PASSAGES)
    mapped = Retriever.build(encoder, table)
    np.testing.assert_array_equal(mapped.vectors, whole.vectors)
    assert mapped.vectors is mapped.bare_vectors, "one copy"
    assert np.shares_memory(mapped.index.vectors, mapped.vectors)
    monkeypatch.setattr(PassageTable, "__getitem__", lambda *_: pytest.fail("texts are read"))
    again = Retriever.build(encoder, table)
    np.testing.assert_array_equal(again.search(["Text 3?"], 4)[0], whole.search(["Text 3?"], 4)[0])


def test_golds_are_found_by_title_and_answer():
    passages = [
        Passage("a0", "Ada  Lovelace", "Ada was a countess."),
        Passage("a1", "Ada  Lovelace", "She was born in London, England."),
        Passage("b0", "Byron", "Byron wrote."),
        Passage("l0", "London", "London is large. Londoners live there."),
    ]
    questions = [
        Example("hop", "Where was Byron's daughter born?", ("london",), ()),
        Example("none", "Who?", ("Ada",), ()),
        Example("far", "Who?", ("Ada",), ()),
        Example("part", "Which?", ("Lond",), ()),
    ]
    titles = {"hop": ["Ada_Lovelace", "BYRON"], "far": ["Elsewhere"], "part": ["London"]}
    found = find_golds(questions, titles, passages)
    # Of Byron's page, which has no answer, its first passage; "Lond" is no word of London's.
    assert found.golds == [("a1", "b0"), (), (), ("l0",)]
    assert (found.titled, found.found, found.answered) == (3, 2, 1)
    assert "of 4 questions 3 name a page, 2 find it in the corpus, 1 with" in found.message()


def test_golds_in_scripts_without_spaces():
    passages = [
        Passage("a", "北京", "北京是一座城市。"),
        Passage("b", "北京", "它于1949年成为中国的首都，有iPhone。"),
        Passage("c", "北京", "19490 iPhones"),
    ]
    asked = ("首都", "1949", "iphone")
    questions = [Example(answer, "?", (answer,), ()) for answer in asked]
    found = find_golds(questions, {answer: ["北京"] for answer in asked}, passages)
    assert found.golds == [("b",)] * 3 and found.answered == 3


def test_questions_of_a_named_set_over_passages_of_ones_own(tmp_path, monkeypatch):
    rows = [
        {"id": f"q{i}", "question": f"{i}?", "answers": [f"text {i}"], "positive_ids": ["a"]}
        for i in range(40)
    ]
    own = [{"id": "a", "title": "Page 1", "text": "Of its own."}]
    for name, some in (("questions", rows), ("passages", own)):
        path = tmp_path / f"boolq.{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    monkeypatch.setenv("FEDRAG_DATA", str(tmp_path))
    with pytest.warns(
        UserWarning, match="boolq over mine: of 40 questions 40 name a page, 40 find"
    ):
        dataset = load_over("boolq", PASSAGES, "mine")
    golds = {e.id: e.positive_ids for e in (*dataset.train, *dataset.validation, *dataset.test)}
    assert golds["q4"] == ("p4",) and golds["q0"] == ("p3",) and dataset.passages is PASSAGES


def test_a_folder_of_jsonl_over_another_corpus(tmp_path, tokenizer):
    own = tmp_path / "own"
    own.mkdir()
    questions = [
        {"id": f"q{i}", "question": f"{i}?", "answers": [f"text {i}"], "positive_ids": [f"p{i}"]}
        for i in range(30)
    ]
    passages = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    for name, some in (("questions", questions), ("passages", passages)):
        (own / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(
            json.dumps({"id": f"o{i}", "title": f"page {i}", "text": f"Says text {3 * i}."}) + "\n"
            for i in range(5)
        )
    )
    with pytest.warns(UserWarning, match=r"30 name a page, 15 find it in the corpus, 5 with"):
        dataset = load(own, corpus=Corpus(str(other)))
    golds = {e.id: e.positive_ids for e in (*dataset.train, *dataset.validation, *dataset.test)}
    assert golds["q0"] == golds["q2"] == ("o0",) and golds["q29"] == ()
    assert dataset.origin.endswith(f"over {other}")
    cut = load(own, corpus=Corpus(tokens=10), tokenizer=tokenizer)
    text = {p.id: embedding_text(p) for p in cut.passages}
    for example in cut.test:
        assert example.positive_ids
        assert all(example.answer in text[i].lower() for i in example.positive_ids)
