"""A generator that learns to search in the passages of a system, by policy gradients."""

from collections.abc import Callable

import numpy as np

from fedrag_jax.data.examples import Dataset, reading_text
from fedrag_jax.evaluation.rewards import F1WithForm
from fedrag_jax.generation.rollouts import TAGS, Tags
from fedrag_jax.objectives.policy_task import Reward, Rolling, policy
from fedrag_jax.objectives.task import Task
from fedrag_jax.rag import RAGSystem

INSTRUCTION = (
    "Answer the question. Think first. To look something up, write {open}query{close}; what is found "
    "follows. When you know enough, write {answer}the answer in as few words as possible{end}.\n"
    "Question: {question}\n"
)


def search_policy(
    system: RAGSystem,
    dataset: Dataset,
    reward: Reward | None = None,
    *,
    passages: int = 1,
    instruction: str = INSTRUCTION,
    **options,
) -> Task:
    """The task of training a system's adapters to search and to answer, see `objectives.policy_task`.

    Args:
      reward: of a rollout; ReSearch's unless given.
      passages: that a search finds.
      instruction: what a rollout begins with, with {question} and, in a model's words, the tags.
      options: of `Rolling` and of `policy`.

    Raises:
      ConfigError: as these.
    """
    own = {name: options.pop(name) for name in [*options] if name in Rolling.__dataclass_fields__}
    tags = own.setdefault("tags", TAGS)
    rolling = Rolling(
        system.prompts.tokenizer,
        prompt=lambda question: _prompt(system, instruction, tags, question),
        search=searched_in(system, passages),
        reward=F1WithForm(tags) if reward is None else reward,
        stop_tokens=system.writer.stop_tokens,
        **own,
    )
    parts = system.decoder, system.generator.params, system.adapters
    return policy(*parts, rolling, dataset.train, **options)


def searched_in(system: RAGSystem, k: int) -> Callable[[list[str]], list[str]]:
    """Gives the texts of the k passages that a system finds for each query, one a line; nothing for
    nothing."""

    def search(queries: list[str]) -> list[str]:
        asked = [query for query in queries if query.strip()]
        found = iter(system.retrieve(asked, k) if asked else ())
        return [
            "\n".join(reading_text(f.passage) for f in next(found)) if query.strip() else ""
            for query in queries
        ]

    return search


def _prompt(system: RAGSystem, instruction: str, tags: Tags, question: str) -> np.ndarray:
    (opening, closing), (answer, end) = tags.search, tags.answer
    marks = {"open": opening, "close": closing, "answer": answer, "end": end}
    text = instruction.format(question=question, **marks)
    return np.array(system.prompts.tokenizer(text)["input_ids"], np.int32)
