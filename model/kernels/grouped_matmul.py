"""Rows that stand in groups, each group times a matrix of its own: what experts are computed with.

On CPUs and GPUs it is `jax.lax.ragged_dot`; in training on TPUs the grouped kernels of
`jax.experimental.pallas.ops.tpu.megablox` (arXiv:2211.15841), because the gradient of XLA's ragged dot by the weights does the
work of a dense product for every group (experiments/LOG.md). Its forward product is a kernel on TPUs too, and unlike ours one
that XLA partitions by itself: what decodes and scores with weights on a mesh takes it.

Axes: R rows, G groups, D width, F width of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

# Rows, contracted and resulting width of a tile, at most, in bfloat16: what fits into the memory of every chip's core.
LARGEST = (512, 2048, 512)


def grouped_matmul(x_RD: jax.Array, w_GDF: jax.Array, sizes_G: jax.Array, platform: str | None) -> jax.Array:
    """The first sizes[0] rows times w[0], the next sizes[1] rows times w[1], and so on.

    Args:
      sizes_G: int32, together at most R.
      platform: of the device that computes this, such as "tpu"; None for whatever it is compiled for, on one device or several.

    Returns:
      [R, F] of x's dtype, added up in float32 or wider. Rows after the last group, and the gradient of x there, hold anything;
      what x and the gradient of the result hold there changes nothing.
    """
    if platform != "tpu":
        return jax.lax.ragged_dot(x_RD, w_GDF, sizes_G, preferred_element_type=x_RD.dtype)
    rows = x_RD.shape[0]
    tile = tiling(x_RD.dtype.itemsize)
    padded = jnp.pad(x_RD, ((0, -rows % tile(rows, 1, 1)[0]), (0, 0)))
    return gmm(padded, w_GDF, sizes_G, x_RD.dtype, tile)[:rows]


@functools.cache
def tiling(itemsize: int) -> Callable[[int, int, int], tuple[int, int, int]]:
    """(rows, contracted width, resulting width) of a product -> those of its tiles, for elements of so many bytes.

    Widths are the multiples of 128, the width of a matrix unit, that leave the least of the last tile empty.
    """

    def fitting(size: int, most: int) -> int:
        return min(range(128, most + 1, 128), key=lambda tile: (-size % tile, -tile))

    def tile(rows: int, width: int, result: int) -> tuple[int, int, int]:
        most_rows, most_width, most_result = LARGEST
        most_rows, most_width = 2 * most_rows // itemsize, 2 * most_width // itemsize
        return min(most_rows, -(-rows // 128) * 128), fitting(width, most_width), fitting(result, most_result)

    return tile
