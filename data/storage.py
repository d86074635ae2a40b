"""Storage: tokenised documents in ArrayRecord shards, and packed rows as a memory-mapped index into them.

A *record* holds up to RECORD_TOKENS consecutive tokens of one document (uint16, or uint32 for large vocabularies).  A long
document's records overlap by one token, so that record r predicts exactly its targets RECORD_TARGETS * r and following.

  <split>-00000.array_record   records; a document never spans two shards.
  <split>_documents.npy        int64 [num_documents, 3]: shard, first record, number of tokens.
  <split>_chunks.npy           int32 [num_chunks, 5]: shard, record, offset in it, length, segment; sorted by row.
  <split>_rows.npy             int64 [num_rows + 1]: row r consists of chunks rows[r]..rows[r + 1] - 1.

A chunk's inputs are record[offset : offset + length], its targets the tokens one later.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.config import Packing
from data.packing import pack, split_at_records

RECORD_TOKENS = 8192
RECORD_TARGETS = RECORD_TOKENS - 1
SHARD_TOKENS = 1 << 26

Split = Literal["train", "held_out"]
Batch = dict[str, np.ndarray]


def write_documents(directory: Path, split: Split, documents: Iterable[np.ndarray], vocab_size: int) -> None:
    """Writes the token ids of documents (int [num_tokens] each) to shards, and the table of documents.

    Raises:
      ValueError: an id outside [0, vocab_size).
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    dtype = _token_dtype(vocab_size)
    table: list[tuple[int, int, int]] = []
    writer, shard, record, tokens_in_shard = None, -1, 0, 0
    for ids in documents:
        if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
            bad = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise ValueError(
                f"token id {bad} is outside the vocabulary [0, {vocab_size}): the tokenizer and its vocabulary disagree; "
                "train it again"
            )
        if writer is None or tokens_in_shard >= SHARD_TOKENS:
            if writer is not None:
                writer.close()
            shard, record, tokens_in_shard = shard + 1, 0, 0
            # One record is read at a time, and tokens hardly compress.
            writer = ArrayRecordWriter(str(_shard_path(directory, split, shard)), "group_size:1,uncompressed")
        table.append((shard, record, ids.size))
        tokens_in_shard += ids.size
        for start in range(0, max(1, ids.size - 1), RECORD_TARGETS):
            writer.write(ids[start : start + RECORD_TOKENS].astype(dtype).tobytes())
            record += 1
    if writer is not None:
        writer.close()
    np.save(directory / f"{split}_documents.npy", np.array(table, np.int64).reshape(-1, 3))


def write_index(tokens_dir: Path, directory: Path, prefix: str, split: Split, seq_len: int, packing: Packing) -> dict[str, Any]:
    """Packs a split into rows of `seq_len` and writes the index; returns its statistics."""
    table = np.load(tokens_dir / f"{split}_documents.npy")
    pieces = pack(np.maximum(table[:, 2] - 1, 0), seq_len, packing)
    pieces, segment = split_at_records(pieces, RECORD_TARGETS)
    shard, first_record, _ = table[pieces.document].T
    part, offset = np.divmod(pieces.offset, RECORD_TARGETS)
    chunks = np.stack([shard, first_record + part, offset, pieces.length, segment], axis=1).astype(np.int32)
    num_rows = int(pieces.row[-1]) + 1 if pieces.row.size else 0
    rows = np.searchsorted(pieces.row, np.arange(num_rows + 1))
    np.save(directory / f"{prefix}{split}_chunks.npy", chunks)
    np.save(directory / f"{prefix}{split}_rows.npy", rows.astype(np.int64))
    num_targets = int(pieces.length.sum())
    fill = num_targets / (num_rows * seq_len) if num_rows else 0.0
    return {"rows": num_rows, "targets": num_targets, "fill": round(fill, 6)}


class PackedRows:
    """Random access to the packed rows of one split of one source.  Picklable; safe to read from several threads."""

    def __init__(self, tokens_dir: Path, index_dir: Path, prefix: str, split: Split, seq_len: int, vocab_size: int):
        self.tokens_dir = tokens_dir
        self.index_dir = index_dir
        self.prefix = prefix
        self.split: Split = split
        self.seq_len = seq_len
        self._dtype = _token_dtype(vocab_size)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here; the copy opens its own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_chunks", "_rows", "_readers")}

    def __len__(self) -> int:
        return self._rows.size - 1

    def read(self, rows: np.ndarray, attend_across_documents: bool = False) -> Batch:
        """Rows (int [n]) as arrays [n, seq_len]: tokens, targets, segment_ids, positions int32, and weights float32.

        Segments are numbered from 1 in each row and their positions from 0; padding has segment 0 and weight 0.  With
        `attend_across_documents` a row is one segment.

        Raises:
          ValueError: a record is damaged.
        """
        rows = np.asarray(rows, np.int64)
        first, last = self._rows[rows], self._rows[rows + 1]
        counts = last - first
        row_of_chunk = np.repeat(np.arange(rows.size), counts)
        within = np.arange(row_of_chunk.size) - (np.cumsum(counts) - counts)[row_of_chunk]
        shard, record, offset, length, segment = self._chunks[first[row_of_chunk] + within].T.astype(np.int64)

        flat, record_start = self._read_records(shard, record)
        # Chunks fill a row from the left, so the filled cells in row-major order are the chunks in order.
        chunk_of_target = np.repeat(np.arange(length.size), length)
        chunk_start = np.cumsum(length) - length
        source = np.arange(chunk_of_target.size) + (record_start + offset - chunk_start)[chunk_of_target]
        fill = np.bincount(row_of_chunk, length, rows.size).astype(np.int64)
        filled = np.arange(self.seq_len) < fill[:, None]
        starts_segment = (np.diff(segment, prepend=0) != 0) | (within == 0)
        if attend_across_documents:
            starts_segment, segment = within == 0, np.ones_like(segment)
        segment_start = chunk_start[starts_segment][np.cumsum(starts_segment) - 1]

        def scatter(values: np.ndarray) -> np.ndarray:
            out = np.zeros(filled.shape, np.int32)
            out[filled] = values
            return out

        return {
            "tokens": scatter(flat[source]),
            "targets": scatter(flat[source + 1]),
            "segment_ids": scatter(segment[chunk_of_target]),
            "positions": scatter(np.arange(chunk_of_target.size) - segment_start[chunk_of_target]),
            "weights": filled.astype(np.float32),
        }

    def _read_records(self, shard: np.ndarray, record: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All tokens of the given records, concatenated, and where each record starts."""
        data: list[bytes] = [b""] * shard.size
        for s in np.unique(shard):
            here = np.flatnonzero(shard == s)
            for i, record_bytes in zip(here, self._read_shard(int(s), record[here].tolist()), strict=True):
                data[i] = record_bytes
        sizes = np.array([len(record_bytes) for record_bytes in data], np.int64) // self._dtype.itemsize
        return np.frombuffer(b"".join(data), self._dtype), np.cumsum(sizes) - sizes

    def _read_shard(self, shard: int, records: list[int]) -> list[bytes]:
        from array_record.python.array_record_module import ArrayRecordReader

        path = _shard_path(self.tokens_dir, self.split, shard)
        try:
            if shard not in self._readers:
                # Two threads may both open it; one reader is then dropped, which harms nobody.
                self._readers[shard] = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
            return self._readers[shard].read(records)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{path}: a record among {records[:8]} is damaged ({error}); delete {self.tokens_dir} and start again: it "
                "will be prepared anew from the sources"
            ) from error

    @functools.cached_property
    def _readers(self) -> dict[int, Any]:
        return {}

    @functools.cached_property
    def _chunks(self) -> np.ndarray:
        return np.load(self.index_dir / f"{self.prefix}{self.split}_chunks.npy", mmap_mode="r")

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        return np.load(self.index_dir / f"{self.prefix}{self.split}_rows.npy", mmap_mode="r")


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _shard_path(directory: Path, split: Split, shard: int) -> Path:
    return directory / f"{split}-{shard:05d}.array_record"
