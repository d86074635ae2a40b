"""Mixtures in closed form: which source, and which of its rows, the g-th row ever served comes from.

Sources are drawn in a fixed pattern of sum(proportions) rows in which each is spread evenly.  A new mixture starts a new
pattern at its first row; every source goes on where it was, so no row is lost or repeated by a change.
"""

from __future__ import annotations

import numpy as np

from data.config import MixtureConfig


class Mixture:
    """The schedule of proportions, as arrays."""

    def __init__(self, mixtures: tuple[MixtureConfig, ...], names: tuple[str, ...], batch_size: int):
        """Args:
        mixtures: by increasing start_step, the first one at 0.
        names: all sources; their order numbers them.
        batch_size: rows of a step over all hosts.
        """
        self._first_row = np.array([mixture.start_step * batch_size for mixture in mixtures], np.int64)
        weights = np.zeros((len(mixtures), len(names)), np.int64)
        for m, mixture in enumerate(mixtures):
            for name, weight in mixture.proportions:
                weights[m, names.index(name)] += weight
        self._weights = weights
        self._patterns = [_even_pattern(row) for row in weights]
        # How often each occurrence's source came before it in the pattern.
        self._ranks = [_ranks(pattern) for pattern in self._patterns]
        self._drawn_before = np.zeros_like(weights)
        for m in range(1, len(mixtures)):
            rows = int(self._first_row[m] - self._first_row[m - 1])
            blocks, rest = divmod(rows, self._patterns[m - 1].size)
            in_rest = np.bincount(self._patterns[m - 1][:rest], minlength=len(names))
            self._drawn_before[m] = self._drawn_before[m - 1] + blocks * weights[m - 1] + in_rest

    def __call__(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source number, how many rows of that source came before), both int64 [n], of global rows `row` int64 [n]."""
        row = np.asarray(row, np.int64)
        source, index = np.empty_like(row), np.empty_like(row)
        which = np.searchsorted(self._first_row, row, side="right") - 1
        for m in np.unique(which):
            here = which == m
            block, position = np.divmod(row[here] - self._first_row[m], self._patterns[m].size)
            drawn = self._patterns[m][position]
            source[here] = drawn
            index[here] = self._drawn_before[m][drawn] + block * self._weights[m][drawn] + self._ranks[m][position]
        return source, index


def _even_pattern(weights: np.ndarray) -> np.ndarray:
    """Source numbers [sum(weights)]; the k-th of w occurrences of a source is due at (k + 1/2) / w of the pattern."""
    source = np.repeat(np.arange(weights.size), weights)
    due = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in weights if weight])
    return source[np.lexsort((source, due))]


def _ranks(pattern: np.ndarray) -> np.ndarray:
    ranks = np.empty(pattern.size, np.int64)
    for source in np.unique(pattern):
        here = pattern == source
        ranks[here] = np.arange(np.sum(here))
    return ranks
