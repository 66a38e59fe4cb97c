"""Benchmarks of the built-in world, and a system that runs them."""

import dataclasses
import json

import pytest
from asked import ASKED, GOLDS, PASSAGES, WORLD

from fedrag_jax.evaluation.benchmarks.benchmarker import Benchmarker
from fedrag_jax.rag import RAGSystem


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Questions of the built-in world as local sets: open, with four choices, and without an answer."""
    root = tmp_path_factory.mktemp("sets")
    shown = [e for e in WORLD.train if e.hops == 1][:6]
    for name in ("mmlu", "squad", "squad_v2"):
        with open(root / f"{name}.questions.jsonl", "w") as file:
            for i, e in enumerate([*ASKED, *shown]):
                others = dict.fromkeys(o.answers[0] for o in WORLD.test if o.answers != e.answers)
                choices = [*others][i : i + 3]
                choices.insert(i % 4, e.answers[0])
                row = {"id": e.id, "question": e.question, "positive_ids": e.positive_ids}
                row |= {"choices": choices, "answer": i % 4, "subject": f"topic {i % 2}"}
                side = ("test", "dev") if name == "mmlu" else ("validation", "train")
                row |= {"split": side[i >= len(ASKED)]}
                if name != "mmlu":
                    none = name == "squad_v2" and i % 3 == 0
                    row["answers"] = [] if none else e.answers
                file.write(json.dumps(row) + "\n")
        with open(root / f"{name}.passages.jsonl", "w") as file:
            held = GOLDS | {p for e in shown for p in e.positive_ids}
            for p in WORLD.passages:
                if p.id in held:
                    file.write(json.dumps(dataclasses.asdict(p)) + "\n")
    return root


@pytest.fixture(scope="session")
def system():
    return RAGSystem.build(PASSAGES, top_k=1)


@pytest.fixture(scope="session")
def run(system, folder):
    """`Benchmarker.run` on the sets of the world."""

    def run(name, at=None, using=system, batch_size=32, seed=0, **how):
        benchmarker = Benchmarker(using, at, batch_size=batch_size, seed=seed, progress=False)
        return benchmarker.run(name, source=folder, **how)

    return run
