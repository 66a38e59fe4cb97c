"""What the bridges to LlamaIndex and LangChain are asked, and the store that is searched for it."""

from fedrag_jax.data import synthetic
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable

WORLD = synthetic.generate(synthetic.WorldConfig())
PASSAGES = WORLD.passages[:60]
ASKED = {  # questions, and what the built-in reader answers with a citation
    "By whom was the Mir Fresco painted?": "Bro Pal",
    "In which city was Bris Rat born?": "Kisrom",
    "What is the year in which the Bot Serial was directed?": "1584",
}
QUESTIONS = [*ASKED]
QUESTION = QUESTIONS[0]
SOURCE = "painting-work-19"


class Counting(FaissStore):
    """A store that counts the questions of each search, and is away when it is told to be."""

    def search(self, questions, vectors=None, k=5):
        self.searches = [*getattr(self, "searches", ()), len(questions)]
        if getattr(self, "away", False):
            raise StoreUnreachable("the store is away: start it")
        return super().search(questions, vectors, k)


def ids(nodes):
    return [n.node_id for n in nodes]


def rewritten(text):
    return text.replace("Bro Pal", "Got Muk")
