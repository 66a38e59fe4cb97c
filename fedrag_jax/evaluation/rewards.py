"""What a rollout is worth: answers, form, and what its searches found."""

import dataclasses
from collections.abc import Callable

from fedrag_jax.data.examples import Example
from fedrag_jax.evaluation.metrics import exact_match, f1
from fedrag_jax.generation.rollouts import TAGS, Rollout, Tags
from fedrag_jax.objectives.policy_task import Reward


@dataclasses.dataclass(frozen=True)
class F1WithForm:
    """ReSearch's (2503.19470): the F1 of an answer in good form, `floor` where that is 0; else 0.

    Yes and no share no word with anything but themselves.
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
    """Search-R1's with form (2503.09516, version 0.3): 1 for a right answer in good form, `loose` for
    one that is not, `form` for good form alone; else 0."""

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
    """Another reward and `bonus` where an answer stands in what the searches of the rollout found.

    Attributes:
      text: gives the text of a found part's tokens.
    """

    reward: Reward
    text: Callable[..., str]
    bonus: float = 0.1

    def __call__(self, example: Example, rollout: Rollout) -> float:
        found = " ".join(self.text(p.tokens) for p in rollout.parts if not p.written).lower()
        there = any(answer.lower() in found for answer in example.answers if answer.strip())
        return self.reward(example, rollout) + self.bonus * there


@dataclasses.dataclass(frozen=True)
class WithCost:
    """Another reward less `cost` for every search, and no less than 0."""

    reward: Reward
    cost: float = 0.02

    def __call__(self, example: Example, rollout: Rollout) -> float:
        return max(self.reward(example, rollout) - self.cost * len(rollout.queries), 0.0)
