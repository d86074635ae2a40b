"""The safetensors format: eight bytes with the length of a JSON header, the header, and the tensors' bytes one after the other.

Read by mapping the files into memory, so that of a tensor only the part is read that somebody looks at; written one tensor at
a time, which the format's own library does not do. All is checked before a tensor is touched: the files are other people's.
Pickle files can run code and are refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # the limit of the format's library


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes `start` to `end` of a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> np.ndarray:
        """The tensor, still on disk.

        Raises:
          ValueError: its type is not a floating-point type that we convert.
        """
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"{self.file}: tensor {self.name!r} is of type {self.dtype}; {', '.join(_DTYPES)} can be converted: take the "
                "checkpoint in bfloat16, or dequantise it first"
            )
        dtype = np.dtype(_DTYPES[self.dtype])
        if self.start == self.end:
            return np.zeros(self.shape, dtype)
        raw = np.memmap(self.file, np.uint8, "r", offset=self.start, shape=(self.end - self.start,))
        return raw.view(np.ndarray).view(dtype).reshape(self.shape)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged or was cut off: {what}. Download it again")


def read_header(path: Path) -> dict[str, Stored]:
    """Tensors of one file by name, none of them read.

    Raises:
      ValueError: the file is not, or no longer, what the format says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise _damaged(path, f"its header is said to have {length} bytes, the file has {size}")
        try:
            header = json.loads(file.read(length))
            assert isinstance(header, dict)
            header.pop("__metadata__", None)
            tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
            raise _damaged(path, f"its header cannot be read ({error!r})") from error
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != position:
            raise _damaged(path, f"tensor {tensor.name!r} begins at byte {tensor.start}, the one before it ends at {position}")
        position = tensor.end
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position}, the file at {size}")
    for tensor in tensors.values():
        if tensor.dtype in _DTYPES:
            expected = math.prod(tensor.shape) * np.dtype(_DTYPES[tensor.dtype]).itemsize
            if expected != tensor.end - tensor.start:
                raise _damaged(
                    path,
                    f"tensor {tensor.name!r} {tensor.dtype}{list(tensor.shape)} takes {expected} bytes and has "
                    f"{tensor.end - tensor.start}",
                )
    return tensors


def _stored(path: Path, name: str, entry: Any, base: int) -> Stored:
    (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
    numbers = (start, end, *shape)
    if not all(type(number) is int and number >= 0 for number in numbers) or start > end or not isinstance(entry["dtype"], str):
        raise ValueError(f"tensor {name!r}: {entry}")
    return Stored(path, name, entry["dtype"], shape, base + start, base + end)


def read_headers(directory: Path) -> dict[str, Stored]:
    """Tensors of a checkpoint by name, over all its files.

    Raises:
      ValueError: there are no safetensors files, one that the index names is missing or damaged, or they disagree.
    """
    if (directory / SINGLE).is_file():  # whatever index lies beside it, as transformers has it
        return read_header(directory / SINGLE)
    index = directory / INDEX
    if not index.is_file():
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(pattern))]
        if pickles:
            raise ValueError(
                f"{directory} has its weights in {pickles[0]}, a pickle, which can run code as it is opened: refused. Take the "
                "safetensors files of this checkpoint, or write them with transformers' save_pretrained where you trust it"
            )
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}: give the directory of a Hugging Face checkpoint")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        assert all(isinstance(name, str) for name in files)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise _damaged(index, f"it has no weight_map of tensor names to file names ({error!r})") from error
    for name in files:
        if name != os.path.basename(name) or "\\" in name or name in ("", ".", ".."):
            raise ValueError(f"{index} names a file outside its directory, {name!r}: do not trust this checkpoint")
        if not (directory / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there: download the missing file")
    tensors: dict[str, Stored] = {}
    for name in files:
        for tensor in read_header(directory / name).values():
            if weight_map.get(tensor.name) != name:
                raise ValueError(
                    f"{directory / name} holds tensor {tensor.name!r}, which {INDEX} looks for in "
                    f"{weight_map.get(tensor.name)}: the files are not of one checkpoint; download them again"
                )
            tensors[tensor.name] = tensor
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise ValueError(f"{index} looks for {lost[0]!r} in {weight_map[lost[0]]}, which does not hold it: download both again")
    return tensors


Declared = tuple[str, tuple[int, ...], np.dtype]  # a tensor's name, shape and type


def plan_shards(tensors: Iterable[Declared], max_shard_bytes: int) -> list[list[Declared]]:
    """Tensors in order, divided where a file would become larger than allowed."""
    shards: list[list[Declared]] = [[]]
    room = max_shard_bytes
    for name, shape, dtype in tensors:
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, shape, dtype))
        room -= size
    return shards


def write_shards(directory: Path, shards: list[list[Declared]], arrays: Iterator[np.ndarray]) -> None:
    """Writes the shards and, of several, their index.

    Args:
      arrays: what the shards declare, in their order; each is asked for when the one before is on its way to the disk.
    """
    count = len(shards)
    names = [SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        with open(directory / name, "xb") as file:
            file.write(_header(shard))
            for tensor, shape, dtype in shard:
                array = next(arrays)
                assert (array.shape, array.dtype) == (shape, dtype), (tensor, array.shape, array.dtype, shape, dtype)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
    if count > 1:
        sizes = (math.prod(shape) * dtype.itemsize for shard in shards for _, shape, dtype in shard)
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _, _ in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _header(shard: list[Declared]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, dtype in shard:
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # readers map the tensors, and want them aligned
    return len(header).to_bytes(8, "little") + header


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with open(path, "x") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
