"""Opens a GGUF file: its metadata, and its tensors as float32.

The header is parsed here and not by the library `gguf`, which trusts the lengths in it: a truncated or
forged file could take any amount of memory. The library knows the tensor types and dequantises them.
"""

import pathlib
import struct
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fedrag_jax.errors import CheckpointError, missing

# Entries of a list at most, such as a vocabulary; dimensions of a tensor.
MOST_ENTRIES, MOST_DIMENSIONS = 1 << 22, 4
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _LIST = 8, 9


class Tensor(NamedTuple):
    """The location of a tensor: `kind` is one of the library's types, `shape` is in NumPy's order."""

    kind: Any
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFFile:
    """A file's `metadata`, `tensors` by name, and `array(name)`.

    Raises:
      ConfigError: the library `gguf` is not installed.
      CheckpointError: not a GGUF file of version 2 or 3, a truncated file, or inconsistent content:
        lengths beyond its end, overlapping tensors, duplicate names.
    """

    def __init__(self, path: pathlib.Path):
        try:
            import gguf
        except ImportError as error:
            raise missing(f"{path}: GGUF files need the library gguf", "gguf") from error
        self.path, self._library = path, gguf
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error
        header = _Header(self._bytes, path)
        self.metadata: dict[str, Any] = header.metadata()
        self.tensors: dict[str, Tensor] = self._tensors(header)

    def _tensors(self, header: "_Header") -> dict[str, Tensor]:
        told = header.tensors()
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment must be a power of two, got {alignment!r}"
            )
        first = -(-header.at // alignment) * alignment
        tensors = {name: self._tensor(name, *one, first) for name, one in told.items()}
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise CheckpointError(f"{self.path}: tensors {before} and {name} overlap")
            end, before = tensor.start + tensor.size, name
        if end > len(self._bytes):
            raise CheckpointError(
                f"{self.path} has {len(self._bytes)} bytes, but its tensors end at {end}: it is "
                "truncated; download it again"
            )
        return tensors

    def _tensor(self, name, shape, kind, offset, first) -> Tensor:
        try:
            kind = self._library.GGMLQuantizationType(kind)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of type {kind}, which the library gguf does not know"
            ) from error
        block, width = self._library.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name} has rows of {shape[-1]}, no multiple of the {block} "
                f"values in a block of {kind.name}"
            )
        return Tensor(kind, shape, first + offset, prod(shape) // block * width)

    def array(self, name: str) -> np.ndarray:
        """A tensor, widened to float32.

        Raises:
          CheckpointError: of a type that the library cannot widen.
        """
        kind, shape, start, size = self.tensors[name]
        rows = self._bytes[start : start + size].reshape(*shape[:-1], -1)
        try:
            array = self._library.quants.dequantize(rows, kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {kind.name}, which the library gguf does not widen"
            ) from error
        return array.reshape(shape)


class _Header:
    """Reads a file sequentially; every length is checked against the remaining bytes."""

    def __init__(self, data: np.ndarray, path: pathlib.Path):
        self.data, self.path, self.at = memoryview(data), path, 0
        if self.data[:4] != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        self.at = 4
        version = self.number("<I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path} is GGUF of version {version} (or of another byte order); supported: 2, 3"
            )
        self.count_tensors, self.count_values = self.number("<Q"), self.number("<Q")

    def take(self, size: int, what: str) -> bytes:
        """The next bytes."""
        left = len(self.data) - self.at
        if size > left:
            raise CheckpointError(
                f"{self.path}: {what} at byte {self.at} is {size} bytes long, {left} are left: the "
                "file is truncated or damaged; download it again"
            )
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def number(self, layout: str):
        """Returns the next number; a 32-bit float as the shortest decimal with the same 32-bit
        value."""
        value = struct.unpack(layout, self.take(struct.calcsize(layout), "a number"))[0]
        return float(str(np.float32(value))) if layout == "<f" else value

    def string(self, what: str) -> str:
        """The next text."""
        found = self.take(self.number("<Q"), what)
        try:
            return found.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8 ({error})") from error

    def metadata(self) -> dict[str, Any]:
        """Returns the metadata of the file."""
        return self._named(self.count_values, self._value)

    def tensors(self) -> dict[str, tuple]:
        """Returns shape, type and offset of each tensor."""
        return self._named(self.count_tensors, self._place)

    def _named(self, count: int, read) -> dict[str, Any]:
        found = {}
        for _ in range(count):
            name = self.string("a name")
            if name in found:
                raise CheckpointError(f"{self.path} has {name} twice")
            found[name] = read(name)
        return found

    def _value(self, name: str):
        kind = self.number("<I")
        if kind == _STRING:
            return self.string(name)
        if kind == _LIST:
            return self._list(name)
        return self.number(self._layout(kind, name))

    def _list(self, name: str) -> list:
        kind, count = self.number("<I"), self.number("<Q")
        if count > MOST_ENTRIES:
            raise CheckpointError(
                f"{self.path}: {name} has {count} entries; at most {MOST_ENTRIES} are read"
            )
        if kind == _STRING:
            return [self.string(name) for _ in range(count)]
        one = self._layout(kind, name)
        layout = f"<{count}{one[1]}"
        return list(struct.unpack(layout, self.take(struct.calcsize(layout), name)))

    def _layout(self, kind: int, name: str) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: {name} is a value of type {kind}, which is unknown"
            )
        return _SCALARS[kind]

    def _place(self, name: str) -> tuple:
        count = self.number("<I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise CheckpointError(
                f"{self.path}: tensor {name} has {count} dimensions; 1 to {MOST_DIMENSIONS} are read"
            )
        shape = tuple(self.number("<Q") for _ in range(count))[::-1]
        if not all(shape):
            raise CheckpointError(f"{self.path}: tensor {name} has shape {shape}")
        return shape, self.number("<I"), self.number("<Q")
