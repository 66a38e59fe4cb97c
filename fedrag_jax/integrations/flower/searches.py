"""A run that searches the parties for questions in a file, in place of training."""

import pathlib
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid

from fedrag_jax.files import read_json, write_json
from fedrag_jax.integrations.flower.parties_store import PartiesStore, Searched
from fedrag_jax.integrations.flower.systems import server_system

ASKED, FOUND = "questions.json", "found.json"


def search_parties(grid: Grid, context: Context) -> None:
    """Searches for the questions of `questions.json` in the folder `search` of the run's configuration.

    Writes `found.json` there: the passages of each question with their parties, who answered, who
    refused and why, and bytes as they were sent.

    Raises:
      StoreUnreachable: no party answers.
    """
    config: Any = context.run_config
    folder = pathlib.Path(config["search"])
    questions = read_json(folder / ASKED)
    retriever = server_system(context).retriever
    store = PartiesStore(grid, retriever, config["clients"], config["patience"])
    searched = store.ask(retriever.embed_questions(questions), config["top-k"])
    write_json(folder / FOUND, told(questions, searched), indent=2)


def told(questions: list[str], searched: Searched) -> dict[str, Any]:
    """A search as JSON types."""
    return {
        "found": [
            {
                "question": question,
                "passages": [
                    {"score": f.score, "parties": parties, "id": f.passage.id,
                     "title": f.passage.title, "text": f.passage.text}
                    for f, parties in zip(found, holders, strict=True)
                ],
            }
            for question, found, holders in zip(
                questions, searched.found, searched.holders, strict=True
            )
        ],
        "answered": searched.answered,
        "refused": searched.refused,
        "bytes_down": sum(searched.down.values()),
        "bytes_up": sum(searched.up.values()),
        "traffic": {"down": searched.down, "up": searched.up},
    }  # fmt: skip
