"""Attention of a few new tokens to a paged cache for TPU: what `paged_attention` computes, at the speed of memory.

One step of the grid is a row and a group of its key-value heads. The pages that some query of the row sees, and no others, are
copied from HBM in blocks of several (arXiv:2309.06180), the next block, of this row or the next, while one is attended to; a
running softmax (arXiv:1805.02867) joins them. Page tables and positions are scalars, known before a step begins.

A page holds all heads side by side, so a copy takes as much of it as the group has heads. There are two groups or more where
heads can be divided, for the two cores of v4 and v5p: each then reads half of every page, and lengths need no balance.
The queries of one key-value head are the rows of one product, so keys are not repeated.

Axes: B rows, T new tokens, H query heads, K key-value heads, X = H / K, M = T * X padded to whole registers, P pages of a row,
N pages of the pool, S slots of a page, D head dimension, V dimensions of a value.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.flash_attention import EMPTY, LOG2_E, dot
from model.kernels.kv_pages import Int8Pages, Pages
from model.kernels.tiles import LANES, MASKED, round_up

BLOCK_SLOTS, BLOCK_PAGES = 512, 16  # of a block, at most
BUFFER_BYTES = 8 << 20  # of the two blocks that are in VMEM at once; v4 has 16 MiB
LOGITS = 1 << 19  # of one key-value head and a block, at most: 2 MiB
QUERIES = 1024  # of 16 bits that a step of the grid takes, at most; of 640 dimensions, with all they need, 13 MiB
SUBLANES = 8


def slots_multiple(dtype: str) -> int:
    """Slots of a register: what the size of a page of `dtype` must be a multiple of."""
    return 4 * SUBLANES // jnp.dtype(dtype).itemsize


def needed_pages(positions_BT: jax.Array, page_size: int, window: int = 0) -> tuple[jax.Array, jax.Array]:
    """int32 [B]: the first page of its table that a row's queries see, and the page after the last; padding sees none.

    Args:
      positions_BT: int32, negative for padding.
      window: a query sees slots at distances below it; 0 is no limit.
    """
    stop_B = (jnp.max(positions_BT, axis=1) + page_size) // page_size
    first_B = jnp.zeros_like(stop_B)
    if window:
        earliest_B = jnp.min(jnp.where(positions_BT < 0, jnp.iinfo(jnp.int32).max, positions_BT), axis=1)
        first_B = jnp.minimum(jnp.maximum(earliest_B - window + 1, 0) // page_size, stop_B)
    return first_B, stop_B


def _bytes_of_head(pages: tuple[Pages, ...]) -> int:
    """Of one page and key-value head in VMEM."""
    return sum(x.dtype.itemsize * x.shape[2] * round_up(x.shape[3], LANES) for x in jax.tree.leaves(pages))


def fits(queries: int, dtype: jnp.dtype) -> bool:
    """Whether a step of the grid has room for so many queries of one key-value head: their tokens times X.

    Products of float32 are made of several of bfloat16, and need more than twice as much.
    """
    return round_up(queries, SUBLANES) * dtype.itemsize**2 <= 4 * QUERIES


def block_shape(pages: tuple[Pages, ...], queries: int, dtype: jnp.dtype, pages_of_row: int) -> tuple[int, int]:
    """Pages of a block and heads of a group: the most heads that leave two groups or more, then the most pages that fit.

    Args:
      queries: of a row and a key-value head, of `dtype`.
    """
    K, S = pages[0].shape[1:3]
    M = round_up(queries, SUBLANES)
    room = BUFFER_BYTES // (2 * _bytes_of_head(pages))
    heads = max((n for n in range(1, max(1, K // 2) + 1) if K % n == 0 and n <= room and fits(n * M, dtype)), default=1)
    fitting = min(BLOCK_SLOTS // S, LOGITS // (M * S), room // heads, BLOCK_PAGES)
    return max(1, min(fitting, pages_of_row)), heads


def _kernel(
    ranges, table, positions, q, sinks, *refs,
    arrays: int, int8: bool, tokens: int, queries: int, scale: float, window: int, cap: float,
):  # fmt: skip
    """The output of a row and a group of heads.

    Args:
      ranges, table, positions: scalars: of `needed_pages` [B * 2], [B * P], [B * T].
      q: [1, 1, heads, M, D], query heads of one token side by side.
      sinks: [1, heads, M, LANES], MASKED without sinks.
      refs: the arrays of the pool, in HBM, each followed by its scales if they are `int8`; the output [1, 1, heads, M, V]; two
        blocks of pages for each array, and the rest.
      queries: X.
    """
    sources, out, buffers = refs[:arrays], refs[arrays], refs[arrays + 1 : 2 * arrays + 1]
    highest, total, sums, semaphores, counted = refs[2 * arrays + 1 :]
    group, row, num_rows = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    _, block_pages, heads, page_size, D = buffers[0].shape
    M, V = sums.shape[1:]
    block_slots, table_width = block_pages * page_size, table.shape[0] // num_rows

    def num_blocks(row: Any) -> Any:
        return pl.cdiv(ranges[2 * row + 1] - ranges[2 * row], block_pages)

    def copies(row: Any, block: Any, slot: Any, action: str) -> None:
        """Starts, or waits for, the copies of a block's pages."""
        begin, stop = ranges[2 * row] + block * block_pages, ranges[2 * row + 1]
        for i in range(block_pages):

            @pl.when(begin + i < stop)
            def _(i: int = i) -> None:
                page = table[row * table_width + begin + i]
                for n, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
                    part = source.at[page, pl.ds(group * heads, heads)]
                    getattr(pltpu.make_async_copy(part, buffer.at[slot, i], semaphores.at[n, slot]), action)()

    @pl.when(row == 0)
    def _() -> None:
        counted[0] = 0
        # Slots that no copy has reached are multiplied by a weight of 0, which a NaN would survive.
        buffers[-1][...] = jnp.zeros(buffers[-1].shape, buffers[-1].dtype)

    begin, count = counted[0], num_blocks(row)

    # Otherwise its first block is on its way: the step before it has asked for it.
    @pl.when((count > 0) & ((row == 0) | (num_blocks(jnp.maximum(row - 1, 0)) == 0)))
    def _() -> None:
        copies(row, 0, jax.lax.rem(begin, 2), "start")

    highest[...] = sinks[0] * LOG2_E
    total[...] = jnp.where(sinks[0] > EMPTY, 1.0, 0.0)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)
    row_of_M = jax.lax.broadcasted_iota(jnp.int32, (M, 1), 0)
    position_of_M = jnp.full((M, 1), -1, jnp.int32)
    for t in range(tokens):
        of_token = (row_of_M >= t * queries) & (row_of_M < (t + 1) * queries)
        position_of_M = jnp.where(of_token, positions[row * tokens + t], position_of_M)

    stride = 2 if int8 else 1

    def scales(buffer: Any, slot: Any, head: int) -> jax.Array:
        """[1, slots of a block]"""
        return jnp.concatenate([buffer[slot, i, head, :, :page_size] for i in range(block_pages)], axis=1)

    def attend(block: Any, _: None) -> None:
        slot = jax.lax.rem(begin + block, 2)
        in_row = block + 1 < count
        next_row = jnp.where(in_row, row, jnp.minimum(row + 1, num_rows - 1))

        @pl.when(in_row | ((row + 1 < num_rows) & (num_blocks(next_row) > 0)))
        def _() -> None:
            copies(next_row, jnp.where(in_row, block + 1, 0), 1 - slot, "start")

        copies(row, block, slot, "wait")
        first_slot = (ranges[2 * row] + block * block_pages) * page_size
        distance = position_of_M - first_slot - jax.lax.broadcasted_iota(jnp.int32, (M, block_slots), 1)
        seen = distance >= 0
        if window:
            seen &= distance < window
        for head in range(heads):
            k = buffers[0][slot, :, head].reshape(block_slots, D).astype(q.dtype)
            v = buffers[-stride][slot, :, head].reshape(block_slots, -1)[:, :V].astype(q.dtype)
            logits = dot(q[0, 0, head], k, (1, 1)) * (scale if cap else scale * LOG2_E)
            if int8:
                logits *= scales(buffers[1], slot, head)
            if cap:
                logits = (cap * LOG2_E) * jnp.tanh(logits / cap)
            logits = jnp.where(seen, logits, MASKED)
            before = highest[head, :, :1]
            now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.where(seen, jnp.exp2(logits - now), 0.0)
            fade = jnp.exp2(before - now)
            highest[head] = jnp.broadcast_to(now, (M, LANES))
            total[head] = total[head] * fade + jnp.sum(weights, axis=1, keepdims=True)
            if int8:
                weights *= scales(buffers[-1], slot, head)
            sums[head] = sums[head] * fade + dot(weights.astype(v.dtype), v, (1, 0))

    jax.lax.fori_loop(0, count, attend, None)
    counted[0] = begin + count
    normaliser = total[:, :, :1]
    out[0, 0] = jnp.where(normaliser == 0, 0.0, sums[...] / jnp.where(normaliser == 0, 1.0, normaliser)).astype(out.dtype)


def paged_decode(
    q_BTHD: jax.Array,
    pages: tuple[Pages, ...],
    table_BP: jax.Array,
    positions_BT: jax.Array,
    sinks_H: jax.Array | None = None,
    *,
    width: int,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> jax.Array:
    """softmax(cap(scale * q k^T)) v over slots 0..position of each query's row; the softmax is float32.

    Args:
      pages: keys and values of the pool, [N, K, S, D or width] or wider by columns of zeros, or one array of keys whose first
        columns are the values; S a multiple of `slots_multiple`; int8 ones are scaled as they are used.
      table_BP: int32, slot s of page table[b, p] holds position p * S + s of row b.
      positions_BT: int32; at a negative one is padding, which gets 0. T is small: a row's queries must be ones that `fits`.
      sinks_H: a logit per head that takes part in the softmax without a value (arXiv:2309.17453).
      window: a query sees slots at distances below it; 0 is no limit.

    Returns:
      [B, T, H, width] of q's dtype.
    """
    B, T, H = q_BTHD.shape[:3]
    K, S, D = pages[0].shape[1:]
    q_BTHD = jnp.pad(q_BTHD, ((0, 0), (0, 0), (0, 0), (0, D - q_BTHD.shape[-1])))
    X = H // K
    M = round_up(T * X, SUBLANES)
    V = min(pages[-1].shape[-1], round_up(width, LANES))
    arrays = jax.tree.leaves(pages)
    block_pages, heads = block_shape(pages, T * X, q_BTHD.dtype, table_BP.shape[1])
    groups = K // heads

    def by_group(x_BTHD: jax.Array, rows: int) -> jax.Array:
        """[B, groups, heads, M, D]"""
        x = x_BTHD.reshape(rows, T, groups, heads, X, -1).transpose(0, 2, 3, 1, 4, 5).reshape(rows, groups, heads, T * X, -1)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, M - T * X), (0, 0)))

    sinks_H = jnp.full(H, MASKED, jnp.float32) if sinks_H is None else sinks_H.astype(jnp.float32)
    sinks = by_group(jnp.broadcast_to(sinks_H[:, None], (1, T, H, LANES)), 1)[0]

    def block(rows: int, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, heads, rows, columns), lambda g, b, *_: (b, g, 0, 0, 0))

    tokens = B * table_BP.shape[1] * S // 2
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            arrays=len(arrays),
            int8=isinstance(pages[0], Int8Pages),
            tokens=T,
            queries=X,
            scale=scale,
            window=window,
            cap=cap,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(groups, B),
            in_specs=[
                block(M, D),
                pl.BlockSpec((1, heads, M, LANES), lambda g, *_: (g, 0, 0, 0)),
                *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(arrays),
            ],
            out_specs=block(M, V),
            scratch_shapes=[
                *(pltpu.VMEM((2, block_pages, heads, *x.shape[2:]), x.dtype) for x in arrays),
                pltpu.VMEM((heads, M, LANES), jnp.float32),
                pltpu.VMEM((heads, M, LANES), jnp.float32),
                pltpu.VMEM((heads, M, V), jnp.float32),
                pltpu.SemaphoreType.DMA((len(arrays), 2)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, groups, heads, M, V), q_BTHD.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # As if half of every row's table were filled.
        cost_estimate=pl.CostEstimate(
            flops=2 * H * T * tokens * (D + V),
            transcendentals=H * T * tokens,
            bytes_accessed=tokens * K * _bytes_of_head(pages) // S,
        ),
        name="paged_decode",
    )(
        jnp.stack(needed_pages(positions_BT, S, window), axis=1).reshape(-1),
        table_BP.reshape(-1),
        positions_BT.reshape(-1),
        by_group(q_BTHD, B),
        sinks,
        *arrays,
    )
    out = out[:, :, :, : T * X, :width].reshape(B, groups, heads, T, X, width)
    return out.transpose(0, 3, 1, 2, 4, 5).reshape(B, T, H, width)
