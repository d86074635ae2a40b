"""Where arrays live: the mesh, the rules that map logical axes to its axes (one table per use), and what they must divide.

Every parameter names the logical axis of each dimension (`model/params.py`), activations are constrained by the same names.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = dict[str, tuple[str, ...]]  # logical axis -> mesh axes

# Neighbours along the last axis exchange most, so that is where a pod's fastest links go.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

# Parameters are scattered along `embed` over all axes along which they would otherwise be copies (ZeRO-3, arXiv:1910.02054),
# and over `tensor` along what attention and MLP are wide in (arXiv:1909.08053). The rows of a batch lie over data, fsdp and
# expert, its tokens over context; outside attention and MLP over tensor too (sequence parallelism, arXiv:2205.05198).
TRAIN_RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "residual": ("context", "tensor"),
    "embed": ("fsdp", "expert", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "expert_embed": ("fsdp", "context"),
    "head_dim": (),
    "layers": (),
}

# To decode, weights are split by heads and width alone, so that no step gathers them.
DECODE_RULES: Rules = {axis: over if over == ("tensor",) else () for axis, over in TRAIN_RULES.items()}


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """The shape of an array and the logical axis of each dimension, None where it is never split."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def partition(array: Dimensions, rules: Rules) -> PartitionSpec:
    """Which mesh axes each dimension lies over.

    Raises:
      ValueError: a logical axis without a rule, or two dimensions on one mesh axis.
    """
    for axis in array.axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"{array.name}: logical axis {axis!r} has no rule; add it to the rules table")
    mesh_axes = [rules[axis] if axis else () for axis in array.axes]
    used = list(itertools.chain(*mesh_axes))
    if len(set(used)) < len(used):
        raise ValueError(f"{array.name}: axes {array.axes} map to mesh axes {mesh_axes}, one of them twice")
    return PartitionSpec(*(axes or None for axes in mesh_axes))


def indivisible(arrays: Iterable[Dimensions], rules: Rules, sizes: dict[str, int]) -> str:
    """The first dimension that the mesh axes it lies over do not divide, in words; empty if there is none."""
    for array in arrays:
        partition(array, rules)
        for length, axis in zip(array.shape, array.axes, strict=True):
            over = {name: sizes[name] for name in rules[axis] if sizes[name] > 1} if axis else {}
            if length % math.prod(over.values()):
                return f"{array.name}: {axis} = {length} does not divide over {_words(over)}"
    return ""


def check_mesh(arrays: Sequence[Dimensions], rules: Rules, sizes: dict[str, int], slices: int = 1) -> None:
    """Raises ValueError where a dimension does not divide or a mesh axis has nothing to split, and proposes a mesh.

    Args:
      arrays: all parameters and activations.
      sizes: of every mesh axis.
      slices: over which the proposed mesh's `data` divides, too.
    """
    # Layers are alike: few shapes are left.
    arrays = list({(array.shape, array.axes): array for array in reversed(arrays)}.values())[::-1]
    problem = mesh_problem(arrays, rules, sizes)
    if problem:
        nearest = propose_mesh(arrays, rules, sizes, slices)
        proposal = f"mesh {_words(nearest)} would do" if nearest else "no mesh of as many devices would do: use fewer"
        raise ValueError(f"mesh {_words(sizes)} does not fit. {problem}. {proposal[0].upper()}{proposal[1:]}.")


def mesh_problem(arrays: Sequence[Dimensions], rules: Rules, sizes: dict[str, int]) -> str:
    """Why the mesh does not fit the arrays, in words; empty if it does."""
    # What only copies or scatters whole layers is left out: every network has a batch and a width.
    split = {name for array in arrays for axis in array.axes if axis not in (None, "batch", "embed") for name in rules[axis]}
    for name in MESH_AXES[2:]:
        if sizes[name] > 1 and name not in split:
            return f"{name}={sizes[name]} has nothing to split: the model has no dimension that lies over {name!r} alone"
    return indivisible(arrays, rules, sizes)


def propose_mesh(arrays: Sequence[Dimensions], rules: Rules, sizes: dict[str, int], slices: int = 1) -> dict[str, int] | None:
    """The mesh of as many devices nearest to `sizes` that fits, None if none does."""
    candidates = sorted(
        factorizations(math.prod(sizes.values()), slices), key=lambda candidate: mesh_distance(candidate, sizes)
    )
    return next((candidate for candidate in candidates if not mesh_problem(arrays, rules, candidate)), None)


def mesh_distance(mesh: dict[str, int], asked: dict[str, int]) -> float:
    """How many doublings and halvings of the sizes asked for lead to a mesh."""
    return round(sum(abs(math.log2(mesh[name] / size)) for name, size in asked.items()), 6)


def factorizations(num_devices: int, slices: int = 1) -> list[dict[str, int]]:
    """Every mesh of so many devices whose `data` divides over the slices of a pod."""
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    found = []
    for rest in itertools.product(divisors, repeat=len(MESH_AXES) - 1):
        if num_devices % (slices * math.prod(rest)) == 0:
            found.append(dict(zip(MESH_AXES, (num_devices // math.prod(rest), *rest), strict=True)))
    return found


def _words(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "of one device"


def resolve_sizes(sizes: dict[str, int], num_devices: int, hosts_of_cpus: int = 0, slices: int = 1) -> dict[str, int]:
    """The size of every mesh axis; one of them may be -1 and takes what remains.

    Args:
      hosts_of_cpus: how many split their CPU into the devices, which the error then proposes to do otherwise.
      slices: of a pod, that hold the devices. The network between them is slow, so that they can only be copies along `data`.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` is no multiple of the number of slices.
    """
    asked = {name: size for name, size in sizes.items() if size != -1}

    def example() -> str:
        meshes = factorizations(num_devices, slices)
        nearest = min(meshes, key=lambda one: (mesh_distance(one, asked), sum(n > 1 for n in one.values())))
        return _words(nearest) if num_devices > 1 else "data=1"

    known = math.prod(size for size in sizes.values() if size != -1)
    resolved = {name: num_devices // known if sizes[name] == -1 else sizes[name] for name in MESH_AXES}
    if math.prod(resolved.values()) != num_devices:
        otherwise = f", or set cpu_devices to {known // hosts_of_cpus}" if hosts_of_cpus and known % hosts_of_cpus == 0 else ""
        raise ValueError(
            f"mesh {_words({name: abs(size) for name, size in sizes.items()})} does not fit {num_devices} devices: its sizes "
            f"must multiply to {num_devices}; for example {example()} and 1 for the others{otherwise}"
        )
    if resolved["data"] % slices:
        raise ValueError(
            f"mesh {_words(resolved)}: data={resolved['data']} does not divide over {slices} slices, and only `data` may lie "
            f"over the slow network between them. Make it a multiple of {slices}; for example {example()} and 1 for the others"
        )
    return resolved


def num_slices(devices: Sequence[Any]) -> int:
    """Of a pod, that these devices belong to."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, laid out so that neighbours on it are neighbours on the pod's network; slices lie along `data`.

    Args:
      sizes: of the axes MESH_AXES; one may be -1 and takes what remains.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` is no multiple of the number of slices.
    """
    devices = list(devices) if devices is not None else jax.devices()
    hosts_of_cpus = jax.process_count() if devices[0].platform == "cpu" else 0
    slices = num_slices(devices)
    shape = tuple(resolve_sizes(sizes, len(devices), hosts_of_cpus, slices).values())
    if slices > 1:
        within = (shape[0] // slices, *shape[1:])
        between = (slices,) + (1,) * len(shape[1:])
        laid_out = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        laid_out = np.array(devices).reshape(shape)
    return Mesh(laid_out, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A mesh and the rules that are in force on it; axes of size 1 are left out of them."""

    mesh: Mesh
    rules: Rules

    @classmethod
    def of(cls, mesh: Mesh, rules: Rules) -> Layout:
        return cls(mesh, {axis: tuple(name for name in over if mesh.shape[name] > 1) for axis, over in rules.items()})

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Over which mesh axes an array with these logical axes lies."""
        return partition(Dimensions("activation", (), axes), self.rules)

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*axes))

    def shards(self, axis: str) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[name] for name in self.rules[axis])


def constrain(x: jax.Array, layout: Layout | None, *axes: str | None) -> jax.Array:
    """x, laid out by its logical axes; without a layout, as it is."""
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(*axes))
