"""Storage: tokenised documents in ArrayRecord shards, and packed rows as a memory-mapped index into them.

A *record* holds up to RECORD_TOKENS consecutive tokens of one document (uint16, or uint32 for large vocabularies).  A long
document's records overlap by one token, so that record r predicts exactly its targets RECORD_TARGETS * r and following.

  <split>-00000.array_record   records; a document never spans two shards.
  <split>_documents.npy        int64 [num_documents, 3]: shard, first record, number of tokens.
  <split>_chunks.npy           int32 [num_chunks, 5]: shard, record, offset in it, length, segment; sorted by row.
  <split>_rows.npy             int64 [num_rows + 1]: row r consists of chunks rows[r]..rows[r + 1] - 1.

A chunk's inputs are record[offset : offset + length], its targets the tokens one later.

Chats (`data/chat_rows.py`) are kept in 32 bits, the highest of which says whether the model is to write the token. The two
answers to a prompt are documents 2 i and 2 i + 1, always in one row, the first with an odd segment; besides there are then

  <split>_labels.npy           float32 [num_documents]: what is known of a document.
  <split>_sequences.npy        int64 [num_chunks]: the document that a chunk is of.

Of solutions in steps, which are one document each, the labels are float32 [num_tokens]: of every token of one document after
another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.config import IGNORE, Content, Packing
from data.packing import Pieces, pack, split_at_records

RECORD_TOKENS = 8192
RECORD_TARGETS = RECORD_TOKENS - 1
SHARD_TOKENS = 1 << 26
TRAINED_BIT = np.uint32(1 << 31)
GROUPED: tuple[Content, ...] = ("pairs", "labels")
JUDGED: tuple[Content, ...] = (*GROUPED, "steps")

_ID_BITS = np.int32(2**31 - 1)

Split = Literal["train", "held_out"]
Batch = dict[str, np.ndarray]


def write_documents(
    directory: Path, split: Split, documents: Iterable[np.ndarray], vocab_size: int, content: Content = "text"
) -> None:
    """Writes the token ids of documents (int [num_tokens] each) to shards, and the table of documents.

    Args:
      content: other than "text", ids are uint32, with the TRAINED_BIT where the model is to write them.

    Raises:
      ValueError: an id outside [0, vocab_size).
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    dtype = _token_dtype(vocab_size, content)
    table: list[tuple[int, int, int]] = []
    writer, shard, record, tokens_in_shard = None, -1, 0, 0
    for ids in documents:
        tokens = ids if content == "text" else ids & ~TRAINED_BIT
        if ids.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
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


def write_index(
    tokens_dir: Path, directory: Path, prefix: str, split: Split, seq_len: int, packing: Packing, content: Content = "text"
) -> dict[str, Any]:
    """Packs a split into rows of `seq_len` and writes the index; returns its statistics.

    Documents of chats, and the pairs of those that are GROUPED, must be no longer than a row: they are not cut.
    """
    table = np.load(tokens_dir / f"{split}_documents.npy")
    lengths = np.maximum(table[:, 2] - 1, 0)
    group = 2 if content in GROUPED else 1
    pieces = pack(lengths.reshape(-1, group).sum(axis=1), seq_len, packing)
    if group > 1:
        document = (pieces.document[:, None] * group + np.arange(group)).reshape(-1)
        pieces = Pieces(document, np.zeros_like(document), lengths[document], np.repeat(pieces.row, group))
    pieces, segment = split_at_records(pieces, RECORD_TARGETS)
    shard, first_record, _ = table[pieces.document].T
    part, offset = np.divmod(pieces.offset, RECORD_TARGETS)
    chunks = np.stack([shard, first_record + part, offset, pieces.length, segment], axis=1).astype(np.int32)
    num_rows = int(pieces.row[-1]) + 1 if pieces.row.size else 0
    rows = np.searchsorted(pieces.row, np.arange(num_rows + 1))
    np.save(directory / f"{prefix}{split}_chunks.npy", chunks)
    np.save(directory / f"{prefix}{split}_rows.npy", rows.astype(np.int64))
    if content in JUDGED:
        np.save(directory / f"{prefix}{split}_sequences.npy", pieces.document)
    num_targets = int(pieces.length.sum())
    fill = num_targets / (num_rows * seq_len) if num_rows else 0.0
    return {"rows": num_rows, "targets": num_targets, "fill": round(fill, 6)}


_OPEN_FILES = ("_chunks", "_rows", "_readers", "_labels", "_sequences", "_first_tokens")


class PackedRows:
    """Random access to the packed rows of one split of one source.  Picklable; safe to read from several threads."""

    def __init__(
        self,
        tokens_dir: Path,
        index_dir: Path,
        prefix: str,
        split: Split,
        seq_len: int,
        vocab_size: int,
        content: Content = "text",
    ):
        self.tokens_dir = tokens_dir
        self.index_dir = index_dir
        self.prefix = prefix
        self.split: Split = split
        self.seq_len = seq_len
        self.content: Content = content
        self._dtype = _token_dtype(vocab_size, content)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here; the copy opens its own.
        return {k: v for k, v in self.__dict__.items() if k not in _OPEN_FILES}

    def __len__(self) -> int:
        return self._rows.size - 1

    def read(self, rows: np.ndarray, attend_across_documents: bool = False) -> Batch:
        """Rows (int [n]) as arrays [n, seq_len]: tokens, targets, segment_ids, positions int32, and weights float32.

        Segments are numbered from 1 in each row and their positions from 0; padding has segment 0 and weight 0.  With
        `attend_across_documents` a row is one segment. Of chats, the weight is 1 where the model is to write the target.

        Pairs and labelled answers have `sequence_ids` int32 (the document a token is of) and `labels` float32 (what is known of
        it) too. Segments 2 k - 1 and 2 k are then two answers to one prompt: chosen and rejected, with the margin as the label;
        or the prompt's answer, labelled 1 or 0, and the answer to another prompt. Their stop tokens are among the tokens. Of a
        solution in steps, a label stands where the last token of its step is read; elsewhere there is IGNORE.

        Raises:
          ValueError: a record is damaged.
        """
        rows = np.asarray(rows, np.int64)
        spans = list(zip(self._rows[rows].tolist(), self._rows[rows + 1].tolist(), strict=True))
        chunks = [self._chunks[start:end] for start, end in spans]
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
        batch = {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "positions": positions}
        if self.content == "text":
            return batch | {"weights": (segment_ids != 0).astype(np.float32)}
        # As int32, the highest bit is the sign.
        batch |= {"weights": (targets < 0).astype(np.float32), "tokens": tokens & _ID_BITS, "targets": targets & _ID_BITS}
        return batch | self._of_sequences(spans, batch) if self.content in JUDGED else batch

    def _of_sequences(self, spans: list[tuple[int, int]], batch: Batch) -> Batch:
        """`sequence_ids` and `labels` of rows of chunks."""
        segment_ids = batch["segment_ids"]
        sequence_ids, labels = np.zeros_like(segment_ids), np.zeros(segment_ids.shape, np.float32)
        for r, (start, end) in enumerate(spans):
            # A segment's chunks follow each other, and so do segments.
            of_segment = np.unique(self._sequences[start:end], return_index=True)[1]
            documents = np.r_[0, self._sequences[start:end][np.sort(of_segment)]]
            real = segment_ids[r] > 0
            sequence_ids[r, real] = documents[segment_ids[r, real]]
            of_token = self.content == "steps"
            place = self._first_tokens[sequence_ids[r]] + batch["positions"][r] if of_token else sequence_ids[r]
            labels[r] = np.where(real, self._labels[place], IGNORE if of_token else 0.0)
        return {"sequence_ids": sequence_ids, "labels": labels}

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

    @functools.cached_property
    def _sequences(self) -> np.ndarray:
        return np.asarray(np.load(self.index_dir / f"{self.prefix}{self.split}_sequences.npy", mmap_mode="r"))

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        return np.load(self.tokens_dir / f"{self.split}_labels.npy")

    @functools.cached_property
    def _first_tokens(self) -> np.ndarray:
        """Place of each document's first token among all of them."""
        sizes = np.load(self.tokens_dir / f"{self.split}_documents.npy")[:, 2]
        return np.cumsum(sizes) - sizes


def _token_dtype(vocab_size: int, content: Content) -> np.dtype:
    if content != "text":
        return np.dtype("<i4")
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _shard_path(directory: Path, split: Split, shard: int) -> Path:
    return directory / f"{split}-{shard:05d}.array_record"
