"""How the tensors of a checkpoint's files are made of our parameters, and back: by one declaration for both directions.

A projection of ours is [in..., out...], split into heads; PyTorch's is a matrix [out, in], and sometimes several of them one
below the other. Seen as [in, groups, width] they are the same numbers: `groups` parts next to each other, in each the rows of
one leaf after those of another. Splitting a file's tensor makes views where numpy can, so that a device reads its part alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
      name: in the file; `{i}` is the number of a layer, `{e}` that of an expert.
      leaves: paths of our parameters in it, within a layer if there is an `{i}`. It exists if the first of them does.
      kind: `matrix` [out, in], `transposed` [in, out] (GPT-2's Conv1D), `vector`, or `table`, the same as ours.
      contract: how many of a leaf's first dimensions are inputs.
      groups: field of ModelConfig: so many times the leaves' rows alternate.
      interleaved: the last dimensions, `mla.qk_rope_head_dim` of them, rotate neighbours in the file and halves here.
    """

    name: str
    leaves: tuple[str, ...]
    kind: Literal["matrix", "transposed", "vector", "table"]
    contract: int = 1
    groups: str = ""
    interleaved: bool = False


def matrix(name: str, *leaves: str, contract: int = 1, groups: str = "", interleaved: bool = False) -> Tensor:
    return Tensor(name, leaves, "matrix", contract, groups, interleaved)


def transposed(name: str, *leaves: str, contract: int = 1) -> Tensor:
    return Tensor(name, leaves, "transposed", contract)


def vector(name: str, *leaves: str, groups: str = "") -> Tensor:
    return Tensor(name, leaves, "vector", groups=groups)


def table(name: str, leaf: str) -> Tensor:
    return Tensor(name, (leaf,), "table")


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf, or a layer or an expert of one that is stacked, in a tensor of the file."""

    path: str
    lead: Shape  # index into the leaf's first dimensions: layer of a scan, expert
    shape: Shape


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor of the file with what it is made of; `groups` and `rotary` are the numbers behind `Tensor`'s."""

    name: str
    tensor: Tensor
    parts: tuple[Part, ...]
    groups: int
    rotary: int

    @property
    def shape(self) -> Shape:
        if self.tensor.kind == "table":
            return self.parts[0].shape
        inputs, width = self._inputs(self.parts[0]), self.groups * sum(self._widths())
        return {"matrix": (width, inputs), "transposed": (inputs, width), "vector": (width,)}[self.tensor.kind]

    def _inputs(self, part: Part) -> int:
        return 1 if self.tensor.kind == "vector" else math.prod(part.shape[: self.tensor.contract])

    def _widths(self) -> list[int]:
        return [math.prod(part.shape) // self._inputs(part) // self.groups for part in self.parts]

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """Our parts of the file's array, of `parts[i].shape`."""
        if self.tensor.kind == "table":
            return [array]
        array = array.T if self.tensor.kind == "matrix" else array
        array = array.reshape(self._inputs(self.parts[0]), self.groups, -1)
        ends = np.cumsum(self._widths()).tolist()
        pieces = (array[..., end - width : end] for end, width in zip(ends, self._widths(), strict=True))
        return [self._halves(piece.reshape(part.shape)) for piece, part in zip(pieces, self.parts, strict=True)]

    def join(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The file's array of our parts: `split` backwards."""
        if self.tensor.kind == "table":
            return arrays[0]
        inputs = self._inputs(self.parts[0])
        pieces = [self._neighbours(array).reshape(inputs, self.groups, -1) for array in arrays]
        joined = (pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)).reshape(inputs, -1)
        return (joined.T if self.tensor.kind == "matrix" else joined).reshape(self.shape)

    def _order(self, width: int) -> np.ndarray:
        """Where our last dimensions stand in the file: even ones of those that rotate, then odd ones."""
        rotary = np.arange(width - self.rotary, width).reshape(-1, 2)
        return np.concatenate([np.arange(width - self.rotary), rotary[:, 0], rotary[:, 1]])

    def _halves(self, array: np.ndarray) -> np.ndarray:
        return array[..., self._order(array.shape[-1])] if self.rotary else array

    def _neighbours(self, array: np.ndarray) -> np.ndarray:
        return array[..., np.argsort(self._order(array.shape[-1]))] if self.rotary else array
