"""Reductions along rows that XLA's CPU backend would take a number at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _by_halves(x: jax.Array) -> jax.Array:
    while x.shape[-1] % 2 == 0 and x.shape[-1] > 16:
        half = x.shape[-1] // 2
        x = jnp.maximum(x[..., :half], x[..., half:])
    return jnp.max(x, axis=-1, keepdims=True)


def row_max(x: jax.Array) -> jax.Array:
    """The maximum of each row [..., N], as [..., 1]; constant to differentiation.

    On a CPU by halves, as long as they are even: maxima of vectors are three times as fast as `jnp.max` there, which takes half
    of the time of a softmax.
    """
    x = jax.lax.stop_gradient(x)
    return jax.lax.platform_dependent(x, cpu=_by_halves, default=lambda x: jnp.max(x, axis=-1, keepdims=True))


def log_sum_exp(x: jax.Array) -> jax.Array:
    """log(sum(exp(x))) of each row [..., N] of finite numbers, as [...]."""
    highest = row_max(x)
    return jnp.log(jnp.sum(jnp.exp(x - highest), axis=-1)) + highest[..., 0]
