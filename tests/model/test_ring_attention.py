"""How a ring deals out the tokens of a row, against counts of every pair; what it computes is in tests/train/test_mesh.py."""

import numpy as np
import pytest

from model.ring_attention import zigzag

RINGS = [(16, 1), (16, 2), (24, 3), (64, 4), (64, 8)]


@pytest.mark.parametrize(("length", "devices"), RINGS)
def test_each_device_holds_a_part_from_the_front_and_its_counterpart_from_the_back(length, devices):
    order = zigzag(length, devices)
    assert sorted(order) == list(range(length))
    width = length // (2 * devices)
    for i, held in enumerate(np.split(order, devices)):
        np.testing.assert_array_equal(held[:width], np.arange(i * width, (i + 1) * width))
        np.testing.assert_array_equal(held[width:], np.arange(length - (i + 1) * width, length - i * width))


@pytest.mark.parametrize(("length", "devices"), RINGS)
def test_at_every_step_of_the_ring_all_devices_meet_as_many_pairs_of_a_causal_document(length, devices):
    dealt = np.split(zigzag(length, devices), devices)
    steps = [
        [np.sum(queries[:, None] >= dealt[(here - step) % devices]) for here, queries in enumerate(dealt)]
        for step in range(devices)
    ]
    assert all(len(set(pairs)) == 1 for pairs in steps), steps
    assert np.sum(steps) == length * (length + 1) // 2
