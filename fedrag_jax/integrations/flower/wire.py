"""Encodes arrays by name, and decodes them only if shape, type and values are as expected."""

import io
from collections.abc import Mapping

import jax
import numpy as np
from flwr.app import Array, ArrayRecord

from fedrag_jax.errors import DataError
from fedrag_jax.federated.algorithm import PyTree

HEADER = 4096  # upper bound of the bytes that NumPy's format adds to the numbers


class WireError(DataError):
    """Arrays differ from those expected."""


def named(tree: PyTree) -> dict[str, jax.Array]:
    """Returns leaves by their path, such as `trainable.layers.q_proj.lora_a`."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def to_record(tree: PyTree) -> ArrayRecord:
    """Encodes the leaves of a tree in NumPy's format; bfloat16, which it lacks, as its bits."""
    found = jax.device_get(named(tree))
    arrays = {name: np.asarray(x) for name, x in found.items()}
    return ArrayRecord({name: Array(x.view(_on_wire(x.dtype))) for name, x in arrays.items()})


def from_record(record: ArrayRecord, like: PyTree, whose: str) -> PyTree:
    """Returns the tree of NumPy arrays in a record.

    Args:
      like: tree with the expected shapes and types.
      whose: the sender, for error messages.

    Raises:
      WireError: names, shapes or types that differ from `like`, or numbers that are not finite; the
        message lists all of them.
    """
    wanted = named(like)
    problems = [f"missing {name}" for name in wanted if name not in record]
    problems += [f"unexpected {name}" for name in record if name not in wanted]
    taken = {}
    for name in (name for name in wanted if name in record):
        try:
            taken[name] = _array(record[name], wanted[name])
        except Exception as error:  # whatever the bytes of another party make NumPy raise
            problems.append(f"{name} {error}")
    if problems:
        shown = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise WireError(f"arrays of {whose} are refused: {shown}")
    return jax.tree.unflatten(jax.tree.structure(like), [taken[name] for name in wanted])


def sizes(record: Mapping[str, Array]) -> dict[str, int]:
    """Returns the bytes of the arrays of each part, by type, as `algorithm.by_kind` does."""
    found: dict[str, int] = {}
    for name, array in record.items():
        part = name.removeprefix("trainable.").removeprefix("message.").partition(".")[0]
        kind = f"{part} {array.dtype}"
        found[kind] = found.get(kind, 0) + len(array.data)
    return found


def add_sizes(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Adds bytes to a total in place."""
    for kind, size in more.items():
        total[kind] = total.get(kind, 0) + size


def _array(sent: Array, like) -> np.ndarray:
    dtype, shape = np.dtype(like.dtype), tuple(like.shape)
    on_wire = _on_wire(dtype)
    if tuple(sent.shape) != shape or sent.dtype != str(on_wire):
        raise ValueError(
            f"is {sent.dtype} {list(sent.shape)} but should be {on_wire} {list(shape)}"
        )
    room = int(np.prod(shape)) * dtype.itemsize + HEADER
    if len(sent.data) > room:
        raise ValueError(f"has {len(sent.data)} bytes, more than its shape needs")
    array = _numbers(sent.data, shape, on_wire).view(dtype)
    if (
        jax.numpy.issubdtype(dtype, jax.numpy.inexact)
        and not np.isfinite(array.astype(np.float32) if dtype.kind == "V" else array).all()
    ):
        raise ValueError("is not finite")
    return array


def _numbers(data: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Reads an array in NumPy's format; its header is compared before memory is taken for it."""
    file = io.BytesIO(data)
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in headers:
        raise ValueError(f"is in version {version} of NumPy's format, which no party writes")
    there, in_columns, kind = headers[version](file)
    if there != shape or kind != dtype:
        raise ValueError(f"holds {kind} {list(there)}, which differs from its description")
    count, order = int(np.prod(shape)), "F" if in_columns else "C"
    return np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order=order)


def _on_wire(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"uint{8 * dtype.itemsize}") if dtype.kind == "V" else dtype
