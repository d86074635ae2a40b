"""CISPO (arXiv:2506.13585): REINFORCE with truncated ratios as weights; unlike with PPO's clip, no token loses its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cispo_losses(logprobs: jax.Array, log_ratio: jax.Array, advantages: jax.Array, clip_high: float) -> jax.Array:
    """-min(r, 1 + clip_high) A log p per token [B, T]; only log p is differentiated."""
    weights = jnp.minimum(jnp.exp(log_ratio), 1 + clip_high)
    return -jax.lax.stop_gradient(weights * advantages) * logprobs
