"""Generators that are asked about texts, one question each: a decoder of ours, or an endpoint.

An author has a `name` and is called with requests; it gives one reply for each, in their order.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fedrag_jax.data.prompts import plain, turns
from fedrag_jax.data.spelling import Spelling
from fedrag_jax.generation.text import Sampling, Writer
from fedrag_jax.models.hub import Pretrained


class Request(NamedTuple):
    """What is asked; `start` is how the reply is to begin, and no part of it.

    Attributes:
      chat: whether a chat is asked in its own template; else it continues the text as it is.
    """

    system: str
    user: str
    start: str
    chat: bool = True


class Reply(NamedTuple):
    """What came back, and whether it came to its end."""

    text: str
    finished: bool


class Author(Protocol):
    """Anything that replies.

    Attributes:
      name: told in the files of what it wrote.
    """

    name: str

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterable[Reply]:
        """One reply for each request."""


@dataclasses.dataclass(frozen=True)
class LocalAuthor:
    """A decoder that runs here: in its chat template if it has one and is to chat, else in plain text.

    Of a user's words that do not fit into its positions, the end is cut.
    """

    model: Pretrained

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> list[Reply]:
        """One reply for each request.

        Raises:
          ConfigError: instructions that leave no room for a reply.
        """
        tokenizer, network = self.model.tokenizer, self.model.network
        stops = {tokenizer.eos_token_id, *self.model.ends}
        if tokenizer.chat_template:
            # What ends a turn is seen where one has ended.
            ended = turns(tokenizer, "x", "<reply>").partition("<reply>")[2]
            (end,) = tokenizer([ended], add_special_tokens=False)["input_ids"]
            stops |= {i for i in end[:1] if i in tokenizer.all_special_ids}
        writer = Writer(network, self.model.params, tokenizer, tuple(sorted(stops - {None})))
        room = network.config.max_positions - sampling.max_new_tokens
        written = writer.complete([self._prompt(r, room) for r in requests], sampling)
        return [Reply(w.text, w.finish == "stop") for w in written]

    def _prompt(self, request: Request, room: int) -> np.ndarray:
        tokenizer, mark = self.model.tokenizer, "<user>"
        if tokenizer.chat_template and request.chat:
            system = f"{request.system}\n\n" if request.system else ""
            before, _, after = turns(tokenizer, system + mark, reply=True).partition(mark)
            bos = []
        else:
            before, after = (f"{request.system}\n\n" if request.system else ""), ""
            bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        # A token is seldom shorter than a character: no more of a long text is looked at.
        user, after = plain(tokenizer, request.user[: 8 * room]), after + request.start
        spelling = Spelling(tokenizer)
        left = room - len(bos) - sum(map(len, spelling([before, after])))
        user, _ = spelling.cut(user, max(left, 0))
        return np.array([*bos, *spelling.whole(before + user + after)], np.int32)
