"""The matmul speed that the devices really reach, which MFU is measured against where no data sheet tells."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec


def matmul_peak(mesh: Mesh, dtype: str, size: int = 1024, trials: int = 8) -> float:
    """FLOP/s of [size, size] matmuls, one on every device of the mesh at the same time: the best of some trials."""
    one_each = PartitionSpec(mesh.axis_names)
    rows = mesh.devices.size * size

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=one_each, out_specs=one_each)
    def multiply(a: jax.Array) -> jax.Array:
        return a @ a

    a = jax.device_put(jnp.full((rows, size), 1 / size, dtype), jax.NamedSharding(mesh, one_each))
    multiply(a).block_until_ready()
    seconds = []
    for _ in range(trials):
        begin = time.perf_counter()
        multiply(a).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * rows * size**2 / min(seconds)
