"""A store that is made of others: where their passages lie."""

from collections.abc import Sequence
from typing import Any

from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore


class OverOthers(KnowledgeStore):
    """A store over others, which are saved below its own folder.

    A folder can say that the passages of one of them lie elsewhere. Its settings then name all such
    places, so that whoever opens it agrees to them before any is followed.
    """

    def _settings(self) -> dict[str, Any]:
        told = [(store, store._settings()) for store in self._others()]
        places = (store.place(s) for store, s in told if store.lies_elsewhere(s))
        return {"depth": self.depth, "elsewhere": ", ".join(places)}

    def _others(self) -> Sequence[KnowledgeStore]:
        raise NotImplementedError

    @classmethod
    def lies_elsewhere(cls, settings: dict[str, Any]) -> bool:
        """If one of the others does."""
        return settings["elsewhere"] != ""

    @classmethod
    def place(cls, settings: dict[str, Any]) -> str:
        """The places of those that do."""
        return repr(settings["elsewhere"])
