"""Which tiles attention visits, as a few integers for each block of tokens: what all layers and heads of a step share.

A pair (query, key) is allowed if both are of the same segment, the key's position is not later, and, with a window, the
distance is below it. Segment 0 is padding: it sees nothing, nobody sees it, and its output is 0.

A *tile* is a block of queries times a block of keys. For every row (and column) of tiles, `make_plan` computes on the device
the range of tiles that hold an allowed pair and, within it, the range of tiles in which every pair is allowed, from the extents
of ids and positions in each block. A tile that is not wholly allowed is computed in *parts*, and which of them hold an allowed
pair is a range for each part of the block. Where segments lie one after the other along a row, as packing and zigzag
sharding lay them, the range holds exactly the tiles with an allowed pair; in any other order it holds at least those. The
ranges are scalars that bound the inner loop of the kernels, so a tile outside costs nothing, and ids are compared only in
tiles that are not wholly allowed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp

from model.chips import Chip

LANES = 128
PART = 512  # queries and keys of a part of a tile, at most
# A logit that is not allowed: exp of it underflows to exactly 0, and a difference of two is finite in any dtype.
MASKED = -1e30
BLOCK_SIZES_FILE = Path(__file__).with_name("block_sizes.json")  # made by benchmarks/attention_schedule.py --tune


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """(queries, keys) of a tile for each kernel; multiples of 128."""

    forward: tuple[int, int] = (1024, 1024)
    backward: tuple[int, int] = (1024, 1024)

    @classmethod
    def of_chip(cls, chip: Chip | None, head_dim: int = LANES, soft_cap: float = 0.0) -> BlockSizes:
        """The sizes with the fewest bundles on a generation for one long document; the default where there is no chip.

        A v4 has 16 MiB of VMEM. In the backward pass heads wider than 128 need 23, and wider than 64 with a soft cap, whose
        derivative is spilled, 16.7: there it takes tiles half as long.
        """
        table = json.loads(BLOCK_SIZES_FILE.read_text())
        sizes = cls(**{name: (q, kv) for name, (q, kv) in table[chip.name].items()}) if chip else cls()
        if chip and chip.name == "v4" and head_dim > (LANES // 2 if soft_cap else LANES):
            q, kv = sizes.backward
            return dataclasses.replace(sizes, backward=(max(LANES, q // 2), max(LANES, kv // 2)))
        return sizes

    def for_itemsize(self, itemsize: int) -> BlockSizes:
        """These sizes, made for queries and keys of 2 bytes, for arrays of `itemsize` bytes.

        In float32, tiles as large need 22.7 MiB of VMEM in the backward pass of 128 dimensions, and a v4 has 16; with 256 and a
        cap, half as large is still too large there.
        """
        divisors = {"forward": max(1, itemsize // 2), "backward": max(1, itemsize // 2) ** 2}
        return BlockSizes(
            **{
                name: (max(LANES, q // divisors[name]), max(LANES, kv // divisors[name]))
                for name, (q, kv) in dataclasses.asdict(self).items()
            }
        )

    def dividing(self, length: int) -> BlockSizes:
        """The largest sizes, at most these, that divide `length` rounded up to a multiple of 128.

        On a ring a device holds two parts of a row, far from each other. A block with tokens of both may meet all keys
        that lie between, so that blocks must end where parts do; they can if the length of a part is a multiple of 128.
        """
        registers = round_up(length, LANES) // LANES

        def largest(size: int) -> int:
            return LANES * max(n for n in range(1, size // LANES + 1) if registers % n == 0)

        return BlockSizes(**{name: (largest(q), largest(kv)) for name, (q, kv) in dataclasses.asdict(self).items()})

    def within(self, queries: int, keys: int) -> BlockSizes:
        """These sizes, cut to rows of so many queries and keys.

        Both kernels read one padded row, a multiple of both their sizes. Of a row below the larger size, the larger becomes a
        multiple of the smaller: 640 tokens in tiles of 640 and of 512 would be padded to 2,560.
        """

        def cut(size: int, side: int, length: int) -> int:
            registers = round_up(length, LANES)
            smaller = min(self.forward[side], self.backward[side], registers)
            return min(size, round_up(registers, smaller))

        return BlockSizes(
            **{name: (cut(q, 0, queries), cut(kv, 1, keys)) for name, (q, kv) in dataclasses.asdict(self).items()}
        )


def part_sizes(block: tuple[int, int]) -> tuple[int, int]:
    """(queries, keys) of a part. Of a tile that is not wholly allowed only parts that hold an allowed pair are computed."""
    return math.gcd(block[0], PART), math.gcd(block[1], PART)


@flax.struct.dataclass
class Visits:
    """Ranges of tiles along one side, for each block of the other; int32 [B, num_blocks], stops are exclusive.

    Attributes:
      first, stop: the tiles that are visited.
      full_first, full_stop: those of them in which every pair is allowed.
      part_first, part_stop: the parts (see `part_sizes`) along that side that are visited, for each part of the other;
        [B, num_blocks * parts of a block].
    """

    first: jax.Array
    stop: jax.Array
    full_first: jax.Array
    full_stop: jax.Array
    part_first: jax.Array
    part_stop: jax.Array

    def scalars(self) -> jax.Array:
        """int32 [B * num_blocks * (4 + 2 * parts of a block)], as the kernels read it."""
        tiles = jnp.stack([self.first, self.stop, self.full_first, self.full_stop], axis=-1)
        parts = jnp.stack([self.part_first, self.part_stop], axis=-1)
        return jnp.concatenate([tiles, parts.reshape(*tiles.shape[:2], -1)], axis=-1).reshape(-1)


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


def _range(tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and stop of those that are true along the last axis, 0 and 0 where none is."""
    found, length = jnp.any(tiles, axis=-1), tiles.shape[-1]
    first, stop = jnp.argmax(tiles, axis=-1), length - jnp.argmax(tiles[..., ::-1], axis=-1)
    return jnp.where(found, first, 0).astype(jnp.int32), jnp.where(found, stop, 0).astype(jnp.int32)


def _visits(q_ids: jax.Array, kv_ids: jax.Array, window: int, block: tuple[int, int], of_keys: bool) -> Visits:
    """For each block of keys or of queries; `full` is left empty where what is wholly allowed is no single range."""

    def tiles(block: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        some, every = _tiles(q_ids, kv_ids, window, block)
        return (some.swapaxes(1, 2), every.swapaxes(1, 2)) if of_keys else (some, every)

    some, every = tiles(block)
    first, stop = _range(some)
    full_first, full_stop = _range(every)
    is_range = (full_stop > full_first) & (jnp.sum(every, axis=-1) == full_stop - full_first)
    full_first, full_stop = (jnp.where(is_range, x, stop) for x in (full_first, full_stop))
    return Visits(first, stop, full_first, full_stop, *_range(tiles(part_sizes(block))[0]))


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
    sizes = (sizes or BlockSizes()).within(q_segments.shape[1], kv_segments.shape[1])
    q_multiple, kv_multiple = (math.lcm(*(size[i] for size in dataclasses.astuple(sizes))) for i in (0, 1))

    def ids(segments: jax.Array, positions: jax.Array, multiple: int) -> jax.Array:
        x = jnp.stack([segments, positions], axis=1).astype(jnp.int32)
        return pad(x, round_up(x.shape[2], multiple))

    q_ids, kv_ids = ids(q_segments, q_positions, q_multiple), ids(kv_segments, kv_positions, kv_multiple)
    return Plan(
        q_ids=q_ids,
        kv_ids=kv_ids,
        forward=_visits(q_ids, kv_ids, window, sizes.forward, of_keys=False),
        backward=_visits(q_ids, kv_ids, window, sizes.backward, of_keys=True),
        window=window,
        sizes=sizes,
    )


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pad(x: jax.Array, length: int) -> jax.Array:
    """Zeros along the third axis."""
    return jnp.pad(x, [(0, length - size if axis == 2 else 0) for axis, size in enumerate(x.shape)])
