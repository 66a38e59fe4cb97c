"""Client corpora: each passage goes to the client whose questions it answers."""

from collections.abc import Callable

import numpy as np

from fedrag_jax.data.examples import Example
from fedrag_jax.data.partition import Partition, Scheme, classes_of, values_of
from fedrag_jax.data.schemes import cut, redrawn, require_enough, require_positive
from fedrag_jax.errors import ConfigError, DataError

Pool = Callable[[Example], np.ndarray]  # the corpus rows, int [n], that an example may see


def following(questions: Partition, rest: str = "topic", min_examples: int = 1) -> Scheme:
    """Returns a scheme that gives each client the passages its questions are about.

        questions = partition(world.train, dirichlet(alpha=0.1, clients=8))
        passages = partition(world.passages, following(questions))

    A passage goes to the client that holds most of its questions; ties are broken at random.

    Args:
      questions: a partition of examples with `positive_ids`; its clients become the clients.
      rest: how to distribute passages that are gold for no question: "topic" distributes the passages
        of a topic in proportion to the clients' questions about it (evenly if there are none);
        "evenly" distributes all of them evenly.

    Raises:
      ConfigError: an unknown `rest`, or fewer passages than the clients need.
      DataError: no question has a gold passage, a gold passage is missing, or none of 100 draws gives
        every client `min_examples`.
    """
    require_positive(min_examples=min_examples)
    if rest not in ("topic", "evenly"):
        raise ConfigError(f"following: rest must be 'topic' or 'evenly', got {rest!r}")
    clients = len(questions.clients)

    def split(passages, seed):
        require_enough(passages, clients, min_examples)
        gold, asking, votes = _votes(questions, passages)
        spread = np.setdiff1d(np.arange(len(passages)), gold)
        shares = [np.full(clients, 1 / clients)]
        kinds = np.zeros(len(spread), int)
        if rest == "topic":
            topics, kind = classes_of(passages, "topic")
            shares, kinds = _askers(questions, topics.tolist()), kind[spread]

        def owners(rng):
            owner = np.empty(len(passages), int)
            # Of several clients written to one passage the last stays: that with most votes.
            order = np.lexsort((rng.random(len(votes)), votes))
            owner[gold[order]] = asking[order]
            for kind, share in enumerate(shares):
                rows = spread[kinds == kind]
                dealer = rng.permutation(clients)  # rounding favours no client number
                owner[rng.permutation(rows)] = np.repeat(dealer, cut(share[dealer], len(rows)))
            return owner

        remedy = "spread the rest 'evenly'"
        return redrawn(owners, clients, min_examples, seed, f"following(rest={rest!r})", remedy)

    return split


def own_passages(questions: Partition, passages: Partition) -> Pool:
    """Returns `pool(example)`: the corpus rows held by the client that holds the example.

    Objectives take it as their `pool`, so that a client trains only on its own passages.

    Raises:
      ConfigError: questions and passages are split over different numbers of clients.
      DataError: raised by the pool, for an example that no client holds.
    """
    if len(questions.clients) != len(passages.clients):
        raise ConfigError(
            f"questions are split over {len(questions.clients)} clients and passages over "
            f"{len(passages.clients)}; split them alike, such as with `following`"
        )
    ids = values_of(questions.examples, "id")
    holder = {ids[row]: client for client, held in enumerate(questions.clients) for row in held}

    def pool(example):
        if example.id not in holder:
            raise DataError(f"question {example.id!r} is with no client, so it has no passages")
        return passages.clients[holder[example.id]]

    return pool


def _votes(questions: Partition, passages) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gold passage (its row), client, and how many of the client's questions it is gold for: [V]."""
    row = {identifier: i for i, identifier in enumerate(values_of(passages, "id"))}
    golds = values_of(questions.examples, "positive_ids")
    pairs = []
    for client, held in enumerate(questions.clients):
        for question in held:
            for identifier in golds[question]:
                if identifier not in row:
                    raise DataError(
                        f"following: question {question} has positive id {identifier!r}, which none "
                        f"of the {len(row):,} passages has; give the whole corpus"
                    )
                pairs.append((row[identifier], client))
    if not pairs:
        raise DataError(
            "following: no question has positive_ids, so passages have none to follow; "
            "split them by themselves, such as with dirichlet"
        )
    pairs, votes = np.unique(pairs, axis=0, return_counts=True)
    return *pairs.T, votes


def _askers(questions: Partition, topics: list) -> np.ndarray:
    """Each client's share in the questions about a topic, [topics, K]; even where nobody asks."""
    asked, counts = questions.counts("topic")
    column = {topic: counts[:, i] for i, topic in enumerate(asked) if counts[:, i].any()}
    asking = np.array([column.get(topic, np.ones(len(counts))) for topic in topics])
    return asking / asking.sum(1, keepdims=True)
