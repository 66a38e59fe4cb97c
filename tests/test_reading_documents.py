"""Folders of files as passages: what is read, where it is cut, what is refused."""

import configparser
import itertools
import json
import os
import pathlib
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pypdf
import pytest
from matplotlib.backends.backend_pdf import PdfPages

from fedrag_jax.data import documents
from fedrag_jax.data.documents import Document
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models import hub

TOKENIZER = hub.load("builtin:decoder").tokenizer


def pdf(path, *pages, **metadata):
    """Pages of lines; None makes one that is a picture."""
    with (
        matplotlib.rc_context({"pdf.use14corefonts": True}),
        PdfPages(path, metadata=metadata) as file,
    ):
        for lines in pages:
            figure = plt.figure()
            if lines is None:
                figure.figimage([[0, 1], [1, 0]])
            for i, line in enumerate(lines or ()):
                figure.text(0.1, 0.9 - 0.1 * i, line)
            file.savefig(figure)
            plt.close(figure)


def encrypted(path, to, password, algorithm):
    writer = pypdf.PdfWriter(path)
    writer.encrypt(password, "owner", algorithm=algorithm)
    writer.write(to)


def contents(folder):
    return {
        d.id: (d.title, d.text)
        for path in documents.find(folder).files
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
    assert found["q"] == ("T", "one") and found["e.jsonl:3"] == ("e", "two\u2028")
    assert len(found) == 7
    assert list(contents(tmp_path / "a.txt")) == ["a.txt"]


def words_of(html, folder):
    path = folder / "page.html"
    path.write_text(html)
    ((title, text),) = contents(path).values()
    return title, text.split()


@pytest.mark.parametrize(
    "element",
    ["dl", "dt", "dd", "details", "summary", "figure", "figcaption", "main", "aside", "form",
     "fieldset", "address", "option", "button", "label", "legend", "caption", "dialog", "search"],
)  # fmt: skip
def test_elements_of_html_that_stand_apart_are_not_glued(tmp_path, element):
    _, words = words_of(
        f"before<{element}>one</{element}><{element}>two</{element}>after", tmp_path
    )
    assert words == ["before", "one", "two", "after"]
    assert words_of("above<hr>below, <b>one</b>word", tmp_path)[1] == ["above", "below,", "oneword"]


@pytest.mark.parametrize(
    ("html", "title"),
    [
        ("<svg><title>Menu</title></svg><h1>Ada</h1>", "Ada"),
        ("<svg><title>Menu</title></svg><title>The page</title><h1>Ada</h1>", "The page"),
        ("<head><title> </title></head><h1>Ada</h1>", "Ada"),
        ("<svg><title>Menu</title></svg>text", "page"),
    ],
)
def test_the_title_of_a_page_is_not_that_of_an_icon(tmp_path, html, title):
    assert words_of(html, tmp_path)[0] == title


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"caf\xe9", r"x.txt: byte 3 is not utf-8-sig; save the file as UTF-8"),
        ("x.pdf", b"%PDF-1.4 and then nothing", "x.pdf: cannot be read"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": 1}', r"x.jsonl:2: no object with a 'text'"),
        ("x.jsonl", b'{"text": "\\ud800"}', r"x.jsonl:1: holds half a character .'.ud800'."),
        ("x.jsonl", b"[1]", r"x.jsonl:1: no object with a 'text'"),
        ("x.jsonl", b'{"text": 7}', r"x.jsonl:1: 'text' and 'title' must be strings"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    (path,) = documents.find(tmp_path).files
    with pytest.raises(DataError, match=words):
        documents.read(path, tmp_path)


def test_a_pdf_of_pictures_is_named_and_so_are_pictures_among_pages(tmp_path):
    for pages in ([[]], [None, None]):
        pdf(tmp_path / "blank.pdf", *pages)
        with pytest.raises(DataError, match=r"blank.pdf: has no text, perhaps"):
            documents.read(tmp_path / "blank.pdf", tmp_path)
    pdf(tmp_path / "mixed.pdf", ["One."], None, [], ["Four."], None)
    (mixed,) = documents.read(tmp_path / "mixed.pdf", tmp_path)
    assert mixed.text.split() == ["One.", "Four."]
    assert "mixed.pdf: of its 5 pages those that are pictures" in mixed.unread
    assert "not read: 2, 5;" in mixed.unread  # and not the third, which is blank


@pytest.mark.parametrize("title", ["untitled", "(anonymous)", " "])
def test_a_pdf_that_nobody_named_is_called_as_its_file(tmp_path, title):
    pdf(tmp_path / "report.pdf", ["text"], Title=title)
    (read,) = documents.read(tmp_path / "report.pdf", tmp_path)
    assert read.title == "report"


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
def test_an_encrypted_pdf_is_read_where_anyone_may(tmp_path, algorithm):
    pdf(tmp_path / "open.pdf", ["Ada was born in London."])
    encrypted(tmp_path / "open.pdf", tmp_path / "anyone.pdf", "", algorithm)
    (read,) = documents.read(tmp_path / "anyone.pdf", tmp_path)
    assert read.text.strip() == "Ada was born in London."
    encrypted(tmp_path / "open.pdf", tmp_path / "closed.pdf", "secret", algorithm)
    with pytest.raises(DataError, match=r"closed.pdf: is encrypted with a password; save it"):
        documents.read(tmp_path / "closed.pdf", tmp_path)


def test_what_encrypted_files_need_is_in_the_extra_and_named(tmp_path):
    setup = configparser.ConfigParser()
    setup.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
    for extra in ("documents", "test"):
        assert "\ncryptography>=" in setup["options.extras_require"][extra]
    pdf(tmp_path / "open.pdf", ["text"])
    encrypted(tmp_path / "open.pdf", tmp_path / "aes.pdf", "", "AES-256")
    code = (
        "import sys, pathlib\nsys.modules |= {'cryptography': None, 'Crypto': None}\n"
        "from fedrag_jax.data import documents\nfolder = pathlib.Path(sys.argv[1])\n"
        "documents.read(folder / 'aes.pdf', folder)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=False, capture_output=True, text=True
    )
    assert "aes.pdf: encrypted PDF files need cryptography: " in run.stderr
    assert run.stderr.rstrip().endswith(f"{sys.executable} -m pip install 'fedrag-jax[documents]'")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (["an exam-", "ple of it"], "an example of it"),
        (["a well-", "known one is", "well-known"], "a well-known one is\nwell-known"),
        (["state-of-the-", "art"], "state-of-the-art"),
        (["Jean-", "Paul and COVID-", "19"], "Jean-Paul and COVID-19"),
        (["pre-", "and post-war"], "pre- and post-war"),
        (["in-", "ter-", "national"], "international"),
        (["an OP-", "TIONAL NATO-", "led"], "an OPTIONAL NATO-led"),
        (["1990", "- one"], "1990\n- one"),
    ],
)
def test_words_that_line_ends_part_are_whole_again(tmp_path, text, whole):
    pdf(tmp_path / "x.pdf", text)
    (read,) = documents.read(tmp_path / "x.pdf", tmp_path)
    assert read.text.strip() == whole
    (tmp_path / "x.txt").write_text("\n".join(text))
    assert documents.read(tmp_path / "x.txt", tmp_path)[0].text == "\n".join(text)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text",
    [
        "Ada Lovelace was born.",
        "Größe: 3 µm\n",
        "Ада Лавлейс родилась",
        "हिन्दी भाषा।",
        "一一一，\n一一",
        "a 😀",
    ],
)
def test_wide_text_needs_no_mark(tmp_path, encoding, text):
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode(encoding))
    assert documents.read(path, tmp_path)[0].text == text
    path.write_bytes("\ufeff".encode(encoding) + text.encode(encoding))
    assert documents.read(path, tmp_path)[0].text == text


def test_what_is_no_text_is_left_out_by_name(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("Ада".encode("utf-16-le"))  # nothing in it tells which encoding it is
    with pytest.raises(DataError, match=r"x.txt: has control characters between its letters"):
        documents.read(path, tmp_path)
    path.write_text("One\0 or another" + " word" * 20)
    assert "One" in documents.read(path, tmp_path)[0].text


def test_what_is_not_read_is_told(tmp_path):
    (tmp_path / "docs").mkdir()
    docs = tmp_path / "docs"
    for name in ("a.txt", "b.docx", "c.CSV", "LICENSE", ".hidden"):
        (docs / name).write_text("x")
    (docs / "gone.txt").symlink_to(tmp_path / "nowhere")
    (docs / "elsewhere").symlink_to(tmp_path)
    (docs / "link.txt").symlink_to(docs / "a.txt")
    os.mkfifo(docs / "pipe.txt")
    found = documents.find(docs)
    assert [path.name for path in found.files] == ["a.txt", "link.txt"]
    told = {path.name: why for path, why in found.left_out.items()}
    assert told.keys() == {"b.docx", "c.CSV", "LICENSE", "gone.txt", "elsewhere", "pipe.txt"}
    assert told["b.docx"].startswith(".docx files are not read")
    assert told["LICENSE"].startswith("files without an ending are not read")
    assert told["elsewhere"].startswith("a link to a folder, which is not followed")
    assert told["gone.txt"] == "a link to nothing" and told["pipe.txt"] == "no ordinary file"


def test_an_empty_place_is_named(tmp_path):
    with pytest.raises(DataError, match="is neither a folder nor a file"):
        documents.find(tmp_path / "nowhere")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 files, none of them \.txt"):
        documents.find(tmp_path)


@pytest.mark.parametrize(
    ("name", "library", "words"),
    [
        ("x.pdf", "pypdf", "PDF files need pypdf"),
        ("x.md", "markdown_it", "Markdown files need markdown_it"),
        ("x.md", "bs4", "Markdown files need bs4"),
        ("x.html", "bs4", "HTML files need bs4"),
    ],
)
def test_a_missing_library_is_named_by_what_needs_it(name, library, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError) as told:
        documents.read(tmp_path / name, tmp_path)
    assert str(told.value) == f"{words}: {sys.executable} -m pip install 'fedrag-jax[documents]'"


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


def test_passages_of_a_line_keep_its_own_id(tmp_path):
    rows = [{"id": "p1", "text": "short"}, {"id": 7, "text": "word " * 90}, {"text": "no id"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.txt").write_text("short")
    found = [
        [p.id for p in documents.split(d, TOKENIZER, tokens=50, overlap=0)]
        for path in documents.find(tmp_path).files
        for d in documents.read(path, tmp_path)
    ]
    assert found[:2] == [["a.txt#0"], ["p1"]] and found[3] == ["x.jsonl:3#0"]
    assert found[2] == [f"7#{i}" for i in range(len(found[2]))] and len(found[2]) > 1


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (10, 5), (10, -1)])
def test_windows_that_cannot_be_are_refused(size, overlap):
    with pytest.raises(ConfigError, match=f"got {size} and {overlap}"):
        documents.split(Document("d", "", "text"), TOKENIZER, size, overlap)
