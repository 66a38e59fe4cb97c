"""The systems that both bridges make a part of a pipeline."""

import pytest
from bridged import PASSAGES, Counting

from fedrag_jax.rag import RAGSystem


@pytest.fixture(scope="session")
def system():
    return RAGSystem.build(
        PASSAGES, generator="builtin:citing", prompt_style="compact_cited", top_k=3
    )


@pytest.fixture
def over(system):
    store = Counting(system.retriever.vectors.shape[1])
    store.add(PASSAGES, system.embed(PASSAGES))
    return system.over(store)


@pytest.fixture(params=["corpus", "store"])
def either(request, system):
    return system if request.param == "corpus" else request.getfixturevalue("over")
