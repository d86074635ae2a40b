"""Attention against float64 numpy, pair by pair; its gradients against central differences of that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.attention
from model.attention import allowed_pairs, attention

B, T, K, G, D = 2, 11, 2, 3, 4
SCALE, CAP = 0.6, 1.5


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, K * G, D), (B, T, K, D), (B, T, K, D))
    segments = np.array([[1] * 4 + [2] * 7, [1] * 9 + [0] * 2], np.int32)
    positions = np.array([[*range(4), *range(7)], [*range(9), 0, 1]], np.int32)
    return [rng.normal(size=shape) for shape in shapes], positions, segments


def allowed(positions, segments, window):
    """Told by the words of the documentation, pair by pair."""
    result = np.zeros((B, T, T), bool)
    for b, t, s in np.ndindex(B, T, T):
        distance = positions[b, t] - positions[b, s]
        result[b, t, s] = segments[b, t] == segments[b, s] and 0 <= distance < (window or T)
    return result


def reference(q, k, v, pairs):
    k, v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    scores = CAP * np.tanh(SCALE * np.einsum("bthd,bshd->bhts", q, k) / CAP)
    weights = np.exp(scores) * pairs[:, None]
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("tile", "max_tiles", "in_order"), [(128, 8, False), (4, 8, True), (2, 3, True), (11, 1, True)])
def test_attention_equals_numpy_in_any_tiles(monkeypatch, window, tile, max_tiles, in_order):
    monkeypatch.setattr(model.attention, "TILE", tile)
    monkeypatch.setattr(model.attention, "MAX_TILES", max_tiles)
    arrays, positions, segments = inputs()
    pairs = allowed(positions, segments, window)
    computed_pairs = allowed_pairs(positions, positions, segments, segments, window)
    np.testing.assert_array_equal(computed_pairs, pairs)
    cotangent = np.random.default_rng(1).normal(size=arrays[0].shape)

    def objective(*qkv):
        return jnp.sum(attention(*qkv, computed_pairs, scale=SCALE, cap=CAP, in_order=in_order) * cotangent)

    qkv = [jnp.asarray(array, jnp.float32) for array in arrays]
    out = attention(*qkv, computed_pairs, scale=SCALE, cap=CAP, in_order=in_order)
    gradients = jax.grad(objective, argnums=(0, 1, 2))(*qkv)
    np.testing.assert_allclose(out, reference(*arrays, pairs), rtol=1e-5, atol=1e-6)
    rng = np.random.default_rng(2)
    for i, gradient in enumerate(gradients):
        direction, step = rng.normal(size=arrays[i].shape), 1e-5
        both = [[*arrays[:i], arrays[i] + sign * step * direction, *arrays[i + 1 :]] for sign in (1, -1)]
        plus, minus = (np.sum(reference(*qkv, pairs) * cotangent) for qkv in both)
        assert np.sum(gradient * direction) == pytest.approx((plus - minus) / (2 * step), rel=1e-4)


def test_tiles_skip_the_keys_after_their_end():
    """The work of 8 tiles is (1 + 1/8) / 2 of the whole: counted by the compiler."""
    q, k, v = (jnp.ones((1, 1024, 1, 16)) for _ in range(3))
    pairs = jnp.ones((1, 1024, 1024), bool)
    flops = {}
    for in_order in (False, True):
        function = jax.jit(lambda *qkv, in_order=in_order: attention(*qkv, pairs, scale=1.0, in_order=in_order))
        flops[in_order] = function.lower(q, k, v).compile().cost_analysis()["flops"]
    assert flops[True] / flops[False] == pytest.approx(9 / 16, rel=0.02)
