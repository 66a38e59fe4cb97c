"""Base class of stores that consist of other stores."""

from collections.abc import Sequence
from typing import Any

from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore


class OverOthers(KnowledgeStore):
    """A store over other stores, which are saved below its own folder.

    Some of them may be external. The settings of the folder then name all external places, so that a
    user can accept them before any connection is made.
    """

    def _settings(self) -> dict[str, Any]:
        told = [(store, store._settings()) for store in self._others()]
        places = (store.place(s) for store, s in told if store.lies_elsewhere(s))
        return {"depth": self.depth, "elsewhere": ", ".join(places)}

    def _others(self) -> Sequence[KnowledgeStore]:
        raise NotImplementedError

    @classmethod
    def lies_elsewhere(cls, settings: dict[str, Any]) -> bool:
        """Whether any of the other stores is external."""
        return settings["elsewhere"] != ""

    @classmethod
    def place(cls, settings: dict[str, Any]) -> str:
        """The places of the external stores."""
        return repr(settings["elsewhere"])
