"""`fedrag` as it is installed: help that imports little, and `fedrag serve` as a process."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from documents import FEDRAG, QUESTIONS

from fedrag_jax.rag import RAGSystem


def test_help_is_quick_and_imports_little():
    code = (
        "import sys\nfrom fedrag_jax.cli.command_line import parser\nparser().format_help()\n"
        "assert not {'jax', 'transformers', 'faiss'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_service_answers_and_stops(system):
    command = [*FEDRAG, "serve", str(system), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    try:
        line = process.stderr.readline()
        assert line.startswith("serving fedrag at http://127.0.0.1:"), line
        address = line.split()[-1]
        body = {"messages": [{"role": "user", "content": QUESTIONS[0].question}]}
        request = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(body).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer = json.loads(reply.read())["choices"][0]["message"]["content"]
        assert answer == RAGSystem.load(system).query(QUESTIONS[0].question).answer
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
