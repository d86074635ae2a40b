"""Attention against float64 numpy, pair by pair; its gradients against central differences; backends against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from model.attention import attention, make_pattern
from model.kernels import xla_attention
from model.kernels.paged_attention import CHUNK, paged_attention

B, T, K, G, D = 2, 11, 2, 3, 4
SCALE, CAP = 0.6, 1.5


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, K * G, D), (B, T, K, D), (B, T, K, D))
    segments = np.array([[1] * 4 + [2] * 7, [1] * 9 + [0] * 2], np.int32)
    positions = np.array([[*range(4), *range(7)], [*range(9), 0, 1]], np.int32)
    return [rng.normal(size=shape) for shape in shapes], positions, segments


def allowed(positions, segments, window):
    """Told by the words of the documentation, pair by pair. Segment 0 is padding."""
    result = np.zeros((B, T, T), bool)
    for b, t, s in np.ndindex(B, T, T):
        distance = positions[b, t] - positions[b, s]
        result[b, t, s] = segments[b, t] == segments[b, s] > 0 and 0 <= distance < (window or T)
    return result


def reference(q, k, v, sinks, pairs):
    k, v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    scores = CAP * np.tanh(SCALE * np.einsum("bthd,bshd->bhts", q, k) / CAP)
    weights = np.exp(scores) * pairs[:, None]
    total = weights.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None]
    return np.einsum("bhts,bshd->bthd", weights / np.where(total > 0, total, 1.0), v)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(
    ("tile", "max_tiles", "backend"), [(128, 8, "reference"), (4, 8, "xla"), (2, 3, "xla"), (11, 1, "xla")]
)
def test_attention_equals_numpy_in_any_tiles(monkeypatch, window, tile, max_tiles, backend, with_sinks):
    monkeypatch.setattr(xla_attention, "TILE", tile)
    monkeypatch.setattr(xla_attention, "MAX_TILES", max_tiles)
    arrays, positions, segments = inputs()
    arrays.append(np.random.default_rng(3).normal(size=K * G) if with_sinks else np.full(K * G, -np.inf))
    pairs = allowed(positions, segments, window)
    pattern = make_pattern(segments, positions, segments, positions, window=window, backend=backend)
    np.testing.assert_array_equal(pattern, pairs)
    cotangent = np.random.default_rng(1).normal(size=arrays[0].shape)

    def attend(q, k, v, sinks):
        return attention(q, k, v, pattern, sinks if with_sinks else None, scale=SCALE, cap=CAP, backend=backend)

    inputs_32 = [jnp.asarray(array, jnp.float32) for array in arrays]
    differentiated = (0, 1, 2, 3) if with_sinks else (0, 1, 2)
    gradients = jax.grad(lambda *x: jnp.sum(attend(*x) * cotangent), argnums=differentiated)(*inputs_32)
    np.testing.assert_allclose(attend(*inputs_32), reference(*arrays, pairs), rtol=1e-5, atol=1e-6)
    rng = np.random.default_rng(2)
    for i, gradient in enumerate(gradients):
        direction, step = rng.normal(size=arrays[i].shape), 1e-5
        both = [[*arrays[:i], arrays[i] + sign * step * direction, *arrays[i + 1 :]] for sign in (1, -1)]
        plus, minus = (np.sum(reference(*x, pairs) * cotangent) for x in both)
        assert np.sum(gradient * direction) == pytest.approx((plus - minus) / (2 * step), rel=1e-4)


@pytest.mark.parametrize(
    ("window", "with_sinks"),
    [(3, True), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0, False), (0, True), (3, False)))],
)
def test_the_kernel_gives_what_plain_jax_gives(window, with_sinks):
    """In the model's layout, padding and sinks included; the kernel's own tests are in test_flash_attention.py."""
    arrays, positions, segments = inputs()
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays)
    sinks = jax.random.normal(jax.random.key(0), (K * G,)) if with_sinks else None
    results = {}
    for backend in ("reference", "flash"):
        pattern = make_pattern(segments, positions, segments, positions, window=window, backend=backend)

        def attend(q, k, v, pattern=pattern, backend=backend):
            return attention(q, k, v, pattern, sinks, scale=SCALE, cap=CAP, backend=backend)

        with pltpu.force_tpu_interpret_mode():
            results[backend] = (attend(q, k, v), *jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), argnums=(0, 1, 2))(q, k, v))
    for ours, theirs in zip(results["flash"], results["reference"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_tiles_skip_the_keys_after_their_end():
    """The work of 8 tiles is (1 + 1/8) / 2 of the whole: counted by the compiler."""
    q, k, v = (jnp.ones((1, 1024, 1, 16)) for _ in range(3))
    pairs = jnp.ones((1, 1024, 1024), bool)
    flops = {}
    for backend in ("reference", "xla"):
        function = jax.jit(lambda *qkv, backend=backend: attention(*qkv, pairs, scale=1.0, backend=backend))
        flops[backend] = function.lower(q, k, v).compile().cost_analysis()["flops"]
    assert flops["xla"] / flops["reference"] == pytest.approx(9 / 16, rel=0.02)


@pytest.mark.parametrize("tokens", [CHUNK - 1, CHUNK])
def test_what_is_not_finite_is_not_taken_for_a_row_that_sees_nothing(tokens):
    """A NaN query, and all that see an infinite key, which they score infinitely; the others are well."""
    rng = np.random.default_rng(0)
    new = [rng.uniform(0.5, 1.0, (1, tokens, heads, D)).astype(np.float32) for heads in (K * G, K, K)]
    new[0][0, 1] = np.nan
    new[1][0, 3] = np.inf
    q, *kept = map(jnp.asarray, new)
    pages = tuple(x.swapaxes(1, 2) for x in kept)  # one, of all tokens
    positions = jnp.arange(tokens, dtype=jnp.int32)[None]
    out = np.asarray(paged_attention(q, (kept[0], kept[1]), pages, jnp.zeros((1, 1), jnp.int32), positions, scale=SCALE))
    ill = np.isin(np.arange(tokens), [1, *range(3, tokens)])
    np.testing.assert_array_equal(np.isfinite(out[0]).all(axis=(1, 2)), ~ill)
    assert np.isnan(out[0, ill]).all()
