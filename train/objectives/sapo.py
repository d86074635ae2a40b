"""SAPO (arXiv:2511.20347): instead of a clip, a gate on the ratio that fades smoothly on either side of 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sapo_losses(log_ratio: jax.Array, advantages: jax.Array, positive: float, negative: float) -> jax.Array:
    """-(4 / t) s(t (r - 1)) A per token, of log r and A of any one shape; s is the logistic function, and t is `positive` where
    A > 0, else `negative`. At r = 1 the gradient is that of the plain ratio; the larger t, the sooner it fades."""
    advantages = jax.lax.stop_gradient(advantages)
    t = jnp.where(advantages > 0, positive, negative)
    return -4 / t * jax.nn.sigmoid(t * jnp.expm1(log_ratio)) * advantages
