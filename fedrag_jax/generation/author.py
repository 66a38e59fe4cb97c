"""Authors: generators that reply to requests about texts, either a local decoder or an endpoint.

An author has a `name`. It is called with requests and returns one reply per request, in order. An
author whose name may stand for several models also has a `fingerprint`, recorded with the name.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fedrag_jax.data.prompts import plain, turns
from fedrag_jax.data.spelling import Spelling
from fedrag_jax.generation.text import Sampling, Writer
from fedrag_jax.models.fingerprint import fingerprint
from fedrag_jax.models.hub import Pretrained


class Request(NamedTuple):
    """A request; `start` is the required beginning of the reply and not part of it.

    Attributes:
      chat: whether to use the model's chat template; otherwise the model continues the plain text.
      ending: end of `user` that stays whole if `user` is truncated, such as the question about a text.
    """

    system: str
    user: str
    start: str
    chat: bool = True
    ending: str = ""


class Reply(NamedTuple):
    """A reply, and whether it is complete."""

    text: str
    finished: bool


class Author(Protocol):
    """The interface of authors.

    Attributes:
      name: name recorded in the files of its replies.
    """

    name: str

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterable[Reply]:
        """One reply for each request."""


@dataclasses.dataclass(frozen=True)
class LocalAuthor:
    """A local decoder; it uses its chat template if it has one and the request is a chat.

    A user text that does not fit into its positions is truncated before the `ending` of its request.
    """

    model: Pretrained

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the model, which its name does not determine: it may have been tuned."""
        model = self.model
        return fingerprint(
            model.params, model.tokenizer, model.network.config, model.ends
        ).hexdigest()[:16]

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> list[Reply]:
        """One reply for each request.

        Raises:
          ConfigError: instructions, or an `ending`, that leave no room for a reply.
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
        user = plain(tokenizer, request.user.removesuffix(request.ending)[: 8 * room])
        after = plain(tokenizer, request.ending) + after + request.start
        spelling = Spelling(tokenizer)
        left = room - len(bos) - sum(map(len, spelling([before, after])))
        user, _ = spelling.cut(user, max(left, 0))
        return np.array([*bos, *spelling.whole(before + user + after)], np.int32)
