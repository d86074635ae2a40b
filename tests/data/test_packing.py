from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data.packing import Pieces, best_fit_decreasing, pack, split_at_records

LENGTHS = st.lists(st.integers(0, 70), max_size=60).map(lambda n: np.array(n, int))


def targets(pieces: Pieces) -> Counter:
    return Counter(
        (int(d), t) for d, o, n in zip(pieces.document, pieces.offset, pieces.length, strict=True) for t in range(o, o + n)
    )


def simple_fit(lengths: list[int], capacity: int, best: bool) -> list[list[int]]:
    """Best fit (fullest bin that holds the item) or first fit, one item at a time, in decreasing length."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b in bins if sum(b) + length <= capacity]
        if not fitting:
            bins.append([length])
        elif best:
            max(fitting, key=sum).append(length)
        else:
            fitting[0].append(length)
    return bins


@pytest.mark.parametrize("packing", ["best_fit", "sequential"])
@hypothesis.given(lengths=LENGTHS, seq_len=st.integers(2, 40))
def test_each_target_once_and_no_row_overfull(packing, lengths, seq_len):
    pieces = pack(lengths, seq_len, packing)
    assert targets(pieces) == Counter((d, t) for d, n in enumerate(lengths) for t in range(n))
    rows = np.unique(pieces.row)
    assert (np.diff(pieces.row) >= 0).all()
    assert rows.tolist() == list(range(rows.size))
    assert (np.bincount(pieces.row, pieces.length) <= seq_len).all()
    assert (pieces.length > 0).all()


@hypothesis.given(lengths=LENGTHS, seq_len=st.integers(2, 40))
def test_sequential_rows_are_full_and_in_order(lengths, seq_len):
    pieces = pack(lengths, seq_len, "sequential")
    assert (np.bincount(pieces.row, pieces.length)[:-1] == seq_len).all()
    assert list(targets(pieces)) == [(d, t) for d, n in enumerate(lengths) for t in range(n)]


@hypothesis.given(lengths=LENGTHS, seq_len=st.integers(2, 40))
def test_best_fit_cuts_only_documents_longer_than_a_row(lengths, seq_len):
    pieces = pack(lengths, seq_len, "best_fit")
    num_pieces = np.bincount(pieces.document, minlength=lengths.size)
    np.testing.assert_array_equal(num_pieces, -(-lengths // seq_len))


@hypothesis.given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80), capacity=st.integers(30, 50))
def test_best_fit_decreasing_makes_the_bins_of_the_simple_algorithm(lengths, capacity):
    bins = best_fit_decreasing(np.array(lengths), capacity)
    ours = Counter(tuple(sorted(np.array(lengths)[bins == b])) for b in range(bins.max() + 1))
    reference = simple_fit(lengths, capacity, best=True)
    assert sorted(map(sum, ours.elements())) == sorted(map(sum, reference))
    assert bins.max() + 1 == len(reference)


def test_best_fit_is_at_least_as_dense_as_first_fit_on_lengths_like_web_text():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 2000).astype(int), 1, 512)
    num_bins = best_fit_decreasing(lengths, 512).max() + 1
    assert num_bins <= len(simple_fit(lengths.tolist(), 512, best=False))
    assert lengths.sum() / (num_bins * 512) > 0.99


def test_best_fit_decreasing_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match=r"must lie in \[1, 8\]"):
        best_fit_decreasing(np.array([3, 9]), 8)


def test_a_million_documents_pack_exactly():
    lengths = np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(int)
    pieces = pack(lengths, 1024, "best_fit")
    fill = np.bincount(pieces.row, pieces.length)
    assert fill.max() <= 1024
    assert fill.sum() == lengths.sum()


@hypothesis.given(lengths=LENGTHS, seq_len=st.integers(2, 40), record_targets=st.integers(1, 25))
def test_pieces_cut_at_records_stay_one_segment(lengths, seq_len, record_targets):
    pieces = pack(lengths, seq_len, "best_fit")
    finer, segment = split_at_records(pieces, record_targets)
    assert targets(finer) == targets(pieces)
    assert (finer.offset // record_targets == (finer.offset + finer.length - 1) // record_targets).all()
    assert len(set(zip(finer.row, segment, strict=True))) == pieces.row.size
    same = (np.diff(finer.row) == 0) & (np.diff(segment) == 0)
    np.testing.assert_array_equal((finer.offset + finer.length)[:-1][same], finer.offset[1:][same])
    for row in np.unique(finer.row):
        numbers = segment[finer.row == row]
        assert numbers[0] == 1
        assert set(np.diff(numbers)) <= {0, 1}
