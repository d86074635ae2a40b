"""TPU generations: what one jax device of each can do, which slices of them exist, and how its links carry a collective.

Peak FLOP/s, HBM and interconnect bandwidth and the sizes of pods are those of Google's documentation,
https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x (its two-way figure per chip, over the ports of a chip, is
twice `link_bandwidth` here). What the documentation leaves open is what libtpu 0.0.42 says of itself:

1. `hbm_bytes` is what its compiler allocates from, named when a program does not fit: a little less than the chip has.
   0.0.50 keeps 10 MiB more of a v5p, v6e and tpu7x to itself, which are left out here.
2. A device is what jax computes with: a whole chip, but one of two cores on tpu7x, where both share HBM and links.
   v4 chips are one device only under the chip configuration `megacore`, which TPU VMs start with; libtpu's own default is not.
3. `clock` is the peak over the FLOPs that the MXUs do in a cycle. For v4, v5e, v5p and v6e it is the documented or generally
   quoted 1.05, 1.5, 1.75 and 1.75 GHz; for tpu7x it gives 2.2 GHz, where libtpu's own cost analysis reckons with 1.9.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
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
        Chip("v5p", 3, 6144, 1, int(95.73 * GIB), 2765e9, 100e9, 459e12, 8 * _MXU_128, 2),
        # Two MXUs of 256 x 256, each with two slots in a bundle.
        Chip("v6e", 2, 256, 1, int(31.24 * GIB), 1638e9, 100e9, 918e12, 4 * _MXU_256),
        Chip("tpu7x", 3, 9216, 2, int(94.74 * GIB), 3690e9, 50e9, 1153.5e12, 4 * _MXU_256),
    )
}

# What jax calls a device of each.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}

PLANAR_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Parts of a cube of 4x4x4 chips; larger slices are made of whole cubes.
PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its chips stand on a torus or grid of `shape`."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape_name}"

    @property
    def shape_name(self) -> str:
        """Such as "4x4x8"."""
        return _name(self.shape)

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which dimensions the last chip is linked to the first: where a slice is as wide as a pod, or made of cubes."""
        if self.chip.torus == 2:
            return tuple(side == 16 for side in self.shape)
        return (all(side % 4 == 0 for side in self.shape),) * 3

    def rings(self, coordinates: Collection[Sequence[int]]) -> list[tuple[int, float]]:
        """(chips, links) along every dimension in which these chips differ: 2 links where they close a ring, else 1; a part of
        them where the chips stand apart, for others, which do the same, stand between them and share the links."""
        found = []
        for side, wraps, places in zip(self.shape, self.wraps, zip(*coordinates, strict=True), strict=False):
            lines = sorted(set(places))
            if len(lines) > 1:
                apart = min(after - before for before, after in itertools.pairwise(lines))
                found.append((len(lines), (2 if wraps and apart * len(lines) == side else 1) / apart))
        return found


def chip_of(device_kind: str) -> Chip | None:
    """The generation of a jax device's `device_kind`; None for what is no TPU of CHIPS."""
    return CHIPS[DEVICE_KINDS[device_kind]] if device_kind in DEVICE_KINDS else None


def shapes(chip: Chip) -> list[tuple[int, ...]]:
    """All shapes of a generation's slices, dimensions in increasing order (but for 2x2x1)."""
    if chip.torus == 2:
        return list(PLANAR_SHAPES)
    cubes = chip.max_chips // 64
    whole = [
        (4 * x, 4 * y, 4 * z)
        for x, y in itertools.combinations_with_replacement(range(1, math.isqrt(cubes) + 1), 2)
        for z in range(y, cubes // (x * y) + 1)
    ]
    return [*PARTS_OF_A_CUBE, *whole, *(((1, 1, 1),) if chip.name == "tpu7x" else ())]


def topology_of(name: str) -> Topology:
    """The slice that a name such as "v5p:4x4x8" means.

    Raises:
      ValueError: there is none of that name; proposes the nearest.
    """
    generation, _, shape_text = name.strip().partition(":")
    if generation not in CHIPS:
        near = difflib.get_close_matches(generation, CHIPS, n=1)
        hint = f" Did you mean {near[0]}:{shape_text or '…'}?" if near else ""
        raise ValueError(f"topology {name!r}: {generation!r} is no TPU generation; there are {', '.join(CHIPS)}.{hint}")
    chip = CHIPS[generation]
    known, sizes = shapes(chip), shape_text.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"topology {name!r} is not of the form GENERATION:SIZES; for example {generation}:{_name(known[3])}")
    shape = tuple(map(int, sizes))
    chips = math.prod(shape)
    if shape not in known:
        rule = ", ".join(map(_name, known))
        if chip.torus == 3:
            rule = f"{', '.join(map(_name, PARTS_OF_A_CUBE))}, or three multiples of 4, the smallest first"
        # Nearest in the number of chips, and if that is the same, in shape.
        nearest = min(known, key=lambda other: (abs(math.log(math.prod(other) / chips)), sorted(other) != sorted(shape)))
        raise ValueError(
            f"topology {name!r} does not exist: slices of {generation} are {rule}, up to {chip.max_chips:,} chips. "
            f"The nearest is {generation}:{_name(nearest)}"
        )
    return Topology(chip, shape)


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
