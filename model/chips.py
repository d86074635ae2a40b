"""TPU generations: what one jax device of each can do, and along which links a group of chips communicates.

Peak FLOP/s, HBM and interconnect bandwidth are those of Google's documentation,
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
from collections.abc import Collection, Sequence


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device of a generation.

    Attributes:
      torus: dimensions of its interconnect.
      hbm_bytes: available to a program.
      hbm_bandwidth, link_bandwidth: bytes/s; a link's is one way, and a device's share if devices share a chip's links.
      peak_flops: FLOP/s of bfloat16 matmuls.
      flops_per_cycle: of all MXUs of the device.
      cores: that work as one device.
      configuration: libtpu's name of how chips are divided into devices; empty is its default.
    """

    name: str
    torus: int
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
        Chip("v4", 3, int(30.75 * GIB), 1228e9, 50e9, 275e12, 8 * _MXU_128, 2, "megacore"),
        Chip("v5e", 2, int(15.75 * GIB), 819e9, 50e9, 197e12, 4 * _MXU_128),
        Chip("v5p", 3, int(95.74 * GIB), 2765e9, 100e9, 459e12, 8 * _MXU_128, 2),
        # Two MXUs of 256 x 256, each with two slots in a bundle.
        Chip("v6e", 2, int(31.25 * GIB), 1638e9, 100e9, 918e12, 4 * _MXU_256),
        Chip("tpu7x", 3, int(94.75 * GIB), 3690e9, 50e9, 1153.5e12, 4 * _MXU_256),
    )
}


def chip_of(topology_name: str) -> Chip:
    """The generation of a slice such as "v5p:4x4x8".

    Raises:
      ValueError: it is not known.
    """
    generation = topology_name.partition(":")[0]
    if generation not in CHIPS:
        raise ValueError(f"topology {topology_name!r}: no TPU generation {generation!r} is known, only {', '.join(CHIPS)}")
    return CHIPS[generation]


def wraps(shape: Sequence[int]) -> tuple[bool, ...]:
    """Along which dimensions of a slice the last chip is linked to the first: as wide as a pod, or made of whole cubes."""
    if len(shape) == 2:
        return tuple(side == 16 for side in shape)
    return (all(side % 4 == 0 for side in shape),) * len(shape)


def rings(shape: Sequence[int], coordinates: Collection[Sequence[int]]) -> list[tuple[int, int]]:
    """(chips, links) along every dimension of a slice in which these chips differ: 2 links where they close a ring, else 1."""
    found = []
    for side, closed, places in zip(shape, wraps(shape), zip(*coordinates, strict=True), strict=False):
        chips = len(set(places))
        if chips > 1:
            found.append((chips, 2 if closed and chips == side else 1))
    return found
