"""Training a generator to search the passages of a system: warm-up, then policy gradients.

`search_form` and `learn_to_search` are tasks of strategies, as `strategies.strategies` has them.
"""

import dataclasses

from fedrag_jax.data.corpora import Pool
from fedrag_jax.data.examples import Dataset
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.rewards import F1WithForm, WithCost, WithRetrieval
from fedrag_jax.generation.rollouts import Searching
from fedrag_jax.generation.searching import Spelled
from fedrag_jax.objectives.policy_task import Reward, Rolling, policy
from fedrag_jax.objectives.search_format import search_format
from fedrag_jax.objectives.task import Task
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.looking_up import Looking, require_bare
from fedrag_jax.retrieval.stores.passage_source import found_in
from fedrag_jax.strategies.strategy import Tasks


def search_policy(
    system: RAGSystem, dataset: Dataset, reward: Reward | None = None, **options
) -> Task:
    """Returns the task that trains a system's adapters to search and answer, see
    `objectives.policy_task`.

    Args:
      reward: reward of a rollout; default: that of ReSearch.
      options: options of `rolling_of` and of `policy`.

    Raises:
      ConfigError: as `rolling_of` and `policy`.
    """
    names = {"pool", *Rolling.__dataclass_fields__}
    own = {name: options.pop(name) for name in names & options.keys()}
    rolling = rolling_of(system, reward, **own)
    return policy(*_parts(system), rolling, dataset.train, **options)


def search_warm_up(system: RAGSystem, dataset: Dataset, **options) -> Task:
    """Returns the task that trains a system's adapters to write in the format of rollouts, see
    `objectives.search_format`.

    Args:
      options: options of `rolling_of`.
    """
    rolling = rolling_of(system, **options)

    def read(examples, queries):
        found = [
            [f.passage for query in asked for f in rolling.search.found(query, example)]
            for example, asked in zip(examples, queries, strict=True)
        ]
        return system.answer([e.question for e in examples], found)

    return search_format(*_parts(system), rolling, read, dataset.train)


def search_form(
    system: RAGSystem, dataset: Dataset, seed: int = 0, pool: Pool | None = None
) -> Tasks:
    """The warm-up alone; `pool` is that of `rolling_of`."""
    return system.replace(**(yield search_warm_up(system, dataset, seed=seed, pool=pool)))


def learn_to_search(
    system: RAGSystem,
    dataset: Dataset,
    seed: int = 0,
    bonus: float = 0.0,
    cost: float = 0.0,
    pool: Pool | None = None,
    searching: Searching | None = None,
    reward: Reward | None = None,
    **options,
) -> Tasks:
    """The warm-up, then policy gradients.

    Args:
      bonus: reward for searches that found the answer, whatever the model answers.
      cost: reward subtracted per search.
      pool: as in `rolling_of`.
      searching: the format of both, and of the returned system; default: the system's.
      reward: reward to which `bonus` and `cost` are applied; default: that of ReSearch.
      options: other options of `search_policy`.
    """
    system = dataclasses.replace(system, searching=searching or system.searching)
    system = yield from search_form(system, dataset, seed, pool)
    reward = F1WithForm(system.searching.tags) if reward is None else reward
    tokenizer, searching = system.prompts.tokenizer, system.searching
    spelled = Spelled(tokenizer, searching.tags, searching.budget.found)
    reward = WithCost(WithRetrieval(reward, tokenizer.decode, bonus, spelled.ending), cost)
    task = search_policy(system, dataset, reward, seed=seed, pool=pool, **options)
    return system.replace(**(yield task))


def rolling_of(
    system: RAGSystem, reward: Reward | None = None, pool: Pool | None = None, **options
) -> Rolling:
    """Returns the rollout settings of a system over its own passages.

    Args:
      reward: as in `search_policy`.
      pool: `pool(example)`: the corpus rows that the searches of an example may find, if passages stay
        with their clients (`data.corpora.own_passages`); default: all.
      options: other options of `Rolling`; its tokenizer and its search are the system's.

    Raises:
      ConfigError: a tokenizer or a search; a system prompt, which searching ignores; a pool for a
        system that answers from a store; as `Rolling`.
    """
    require_bare(system.prompts.system)
    if given := sorted({"tokenizer", "search"} & options.keys()):
        raise ConfigError(
            f"rollouts of a system use its own tokenizer and search, so leave out {given}; to choose "
            "them, make a `Rolling` and give it to `objectives.policy_task.policy`"
        )
    if pool and system.store is not None:
        raise ConfigError(
            "a pool has rows of the system's own index, but this system answers from a store "
            f"({system.store.kind}): leave out the pool, or use a system without a store"
        )

    def within(questions, k, pools):
        rows, scores = system.retriever.search_within(questions, pools, k)
        return found_in(system.retriever.passages, rows, scores)

    searching = options.setdefault("searching", system.searching)
    options.setdefault("stop_tokens", system.writer.stop_tokens)
    return Rolling(
        system.prompts.tokenizer,
        search=Looking(within if pool else system.retrieve, searching, pool),
        reward=F1WithForm(searching.tags) if reward is None else reward,
        **options,
    )


def _parts(system: RAGSystem):
    return system.decoder, system.generator.params, system.adapters
