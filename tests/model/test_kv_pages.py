"""Pages in 8 bits: how far they are off, where tokens are written, and that attention to them is that to the rounded."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels.kv_pages import Int8Pages, as_kept, rounded, take, write
from model.kernels.paged_attention import paged_attention

SLOTS, HEADS, WIDTH = 4, 2, 8


def test_every_element_is_within_half_a_step():
    x = np.random.default_rng(0).standard_normal((5, 3, HEADS, WIDTH)).astype(np.float32)
    x[1, 1] = 0.0
    values, scales = map(np.asarray, rounded(jnp.asarray(x)))
    assert values.dtype == np.int8
    np.testing.assert_allclose(scales[..., 0], np.abs(x).max(axis=-1) / 127, rtol=1e-6)
    off = np.abs(values.astype(np.float64) * scales - x)
    assert np.all(off <= 0.5001 * scales)
    assert off.max() > 0.4 * scales.max()


def empty(num_pages, int8):
    values = jnp.zeros((num_pages, HEADS, SLOTS, WIDTH), jnp.int8 if int8 else jnp.float32)
    return Int8Pages(values, jnp.zeros((num_pages, HEADS, 1, SLOTS))) if int8 else values


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_tokens_are_written_where_they_belong_and_nowhere_else(tokens):
    """Token by token into a dictionary, over two turns: rows that end amid pages, begin at their borders, or are padding."""
    rng = np.random.default_rng(tokens)
    table = rng.permutation(24)[:18].reshape(3, 6).astype(np.int32)
    pages, expected, length = empty(24, int8=True), {}, np.array([0, 3, 4])
    for turn in range(2):
        x = rng.standard_normal((3, tokens, HEADS, WIDTH)).astype(np.float32)
        positions = np.full((3, tokens), -1, np.int32)
        for row, count in enumerate((tokens, max(1, tokens - 1), 0 if turn else tokens)):
            positions[row, :count] = length[row] + np.arange(count)
            length[row] += count
            for t in range(count):
                at = positions[row, t]
                expected[table[row, at // SLOTS], at % SLOTS] = np.asarray(as_kept(jnp.asarray(x[row, t]), pages))
        pages = write(pages, jnp.asarray(x), jnp.asarray(table), jnp.asarray(positions))
    kept = np.asarray(take(pages, jnp.arange(24), WIDTH, jnp.float32))
    for page in range(24):
        for slot in range(SLOTS):
            np.testing.assert_array_equal(kept[page, :, slot], expected.get((page, slot), np.zeros((HEADS, WIDTH))))


@pytest.mark.parametrize(("tokens", "cap"), [(1, 0.0), (3, 2.0), (20, 0.0)])
def test_the_error_of_attention_is_within_its_bound(tokens, cap):
    """With e the most a logit moves, weights move by a factor within exp(+-2 e); values by half a step.

    A logit moves by half a step of its key times the sum of the magnitudes of the query, and a cap only lessens that.
    """
    rng = np.random.default_rng(0)
    scale, length = 0.2, 27
    table = jnp.asarray(rng.permutation(8)[None].astype(np.int32))
    past = [jnp.asarray(rng.standard_normal((1, length, HEADS, WIDTH)), jnp.float32) for _ in range(2)]
    q = jnp.asarray(rng.standard_normal((1, tokens, HEADS, WIDTH)), jnp.float32)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    outs = []
    for int8 in (False, True):
        pages = tuple(write(empty(8, int8), x, table, positions) for x in past)
        new = tuple(as_kept(x, page)[:, -tokens:] for x, page in zip(past, pages, strict=True))
        out = paged_attention(q, new, pages, table, positions[:, -tokens:], scale=scale, cap=cap)
        outs.append(np.asarray(out, np.float64))
    half_steps = [np.abs(np.asarray(x, np.float64)).max(axis=-1) / 127 / 2 for x in past]
    moved = scale * np.abs(np.asarray(q, np.float64)).sum(axis=-1).max() * half_steps[0].max()
    bound = np.expm1(2 * moved) * np.abs(np.asarray(past[1])).max() + half_steps[1].max()
    assert 1e-4 < np.abs(outs[0] - outs[1]).max() <= bound + 1e-6
