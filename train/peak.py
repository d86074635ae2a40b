"""The matmul speed that MFU is measured against: of a TPU's data sheet, or what other devices really reach."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from model.chips import chip_of

SHORTEST_TRIAL = 0.01  # seconds; below, dispatching the program would count


def peak_flops(devices: Sequence[Any], dtype: str) -> float:
    """FLOP/s of all these jax devices together: for TPUs that of bfloat16, whatever the dtype.

    What has to be measured is measured once in a process, however many runs it makes.
    """
    chip = chip_of(devices[0].device_kind)
    return len(devices) * chip.peak_flops if chip else _measured(Mesh(np.array(devices), ("local",)), dtype)


@functools.cache
def _measured(mesh: Mesh, dtype: str) -> float:
    return matmul_peak(mesh, dtype)


def matmul_peak(mesh: Mesh, dtype: str, size: int = 1024, trials: int = 8) -> float:
    """FLOP/s of chains of [size, size] matmuls on every device of the mesh at the same time: the best of some trials."""
    one_each = PartitionSpec(mesh.axis_names)
    rows = mesh.devices.size * size

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(one_each, PartitionSpec()), out_specs=one_each)
    def multiply(a: jax.Array, length: int) -> jax.Array:
        return jax.lax.fori_loop(0, length, lambda _, product: product @ a, a)

    a = jax.device_put(jnp.full((rows, size), 1 / size, dtype), jax.NamedSharding(mesh, one_each))

    def seconds(length: int) -> float:
        begin = time.perf_counter()
        multiply(a, length).block_until_ready()
        return time.perf_counter() - begin

    length = 1
    while seconds(length) < SHORTEST_TRIAL or seconds(length) < SHORTEST_TRIAL:  # the first call compiles
        length *= 4
    return 2 * rows * size**2 * length / min(seconds(length) for _ in range(trials))
