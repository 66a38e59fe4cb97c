"""Arrays on the wire: by name, and taken in only if shape, type and values are what was expected."""

from collections.abc import Mapping

import jax
import numpy as np
from flwr.app import Array, ArrayRecord

from fedrag_jax.errors import DataError
from fedrag_jax.federated.algorithm import PyTree

HEADER = 4096  # bytes that NumPy's format may take beside the numbers, and more than it does


class WireError(DataError):
    """Arrays that are not those expected."""


def named(tree: PyTree) -> dict[str, jax.Array]:
    """Leaves by their path, such as `trainable.layers.q_proj.lora_a`."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def to_record(tree: PyTree) -> ArrayRecord:
    """The leaves of a tree, in NumPy's format; bfloat16, which it does not know, as its bits."""
    found = jax.device_get(named(tree))
    arrays = {name: np.asarray(x) for name, x in found.items()}
    return ArrayRecord({name: Array(x.view(_on_wire(x.dtype))) for name, x in arrays.items()})


def from_record(record: ArrayRecord, like: PyTree, whose: str) -> PyTree:
    """The tree of NumPy arrays that a record holds.

    Args:
      like: what has shapes and types as they are to be.
      whose: the arrays are, for messages.

    Raises:
      WireError: names, shapes or types that are not those of `like`, numbers that are not finite; all
        of them at once.
    """
    wanted = named(like)
    problems = [f"missing {name}" for name in wanted if name not in record]
    problems += [f"unexpected {name}" for name in record if name not in wanted]
    taken = {}
    for name in (name for name in wanted if name in record):
        try:
            taken[name] = _array(record[name], wanted[name])
        except (ValueError, TypeError, OSError, EOFError) as error:
            problems.append(f"{name} {error}")
    if problems:
        shown = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise WireError(f"arrays of {whose} are refused: {shown}")
    return jax.tree.unflatten(jax.tree.structure(like), [taken[name] for name in wanted])


def sizes(record: Mapping[str, Array]) -> dict[str, int]:
    """Bytes of the arrays of each part, by type, as `algorithm.by_kind` gives them."""
    found: dict[str, int] = {}
    for name, array in record.items():
        part = name.removeprefix("trainable.").removeprefix("message.").partition(".")[0]
        kind = f"{part} {array.dtype}"
        found[kind] = found.get(kind, 0) + len(array.data)
    return found


def _array(sent: Array, like) -> np.ndarray:
    dtype, shape = np.dtype(like.dtype), tuple(like.shape)
    on_wire = _on_wire(dtype)
    if tuple(sent.shape) != shape or sent.dtype != str(on_wire):
        raise ValueError(
            f"is {sent.dtype} {list(sent.shape)} and should be {on_wire} {list(shape)}"
        )
    room = int(np.prod(shape)) * dtype.itemsize + HEADER
    if len(sent.data) > room:
        raise ValueError(f"has {len(sent.data)} bytes, for which there is no reason")
    array = sent.numpy()
    # What the bytes say of themselves counts, not what is said beside them.
    if array.shape != shape or array.dtype != on_wire:
        raise ValueError(f"holds {array.dtype} {list(array.shape)}, not what it is said to")
    array = array.view(dtype)
    if (
        jax.numpy.issubdtype(dtype, jax.numpy.inexact)
        and not np.isfinite(array.astype(np.float32) if dtype.kind == "V" else array).all()
    ):
        raise ValueError("is not finite")
    return array


def _on_wire(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"uint{8 * dtype.itemsize}") if dtype.kind == "V" else dtype
