"""Losses that tune the generator on retrieved passages.

`concatenated`: one prompt with the top-k passages (Lawton et al. 2025, Ft. Gen.).
`ralt`: one prompt per passage, losses summed (RA-DIT, arXiv 2310.01352, LM fine-tuning).
`closed_book`: no passage, the baseline that measures memorisation.
At k = 1 the first two are equal; at k = 0 the first equals the last.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from fedrag_jax.data.batching import Prompts
from fedrag_jax.generation.likelihood import answer_log_probs, tokens_read, weighted_mean
from fedrag_jax.models.network import Network
from fedrag_jax.objectives import costs
from fedrag_jax.objectives.task import PyTree, StepCost, Task


@dataclasses.dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood of the answer, summed over its tokens and its prompts.

    `trainable` or `frozen` hold `decoder` and `adapters` (None for an unadapted decoder).
    """

    decoder: Network

    def __call__(self, trainable, frozen, batch, rng):
        parts = frozen | trainable
        log_probs = answer_log_probs(self.decoder, parts["decoder"], parts["adapters"], batch)
        nll = -(log_probs * batch["answer_mask"][:, None]).sum((1, 2))
        tokens = jnp.maximum(batch["answer_mask"].sum(1), 1) * log_probs.shape[1]
        loss = weighted_mean(nll, batch["weight"])
        told = {"nll_per_token": nll / tokens, "tokens": tokens_read(batch)}
        return loss, {name: weighted_mean(x, batch["weight"]) for name, x in told.items()}

    def cost(self) -> StepCost:
        """The cost of a step."""
        return costs.declared(
            self,
            lambda: dataclasses.replace(self, decoder=self.decoder.unrolled()),
            lambda task, table: costs.trained_reading(self.decoder, table),
        )


def concatenated(
    decoder: Network, params: PyTree, adapters: PyTree, prompts: Prompts, rows
) -> Task:
    """Answer NLL given one prompt with all passages.

    Args:
      rows: `rows(examples) -> int [N, k]`: the passages of a frozen retriever.
    """
    task = _task("concatenated", decoder, params, adapters, prompts, rows, per_passage=False)
    return dataclasses.replace(task, label="generator: answer NLL")


def ralt(
    decoder: Network,
    params: PyTree,
    adapters: PyTree,
    prompts: Prompts,
    rows,
    *,
    packed: bool = False,
) -> Task:
    """L = -sum_j sum_i log p(y_i | c_j, x, y_<i): one prompt per passage c_j (RA-DIT, L(D_L)).

    Args:
      packed: put the k prompts of a question into one row of tokens, with less padding and more
        attention. The loss is the same unless passages are truncated (see `Prompts.training_width`).
        Packing is slower if passages have similar lengths, and on a CPU.
    """
    how = {"per_passage": True, "packed": packed}
    task = _task("ralt", decoder, params, adapters, prompts, rows, **how)
    return dataclasses.replace(task, label="generator: RALT")


def closed_book(decoder: Network, params: PyTree, adapters: PyTree, prompts: Prompts) -> Task:
    """Answer NLL given only the question."""

    def none(examples):
        return np.zeros((len(examples), 0), np.int32)

    return _task("closed_book", decoder, params, adapters, prompts, none, per_passage=False)


def _task(name, decoder, params, adapters, prompts, rows, **how) -> Task:
    loss = AnswerLoss(decoder)
    return Task(
        name=name,
        trainable={"adapters": adapters},
        frozen={"decoder": params},
        loss=loss,
        collate=lambda examples, _: prompts.training_table(examples, rows(examples), **how),
        cost=loss.cost(),
    )
