"""Four kinds of FAISS index by name, shared by stores and by training."""

import dataclasses

import faiss
import numpy as np

from fedrag_jax.errors import ConfigError

KINDS = ("flat", "ivf", "hnsw", "pq")
# Vectors that k-means wants for a list, and for a codebook of 256.
PER_LIST, FEWEST_CODED = 39, 39 * 256
_HNSW, _TRAINED = faiss.IndexHNSWFlat, {"ivf": faiss.IndexIVFFlat, "pq": faiss.IndexIVFPQ}


@dataclasses.dataclass(frozen=True)
class FaissKind:
    """The kind and settings of an inner-product index.

    Attributes:
      index: "flat", exact; "ivf", vectors in lists, of which only those nearest to a question are
        searched; "hnsw", a graph of neighbours; "pq", IVF with compressed vectors.
      lists: number of lists of ivf and pq; 0 for the square root of the number of training vectors.
        With fewer than 39 vectors per list (10,000 vectors for pq) the search is exact.
      probes: number of lists to search; 0 for a quarter of them.
      neighbours: neighbours of each vector in hnsw.
      effort: candidates that hnsw keeps during a search; more candidates find more and take longer.
      codes: bytes per vector in pq; 0 for one byte per 4 dimensions.

    Raises:
      ConfigError: an unknown kind, or a number out of its range.
    """

    index: str = "flat"
    lists: int = 0
    probes: int = 0
    neighbours: int = 32
    effort: int = 64
    codes: int = 0

    def __post_init__(self):
        if self.index not in KINDS:
            raise ConfigError(f"index must be one of {KINDS}, got {self.index!r}")
        if min(self.lists, self.probes, self.codes) < 0 or self.neighbours < 2 or self.effort < 1:
            raise ConfigError(
                "an index needs lists, probes and codes >= 0, neighbours >= 2 and effort >= 1, got "
                f"{self.lists}, {self.probes}, {self.codes}, {self.neighbours} and {self.effort}"
            )

    def coded(self, dimension: int) -> int:
        """Returns the bytes per vector in pq.

        Raises:
          ConfigError: the bytes do not divide the dimension, or the dimension is below 1.
        """
        if dimension < 1:
            raise ConfigError(f"a store needs dimension >= 1, got {dimension}")
        codes = self.codes or next(
            n for n in range(max(dimension // 4, 1), 0, -1) if dimension % n == 0
        )
        if dimension % codes:
            raise ConfigError(f"codes must divide the dimension {dimension}, got {codes}")
        return codes

    def lists_of(self, size: int) -> int:
        """Returns the number of lists for a number of vectors; 0 if they are too few for training."""
        lists = self.lists or int(size**0.5)
        fewest = max(PER_LIST * lists, FEWEST_CODED * (self.index == "pq"))
        return lists if self.index in _TRAINED and size >= fewest else 0

    def untrained(self, dimension: int):
        """Returns an empty index that needs no training: hnsw or flat."""
        if self.index == "hnsw":
            return _HNSW(dimension, self.neighbours, faiss.METRIC_INNER_PRODUCT)
        return faiss.IndexFlatIP(dimension)

    def trained(self, vectors: np.ndarray, size: int = 0):
        """Returns an empty index, trained on these vectors [N, D] if they are enough.

        Args:
          size: number of vectors of which these are a sample; 0 if they are all.
        """
        dimension = vectors.shape[1]
        lists = min(self.lists_of(size or len(vectors)), len(vectors) // PER_LIST)
        codes = self.coded(dimension)
        if not lists:
            return self.untrained(dimension)
        coarse, metric = faiss.IndexFlatIP(dimension), faiss.METRIC_INNER_PRODUCT
        if self.index == "ivf":
            index = faiss.IndexIVFFlat(coarse, dimension, lists, metric)
        else:
            index = faiss.IndexIVFPQ(coarse, dimension, lists, codes, 8, metric)
        index.train(vectors)
        index.make_direct_map()  # so that vectors can be read back, and put in place of others
        return index

    def parameters(self, index, k: int, selector=None):
        """Returns the search parameters of this kind for k rows that a selector accepts."""
        if self.index == "hnsw":
            return faiss.SearchParametersHNSW(sel=selector, efSearch=max(self.effort, k))
        if isinstance(index, faiss.IndexFlat):
            return faiss.SearchParameters(sel=selector)
        probes = self.probes or -(-index.nlist // 4)
        coded = self.index == "pq"
        kind = faiss.IVFPQSearchParameters if coded else faiss.SearchParametersIVF
        return kind(sel=selector, nprobe=min(probes, index.nlist))

    def made(self, index) -> bool:
        """Returns whether an index from a file is of this kind: with its vectors in the file itself,
        and with inner products."""

        def flat(other) -> bool:
            return type(other) in (faiss.IndexFlat, faiss.IndexFlatIP)

        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            return False
        if self.index == "hnsw":
            storage = faiss.downcast_index(index.storage) if type(index) is _HNSW else None
            return flat(storage) and storage.metric_type == faiss.METRIC_INNER_PRODUCT
        if type(index) is not _TRAINED.get(self.index):
            return flat(index)
        lists = faiss.downcast_InvertedLists(index.invlists)
        return flat(faiss.downcast_index(index.quantizer)) and type(lists) in (
            faiss.ArrayInvertedLists,
        )
