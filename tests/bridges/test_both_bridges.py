"""What both bridges share: they refuse blank questions, and name the library that is missing."""

import importlib
import subprocess
import sys

import pytest
from bridged import QUESTION
from llama_index.core.schema import QueryBundle

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.integrations import langchain, llama_index


def test_a_blank_question_is_refused_by_both_bridges(either):
    blank = pytest.raises(DataError, match="question 1 of 1 is blank: ask something")
    nodes = llama_index.RAGRetriever(either).retrieve(QUESTION)
    for ask in (
        lambda: llama_index.RAGRetriever(either).retrieve(" "),
        lambda: llama_index.RAGQueryEngine(either).query(" "),
        lambda: llama_index.RAGQueryEngine(either).synthesize(QueryBundle(" "), nodes),
        lambda: langchain.RAGRetriever(system=either).invoke(""),
        lambda: langchain.RAGRunnable(system=either).invoke(" "),
        lambda: [*langchain.RAGRunnable(system=either).stream({"question": " ", "context": []})],
    ):
        with blank:
            ask()
    found = langchain.RAGRunnable(system=either).batch([QUESTION, " "], return_exceptions=True)
    assert found[0]["answer"] and isinstance(found[1], DataError)


def test_modes_that_need_other_passages_are_refused_with_a_remedy(system):
    engine, answers = llama_index.RAGQueryEngine, langchain.RAGRunnable(system=system)
    for ask in (
        lambda: engine(system, mode="search"),
        lambda: answers.invoke(QUESTION, mode="search"),
        lambda: [*answers.stream(QUESTION, mode="search")],
    ):
        with pytest.raises(ConfigError, match=r"its own passages: use RAGSystem\.query"):
            ask()
    assert str(engine(system).synthesize(QueryBundle(QUESTION), []))
    for ask in (
        lambda: engine(system, mode="ensemble").synthesize(QueryBundle(QUESTION), []),
        lambda: answers.invoke({"question": QUESTION, "context": []}, mode="ensemble"),
    ):
        with pytest.raises(ConfigError, match=r"at least one; got .*use mode 'concatenated'"):
            ask()


@pytest.mark.parametrize(
    "module, library, extra",
    [
        ("llama_index", "llama_index", "llama-index"),
        ("langchain", "langchain_core", "langchain"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, module, library, extra):
    for name in [*sys.modules]:
        if name.split(".")[0] == library:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"fedrag_jax.integrations.{module}")
    with pytest.raises(ConfigError, match=rf"pip install 'fedrag-jax\[{extra}\]'"):
        importlib.import_module(f"fedrag_jax.integrations.{module}")


def test_the_package_imports_neither():
    code = (
        "import sys, fedrag_jax.integrations; "
        "assert not {'llama_index', 'langchain_core', 'jax'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
