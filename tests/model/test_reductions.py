"""Maxima by halves are maxima, whatever the length of a row."""

import jax
import numpy as np
import pytest

from model.kernels.reductions import log_sum_exp, row_max

LENGTHS = [1, 2, 16, 17, 34, 96, 100, 4096, 49_152]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_place_may_hold_the_largest(length):
    x = np.random.default_rng(length).normal(size=(3, length)).astype(np.float32)
    for place in {0, length // 3, length // 2, length - 1}:
        x[1, place] = 9.0 + place
        np.testing.assert_array_equal(jax.jit(row_max)(x), x.max(axis=-1, keepdims=True))


def test_what_is_not_a_number_stays_seen():
    x = np.zeros((2, 64), np.float32)
    x[1, 40] = np.nan
    assert np.isnan(jax.jit(row_max)(x)).ravel().tolist() == [False, True]


@pytest.mark.parametrize("length", LENGTHS)
def test_log_sum_exp_and_its_gradient(length):
    x = (np.random.default_rng(length).normal(size=(3, length)) * 30).astype(np.float32)
    wide = x.astype(np.float64)
    highest = wide.max(axis=-1, keepdims=True)
    total = np.exp(wide - highest).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(log_sum_exp)(x), (highest + np.log(total))[:, 0], rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda x: log_sum_exp(x).sum())(x)
    np.testing.assert_allclose(gradient, np.exp(wide - highest) / total, rtol=2e-5, atol=1e-7)
