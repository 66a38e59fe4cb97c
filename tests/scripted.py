"""An author that says what a test wants, and texts for it to read."""

from fedrag_jax.data.examples import Passage
from fedrag_jax.generation.author import Reply

TEXTS = [Passage(f"t{i}", "", f"Person {i} was born in Town{i}.", topic="towns") for i in range(12)]


class Scripted:
    """An author that replies as it is told, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def __call__(self, requests, sampling):
        self.asked += requests
        replies = [self.reply(request) for request in requests]
        return [r if isinstance(r, Reply) else Reply(r, True) for r in replies]
