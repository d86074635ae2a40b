"""Flash attention for TPU, forward and backward, that never visits a tile without an allowed pair (arXiv:2205.14135).

A pair (query, key) is allowed if both are of the same segment, the key's position is not later, and, with a window, the
distance is below it. Segment 0 is padding: it sees nothing, nobody sees it, and its output is 0.

A *tile* is a block of queries times a block of keys. For every row (and column) of tiles, `make_plan` computes on the device
the range of tiles that hold an allowed pair and, within it, the range of tiles in which every pair is allowed: four integers,
from the extents of ids and positions in each block. Where segments lie one after the other along a row, as packing and zigzag
sharding lay them, the range holds exactly the tiles with an allowed pair; in any other order it holds at least those. The
ranges are scalars that bound the inner loop of the kernels, so a tile outside costs nothing, and ids are compared only in
tiles that are not wholly allowed.

Scores are computed transposed, [keys, queries]: maxima and sums then run along sublanes, which is element-wise work, running
statistics are one row each, and the sum over keys comes from the MXU through rows of ones appended to the values.

Keys and values, or queries and their gradients, stay in HBM and are copied tile by tile, the next while one is computed.

Axes: B rows, H query heads, K key-value heads, G = H / K, T queries, S keys, D head dimension.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2_E = math.log2(math.e)
# Large enough that exp2 underflows to exactly 0, small enough that a difference of two is finite.
MASKED = -1e30
EMPTY = MASKED / 2  # A maximum below it is of a query that sees nothing.
STRIP = 512  # queries whose scores are computed at once
BLOCK_SIZES_FILE = Path(__file__).with_name("block_sizes.json")  # made by benchmarks/attention_schedule.py --tune
ONES = 16  # rows of ones under the values: one packed bfloat16 register


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """(queries, keys) of a tile for each kernel; multiples of 128."""

    forward: tuple[int, int] = (1024, 1024)
    backward: tuple[int, int] = (1024, 1024)

    @classmethod
    def of_chip(cls, chip: str) -> BlockSizes:
        """The sizes with the fewest bundles on a generation, such as "v5e", for one long document.

        Raises:
          ValueError: a generation that is not in the table.
        """
        table = json.loads(BLOCK_SIZES_FILE.read_text())
        if chip not in table:
            raise ValueError(f"no block sizes for {chip!r}: block_sizes.json has {sorted(table)}")
        return cls(**{name: (q, kv) for name, (q, kv) in table[chip].items()})


@flax.struct.dataclass
class Visits:
    """Ranges of tiles along one side, for each block of the other; int32 [B, num_blocks], stops are exclusive.

    Attributes:
      first, stop: the tiles that are visited.
      full_first, full_stop: those of them in which every pair is allowed.
    """

    first: jax.Array
    stop: jax.Array
    full_first: jax.Array
    full_stop: jax.Array

    def scalars(self) -> jax.Array:
        """int32 [B * num_blocks * 4], as the kernels read it."""
        return jnp.stack([self.first, self.stop, self.full_first, self.full_stop], axis=-1).reshape(-1)


@flax.struct.dataclass
class Plan:
    """What all layers and heads of a step share.

    Attributes:
      q_ids, kv_ids: int32 [B, 2, T or S rounded up]: segments and positions.
      forward: keys that each block of queries visits.
      backward: queries that each block of keys visits.
    """

    q_ids: jax.Array
    kv_ids: jax.Array
    forward: Visits
    backward: Visits
    window: int = flax.struct.field(pytree_node=False)
    sizes: BlockSizes = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class _Extents:
    """Of each block of tokens, int32 [B, num_blocks]: smallest and largest segment but padding, the positions of each of these
    two segments and of all, and whether there is padding."""

    segments: tuple[jax.Array, jax.Array]
    of_first: tuple[jax.Array, jax.Array]
    of_last: tuple[jax.Array, jax.Array]
    of_all: tuple[jax.Array, jax.Array]
    padded: jax.Array

    def positions(self, segment: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Bounds on the positions of `segment` in the block; exact for its first and last segment."""

        def choose(first: jax.Array, last: jax.Array, other: jax.Array) -> jax.Array:
            return jnp.where(segment == self.segments[0], first, jnp.where(segment == self.segments[1], last, other))

        low, high = (choose(*bounds) for bounds in zip(self.of_first, self.of_last, self.of_all, strict=True))
        return low, high


def _extents(ids: jax.Array, block: int) -> _Extents:
    segments, positions = ids.reshape(ids.shape[0], 2, -1, block).swapaxes(0, 1)
    highest = jnp.iinfo(jnp.int32).max

    def bounds(x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.min(jnp.where(where, x, highest), axis=-1), jnp.max(jnp.where(where, x, -1), axis=-1)

    real = segments > 0
    first, last = bounds(segments, real)
    of_first, of_last = (bounds(positions, segments == segment[..., None]) for segment in (first, last))
    return _Extents((first, last), of_first, of_last, bounds(positions, real), ~jnp.all(real, axis=-1))


def _tiles(q_ids: jax.Array, kv_ids: jax.Array, window: int, block: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Whether each tile may hold an allowed pair, and whether all its pairs are allowed: bool [B, T / bq, S / bk] each."""
    q = jax.tree.map(lambda x: x[:, :, None], _extents(q_ids, block[0]))
    k = jax.tree.map(lambda x: x[:, None, :], _extents(kv_ids, block[1]))
    first, last = jnp.maximum(q.segments[0], k.segments[0]), jnp.minimum(q.segments[1], k.segments[1])
    (q_low, q_high), (k_low, k_high) = q.positions(first), k.positions(first)
    near = q_low - k_high < window if window else True
    some = (first < last) | ((first == last) & (q_high >= k_low) & near)
    one_segment = (q.segments[0] == q.segments[1]) & (k.segments[0] == k.segments[1]) & (first == last)
    all_near = q_high - k_low < window if window else True
    every = one_segment & ~q.padded & ~k.padded & (q_low >= k_high) & all_near
    return some, every


def _visits(some: jax.Array, every: jax.Array) -> Visits:
    """Ranges along the last axis; `full` is left empty where what is wholly allowed is no single range."""
    length = some.shape[-1]

    def bounds(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(x, axis=-1), length - jnp.argmax(x[..., ::-1], axis=-1)

    found = jnp.any(some, axis=-1)
    first, stop = (jnp.where(found, x, 0) for x in bounds(some))
    full_first, full_stop = bounds(every)
    is_range = jnp.sum(every, axis=-1) == full_stop - full_first
    full_first, full_stop = (jnp.where(is_range, x, stop) for x in (full_first, full_stop))
    return Visits(*(x.astype(jnp.int32) for x in (first, stop, full_first, full_stop)))


def make_plan(
    q_segments: jax.Array,
    q_positions: jax.Array,
    kv_segments: jax.Array,
    kv_positions: jax.Array,
    window: int = 0,
    sizes: BlockSizes | None = None,
) -> Plan:
    """The plan of one attention pattern, for every layer and head that has it.

    Args:
      q_segments, q_positions: int32 [B, T], not negative; segment 0 is padding.
      kv_segments, kv_positions: int32 [B, S].
      window: a query sees keys at distances below it; 0 is no limit.
    """
    sizes = sizes or BlockSizes()
    sizes = BlockSizes(
        **{
            name: (min(q, _round_up(q_segments.shape[1], LANES)), min(kv, _round_up(kv_segments.shape[1], LANES)))
            for name, (q, kv) in dataclasses.asdict(sizes).items()
        }
    )
    q_multiple, kv_multiple = (math.lcm(*(size[i] for size in dataclasses.astuple(sizes))) for i in (0, 1))

    def ids(segments: jax.Array, positions: jax.Array, multiple: int) -> jax.Array:
        x = jnp.stack([segments, positions], axis=1).astype(jnp.int32)
        return _pad(x, _round_up(x.shape[2], multiple))

    q_ids, kv_ids = ids(q_segments, q_positions, q_multiple), ids(kv_segments, kv_positions, kv_multiple)
    some, every = _tiles(q_ids, kv_ids, window, sizes.backward)
    return Plan(
        q_ids=q_ids,
        kv_ids=kv_ids,
        forward=_visits(*_tiles(q_ids, kv_ids, window, sizes.forward)),
        backward=_visits(some.swapaxes(1, 2), every.swapaxes(1, 2)),
        window=window,
        sizes=sizes,
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Zeros along the third axis."""
    return jnp.pad(x, [(0, length - size if axis == 2 else 0) for axis, size in enumerate(x.shape)])


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
        scores = _dot(k, q, (1, 1))
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


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
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

    def __init__(self, copies: Callable[[Any, Any, Any], list[Any]], visited: Any, visits: Any, repeats: int = 1):
        """Args:
        copies: (repetition, tile), slot -> the async copies of that tile.
        repeats: how often each row's tiles are walked over (once for each query head of a key-value head).
        """
        self.copies, self.visited, self.visits, self.repeats = copies, visited, visits, repeats
        self.row, self.num_rows = pl.program_id(2), pl.num_programs(2)
        self.first, self.stop, self.full_first, self.full_stop = (self._scalar(self.row, i) for i in range(4))

    def _scalar(self, row: Any, which: int) -> Any:
        return self.visits[(pl.program_id(0) * self.num_rows + row) * 4 + which]

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
    stream = _Stream(_copier(sources, [k_buffer, v_buffer, ids_buffer], semaphores), visited, visits)

    def tile(number: Any, _: Any, __: Any, masked: bool) -> None:
        slot = jax.lax.rem(number, 2)
        k, v = k_buffer[slot], v_buffer[slot]
        v_and_ones = jnp.concatenate([v.T, jnp.ones((ONES, v.shape[0]), v.dtype)], axis=0)
        # In strips of queries: the products of one are computed while the exponentials of another are.
        strips = [pl.ds(start, min(STRIP, block[0] - start)) for start in range(0, block[0], STRIP)]
        scores = [logits(k, q[0, 0, strip])[0] for strip in strips]
        if masked:
            segments, positions = _columns(ids_buffer[slot], min(STRIP, block[0]))
            scores = [
                logits.mask(z, (segments[:, : z.shape[1]], positions[:, : z.shape[1]]), q_ids[0, :, strip])
                for z, strip in zip(scores, strips, strict=True)
            ]
        for z, strip in zip(scores, strips, strict=True):
            before = highest[0:1, strip]
            now = jnp.maximum(before, jnp.max(z, axis=0, keepdims=True))
            weights = jnp.exp2(z - now).astype(v.dtype)
            total[:, strip] = jnp.exp2(before - now) * total[:, strip] + _dot(v_and_ones, weights, (1, 0))
            highest[0:1, strip] = now

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
    stream = _Stream(_copier(sources, buffers, semaphores), visited, visits, repeats=group)
    dq_sum = _Accumulator(
        lambda repeat, tile: dq_hbm.at[batch, head(repeat), :, _rows(tile, block[0])], dq_buffer, dq_semaphores, dq_state
    )
    num_q_blocks = q_hbm.shape[2] // block[0]
    pl.when(stream.row == 0)(dq_sum.reset)

    def tile(number: Any, repeat: Any, tile: Any, masked: bool) -> None:
        exists, next_repeat, next_tile = stream.following(repeat, tile)
        place, next_place = repeat * num_q_blocks + tile, next_repeat * num_q_blocks + next_tile
        dq_sum.begin(number, place, repeat, tile, (exists, next_place, next_repeat, next_tile))
        slot = jax.lax.rem(number, 2)
        q, d_out, statistics = q_buffer[slot], d_out_buffer[slot], statistics_buffer[slot]
        z, slope = logits(k[0, 0], q)
        d_weights = _dot(v[0, 0], d_out, (1, 1))
        if masked:
            repeats = (1, block[0] // LANES)
            z = logits.mask(z, (jnp.tile(segments[...], repeats), jnp.tile(positions[...], repeats)), ids_buffer[slot])
        weights = jnp.exp2(z - statistics[0:1])
        d_scores = weights * (d_weights - statistics[1:2])
        d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
        dv_total[...] += _dot(weights.astype(d_out.dtype), d_out, (1, 0))
        dk_total[...] += _dot(d_scores, q, (1, 0))
        dq_buffer[jax.lax.rem(number, 3)] += _dot(k_transposed[...], d_scores, (1, 0))
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


def _forward(plan: Plan, logits: _Logits, q, k, v, sinks) -> tuple[jax.Array, jax.Array]:
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
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32)],
        compiler_params=_PARAMS,
        cost_estimate=_cost(plan, H, 2, q, q, k, v),
        name="flash_forward",
    )(plan.forward.scalars(), sinks, q, plan.q_ids, k, v, plan.kv_ids)


def _backward(plan: Plan, logits: _Logits, q, k, v, d_out, statistics) -> tuple[jax.Array, jax.Array, jax.Array]:
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
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        input_output_aliases={8: 0},
        compiler_params=_PARAMS,
        cost_estimate=_cost(plan, H, 5, q, d_out, k, v, k, v, dq, dq),
        name="flash_backward",
    )(plan.backward.scalars(), k, v, plan.kv_ids, q, d_out, statistics, plan.q_ids, dq)
    return (dq * logits.scale).swapaxes(2, 3).astype(q.dtype), dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(plan: Plan, logits: _Logits, q, k, v, sinks) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(plan, logits, q, k, v, sinks)[0]


def _attend_forward(plan: Plan, logits: _Logits, q, k, v, sinks):
    scaled = (q.astype(jnp.float32) * logits.query_scale).astype(q.dtype)
    out, lse = _forward(plan, logits, scaled, k, v, sinks)
    return (out, lse), (plan, scaled, k, v, sinks, out, lse)


def _attend_backward(logits: _Logits, residuals, cotangents):
    plan, scaled, k, v, sinks, out, lse = residuals
    d_out, d_lse = cotangents
    # d score = weight x (d weight - sum over keys of weight x d weight), whose sum is out . d_out; lse adds its own.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, None] - d_lse
    empty = lse <= EMPTY  # Their weights are then exp2(MASKED - 0) = 0.
    base = jnp.where(empty, 0.0, lse * LOG2_E)
    statistics = jnp.concatenate([base, delta], axis=2)
    dq, dk, dv = _backward(plan, logits, scaled, k, v, d_out, statistics)
    weight_of_sink = jnp.where(empty, 0.0, jnp.exp(sinks[:, None, None] - lse))
    d_sinks = -jnp.sum(weight_of_sink * delta, axis=(0, 2, 3))
    return None, dq, dk, dv, d_sinks


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
) -> tuple[jax.Array, jax.Array]:
    """softmax(cap(scale * q k^T)) v over the allowed pairs of `plan`; sums and softmax are float32.

    Args:
      sinks_H: float32 [H], a logit per head that takes part in the softmax without a value (arXiv:2309.17453).
      cap: logits become cap * tanh(logits / cap); 0 is off.

    Returns:
      [B, H, T, D] of q's dtype, and the log-sum-exp of each query's logits (its sink among them), float32 [B, H, T]; both are
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
    q = _pad(q_BHTD, plan.q_ids.shape[2])
    k, v = (_pad(x, plan.kv_ids.shape[2]) for x in (k_BKSD, v_BKSD))
    out_and_lse: tuple[jax.Array, jax.Array] = _attend(plan, _Logits(scale, cap, plan.window), q, k, v, sinks)
    return out_and_lse[0][:, :, :T], out_and_lse[1][:, :, 0, :T]
