"""The GGUF format: a header of keys and values, the list of tensors, and their bytes.

Read here rather than by the format's own library, which makes several objects of each token of a vocabulary, and trusts the
lengths that a file claims. Tensors are mapped into memory; their blocks are dequantised by the library.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_VERSIONS = (2, 3)


@dataclasses.dataclass(frozen=True)
class StoredBlocks:
    """Where a tensor lies: from byte `start` of a file, in blocks of `kind`. `shape` is numpy's order, the file's reversed."""

    file: Path
    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        elements, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // elements * size

    def read(self) -> np.ndarray:
        """float32, dequantised.

        Raises:
          ValueError: the library cannot dequantise blocks of this kind.
        """
        if not self.num_bytes:
            return np.zeros(self.shape, np.float32)
        raw = np.memmap(self.file, np.uint8, "r", offset=self.start, shape=(self.num_bytes,)).view(np.ndarray)
        rows = raw.reshape(*self.shape[:-1], -1)
        try:
            return gguf.quants.dequantize(rows, self.kind).reshape(self.shape)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.file}: tensor {self.name!r} is of type {self.kind.name}, which cannot be dequantised: take the model "
                "in F16, Q8_0 or another type"
            ) from error


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """What a file says, none of its tensors read. Arrays of numbers are numpy's, of strings lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredBlocks]


class _Cursor:
    """Reads one value after the other and never past the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"{count} bytes are wanted at byte {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        # Some vocabularies cut characters in two.
        return self.take(self.number("Q")).decode(errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value is of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind]) if kind != 7 else np.dtype(bool)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _ARRAY:
            raise ValueError("an array holds arrays")
        return [self.value(kind) for _ in range(count)]


def read_gguf(path: str | Path) -> GgufFile:
    """Opens a file.

    Raises:
      ValueError: it is not, or no longer, what the format says.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give a .gguf file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} does not begin as a GGUF file does: give a .gguf file, or download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, _Cursor(data))
            except (ValueError, struct.error, KeyError, OverflowError, MemoryError) as error:
                raise ValueError(f"{path} is damaged or was cut off: {error}. Download it again") from error


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    cursor.take(4)
    if (version := cursor.number("I")) not in _VERSIONS:
        raise ValueError(f"it says version {version} of the format, and little-endian {_VERSIONS} are read")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the key {key!r} stands twice")
        metadata[key] = cursor.value(cursor.number("I"))
    found: dict[str, StoredBlocks] = {}
    for _ in range(num_tensors):
        tensor = _stored(path, cursor)
        if tensor.name in found:
            raise ValueError(f"the tensor {tensor.name!r} stands twice")
        found[tensor.name] = tensor
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment={alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors = {name: dataclasses.replace(tensor, start=base + tensor.start) for name, tensor in found.items()}
    for tensor in tensors.values():
        if tensor.start + tensor.num_bytes > len(cursor.data):
            raise ValueError(
                f"tensor {tensor.name!r} ends at byte {tensor.start + tensor.num_bytes}, the file at {len(cursor.data)}"
            )
    return GgufFile(path, metadata, tensors)


def _stored(path: Path, cursor: _Cursor) -> StoredBlocks:
    name, rank = cursor.string(), cursor.number("I")
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {rank} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
    kind = gguf.GGMLQuantizationType(cursor.number("I"))
    if math.prod(shape) and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        raise ValueError(f"tensor {name!r} {list(shape)} is not made of whole blocks of {kind.name}")
    return StoredBlocks(path, name, kind, shape, cursor.number("Q"))
