"""Training a generator to search the passages of a system: warm-up, then policy gradients.

`search_form` and `learn_to_search` are tasks of strategies, as `strategies.strategies` has them.
"""

from fedrag_jax.data.examples import Dataset
from fedrag_jax.evaluation.rewards import F1WithForm, WithCost, WithRetrieval
from fedrag_jax.objectives.policy_task import Reward, Rolling, policy
from fedrag_jax.objectives.search_format import search_format
from fedrag_jax.objectives.task import Task
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.looking_up import Looking
from fedrag_jax.strategies.strategy import Tasks


def search_policy(
    system: RAGSystem, dataset: Dataset, reward: Reward | None = None, **options
) -> Task:
    """Returns the task that trains a system's adapters to search and answer, see
    `objectives.policy_task`.

    Args:
      reward: reward of a rollout; default: that of ReSearch.
      options: options of `Rolling` and of `policy`.

    Raises:
      ConfigError: as `Rolling` and `policy`.
    """
    own = {name: options.pop(name) for name in [*options] if name in Rolling.__dataclass_fields__}
    rolling = rolling_of(system, reward, **own)
    return policy(*_parts(system), rolling, dataset.train, **options)


def search_warm_up(system: RAGSystem, dataset: Dataset, **options) -> Task:
    """Returns the task that trains a system's adapters to write in the format of rollouts, see
    `objectives.search_format`.

    Args:
      options: options of `Rolling`.
    """
    rolling = rolling_of(system, **options)

    def read(questions, queries):
        found = [
            [f.passage for query in some for f in rolling.search.found.get(query, ())]
            for some in queries
        ]
        return system.answer(questions, found)

    return search_format(*_parts(system), rolling, read, dataset.train)


def search_form(system: RAGSystem, dataset: Dataset, seed: int = 0) -> Tasks:
    """The warm-up alone."""
    return system.replace(**(yield search_warm_up(system, dataset, seed=seed)))


def learn_to_search(
    system: RAGSystem,
    dataset: Dataset,
    seed: int = 0,
    bonus: float = 0.0,
    cost: float = 0.0,
    **options,
) -> Tasks:
    """The warm-up, then policy gradients.

    Args:
      bonus: reward for searches that found the answer, whatever the model answers.
      cost: reward subtracted per search.
      options: options of `search_policy`.
    """
    system = yield from search_form(system, dataset, seed)
    found = WithRetrieval(F1WithForm(system.searching.tags), system.prompts.tokenizer.decode, bonus)
    reward = WithCost(found, cost)
    return system.replace(**(yield search_policy(system, dataset, reward, seed=seed, **options)))


def rolling_of(system: RAGSystem, reward: Reward | None = None, **options) -> Rolling:
    """Returns the rollout settings of a system over its own passages.

    Args:
      reward, options: as in `search_policy`; options of `Rolling`.
    """
    searching = options.setdefault("searching", system.searching)
    return Rolling(
        system.prompts.tokenizer,
        search=Looking(system.retrieve, searching),
        reward=F1WithForm(searching.tags) if reward is None else reward,
        stop_tokens=system.writer.stop_tokens,
        **options,
    )


def _parts(system: RAGSystem):
    return system.decoder, system.generator.params, system.adapters
