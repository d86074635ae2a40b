"""The chunked log-probabilities against float64 numpy and against jax's own differentiation of the plain formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.logprobs import token_logprobs

CONFIG = ModelConfig(
    vocab_size=37, num_layers=1, d_model=16, num_heads=2, d_ff=16, max_seq_len=12, head_bias=True, logit_soft_cap=0.0
)


def make(config: ModelConfig, rows: int = 3, length: int = 11):  # prime: chunks do not fit
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "head": jax.random.normal(keys[0], (config.d_model, config.vocab_size)),
        "head_bias": jax.random.normal(keys[1], (config.vocab_size,)),
    }
    hidden = jax.random.normal(keys[2], (rows, length, config.d_model))
    targets = jax.random.randint(keys[3], (rows, length), 0, config.vocab_size)
    return params, hidden, targets


def plain(params, config, hidden, targets):
    logits = hidden @ params["head"] + params["head_bias"]
    if config.logit_soft_cap:
        logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - log_z[..., None]
    logprobs = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return logprobs, log_z, -jnp.sum(jnp.exp(log_p) * log_p, -1), jnp.argmax(logits, -1) == targets


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 9, 36, 10**6])
def test_values_and_gradients_equal_the_plain_ones_in_float64(cap, chunk_tokens):
    config = dataclasses.replace(CONFIG, logit_soft_cap=cap)
    with jax.enable_x64(True):
        params, hidden, targets = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, make(config)
        )
        weights = jax.random.normal(jax.random.key(9), (4, *targets.shape), jnp.float64)

        def loss(params, hidden, ours: bool):
            if ours:
                out = token_logprobs(params, config, hidden, targets, chunk_tokens)
                values = (out.logprobs, out.log_z, out.entropy)
            else:
                values = plain(params, config, hidden, targets)[:3]
            return sum(jnp.sum(w * value) for w, value in zip(weights, values, strict=False))

        out = token_logprobs(params, config, hidden, targets, chunk_tokens)
        expected = plain(params, config, hidden, targets)
        for name, value in zip(("logprobs", "log_z", "entropy", "correct"), expected, strict=True):
            np.testing.assert_allclose(getattr(out, name), value, rtol=1e-12, atol=1e-12, err_msg=name)
        ours = jax.grad(loss, argnums=(0, 1))(params, hidden, True)
        reference = jax.grad(loss, argnums=(0, 1))(params, hidden, False)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), ours, reference)


def test_extreme_logits_stay_finite():
    params, hidden, targets = make(CONFIG)
    out = token_logprobs(params, CONFIG, hidden * 1e4, targets, 9)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    assert (np.asarray(out.entropy) >= 0).all()


def test_logits_and_softmax_of_a_bfloat16_network_are_float32():
    """Against float64 of the same rounded numbers; rounded logits, of up to 13 here, would be wrong by up to 1/32."""
    params, hidden, targets = make(CONFIG)
    params, hidden = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, hidden))
    out = jax.jit(token_logprobs, static_argnums=(1, 4))(params, CONFIG, hidden, targets, 9)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, hidden))
        expected = jax.jit(plain, static_argnums=1)(wide[0], CONFIG, wide[1], targets)
    for name, value in zip(("logprobs", "log_z", "entropy"), expected, strict=False):
        assert getattr(out, name).dtype == np.float32
        np.testing.assert_allclose(getattr(out, name), value, rtol=0, atol=2e-5, err_msg=name)


def test_chunked_memory_does_not_hold_all_logits():
    config = dataclasses.replace(CONFIG, vocab_size=4096, d_model=8, head_bias=False)
    rows, length = 4, 512

    def loss(params, hidden, targets, chunk_tokens):
        return jnp.sum(token_logprobs(params, config, hidden, targets, chunk_tokens).logprobs)

    def peak(chunk_tokens):
        shapes = (
            {"head": jax.ShapeDtypeStruct((8, 4096), jnp.float32)},
            jax.ShapeDtypeStruct((rows, length, 8), jnp.float32),
            jax.ShapeDtypeStruct((rows, length), jnp.int32),
        )
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)
        return step.lower(*shapes, chunk_tokens).compile().memory_analysis().temp_size_in_bytes

    logits_bytes = rows * length * 4096 * 4
    assert peak(0) >= logits_bytes
    assert peak(128) < logits_bytes / 4
