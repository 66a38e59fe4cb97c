"""One foreign server and one system for all that asks them."""

import functools
import subprocess

import pytest
from mcp_processes import FOREIGN, PASSAGES, free_port, process, wait_for

from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.mcp import MCPStore


@pytest.fixture(scope="session")
def foreign():
    """Stores that ask one server, over HTTP."""
    port = free_port()
    with process(*FOREIGN, str(port), stderr=subprocess.DEVNULL):
        wait_for(port)
        url = f"http://127.0.0.1:{port}/mcp"
        yield functools.partial(MCPStore, url=url, question="query", k=None)


@pytest.fixture(scope="session")
def system():
    return RAGSystem.build(PASSAGES, top_k=3)
