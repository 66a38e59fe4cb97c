"""Rewards of rollouts: for answers, for the format, and for searches."""

import dataclasses
from collections.abc import Callable, Sequence

from fedrag_jax.data.examples import Example
from fedrag_jax.evaluation.metrics import exact_match, f1
from fedrag_jax.evaluation.rankings import answer_recall_at_k
from fedrag_jax.generation.rollouts import TAGS, Rollout, Tags
from fedrag_jax.objectives.policy_task import Reward


@dataclasses.dataclass(frozen=True)
class F1WithForm:
    """The reward of ReSearch (2503.19470): F1 of a well-formed answer, `floor` if F1 is 0; else 0.

    Yes and no match only themselves.
    """

    tags: Tags = TAGS
    floor: float = 0.1

    def __call__(self, example: Example, rollout: Rollout) -> float:
        if not rollout.well_formed(self.tags):
            return 0.0
        overlap = f1(rollout.answer(self.tags), example.answers, rule="hotpotqa")
        return overlap if overlap > 0 else self.floor


@dataclasses.dataclass(frozen=True)
class ExactWithForm:
    """The reward of Search-R1 with format (2503.09516, version 0.3): 1 for a correct well-formed
    answer, `loose` for a correct malformed one, `form` for a wrong well-formed one; else 0."""

    tags: Tags = TAGS
    loose: float = 0.8
    form: float = 0.2

    def __call__(self, example: Example, rollout: Rollout) -> float:
        answer = rollout.answer(self.tags)
        right = bool(answer) and exact_match(answer, example.answers)
        if rollout.well_formed(self.tags):
            return 1.0 if right else self.form
        return self.loose if right else 0.0


@dataclasses.dataclass(frozen=True)
class WithRetrieval:
    """Adds `bonus` to another reward if the searches of the rollout found an answer, as whole words.

    Attributes:
      text: function that returns the text of a retrieved part's tokens.
      ending: function that returns the tokens that end a retrieved part whatever was found, such as
        the question, which may have an answer in it (`searching.Spelled.ending`); default: none.
    """

    reward: Reward
    text: Callable[..., str]
    bonus: float = 0.1
    ending: Callable[[str], Sequence[int]] = lambda question: ()

    def __call__(self, example: Example, rollout: Rollout) -> float:
        rest = len(self.ending(example.question))
        parts = [p.tokens for p in rollout.parts if not p.written]
        found = " ".join(self.text(tokens[: max(len(tokens) - rest, 0)]) for tokens in parts)
        (there,) = answer_recall_at_k([[0]], [found], [example.answers], 1)
        return self.reward(example, rollout) + self.bonus * float(there)


@dataclasses.dataclass(frozen=True)
class WithCost:
    """Subtracts `cost` per search from another reward, down to 0; a reward below 0 stays as it is."""

    reward: Reward
    cost: float = 0.02

    def __call__(self, example: Example, rollout: Rollout) -> float:
        reward = self.reward(example, rollout)
        return max(reward - self.cost * len(rollout.queries), min(reward, 0.0))
