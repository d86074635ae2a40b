"""TPU generations: what one jax device of each can do, which slices of them exist, and how its links carry a collective.

Peak FLOP/s, HBM and interconnect bandwidth and the sizes of pods are those of Google's documentation,
https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x (its two-way figure per chip, over the ports of a chip, is
twice `link_bandwidth` here). What the documentation leaves open is what libtpu 0.0.42 says of itself:

1. `hbm_bytes` is what its compiler allocates from, named when a program does not fit: a little less than the chip has.
2. A device is what jax computes with: a whole chip, but one of two cores on tpu7x, where both share HBM and links.
   v4 chips are one device only under the chip configuration `megacore`, which TPU VMs start with; libtpu's own default is not.
3. `clock` is the peak over the FLOPs that the MXUs do in a cycle. For v4, v5e, v5p and v6e it is the documented or generally
   quoted 1.05, 1.5, 1.75 and 1.75 GHz; for tpu7x it gives 2.2 GHz, where libtpu's own cost analysis reckons with 1.9.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Sequence


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device of a generation.

    Attributes:
      torus: dimensions of its interconnect.
      max_chips: of the largest slice.
      devices_per_chip: 2 where each core is a device of its own.
      hbm_bytes: available to a program.
      hbm_bandwidth, link_bandwidth: bytes/s; a link's is one way, and a device's share if devices share a chip's links.
      peak_flops: FLOP/s of bfloat16 matmuls.
      flops_per_cycle: of all MXUs of the device.
      cores: that work as one device.
      configuration: libtpu's name of how chips are divided into devices; empty is its default.
    """

    name: str
    torus: int
    max_chips: int
    devices_per_chip: int
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    peak_flops: float
    flops_per_cycle: int
    cores: int = 1
    configuration: str = ""

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak_flops / self.flops_per_cycle


GIB = 2**30
_MXU_128, _MXU_256 = 2 * 128 * 128, 2 * 256 * 256

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 3, 4096, 1, int(30.75 * GIB), 1228e9, 50e9, 275e12, 8 * _MXU_128, 2, "megacore"),
        Chip("v5e", 2, 256, 1, int(15.75 * GIB), 819e9, 50e9, 197e12, 4 * _MXU_128),
        Chip("v5p", 3, 6144, 1, int(95.74 * GIB), 2765e9, 100e9, 459e12, 8 * _MXU_128, 2),
        # Two MXUs of 256 x 256, each with two slots in a bundle.
        Chip("v6e", 2, 256, 1, int(31.25 * GIB), 1638e9, 100e9, 918e12, 4 * _MXU_256),
        Chip("tpu7x", 3, 9216, 2, int(94.75 * GIB), 3690e9, 50e9, 1153.5e12, 4 * _MXU_256),
    )
}

# Slices smaller than a cube of 4 x 4 x 4 or a pod of 16 x 16; larger 3-d ones are made of whole cubes.
_SMALL = {
    2: ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
}
_LARGEST_SIDE = 48


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its chips stand on a torus or grid of `shape`."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which dimensions the last chip is linked to the first: where a slice is as wide as a pod, or made of cubes."""
        if self.chip.torus == 2:
            return tuple(side == 16 for side in self.shape)
        return (all(side % 4 == 0 for side in self.shape),) * 3

    def rings(self, coordinates: Collection[Sequence[int]]) -> list[tuple[int, int]]:
        """(chips, links) along every dimension in which these chips differ: 2 links where they close a ring, else 1."""
        found = []
        for side, wraps, places in zip(self.shape, self.wraps, zip(*coordinates, strict=True), strict=False):
            chips = len(set(places))
            if chips > 1:
                found.append((chips, 2 if wraps and chips == side else 1))
        return found


def _shapes(chip: Chip) -> list[tuple[int, ...]]:
    """Shapes of all slices of a generation, by size."""
    shapes = list(_SMALL[chip.torus])
    if chip.torus == 3:
        sides = range(4, _LARGEST_SIDE + 1, 4)
        shapes += [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c and a * b * c <= chip.max_chips]
    return sorted(shapes, key=lambda shape: (math.prod(shape), shape[-1]))


def topology_of(name: str) -> Topology:
    """The slice that a name such as "v5p:4x4x8" means.

    Raises:
      ValueError: no such generation, or it has no slice of that shape; the message names near ones.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip())
    if not match:
        raise ValueError(f"topology {name!r} is not of the form GENERATION:SHAPE, such as v5e:16x16 or v5p:4x4x8")
    if match[1] not in CHIPS:
        near = difflib.get_close_matches(match[1], CHIPS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"topology {name!r}: no TPU generation {match[1]!r} is known, only {', '.join(CHIPS)}.{hint}")
    chip, shape = CHIPS[match[1]], tuple(int(side) for side in match[2].split("x"))
    shapes = _shapes(chip)
    if shape not in shapes:
        near = sorted(shapes, key=lambda other: abs(math.log(math.prod(other) / max(math.prod(shape), 1))))[:4]
        proposals = ", ".join(Topology(chip, other).name for other in near)
        raise ValueError(
            f"topology {name!r} does not exist: a slice of {chip.name} has {chip.torus} dimensions; near it in size are "
            f"{proposals}"
        )
    return Topology(chip, shape)


def chip_of(topology_name: str) -> Chip:
    """The generation of a slice; raises as `topology_of` does."""
    return topology_of(topology_name).chip
