"""The warm-up of a search policy: it teaches the format of rollouts, but no correct answers."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fedrag_jax.data.examples import Example
from fedrag_jax.generation.likelihood import answer_log_probs, tokens_read, weighted_mean
from fedrag_jax.generation.scripted import scripted
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.policy import aggregated
from fedrag_jax.objectives.policy_task import Rolling, rollout_table
from fedrag_jax.objectives.task import PyTree, Task


@dataclasses.dataclass(frozen=True)
class FormatLoss:
    """-mean log p(y_t) over the written tokens of a table of scripts.

    `trainable` or `frozen` hold `decoder` and `adapters`; a batch holds the columns of `PolicyLoss`.
    """

    decoder: Network

    def __call__(self, trainable, frozen, batch, rng):
        parts = frozen | trainable
        log_probs = answer_log_probs(self.decoder, parts["decoder"], parts["adapters"], batch)
        loss = -aggregated(log_probs, batch["written"], batch["weight"], "token")
        return loss, {"tokens": weighted_mean(tokens_read(batch), batch["weight"])}


def search_format(
    decoder: Network,
    params: PyTree,
    adapters: PyTree,
    rolling: Rolling,
    read: Callable[[Sequence[Example], list[list[str]]], list[str]],
    examples: Sequence[Example],
) -> Task:
    """Returns the task of imitating scripts (`generation.scripted`), one per question.

    Args:
      read: function that returns the model's answer to each example from the results of its queries.
      examples: all training examples; they determine the width of the table. Longer questions, which
        may be held out, get a table of their own width.
    """
    width = rolling.width(examples)

    def collate(some, retrieved):
        rng = np.random.default_rng(rolling.seed)
        scripts = scripted(
            [e.question for e in some], rolling.tokenizer, rolling.searching,
            rolling.searched_for(some), lambda queries: read(some, queries), rng,
        )  # fmt: skip
        room = max(width, rolling.width(some))
        return rollout_table([[script] for script in scripts], rolling, room)

    return Task(
        name="search_format",
        trainable={"adapters": adapters},
        frozen={"decoder": params},
        loss=FormatLoss(decoder),
        collate=collate,
        coupled=True,
        label="form of searches",
    )
