"""The policy-gradient task: rollouts of the current model become the table of a round.

The rollouts of a question are written in the retrieval step, between compiled rounds, by the current
global model. With `refresh_every=1` each round trains on its own rollouts. The questions of a federated
client are rolled out by the round's global model.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.clock import Clock, Spent
from fedrag_jax.data.examples import Example
from fedrag_jax.data.seeds import key_of
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.generation.rollouts import SEARCHING, Rollout, Searching
from fedrag_jax.generation.searching import Search, roll_out
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.policy import PolicyLoss, group_advantages
from fedrag_jax.objectives.task import PyTree, Task

_AT_ONCE = 64  # rollouts written together
# Numbers of a packed rollout that come before its tokens.
_HEAD = ("prompt", "length", "searches", "well_formed", "reward")


class Reward(Protocol):
    """Computes the reward of a rollout."""

    def __call__(self, example: Example, rollout: Rollout, /) -> float: ...


@dataclasses.dataclass(frozen=True)
class Rolling:
    """The settings of rollouts.

    Attributes:
      tokenizer: the generator's tokenizer.
      search: `search(queries, examples)` returns the text found for each query of an example's rollout.
      reward: the reward of a rollout.
      searching: prompts, tags and budget.
      group: G, rollouts per question.
      stop_tokens, temperature, top_p: as in `roll_out`.
      seed: random seed; the draws differ between retrievals.
      masked: whether retrieved tokens are masked from the loss; otherwise the policy is also trained to
        write them (the ablation of Search-R1).

    Raises:
      ConfigError: fewer than one rollout.
    """

    tokenizer: Any
    search: Callable[[list[str], list[Example]], list[str]]
    reward: Reward
    searching: Searching = SEARCHING
    group: int = 5
    stop_tokens: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    masked: bool = True

    def __post_init__(self):
        if self.group < 1:
            raise ConfigError(f"a group needs at least one rollout, got {self.group}")

    def prompt(self, question: str) -> np.ndarray:
        """Returns the prompt's tokens, int32 [T]."""
        return self.searching.prompt(self.tokenizer, question)

    def searched_for(self, examples: Sequence[Example]) -> Search:
        """Returns the search of the rollouts of examples, as `roll_out` takes it."""
        return lambda queries, numbers: self.search(queries, [examples[n] for n in numbers])

    @property
    def learned(self) -> int:
        """Maximum number of tokens of a rollout that count in the loss."""
        turns, written, found = self.searching.budget
        return (turns + 1) * written + (0 if self.masked else turns * found)

    def width(self, examples: Sequence[Example]) -> int:
        """Returns the maximum number of tokens of a rollout."""
        turns, written, found = self.searching.budget
        longest = max(len(self.prompt(e.question)) for e in examples)
        return longest + (turns + 1) * written + turns * found

    def rollouts(
        self, network: Network, params, adapters, examples: Sequence[Example], time: int
    ) -> list[list[Rollout]]:
        """Returns G rollouts of each example, with the random draws of a retrieval number."""
        asked = [e for e in examples for _ in range(self.group)]
        prompts = [self.prompt(e.question) for e in asked]
        key = jax.random.fold_in(key_of(self.seed), time)
        found: list[Rollout] = []
        for start in range(0, len(prompts), _AT_ONCE):
            some = range(len(prompts))[start : start + _AT_ONCE]
            filled = [*some, *[some[-1]] * (min(_AT_ONCE, len(prompts)) - len(some))]
            written = roll_out(
                network, params, adapters, self.tokenizer, [prompts[i] for i in filled],
                self.searched_for([asked[i] for i in filled]),
                questions=[asked[i].question for i in filled], tags=self.searching.tags,
                budget=self.searching.budget, stop_tokens=self.stop_tokens,
                temperature=self.temperature, top_p=self.top_p, key=key,
                rows=range(start, start + len(filled)),
            )  # fmt: skip
            found += written[: len(some)]
        return [found[i : i + self.group] for i in range(0, len(found), self.group)]


def policy(
    decoder: Network,
    params: PyTree,
    adapters: PyTree,
    rolling: Rolling,
    examples: Sequence[Example],
    *,
    reference: PyTree | None = None,
    scaled: bool = True,
    **loss,
) -> Task:
    """Returns the task that trains adapters by policy gradients; use `refresh_every=1` in `fit`.

    Args:
      examples: all training examples; they determine the width of the table. Longer questions, which
        may be held out, get a table of their own width.
      reference: adapters of the reference policy for the KL penalty; default: the initial adapters.
      scaled: as in `group_advantages`.
      loss: settings of `PolicyLoss`.

    Raises:
      ConfigError: as `PolicyLoss`.
    """
    policy_loss, spent = PolicyLoss(decoder, **loss), Spent()
    reference = adapters if reference is None else reference
    width = rolling.width(examples)

    def retrieve(some, trained, index):
        clock, time = Clock(), int(index["time"])
        base = trained.get("decoder", params)  # of an algorithm that changes it
        groups = rolling.rollouts(decoder, base, trained["adapters"], some, time)
        room = max(width, rolling.width(some))
        packed = np.stack(
            [
                [
                    _packed(rollout, rolling, rolling.reward(example, rollout), room)
                    for rollout in group
                ]
                for example, group in zip(some, groups, strict=True)
            ]
        )
        if not rolling.masked:
            packed = _all_written(decoder, base, trained["adapters"], packed, rolling)
        spent.searching += clock.lap().others
        return packed, {"time": np.asarray(time + 1)}

    def collate(some, packed):
        table = _table(packed, rolling.learned, scaled)
        if policy_loss.kl:
            table["reference_log_probs"] = _log_probs(decoder, params, reference, table)
        return table

    return Task(
        name="policy" if rolling.masked else "policy_unmasked",
        trainable={"adapters": adapters},
        frozen={"decoder": params},
        loss=policy_loss,
        collate=collate,
        retrieve=retrieve,
        index={"time": np.asarray(0)},
        coupled=policy_loss.aggregation == "token",
        label="policy gradients" + ("" if rolling.masked else ", nothing masked"),
        spent=spent,
        judged="reward",
    )


def rollout_table(
    groups: Sequence[Sequence[Rollout]], rolling: Rolling, width: int
) -> dict[str, np.ndarray]:
    """Returns the columns of `PolicyLoss` for rollouts [N][G] without rewards."""
    packed = np.stack([[_packed(r, rolling, 0.0, width) for r in group] for group in groups])
    return _table(packed, rolling.learned, scaled=True)


def _packed(rollout: Rollout, rolling: Rolling, reward: float, width: int) -> np.ndarray:
    """Packs a rollout into int32 [5 + 3 width], so that it can be stored like retrieved rows: `_HEAD`,
    its tokens, whether each was written, and log-probabilities; floats are stored as bits."""
    tokens = np.concatenate([rollout.prompt, *(part.tokens for part in rollout.parts)])
    own = [np.full(len(part.tokens), part.written) for part in rollout.parts]
    log_probs = [np.zeros(len(rollout.prompt)), *(part.log_probs for part in rollout.parts)]
    head = [
        len(rollout.prompt),
        len(tokens),
        len(rollout.queries),
        rollout.well_formed(rolling.searching.tags),
        np.float32(reward).view(np.int32),
    ]
    columns = np.zeros((3, width), np.int32)
    columns[0, : len(tokens)] = tokens
    columns[1, len(rollout.prompt) : len(tokens)] = np.concatenate(own)
    columns[2, : len(tokens)] = np.concatenate(log_probs).astype(np.float32).view(np.int32)
    return np.concatenate([np.array(head, np.int32), columns.ravel()])


def _columns(packed: np.ndarray) -> np.ndarray:
    """Returns a view [N, G, 3, width] of packed rollouts, without the head."""
    return packed[..., len(_HEAD) :].reshape(*packed.shape[:2], 3, -1)


def _table(packed: np.ndarray, most: int, scaled: bool) -> dict[str, np.ndarray]:
    """Returns the columns of `PolicyLoss` from packed rollouts int32 [N, G, 5 + 3 width].

    Args:
      most: maximum tokens that a rollout writes.
    """
    head = dict(zip(_HEAD, np.moveaxis(packed[..., : len(_HEAD)], -1, 0), strict=True))
    tokens, own, bits = np.moveaxis(_columns(packed), 2, 0)
    log_probs = np.ascontiguousarray(bits).view(np.float32)
    # The places of written tokens first, in order; what is left over points at the second token.
    order = np.argsort(own == 0, axis=-1, kind="stable")[..., :most]
    written = np.take_along_axis(own, order, -1).astype(np.float32)
    rewards = np.ascontiguousarray(head["reward"]).view(np.float32)
    told = {
        "reward": rewards.mean(-1),
        "no_variance": np.ptp(rewards, axis=-1) == 0,
        "malformed": 1 - head["well_formed"].mean(-1),
        "searches": head["searches"].mean(-1),
        "written_tokens": written.sum(-1).mean(-1),
    }
    return {
        "tokens": tokens,
        "lengths": head["length"],
        "answer_positions": np.where(written > 0, order, 1).astype(np.int32),
        "written": written,
        "old_log_probs": np.where(
            written > 0, np.take_along_axis(log_probs, order, -1), 0.0
        ).astype(np.float32),
        "advantages": group_advantages(rewards, scaled),
    } | {name: column.astype(np.float32) for name, column in told.items()}


def _all_written(
    decoder: Network, params, adapters, packed: np.ndarray, rolling: Rolling
) -> np.ndarray:
    """Returns packed rollouts as if the policy had written the retrieved tokens, with its
    probabilities."""
    packed = packed.copy()
    columns = _columns(packed)
    head = dict(zip(_HEAD, np.moveaxis(packed[..., : len(_HEAD)], -1, 0), strict=True))
    places = np.arange(columns.shape[-1])
    columns[:, :, 1] = (places >= head["prompt"][..., None]) & (places < head["length"][..., None])
    table = _table(packed, rolling.learned, scaled=True)
    log_probs = _log_probs(decoder, params, adapters, table)
    i, g, a = np.nonzero(table["written"])
    columns[i, g, 2, table["answer_positions"][i, g, a]] = log_probs[i, g, a].view(np.int32)
    return packed


@functools.partial(jax.jit, static_argnums=0)
def _of_batch(decoder, params, adapters, batch):
    return answer_log_probs(decoder, params, adapters, batch)


def _log_probs(decoder: Network, params, adapters, table) -> np.ndarray:
    """Returns log-probabilities [N, G, A] of the written tokens, question by question."""
    names = "tokens", "lengths", "answer_positions"
    found = [
        _of_batch(decoder, params, adapters, {n: jnp.asarray(table[n][i : i + 1]) for n in names})
        for i in range(len(table["tokens"]))
    ]
    return np.concatenate(jax.device_get(found))
