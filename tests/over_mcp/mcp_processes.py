"""Processes that speak MCP, stores that ask them, and what a system of ours is asked."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

from fedrag_jax.data import synthetic
from fedrag_jax.retrieval.stores.mcp import MCPStore

FOREIGN = [sys.executable, str(pathlib.Path(__file__).with_name("foreign_mcp.py"))]
WORLD = synthetic.generate(synthetic.WorldConfig())
PASSAGES = WORLD.passages[:24]
HELD = {p.id for p in PASSAGES}
QUESTIONS = [e.question for e in WORLD.test if {*e.positive_ids} <= HELD]


def started(tool, **how):
    return MCPStore(tool, **{"command": FOREIGN, "question": "query", "k": None} | how)


def texts(found):
    return [[f.passage.text for f in some] for some in found]


def ended(pid, within=10.0):
    """Whether a process is gone, and no zombie of it is left."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(*command, **how):
    child = subprocess.Popen(command, text=True, **how)
    try:
        yield child
    finally:
        child.kill()
        child.communicate(timeout=10)


def wait_for(port):
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise TimeoutError(port)
