"""Citing, then answering: the training step of ALoFTRAG (Devine, 2501.11929, section 3.5).

    Q + D_1 ... D_n  ->  the numbers of the passages that hold the answer, then the answer

The prompt has numbered passages in random order; the loss covers only the target.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.citations import UNKNOWN, cite
from fedrag_jax.data.examples import Example
from fedrag_jax.errors import DataError
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.generator import AnswerLoss
from fedrag_jax.objectives.task import PyTree, Task


class Context(NamedTuple):
    """The passages of a question's prompt.

    Attributes:
      rows: int [n] corpus rows, in reading order.
      cites: numbers of the passages to cite, from 1; empty if none answers the question.
    """

    rows: np.ndarray
    cites: tuple[int, ...]


def citing(
    decoder: Network,
    params: PyTree,
    adapters: PyTree,
    prompts: Prompts,
    examples: Sequence[Example],
    contexts: Mapping[str, Context],
    unanswerable: str = UNKNOWN,
) -> Task:
    """NLL of citation and answer given one prompt with the passages of a context.

    Args:
      examples: all training examples.
      contexts: context of each example by its id, all of the same length.
      unanswerable: the answer if nothing is to be cited.

    Raises:
      ConfigError: a prompt style without numbers or without a mark after them.
      DataError: an example without a context.
    """

    prompts.require_citing()
    missing = [e.id for e in examples if e.id not in contexts]
    if missing:
        raise DataError(
            f"citing: question {missing[0]!r} and {len(missing) - 1} others lack a context"
        )

    def answered(example: Example) -> Example:
        if contexts[example.id].cites:
            return example
        return Example(example.id, example.question, (unanswerable,), ())

    targets = {e.id: answered(e) for e in examples}
    citations = {e.id: cite(contexts[e.id].cites) for e in examples}
    prompts = prompts.wide_enough_for(
        [*targets.values()], [*citations.values()], [contexts[e.id].rows for e in examples]
    )

    def collate(some, _):
        return prompts.training_table(
            [targets[e.id] for e in some],
            np.stack([contexts[e.id].rows for e in some]),
            per_passage=False,
            reasoning=[citations[e.id] for e in some],
        )

    loss, trainable = AnswerLoss(decoder), {"adapters": adapters}
    return Task("citing", trainable, {"decoder": params}, loss, collate, cost=loss.cost())
