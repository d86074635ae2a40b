"""TPU slices by name, such as "v5p:4x4x8": which ones exist, and their chips, virtual machines and names elsewhere.

Facts: https://cloud.google.com/tpu/docs/v5p (and v4, v5e, v6e, tpu7x, runtimes),
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from typing import NamedTuple

from model.config import check

PLANAR_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Parts of a cube of 4x4x4 chips; larger slices are made of whole cubes.
PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Generation:
    """Attributes:
    gke_accelerator: node label `cloud.google.com/gke-tpu-accelerator`.
    max_chips: of one slice.
    accelerator_type: what precedes the count in gcloud's name of a slice; empty where there are no Cloud TPU VMs of it.
    counted_per_chip: what that name counts: chips, or the two TensorCores of each.
    runtime_version: software of a Cloud TPU VM.
    devices_per_chip: as jax sees them.
    """

    gke_accelerator: str
    max_chips: int
    accelerator_type: str = ""
    counted_per_chip: int = 1
    runtime_version: str = ""
    devices_per_chip: int = 1


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", 4096, "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", 256, "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", 6144, "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", 256, "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", 9216, devices_per_chip=2),
}


class Topology(NamedTuple):
    """One slice. A virtual machine of GKE has four of its chips, except that a slice of one chip has one with one."""

    generation: str
    shape: tuple[int, ...]
    chips: int
    vms: int

    @property
    def name(self) -> str:
        """Such as "v5p:4x4x8"."""
        return f"{self.generation}:{self.shape_name}"

    @property
    def shape_name(self) -> str:
        """Such as "4x4x8"."""
        return _name(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * GENERATIONS[self.generation].devices_per_chip


def shapes(generation: str) -> list[tuple[int, ...]]:
    """All shapes of a generation's slices, dimensions in increasing order (but for 2x2x1)."""
    if generation in ("v5e", "v6e"):
        return list(PLANAR_SHAPES)
    cubes = GENERATIONS[generation].max_chips // 64
    whole = [
        (4 * x, 4 * y, 4 * z)
        for x, y in itertools.combinations_with_replacement(range(1, math.isqrt(cubes) + 1), 2)
        for z in range(y, cubes // (x * y) + 1)
    ]
    return [*PARTS_OF_A_CUBE, *whole, *(((1, 1, 1),) if generation == "tpu7x" else ())]


def check_topology(name: str) -> Topology:
    """The slice of a name such as "v5p:4x4x8".

    Raises:
      ValueError: there is none of that name; proposes the nearest.
    """
    generation, _, shape_text = name.partition(":")
    if generation not in GENERATIONS:
        nearest = difflib.get_close_matches(generation, GENERATIONS, n=1)
        raise ValueError(
            f"topology {name!r}: {generation!r} is no TPU generation; there are {', '.join(GENERATIONS)}."
            + (f" Did you mean {nearest[0]}:{shape_text or '…'}?" if nearest else "")
        )
    known = shapes(generation)
    sizes = shape_text.split("x")
    check(
        all(size.isdecimal() and int(size) > 0 for size in sizes),
        f"topology {name!r} is not of the form GENERATION:SIZES; for example {generation}:{_name(known[3])}",
    )
    shape = tuple(map(int, sizes))
    chips = math.prod(shape)
    if shape not in known:
        rule = ", ".join(map(_name, known))
        if len(known[0]) == 3:
            rule = f"{', '.join(map(_name, PARTS_OF_A_CUBE))}, or three multiples of 4, the smallest first"
        # Nearest in the number of chips, and if that is the same, in shape.
        nearest = min(known, key=lambda other: (abs(math.log(math.prod(other) / chips)), sorted(other) != sorted(shape)))
        raise ValueError(
            f"topology {name!r} does not exist: slices of {generation} are {rule}, up to "
            f"{GENERATIONS[generation].max_chips:,} chips. The nearest is {generation}:{_name(nearest)}"
        )
    return Topology(generation, shape, chips, vms=-(-chips // 4))


def accelerator_type(topology: Topology) -> str:
    """gcloud's name of a slice, which counts chips (v5e, v6e) or TensorCores and stands for the most cubic shape of that count.

    Raises:
      ValueError: the name would mean another shape, or the generation has no Cloud TPU VMs.
    """
    facts = GENERATIONS[topology.generation]
    check(bool(facts.accelerator_type), f"{topology.generation} comes through GKE only: launch it with --on=jobset or --on=xpk")
    name = f"{facts.accelerator_type}-{topology.chips * facts.counted_per_chip}"
    default = min((shape for shape in shapes(topology.generation) if math.prod(shape) == topology.chips), key=sum)
    check(
        topology.shape == default,
        f"topology {topology.generation}:{topology.shape_name} has no name outside of GKE, where {name} means "
        f"{topology.generation}:{_name(default)}: choose that one, or --on=jobset or --on=xpk",
    )
    return name


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
