"""The loader: step -> batch, a pure function of (prepared data, config, seed, skipped windows, step).

  step -> data step          skipped windows of data steps are jumped over
  data step -> global rows   batch_size of them; a host takes those that its devices hold
  global row -> source, i    the i-th row drawn from that source (`data/mixture.py`)
  i -> epoch, row            in each epoch a source's rows come in a new pseudo-random order (`data/permutation.py`)

So the loader's state is the step alone, and hosts, threads and restarts cannot change the order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import numpy as np

from data.config import DataConfig, MixtureConfig
from data.mixture import Mixture
from data.permutation import permute
from data.prepare import PreparedData
from data.prompts import EncodedPrompt
from data.storage import Batch


class Batches:
    """`batches[step]` is this host's part of the batch at `step`: a dict of arrays [len(rows), seq_len].

    tokens, targets, segment_ids and positions are int32, weights float32 (`data/storage.py`, PackedRows.read). Prompts are no
    arrays, and come from `prompts`.
    Picklable; safe to use from several threads.
    """

    def __init__(
        self,
        prepared: PreparedData,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
        skipped: tuple[tuple[int, int], ...] = (),
    ):
        """Args:
        batch_size: rows over all hosts.
        seed: of the order of rows.
        rows: which of 0..batch_size-1 this host takes, in this order; int64, None is all.
        skipped: (first, last) data steps, both inclusive, that are never served; disjoint.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive")
        self._names = tuple(prepared.train)
        self._sources = tuple(prepared.train.values())
        mixtures = config.mixtures or (MixtureConfig(0, ((self._names[0], 1),)),)
        self._mixture = Mixture(mixtures, self._names, batch_size)
        self._attend_across_documents = config.attend_across_documents
        self._seed = seed
        self._batch_size = batch_size
        self._host_rows = np.arange(batch_size) if rows is None else rows
        self._skipped = tuple(sorted(skipped))
        ends = [-1, *(last for _, last in self._skipped)]
        if any(not end < first <= last for end, (first, last) in zip(ends, self._skipped, strict=False)):
            raise ValueError(f"skipped={skipped} must be disjoint windows (first data step, last data step)")

    def data_step(self, step: int) -> int:
        """`step` plus the lengths of the skipped windows that lie before it."""
        for first, last in self._skipped:
            if step < first:
                break
            step += last - first + 1
        return step

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source number, row of that source) of each row of this host's batch, both int64 [rows]."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        source, index = self._mixture(self.data_step(step) * self._batch_size + self._host_rows)
        row = np.empty_like(index)
        for s in np.unique(source):
            size = len(self._sources[s])
            epoch, position = np.divmod(index, size)
            for e in np.unique(epoch[source == s]):
                here = (source == s) & (epoch == e)
                row[here] = permute(position[here], size, f"{self._seed}/{self._names[s]}/{e}")
        return source, row

    def prompts(self, step: int) -> list[EncodedPrompt]:
        """This host's prompts at `step`, of data of that content."""
        return [self._sources[s][r] for s, r in zip(*(array.tolist() for array in self.rows(step)), strict=True)]

    def __getitem__(self, step: int) -> Batch:
        source, row = self.rows(step)
        batch: Batch = {}
        for s in np.unique(source):
            here = source == s
            for key, value in self._sources[s].read(row[here], self._attend_across_documents).items():
                if key not in batch:
                    batch[key] = np.empty((row.size, value.shape[1]), value.dtype)
                batch[key][here] = value
        return batch


def load(batches: Batches, first_step: int, stop_step: int, num_threads: int, prefetch: int) -> Generator[Batch]:
    """Batches of steps first_step..stop_step-1, in order, read ahead by threads of Grain (0: in the caller's thread).

    Args:
      prefetch: how many batches are kept ready.

    Closing the generator ends the threads.
    """
    steps = range(first_step, stop_step)
    if num_threads == 0:
        yield from map(batches.__getitem__, steps)
        return
    import grain

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    with contextlib.closing(
        iter(grain.MapDataset.range(first_step, stop_step).map(batches.__getitem__).to_iter_dataset(options))
    ) as iterator:
        yield from iterator


def num_held_out_batches(prepared: PreparedData, source: str, batch_size: int) -> int:
    """How many batches the held-out rows of `source` fill, the last one perhaps in part."""
    return -(-len(prepared.held_out[source]) // batch_size)


def held_out_batches(
    prepared: PreparedData,
    config: DataConfig,
    source: str,
    batch_size: int,
    max_batches: int = 0,
    *,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """The held-out rows of `source`, each exactly once, in order; the last batch is filled up with padding rows.

    Args:
      batch_size: rows over all hosts.
      max_batches: only so many, spread evenly over all; 0 is all.
      rows: which of 0..batch_size-1 this host takes, ascending; None is all.
    """
    if source not in prepared.held_out:
        raise ValueError(f"data source {source!r} holds nothing out to evaluate on: set its held_out_fraction above 0")
    packed = prepared.held_out[source]
    rows = np.arange(batch_size) if rows is None else rows
    num_batches = num_held_out_batches(prepared, source, batch_size)
    chosen = np.linspace(0, num_batches - 1, min(max_batches or num_batches, num_batches)).round().astype(int)
    for start in (chosen * batch_size).tolist():
        real = (start + rows)[start + rows < len(packed)]
        batch = packed.read(real, config.attend_across_documents)
        yield {key: np.pad(value, ((0, rows.size - real.size), (0, 0))) for key, value in batch.items()}
