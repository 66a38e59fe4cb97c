"""Folders of files as passages: what is read, where it is cut, what is refused."""

import itertools
import json

import matplotlib
import matplotlib.pyplot as plt
import pytest

from fedrag_jax.data import documents
from fedrag_jax.data.documents import Document
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models import hub

TOKENIZER = hub.load("builtin:decoder").tokenizer


def pdf(path, lines, **metadata):
    with matplotlib.rc_context({"pdf.use14corefonts": True}):
        figure = plt.figure()
        for i, line in enumerate(lines):
            figure.text(0.1, 0.9 - 0.1 * i, line)
        figure.savefig(path, format="pdf", metadata=metadata)
        plt.close(figure)


def contents(folder):
    return {
        d.id: (d.title, d.text)
        for path in documents.find(folder)
        for d in documents.read(path, folder)
    }


def test_every_kind_of_file_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("Plain\n\ntext", encoding="utf-8-sig")
    (tmp_path / "wide.txt").write_text("Größe", encoding="utf-16")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text(
        "# A *title*\n\nOne\nline, [a link](http://x).\n\n- first\n- second\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    (tmp_path / "c.HTML").write_text(
        "<!DOCTYPE html><html><head><title>Page &amp; more</title><style>p {}</style><body>"
        "<nav>menu</nav><!-- hidden --><?php x ?>"
        "<h1>Head</h1><p>One <b>bold</b>word.</p><script>alert(1)</script><ul><li>x</li><li>y</li></ul>"
    )
    pdf(tmp_path / "d.pdf", ["Ada was born in London.", "She wrote notes."], Title="Ada")
    (tmp_path / "e.jsonl").write_text(
        json.dumps({"id": "q", "title": "T", "text": "one"})
        + "\n\n"
        + json.dumps({"text": "two\u2028"})
    )
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = contents(tmp_path)
    assert found["a.txt"] == ("a", "Plain\n\ntext") and found["wide.txt"] == ("wide", "Größe")
    assert found["sub/b.md"] == (
        "A title", "A title\n\nOne line, a link.\n\nfirst\n\nsecond\n\na b\n\n1 2"
    )  # fmt: skip
    assert found["c.HTML"] == ("Page & more", "Head\n\nOne boldword.\n\nx\n\ny")
    title, text = found["d.pdf"]
    assert title == "Ada" and " ".join(text.split()) == "Ada was born in London. She wrote notes."
    assert found["e.jsonl:q"] == ("T", "one") and found["e.jsonl:3"] == ("e", "two\u2028")
    assert len(found) == 7
    assert list(contents(tmp_path / "a.txt")) == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"caf\xe9", r"x.txt: byte 3 is not utf-8-sig; save the file as UTF-8"),
        ("x.pdf", b"%PDF-1.4 and then nothing", "x.pdf: cannot be read"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": 1}', r"x.jsonl:2: no object with a 'text'"),
        ("x.jsonl", b'{"text": "\\ud800"}', r"x.jsonl: cannot be read .UnicodeEncodeError"),
        ("x.jsonl", b"[1]", r"x.jsonl:1: no object with a 'text'"),
        ("x.jsonl", b'{"text": 7}', r"x.jsonl:1: 'text' and 'title' must be strings"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    (path,) = documents.find(tmp_path)
    with pytest.raises(DataError, match=words):
        documents.read(path, tmp_path)


def test_a_pdf_of_pictures_or_with_a_password_is_named(tmp_path):
    import pypdf

    pdf(tmp_path / "blank.pdf", [])
    with pytest.raises(DataError, match=r"blank.pdf: has no text in it"):
        documents.read(tmp_path / "blank.pdf", tmp_path)
    pdf(tmp_path / "open.pdf", ["text"])
    writer = pypdf.PdfWriter(tmp_path / "open.pdf")
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "closed.pdf")
    with pytest.raises(DataError, match=r"closed.pdf: is encrypted"):
        documents.read(tmp_path / "closed.pdf", tmp_path)


def test_an_empty_place_is_named(tmp_path):
    with pytest.raises(DataError, match="is neither a folder nor a file"):
        documents.find(tmp_path / "nowhere")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 files, none of them \.txt"):
        documents.find(tmp_path)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    (tmp_path / "x.pdf").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"PDF files need pypdf: pip install 'fedrag-jax\[documents\]'"
    ):
        documents.read(tmp_path / "x.pdf", tmp_path)


def tokens(text):
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def test_passages_are_short_overlap_and_cover_all():
    words = [f"word{i}" for i in range(400)]
    document = Document("d.txt", "Title", " ".join(words))
    passages = documents.split(document, TOKENIZER, tokens=50, overlap=12)
    assert [p.id for p in passages] == [f"d.txt#{i}" for i in range(len(passages))]
    assert {p.title for p in passages} == {"Title"}
    assert all(tokens(p.text) <= 50 for p in passages)
    assert list(dict.fromkeys(w for p in passages for w in p.text.split())) == words
    for one, other in itertools.pairwise(passages):
        shared = {*one.text.split()} & {*other.text.split()}
        assert shared and tokens(" ".join(shared)) <= 14
    apart = documents.split(document, TOKENIZER, tokens=50, overlap=0)
    assert " ".join(p.text for p in apart) == document.text


def test_white_space_makes_no_passages():
    text = "a" + 8000 * " " + "b" + 8000 * "\n" + "c\0d"
    passages = documents.split(Document("d", "", text), TOKENIZER, tokens=100, overlap=10)
    assert [p.text for p in passages] == ["a b\n\nc d"]


def test_cuts_are_where_a_paragraph_or_sentence_ends():
    text = "One two three four five six. Seven eight nine ten\n\neleven twelve. Thirteen fourteen"
    passages = documents.split(
        Document("d", "", text), TOKENIZER, tokens=tokens(text) - 6, overlap=0
    )
    assert passages[0].text.endswith(("ten", "twelve."))
    assert documents.split(Document("d", "", " \n "), TOKENIZER) == []
    (whole,) = documents.split(Document("d", "", f" {text}\n"), TOKENIZER, tokens=1000)
    assert whole.text == text
    unbroken = documents.split(Document("d", "", "x" * 5000), TOKENIZER, tokens=100, overlap=20)
    assert len(unbroken) > 1 and all(tokens(p.text) <= 110 for p in unbroken)


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (10, 5), (10, -1)])
def test_windows_that_cannot_be_are_refused(size, overlap):
    with pytest.raises(ConfigError, match=f"got {size} and {overlap}"):
        documents.split(Document("d", "", "text"), TOKENIZER, size, overlap)
