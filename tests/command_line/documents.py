"""Documents to index, questions about them, and what commands print."""

import json
import pathlib
import sys

from fedrag_jax.data import synthetic
from fedrag_jax.rag import RAGSystem

WORLD = synthetic.generate(synthetic.WorldConfig())
PASSAGES = WORLD.passages[:60]
HELD = {p.id for p in PASSAGES}
QUESTIONS = [e for e in [*WORLD.train, *WORLD.validation, *WORLD.test] if {*e.positive_ids} <= HELD]
FEDRAG = (
    sys.executable,
    "-c",
    "import sys; from fedrag_jax.cli.command_line import main; sys.exit(main(sys.argv[1:]))",
)


def write_documents(folder: pathlib.Path, passages=PASSAGES) -> pathlib.Path:
    """A file for each of the first, the others in one of JSON lines."""
    folder.mkdir()
    for p in passages[:20]:
        (folder / f"{p.id}.txt").write_text(p.text)
    lines = (json.dumps({"id": p.id, "title": p.title, "text": p.text}) for p in passages[20:])
    (folder / "more.jsonl").write_text("\n".join(lines))
    return folder


def write_questions(path: pathlib.Path, system: pathlib.Path) -> pathlib.Path:
    """Those of the world, with the ids that the index gave their passages."""
    ids = {p.id.split(":")[-1].split(".txt")[0].split("#")[0]: p.id
           for p in RAGSystem.load(system).store.passages()}  # fmt: skip
    with open(path, "w") as file:
        for i, e in enumerate(QUESTIONS):
            row = {"id": e.id, "question": e.question, "answers": e.answers, "topic": e.topic}
            row["positive_ids"] = [ids[p] for p in e.positive_ids]
            row["split"] = ("train", "train", "validation", "test")[i % 4]
            file.write(json.dumps(row) + "\n")
    return path


def told(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
