"""The rules that map logical axes to mesh axes, one table per use, and the meshes they speak of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = dict[str, str | tuple[str, ...] | None]

# Rows over data and fsdp; parameters over fsdp along `embed` and over tensor along what attention and MLP are wide in.
TRAIN_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
}


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with named axes over all devices; one size may be -1 and takes what remains.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = devices if devices is not None else jax.devices()
    known = math.prod(size for size in sizes.values() if size != -1)
    resolved = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(resolved.values()) != len(devices):
        raise ValueError(
            f"mesh {sizes} does not fit {len(devices)} devices: its sizes must multiply to {len(devices)}; "
            f"for example data={len(devices)} and 1 for the others"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(resolved)
    return jax.make_mesh(tuple(resolved.values()), tuple(resolved), axis_types=auto, devices=devices)


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Rows of a batch over the mesh axes of `batch`."""
    return NamedSharding(mesh, PartitionSpec(rules["batch"]))
