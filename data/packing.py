"""Packing: which part of which document goes into which row.  Pure functions of document lengths, in numpy.

A document of n tokens offers n - 1 targets; its *length* here is that number.  A *piece* (document, offset, length, row)
feeds tokens offset..offset+length-1 of the document and predicts the tokens one later.  Every packing uses each target of
each document exactly once, and no row holds more than `seq_len` of them.

`best_fit` follows "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): a document longer than a row is cut
into full rows, and what remains is packed best-fit-decreasing, so that no document is cut that could stay whole.
`sequential` is the usual concatenate-and-split.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.config import Packing


class Pieces(NamedTuple):
    """Arrays int64 [num_pieces], sorted by row; a row's pieces lie in it in this order, without gaps."""

    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    row: np.ndarray


def pack(lengths: np.ndarray, seq_len: int, packing: Packing) -> Pieces:
    """Packs documents of the given lengths (int [num_documents], >= 0) into rows of `seq_len` targets."""
    return pack_best_fit(lengths, seq_len) if packing == "best_fit" else pack_sequential(lengths, seq_len)


def pack_sequential(lengths: np.ndarray, seq_len: int) -> Pieces:
    """Documents one after the other, cut every `seq_len` targets; only the last row may have room."""
    lengths = np.asarray(lengths, np.int64)
    documents = np.flatnonzero(lengths)
    ends = np.cumsum(lengths[documents])
    total = int(ends[-1]) if ends.size else 0
    document_starts = ends - lengths[documents]
    starts = np.union1d(document_starts, np.arange(0, total, seq_len))
    which = np.searchsorted(document_starts, starts, side="right") - 1
    length = np.diff(starts, append=total)
    return Pieces(documents[which], starts - document_starts[which], length, starts // seq_len)


def pack_best_fit(lengths: np.ndarray, seq_len: int) -> Pieces:
    """Full rows of long documents first, then the remainders best-fit-decreasing."""
    lengths = np.asarray(lengths, np.int64)
    full_rows = lengths // seq_len
    document = np.repeat(np.arange(lengths.size), full_rows)
    number = _ranges(full_rows)
    row = np.arange(document.size)

    rest = np.flatnonzero(lengths % seq_len)
    rest_length = lengths[rest] % seq_len
    rest_row = document.size + best_fit_decreasing(rest_length, seq_len)

    # Longest first within a row, ties in document order.
    order = np.lexsort((rest, -rest_length, rest_row))
    return Pieces(
        np.concatenate([document, rest[order]]),
        np.concatenate([number * seq_len, full_rows[rest[order]] * seq_len]),
        np.concatenate([np.full(document.size, seq_len, np.int64), rest_length[order]]),
        np.concatenate([row, rest_row[order]]),
    )


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each item, int64 [n]: items in decreasing length, each into the fullest bin that still holds it.

    Equal items are placed together.  Of the bins that hold an item of length l, the fullest one stays the fullest after
    it received the item, so it takes items until it has less than l left: the bins with s left take s // l each.  Bins of
    equal room are kept in one list, which makes the cost about one operation per distinct (length, room) met.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths must lie in [1, {capacity}], got {lengths.min()}..{lengths.max()}")
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(lengths.size, np.int64)
    with_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # room -> lists of bins
    count = np.zeros(capacity + 1, np.int64)
    num_bins = 0

    distinct, number = np.unique(lengths, return_counts=True)
    for length, start, size in zip(distinct[::-1], lengths.size - np.cumsum(number)[::-1], number[::-1], strict=True):
        items = order[start : start + size]
        for room in (*(length + np.flatnonzero(count[length:capacity])), capacity):
            if not items.size:
                break
            per_bin = room // length
            needed = -(-items.size // per_bin)
            if room == capacity:
                candidates = np.arange(num_bins, num_bins + needed)
                num_bins += needed
            else:
                candidates = np.concatenate(with_room[room])
                with_room[room] = [candidates[needed:]]
                count[room] = max(0, candidates.size - needed)
                candidates = candidates[:needed]
            placed = min(items.size, candidates.size * per_bin)
            bins[items[:placed]] = np.repeat(candidates, per_bin)[:placed]
            items = items[placed:]
            in_last = placed - (candidates.size - 1) * per_bin
            for group, left in ((candidates[:-1], room - per_bin * length), (candidates[-1:], room - in_last * length)):
                with_room[left].append(group)
                count[left] += group.size
    return bins


def split_at_records(pieces: Pieces, record_targets: int) -> tuple[Pieces, np.ndarray]:
    """Cuts pieces where a document's storage goes over to its next record.

    Returns:
      The finer pieces, and the segment (int64 [num_pieces], from 1 in each row) of each: parts of one piece share it.
    """
    first = pieces.offset // record_targets
    parts = (pieces.offset + pieces.length - 1) // record_targets - first + 1
    which = np.repeat(np.arange(parts.size), parts)
    record_start = (first[which] + _ranges(parts)) * record_targets
    start = np.maximum(pieces.offset[which], record_start)
    end = np.minimum((pieces.offset + pieces.length)[which], record_start + record_targets)
    first_of_row = np.searchsorted(pieces.row, pieces.row)
    segment = np.arange(pieces.row.size) - first_of_row + 1
    return Pieces(pieces.document[which], start, end - start, pieces.row[which]), segment[which]


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0..c-1 for each count c, concatenated."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
