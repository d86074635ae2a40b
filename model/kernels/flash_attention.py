"""Flash attention for TPU, forward and backward, that never visits a tile without an allowed pair (arXiv:2205.14135).

Which pairs are allowed, and which tiles hence are visited, is in `model/kernels/tiles.py`.

Scores are computed transposed, [keys, queries]: maxima and sums then run along sublanes, which is element-wise work, running
statistics are one row each, and the sum over keys comes from the MXU through rows of ones appended to the values.

Keys and values, or queries and their gradients, stay in HBM and are copied tile by tile, the next while one is computed.

Axes: B rows, H query heads, K key-value heads, G = H / K, T queries, S keys, D head dimension.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.tiles import LANES, MASKED, Plan, pad, part_sizes

LOG2_E = math.log2(math.e)
EMPTY = MASKED / 2  # A maximum below it is of a query that sees nothing.
STRIP = 512  # queries whose scores are computed at once
ONES = 16  # rows of ones under the values: one packed bfloat16 register


# --- Inside the kernels ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Logits:
    """From scaled queries and keys to logits in units of log 2.

    `query_scale` is multiplied into the queries beforehand, so that without a cap nothing is left to do to the scores.
    """

    scale: float
    cap: float
    window: int

    @property
    def query_scale(self) -> float:
        return self.scale if self.cap else self.scale * LOG2_E

    def __call__(self, k: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Logits [keys, queries], and the derivative of the cap, None where it is 1."""
        scores = dot(k, q, (1, 1))
        if not self.cap:
            return scores, None
        t = jnp.tanh(scores / self.cap)
        return (self.cap * LOG2_E) * t, 1.0 - t * t

    def mask(self, logits: jax.Array, kv_columns: tuple[jax.Array, jax.Array], q_ids: jax.Array) -> jax.Array:
        """Logits with MASKED in place of pairs that are not allowed."""
        kv_segments, kv_positions = kv_columns
        distance = q_ids[1:2] - kv_positions
        # Queries of padding have segment 0, which `_columns` leaves to no key.
        allowed = (q_ids[0:1] == kv_segments) & (distance >= 0)
        if self.window:
            allowed &= distance < self.window
        return jnp.where(allowed, logits, MASKED)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """float32 product of two matrices over the given axis of each."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _columns(ids: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Segments and positions of keys, int32 [2, n], as columns [n, width] whose lanes are equal; padding becomes -1."""

    def column(row: jax.Array) -> jax.Array:
        return jnp.tile(jnp.broadcast_to(row, (LANES, row.shape[1])).T, (1, width // LANES))

    segments = ids[0:1]
    return column(jnp.where(segments == 0, -1, segments)), column(ids[1:2])


class _Stream:
    """Copies blocks from HBM into two slots in turn: the next is on its way while one is used, across grid steps too.

    The grid's last axis walks over rows of tiles in order. `visited`, a scalar that outlives a step, counts tiles; a tile's
    slot is its number modulo 2. A step finds its first tile on its way if the step before it visited any.
    """

    def __init__(
        self,
        copies: Callable[[Any, Any, Any], list[Any]],
        visited: Any,
        visits: Any,
        parts: tuple[int, int],
        repeats: int = 1,
    ):
        """Args:
        copies: (repetition, tile), slot -> the async copies of that tile.
        visits: of `Visits.scalars`.
        parts: of the row's own block, and of a tile along it.
        repeats: how often each row's tiles are walked over (once for each query head of a key-value head).
        """
        self.copies, self.visited, self.visits, self.parts, self.repeats = copies, visited, visits, parts, repeats
        self.row, self.num_rows = pl.program_id(2), pl.num_programs(2)
        self.first, self.stop, self.full_first, self.full_stop = (self._scalar(self.row, i) for i in range(4))

    def _scalar(self, row: Any, which: int) -> Any:
        return self.visits[(pl.program_id(0) * self.num_rows + row) * (4 + 2 * self.parts[0]) + which]

    def _count(self, row: Any) -> Any:
        return self._scalar(row, 1) - self._scalar(row, 0)

    def _start(self, repeat: Any, tile: Any, slot: Any) -> None:
        for copy in self.copies(repeat, tile, slot):
            copy.start()

    def following(self, repeat: Any, tile: Any) -> tuple[Any, Any, Any]:
        """Whether a tile follows this one without an empty row between them, and its repetition and number."""
        row = jnp.minimum(self.row + 1, self.num_rows - 1)
        in_row, in_repeats = tile + 1 < self.stop, repeat + 1 < self.repeats
        exists = in_row | in_repeats | ((self.row + 1 < self.num_rows) & (self._count(row) > 0))
        next_repeat = jnp.where(in_row, repeat, jnp.where(in_repeats, repeat + 1, 0))
        return exists, next_repeat, jnp.where(in_row, tile + 1, jnp.where(in_repeats, self.first, self._scalar(row, 0)))

    def each_part(self, tile: Any, visit: Callable[[Any, Any], None]) -> None:
        """Calls visit(part of the row's block, part of the tile) for those of a tile that may hold an allowed pair."""
        before = tile * self.parts[1]

        def of_block(part: Any, _: None) -> None:
            first = jnp.maximum(self._scalar(self.row, 4 + 2 * part) - before, 0)
            stop = jnp.minimum(self._scalar(self.row, 5 + 2 * part) - before, self.parts[1])
            jax.lax.fori_loop(first, stop, lambda other, _: visit(part, other), None)

        if self.parts[0] == 1:
            of_block(0, None)
        else:
            jax.lax.fori_loop(0, self.parts[0], of_block, None)

    def run(self, tile_function: Callable[[Any, Any, Any, bool], None]) -> None:
        """Calls tile_function(number, repetition, tile, masked) for each tile of this step's row."""
        count = self._count(self.row)

        @pl.when(self.row == 0)
        def _():
            self.visited[0] = 0

        begin = self.visited[0]

        @pl.when((count > 0) & ((self.row == 0) | (self._count(jnp.maximum(self.row - 1, 0)) == 0)))
        def _():
            self._start(0, self.first, jax.lax.rem(begin, 2))

        def visit(repeat: Any, tile: Any, masked: bool) -> None:
            number = begin + repeat * count + tile - self.first
            slot = jax.lax.rem(number, 2)
            exists, next_repeat, next_tile = self.following(repeat, tile)

            @pl.when(exists)
            def _():
                self._start(next_repeat, next_tile, 1 - slot)

            for copy in self.copies(repeat, tile, slot):
                copy.wait()
            tile_function(number, repeat, tile, masked)

        def walk(repeat: Any, _: None) -> None:
            for start, stop, masked in (
                (self.first, self.full_first, True),
                (self.full_first, self.full_stop, False),
                (self.full_stop, self.stop, True),
            ):
                jax.lax.fori_loop(start, stop, lambda tile, _, masked=masked: visit(repeat, tile, masked), None)

        if self.repeats == 1:
            walk(0, None)
        else:
            jax.lax.fori_loop(0, self.repeats, walk, None)
        self.visited[0] = begin + self.repeats * count


class _Accumulator:
    """Adds to blocks of a float32 array in HBM, in three slots: while one is added to, the next is read and the last written.

    A block that comes again while its sum is still in a slot is read only when that sum has been written.
    """

    def __init__(self, block_of: Callable[[Any, Any], Any], buffer: Any, semaphores: Any, state: Any):
        """Args:
        block_of: (repetition, tile) -> HBM slice.
        semaphores: of reads and of writes, [2, 3].
        state: scalars [5] that outlive a step: whether each slot is being written; 1 + number of the tile read last; 1 + place
          of the tile added to last.
        """
        self.block_of, self.buffer, self.semaphores, self.state = block_of, buffer, semaphores, state

    def reset(self) -> None:
        for i in range(5):
            self.state[i] = 0

    def _read(self, number: Any, repeat: Any, tile: Any) -> Any:
        slot = jax.lax.rem(number, 3)
        return pltpu.make_async_copy(self.block_of(repeat, tile), self.buffer.at[slot], self.semaphores.at[0, slot])

    def _write(self, slot: Any, repeat: Any, tile: Any) -> Any:
        return pltpu.make_async_copy(self.buffer.at[slot], self.block_of(repeat, tile), self.semaphores.at[1, slot])

    def _wait_for_write(self, slot: Any) -> None:
        @pl.when(self.state[slot] == 1)
        def _():
            self._write(slot, 0, 0).wait()  # Any block will do: all are of one size.
            self.state[slot] = 0

    def _start_read(self, number: Any, repeat: Any, tile: Any) -> None:
        self._wait_for_write(jax.lax.rem(number, 3))
        self._read(number, repeat, tile).start()
        self.state[3] = number + 1

    def begin(self, number: Any, place: Any, repeat: Any, tile: Any, following: tuple[Any, Any, Any, Any]) -> None:
        """Starts reading the block of the next tile, and waits for that of this one.

        Args:
          number, place: of this tile; equal places are the same block.
          following: whether a tile follows; its place, repetition and tile.
        """

        @pl.when(self.state[3] != number + 1)
        def _():
            self.drain()
            self._start_read(number, repeat, tile)

        exists, next_place, next_repeat, next_tile = following

        @pl.when(exists & (next_place != place))
        def _():
            @pl.when(next_place + 1 == self.state[4])
            def _():
                self._wait_for_write(jax.lax.rem(number + 2, 3))  # the slot of number - 1

            self._start_read(number + 1, next_repeat, next_tile)

        self._read(number, repeat, tile).wait()

    def end(self, number: Any, place: Any, repeat: Any, tile: Any) -> None:
        """Starts writing the block of this tile back."""
        slot = jax.lax.rem(number, 3)
        self._write(slot, repeat, tile).start()
        self.state[slot] = 1
        self.state[4] = place + 1

    def drain(self) -> None:
        """Waits for all writes."""
        for slot in range(3):
            self._wait_for_write(slot)


def _rows(tile: Any, block: int) -> Any:
    return pl.ds(pl.multiple_of(tile * block, block), block)


def _copier(sources: list[Callable[[Any, Any], Any]], buffers: list[Any], semaphores: Any) -> Callable[..., list[Any]]:
    """copies(repeat, tile, slot) of the `sources`, each a function (repeat, tile) -> HBM slice, into `buffers`."""

    def copies(repeat: Any, tile: Any, slot: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(source(repeat, tile), buffer.at[slot], semaphores.at[n, slot])
            for n, (source, buffer) in enumerate(zip(sources, buffers, strict=True))
        ]

    return copies


def _forward_kernel(
    visits, sinks, q, q_ids, k_hbm, v_hbm, kv_ids_hbm, out, lse,
    k_buffer, v_buffer, ids_buffer, highest, total, semaphores, visited, *, logits: _Logits, block: tuple[int, int], group: int,
):  # fmt: skip
    batch, head = pl.program_id(0), pl.program_id(1)
    kv_head = jax.lax.div(head, group)
    D = q.shape[-1]
    highest[...] = jnp.full(highest.shape, sinks[head] * LOG2_E, jnp.float32)
    # The last rows count exp(logit); a sink is in from the start.
    total[:D] = jnp.zeros((D, block[0]), jnp.float32)
    total[D:] = jnp.where(sinks[head] > EMPTY, jnp.ones((ONES, block[0]), jnp.float32), 0.0)
    sources = [
        lambda _, tile: k_hbm.at[batch, kv_head, _rows(tile, block[1])],
        lambda _, tile: v_hbm.at[batch, kv_head, _rows(tile, block[1])],
        lambda _, tile: kv_ids_hbm.at[batch, :, _rows(tile, block[1])],
    ]
    part_q, part_k = part_sizes(block)
    parts = (block[0] // part_q, block[1] // part_k)
    stream = _Stream(_copier(sources, [k_buffer, v_buffer, ids_buffer], semaphores), visited, visits, parts)

    def add(z: jax.Array, v_and_ones: jax.Array, queries: Any) -> None:
        before = highest[0:1, queries]
        now = jnp.maximum(before, jnp.max(z, axis=0, keepdims=True))
        weights = jnp.exp2(z - now).astype(v_and_ones.dtype)
        total[:, queries] = jnp.exp2(before - now) * total[:, queries] + dot(v_and_ones, weights, (1, 0))
        highest[0:1, queries] = now

    def with_ones(v: jax.Array) -> jax.Array:
        return jnp.concatenate([v.T, jnp.ones((ONES, v.shape[0]), v.dtype)], axis=0)

    def tile(number: Any, _: Any, tile: Any, masked: bool) -> None:
        slot = jax.lax.rem(number, 2)

        def masked_part(of_queries: Any, of_keys: Any) -> None:
            queries, keys = _rows(of_queries, part_q), _rows(of_keys, part_k)
            z = logits(k_buffer[slot, keys], q[0, 0, queries])[0]
            z = logits.mask(z, _columns(ids_buffer[slot, :, keys], part_q), q_ids[0, :, queries])
            add(z, with_ones(v_buffer[slot, keys]), queries)

        if masked:
            stream.each_part(tile, masked_part)
            return
        k, v_and_ones = k_buffer[slot], with_ones(v_buffer[slot])
        # In strips of queries: the products of one are computed while the exponentials of another are.
        strips = [pl.ds(start, min(STRIP, block[0] - start)) for start in range(0, block[0], STRIP)]
        scores = [logits(k, q[0, 0, strip])[0] for strip in strips]
        for z, strip in zip(scores, strips, strict=True):
            add(z, v_and_ones, strip)

    stream.run(tile)
    sees_something = ~(highest[0:1] <= EMPTY)  # a NaN must not look like a query that sees nothing
    normaliser = jnp.where(sees_something, total[D : D + 1], 1.0)
    out[0, 0] = jnp.where(sees_something, total[:D] / normaliser, 0.0).T.astype(out.dtype)
    lse[0, 0] = jnp.where(sees_something, (highest[0:1] + jnp.log2(normaliser)) / LOG2_E, MASKED)


def _backward_kernel(
    visits, k, v, kv_ids, q_hbm, d_out_hbm, statistics_hbm, q_ids_hbm, _, dq_hbm, dk, dv,
    q_buffer, d_out_buffer, statistics_buffer, ids_buffer, dq_buffer, k_transposed, dk_total, dv_total, segments, positions,
    semaphores, visited, dq_semaphores, dq_state, *, logits: _Logits, block: tuple[int, int], group: int,
):  # fmt: skip
    """Gradients of one block of keys and values; those of the queries it meets are added to `dq_hbm`, [B, H, D, T]."""
    batch, kv_head = pl.program_id(0), pl.program_id(1)
    dk_total[...] = jnp.zeros(dk_total.shape, jnp.float32)
    dv_total[...] = jnp.zeros(dv_total.shape, jnp.float32)
    k_transposed[...] = k[0, 0].T
    segments[...], positions[...] = _columns(kv_ids[0], LANES)

    def head(repeat: Any) -> Any:
        return kv_head * group + repeat

    sources = [
        lambda repeat, tile: q_hbm.at[batch, head(repeat), _rows(tile, block[0])],
        lambda repeat, tile: d_out_hbm.at[batch, head(repeat), _rows(tile, block[0])],
        lambda repeat, tile: statistics_hbm.at[batch, head(repeat), :, _rows(tile, block[0])],
        lambda _, tile: q_ids_hbm.at[batch, :, _rows(tile, block[0])],
    ]
    buffers = [q_buffer, d_out_buffer, statistics_buffer, ids_buffer]
    part_q, part_k = part_sizes(block)
    parts = (block[1] // part_k, block[0] // part_q)
    stream = _Stream(_copier(sources, buffers, semaphores), visited, visits, parts, repeats=group)
    dq_sum = _Accumulator(
        lambda repeat, tile: dq_hbm.at[batch, head(repeat), :, _rows(tile, block[0])], dq_buffer, dq_semaphores, dq_state
    )
    num_q_blocks = q_hbm.shape[2] // block[0]
    pl.when(stream.row == 0)(dq_sum.reset)

    def tile(number: Any, repeat: Any, tile: Any, masked: bool) -> None:
        exists, next_repeat, next_tile = stream.following(repeat, tile)
        place, next_place = repeat * num_q_blocks + tile, next_repeat * num_q_blocks + next_tile
        dq_sum.begin(number, place, repeat, tile, (exists, next_place, next_repeat, next_tile))
        slot, dq_slot = jax.lax.rem(number, 2), jax.lax.rem(number, 3)

        def add(keys: Any, queries: Any) -> None:
            q, d_out, statistics = q_buffer[slot, queries], d_out_buffer[slot, queries], statistics_buffer[slot, :, queries]
            z, slope = logits(k[0, 0, keys], q)
            d_weights = dot(v[0, 0, keys], d_out, (1, 1))
            if masked:
                repeats = (1, part_q // LANES)
                columns = jnp.tile(segments[keys], repeats), jnp.tile(positions[keys], repeats)
                z = logits.mask(z, columns, ids_buffer[slot, :, queries])
            weights = jnp.exp2(z - statistics[0:1])
            d_scores = weights * (d_weights - statistics[1:2])
            d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
            dv_total[keys] += dot(weights.astype(d_out.dtype), d_out, (1, 0))
            dk_total[keys] += dot(d_scores, q, (1, 0))
            dq_buffer[dq_slot, :, queries] += dot(k_transposed[:, keys], d_scores, (1, 0))

        if masked:
            stream.each_part(tile, lambda of_keys, of_queries: add(_rows(of_keys, part_k), _rows(of_queries, part_q)))
        else:
            add(slice(None), slice(None))
        dq_sum.end(number, place, repeat, tile)

    stream.run(tile)
    pl.when(stream.row == stream.num_rows - 1)(dq_sum.drain)
    dk[0, 0] = (dk_total[...] * (logits.scale / logits.query_scale)).astype(dk.dtype)
    dv[0, 0] = dv_total[...].astype(dv.dtype)


# --- Calling them ---------------------------------------------------------------------------------------------------------

_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=100 * 1024 * 1024)


def _block(shape: tuple[int, ...], of_head: bool, along_lanes: bool = False) -> pl.BlockSpec:
    """Of arrays [B, heads, ...] or [B, ...]: the block of the grid's step (b, h, i)."""

    def index(b: Any, h: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return (b, *((h,) if of_head else ()), *((0, i) if along_lanes else (i, 0)))

    return pl.BlockSpec((1, *((1,) if of_head else ()), *shape), index)


_HBM = pl.BlockSpec(memory_space=pl.ANY)


def _cost(plan: Plan, heads: int, dots: int, *arrays: jax.Array) -> pl.CostEstimate:
    """An upper estimate: as if half of all tiles were visited."""
    pairs = plan.q_ids.shape[0] * heads * plan.q_ids.shape[2] * plan.kv_ids.shape[2] // 2
    head_dim = arrays[0].shape[-1]
    return pl.CostEstimate(
        flops=2 * dots * pairs * head_dim, transcendentals=pairs, bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays)
    )


def _forward(plan: Plan, logits: _Logits, q, k, v, sinks, dtype) -> tuple[jax.Array, jax.Array]:
    B, H, T, D = q.shape
    bq, bk = block = plan.sizes.forward
    kernel = functools.partial(_forward_kernel, logits=logits, block=block, group=H // k.shape[1])
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, H, T // bq),
            in_specs=[_block((bq, D), True), _block((2, bq), False, along_lanes=True), _HBM, _HBM, _HBM],
            out_specs=[_block((bq, D), True), _block((1, bq), True, along_lanes=True)],
            scratch_shapes=[
                pltpu.VMEM((2, bk, D), k.dtype),
                pltpu.VMEM((2, bk, D), v.dtype),
                pltpu.VMEM((2, 2, bk), jnp.int32),
                pltpu.VMEM((8, bq), jnp.float32),
                pltpu.VMEM((D + ONES, bq), jnp.float32),
                pltpu.SemaphoreType.DMA((3, 2)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32)],
        compiler_params=_PARAMS,
        cost_estimate=_cost(plan, H, 2, q, q, k, v),
        name="flash_forward",
    )(plan.forward.scalars(), sinks, q, plan.q_ids, k, v, plan.kv_ids)


def _backward(plan: Plan, logits: _Logits, q, k, v, d_out, statistics, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    B, K, S, D = k.shape
    H, T = q.shape[1:3]
    bq, bk = block = plan.sizes.backward
    dq = jnp.zeros((B, H, D, T), jnp.float32)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, logits=logits, block=block, group=H // K),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, S // bk),
            in_specs=[
                _block((bk, D), True),
                _block((bk, D), True),
                _block((2, bk), False, along_lanes=True),
                *[_HBM] * 5,
            ],
            out_specs=[_HBM, _block((bk, D), True), _block((bk, D), True)],
            scratch_shapes=[
                pltpu.VMEM((2, bq, D), q.dtype),
                pltpu.VMEM((2, bq, D), d_out.dtype),
                pltpu.VMEM((2, 2, bq), jnp.float32),
                pltpu.VMEM((2, 2, bq), jnp.int32),
                pltpu.VMEM((3, D, bq), jnp.float32),
                pltpu.VMEM((D, bk), k.dtype),
                pltpu.VMEM((bk, D), jnp.float32),
                pltpu.VMEM((bk, D), jnp.float32),
                pltpu.VMEM((bk, LANES), jnp.int32),
                pltpu.VMEM((bk, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA((4, 2)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 3)),
                pltpu.SMEM((5,), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(dq.shape, dq.dtype),
            jax.ShapeDtypeStruct(k.shape, dtype),
            jax.ShapeDtypeStruct(v.shape, dtype),
        ],
        input_output_aliases={8: 0},
        compiler_params=_PARAMS,
        cost_estimate=_cost(plan, H, 5, q, d_out, k, v, k, v, dq, dq),
        name="flash_backward",
    )(plan.backward.scalars(), k, v, plan.kv_ids, q, d_out, statistics, plan.q_ids, dq)
    return (dq * logits.scale).swapaxes(2, 3).astype(dtype), dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(plan: Plan, logits: _Logits, dtype: Any, q, k, v, sinks) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(plan, logits, dtype, q, k, v, sinks)[0]


def _attend_forward(plan: Plan, logits: _Logits, dtype: Any, q, k, v, sinks):
    out, lse = _forward(plan, logits, _scaled(q, logits), k, v, sinks, dtype)
    # Named for remat: with these kept, the backward pass need not run the kernel again.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (plan, q, k, v, sinks, out, lse)


def _attend_backward(logits: _Logits, _: Any, residuals, cotangents):
    plan, q, k, v, sinks, out, lse = residuals
    d_out, d_lse = cotangents
    # d score = weight x (d weight - sum over keys of weight x d weight), whose sum is out . d_out; lse adds its own.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, None] - d_lse
    dq, dk, dv = _gradients(plan, logits, q, k, v, d_out.astype(q.dtype), lse, delta, q.dtype)
    weight_of_sink = jnp.where(lse <= EMPTY, 0.0, jnp.exp(sinks[:, None, None] - lse))
    return None, dq, dk, dv, -jnp.sum(weight_of_sink * delta, axis=(0, 2, 3))


def _scaled(q: jax.Array, logits: _Logits) -> jax.Array:
    return (q.astype(jnp.float32) * logits.query_scale).astype(q.dtype)


def _gradients(plan: Plan, logits: _Logits, q, k, v, d_out, lse, delta, dtype):
    # The weights of queries that see nothing are then exp2(MASKED - 0) = 0.
    base = jnp.where(lse <= EMPTY, 0.0, lse * LOG2_E)
    statistics = jnp.concatenate([base, delta], axis=2)
    return _backward(plan, logits, _scaled(q, logits), k, v, d_out, statistics, dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def flash_attention(
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    plan: Plan,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    cap: float = 0.0,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(cap(scale * q k^T)) v over the allowed pairs of `plan`; sums and softmax are float32.

    Args:
      sinks_H: float32 [H], a logit per head that takes part in the softmax without a value (arXiv:2309.17453).
      cap: logits become cap * tanh(logits / cap); 0 is off.
      out_dtype: by default that of q.

    Returns:
      [B, H, T, D] of `out_dtype`, and the log-sum-exp of each query's logits (its sink among them), float32 [B, H, T]; both are
      differentiable. A query that sees nothing and has no sink gets 0 and MASKED.

    Raises:
      ValueError: shapes that do not fit.
    """
    _, H, T, D = q_BHTD.shape
    K = k_BKSD.shape[1]
    if H % K or k_BKSD.shape != v_BKSD.shape or k_BKSD.shape[3] != D:
        raise ValueError(
            f"queries {q_BHTD.shape}, keys {k_BKSD.shape} and values {v_BKSD.shape} do not fit: heads must be a multiple of "
            "key-value heads, and all head dimensions equal"
        )
    sinks = jnp.full((H,), MASKED, jnp.float32) if sinks_H is None else sinks_H.astype(jnp.float32)
    q = pad(q_BHTD, plan.q_ids.shape[2])
    k, v = (pad(x, plan.kv_ids.shape[2]) for x in (k_BKSD, v_BKSD))
    out_and_lse: tuple[jax.Array, jax.Array] = _attend(
        plan, _Logits(scale, cap, plan.window), jnp.dtype(out_dtype or q.dtype), q, k, v, sinks
    )
    return out_and_lse[0][:, :, :T], out_and_lse[1][:, :, 0, :T]


def flash_gradients(
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    plan: Plan,
    d_out_BHTD: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    *,
    scale: float,
    cap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What some of the keys add to the gradients of an attention over more keys than these (ring attention).

    Args:
      lse_BHT: log-sum-exp over all keys.
      delta_BHT: out . d_out, over all keys.

    Returns:
      float32 gradients of q, of these keys and of their values.
    """
    T, S = q_BHTD.shape[2], k_BKSD.shape[2]
    q, d_out = (pad(x, plan.q_ids.shape[2]) for x in (q_BHTD, d_out_BHTD))
    k, v = (pad(x, plan.kv_ids.shape[2]) for x in (k_BKSD, v_BKSD))
    lse, delta = (pad(x[:, :, :, None], plan.q_ids.shape[2]).swapaxes(2, 3) for x in (lse_BHT, delta_BHT))
    dq, dk, dv = _gradients(plan, _Logits(scale, cap, plan.window), q, k, v, d_out, lse, delta, jnp.float32)
    return dq[:, :, :T], dk[:, :, :S], dv[:, :, :S]
