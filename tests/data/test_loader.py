import dataclasses
import itertools
import json
import pickle
import random
from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data.config import DataConfig, MixtureConfig, SourceConfig, TokenizerConfig
from data.loader import Batches, load
from data.mixture import Mixture
from data.permutation import permute
from data.prepare import PreparedData, prepare

BATCH_SIZE = 8


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[PreparedData, DataConfig]:
    """Two sources of unlike sizes, best-fit packing, a mixture that changes at step 30."""
    directory = tmp_path_factory.mktemp("job")
    rng = random.Random(0)
    for name, num_documents in (("a", 120), ("b", 60)):
        rows = [" ".join(f"{name}{rng.randint(0, 99)}" for _ in range(rng.randint(1, 60))) for _ in range(num_documents)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = DataConfig(
        sources=tuple(
            SourceConfig(name, "files", path=str(directory / f"{name}.jsonl"), held_out_fraction=0.1) for name in ("a", "b")
        ),
        tokenizer=TokenizerConfig("bytes"),
        mixtures=(MixtureConfig(0, (("a", 3), ("b", 2))), MixtureConfig(30, (("b", 1), ("a", 6)))),
        seq_len=48,
        cache_dir=str(directory / "cache"),
    )
    return prepare(config, log=lambda line: None), config


def batches_of(job, **options) -> Batches:
    return Batches(*job, **{"batch_size": BATCH_SIZE, "seed": 3, **options})


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        np.testing.assert_array_equal(one[key], other[key])


# --- Order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 65_537])
def test_permutation_is_a_bijection(size):
    order = permute(np.arange(size), size, "key")
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_permutation_is_a_pure_function_of_position_and_key():
    whole = permute(np.arange(5000), 5000, "1/a/0")
    np.testing.assert_array_equal(permute(np.array([17, 4999, 0]), 5000, "1/a/0"), whole[[17, 4999, 0]])
    for other in ("2/a/0", "1/b/0", "1/a/1"):
        assert np.mean(permute(np.arange(5000), 5000, other) == whole) < 0.01
    huge = permute(np.arange(100), 1 << 50, "key")
    assert len(set(huge.tolist())) == 100
    assert huge.max() < 1 << 50


def test_permutation_looks_random():
    size = 4096
    order = permute(np.arange(size), size, "key")
    neighbours = np.corrcoef(order[:-1], order[1:])[0, 1]
    lagged = np.corrcoef(np.arange(size), order)[0, 1]
    assert abs(neighbours) < 0.06
    assert abs(lagged) < 0.06  # four standard deviations of an honest shuffle
    steps = Counter(np.diff(order).tolist())
    assert max(steps.values()) < 15  # a congruential generator repeats its steps
    first_of_key = [permute(np.array([0]), 8, str(key))[0] for key in range(4000)]
    assert np.ptp(np.bincount(first_of_key, minlength=8)) < 200  # 500 each expected, deviation 21


def test_positions_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 10\)"):
        permute(np.array([10]), 10, "key")


SCHEDULES = st.lists(
    st.tuples(st.integers(1, 12), st.dictionaries(st.sampled_from("abc"), st.integers(1, 7), min_size=1)),
    min_size=1,
    max_size=4,
)


@hypothesis.given(schedule=SCHEDULES, batch_size=st.integers(1, 9))
def test_mixture_equals_counting_row_by_row(schedule, batch_size):
    starts = itertools.accumulate((steps for steps, _ in schedule[:-1]), initial=0)
    configs = tuple(MixtureConfig(s, tuple(p.items())) for s, (_, p) in zip(starts, schedule, strict=True))
    mixture = Mixture(configs, ("a", "b", "c"), batch_size)
    num_rows = batch_size * sum(steps for steps, _ in schedule)
    source, index = mixture(np.arange(num_rows))
    drawn = Counter()
    for s, i in zip(source.tolist(), index.tolist(), strict=True):
        assert i == drawn[s]
        drawn[s] += 1
    for config, (steps, proportions) in zip(configs, schedule, strict=True):
        first, total = config.start_step * batch_size, sum(proportions.values())
        for block in range(first, first + steps * batch_size - total + 1, total):
            counts = np.bincount(source[block : block + total], minlength=3)
            assert counts.tolist() == [proportions.get(name, 0) for name in "abc"]
    np.testing.assert_array_equal(mixture(np.arange(num_rows)[::-1])[1], index[::-1])


def test_mixture_spreads_sources_evenly():
    source, _ = Mixture((MixtureConfig(0, (("a", 3), ("b", 1))),), ("a", "b"), 4)(np.arange(400))
    gaps = np.diff(np.flatnonzero(source == 1))
    assert set(gaps) == {4}
    source, _ = Mixture((MixtureConfig(0, (("a", 700_000), ("b", 300_000))),), ("a", "b"), 4)(np.arange(1000))
    assert np.diff(np.flatnonzero(source == 1)).max() <= 4


# --- Batches ------------------------------------------------------------------------------------------------------------


def test_first_200_batches_are_the_same_for_any_hosts_and_threads(job):
    whole = batches_of(job)
    expected = [whole[step] for step in range(200)]
    assert any(batch["segment_ids"].max() > 1 for batch in expected)
    for hosts in (2, 4):
        # In one piece each, and as on a mesh that deals rows out in turn.
        for rows in (np.split(np.arange(BATCH_SIZE), hosts), [np.arange(h, BATCH_SIZE, hosts) for h in range(hosts)]):
            parts = [batches_of(job, rows=share) for share in rows]
            for step, batch in enumerate(expected):
                for share, part in zip(rows, parts, strict=True):
                    assert_equal(part[step], {key: value[share] for key, value in batch.items()})
    for threads in (0, 1, 4):
        served = list(load(batches_of(job), 0, 200, threads, 3))
        assert len(served) == 200
        for one, other in zip(served, expected, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_at_any_step_equals_never_having_stopped(job, threads):
    straight = list(load(batches_of(job), 0, 60, threads, 2))
    for step in (1, 29, 31, 59):
        resumed = list(load(pickle.loads(pickle.dumps(batches_of(job))), step, 60, threads, 2))
        assert len(resumed) == 60 - step
        for one, other in zip(resumed, straight[step:], strict=True):
            assert_equal(one, other)
    assert list(load(batches_of(job), 60, 60, threads, 2)) == []


def test_each_epoch_of_a_source_serves_each_row_once_in_a_new_order(job):
    prepared, _ = job
    batches = batches_of(job)
    served: dict[int, list[int]] = {0: [], 1: []}
    for step in range(200):
        for source, row in zip(*batches.rows(step), strict=True):
            served[source].append(int(row))
    for number, packed in enumerate(prepared.train.values()):
        epochs = [served[number][i : i + len(packed)] for i in range(0, len(served[number]) - len(packed) + 1, len(packed))]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(len(packed))) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_the_seed_changes_the_order_and_nothing_else_does(job):
    assert_equal(batches_of(job)[7], batches_of(job)[7])
    assert not np.array_equal(batches_of(job)[7]["tokens"], batches_of(job, seed=4)[7]["tokens"])


def test_a_change_of_mixture_leaves_earlier_batches_alone(job):
    prepared, config = job
    plain = Batches(prepared, dataclasses.replace(config, mixtures=config.mixtures[:1]), batch_size=BATCH_SIZE, seed=3)
    changed = batches_of(job)
    assert_equal(plain[29], changed[29])
    counts = np.bincount(np.concatenate([changed.rows(step)[0] for step in range(30, 37)]))
    assert counts.tolist() == [48, 8]  # 7 steps of 8 rows in proportions 6 : 1


@hypothesis.given(
    gaps=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), max_size=4), steps=st.just(30), order=st.randoms()
)
def test_skipped_windows_are_never_served_and_nothing_else_is_lost(job, gaps, steps, order):
    windows, at = [], 0
    for gap, length in gaps:
        windows.append((at + gap, at + gap + length - 1))
        at += gap + length
    order.shuffle(windows)
    skipped = {step for first, last in windows for step in range(first, last + 1)}
    batches = batches_of(job, skipped=tuple(windows))
    expected = list(itertools.islice((step for step in itertools.count() if step not in skipped), steps))
    assert [batches.data_step(step) for step in range(steps)] == expected
    np.testing.assert_array_equal(batches.rows(9), batches_of(job).rows(expected[9]))


@pytest.mark.parametrize("skipped", [((5, 4),), ((0, 3), (3, 5)), ((-1, 2),)])
def test_windows_that_overlap_or_end_before_they_begin_are_refused(job, skipped):
    with pytest.raises(ValueError, match="disjoint windows"):
        batches_of(job, skipped=skipped)


def test_a_single_source_needs_no_mixture(job):
    prepared, config = job
    only = dataclasses.replace(prepared, train={"a": prepared.train["a"]})
    batches = Batches(only, dataclasses.replace(config, sources=config.sources[:1], mixtures=()), batch_size=4, seed=0)
    assert batches[0]["tokens"].shape == (4, config.seq_len)
