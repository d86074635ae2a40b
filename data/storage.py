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
        chunks = [self._chunks[start:end] for start, end in zip(self._rows[rows], self._rows[rows + 1], strict=True)]
        row_of_chunk = np.repeat(np.arange(rows.size), [len(chunk) for chunk in chunks])
        shard, record, offset, length, segment = np.concatenate(chunks or [self._chunks[:0]]).T
        records = self._read_records(shard, record)

        shape = (rows.size, self.seq_len)
        tokens, targets, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
        counting = np.arange(self.seq_len, dtype=np.int32)
        current, column, position = (-1, 0), 0, 0
        chunk_fields = (row_of_chunk, offset, length, segment)
        for ids, r, start, size, number in zip(records, *(field.tolist() for field in chunk_fields), strict=True):
            if attend_across_documents:
                number = 1
            if (r, number) != current:
                column = column if r == current[0] else 0
                current, position = (r, number), 0
            here = slice(column, column + size)
            tokens[r, here] = ids[start : start + size]
            targets[r, here] = ids[start + 1 : start + size + 1]
            segment_ids[r, here] = number
            positions[r, here] = counting[position : position + size]
            column += size
            position += size
        return {
            "tokens": tokens,
            "targets": targets,
            "segment_ids": segment_ids,
            "positions": positions,
            "weights": (segment_ids != 0).astype(np.float32),
        }

    def _read_records(self, shard: np.ndarray, record: np.ndarray) -> list[np.ndarray]:
        """Token ids of the given records; one request per shard."""
        records: list[np.ndarray] = [np.empty(0)] * shard.size
        for s in np.unique(shard).tolist():
            here = np.flatnonzero(shard == s)
            for i, data in zip(here, self._read_shard(s, record[here].tolist()), strict=True):
                records[i] = np.frombuffer(data, self._dtype)
        return records

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
        return np.asarray(np.load(self.index_dir / f"{self.prefix}{self.split}_chunks.npy", mmap_mode="r"))

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        return np.asarray(np.load(self.index_dir / f"{self.prefix}{self.split}_rows.npy", mmap_mode="r"))


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _shard_path(directory: Path, split: Split, shard: int) -> Path:
    return directory / f"{split}-{shard:05d}.array_record"
