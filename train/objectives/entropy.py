"""Entropy of the policy: a bonus against its collapse, the tokens where it matters, and a coefficient that adapts.

The entropy is that of the whole distribution (`model.logprobs`), which can be differentiated; -log p of the sampled token has
the same mean but a gradient of mean zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats [...] of logits [..., V]."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.where(jnp.isneginf(log_p), 0, jnp.exp(log_p) * log_p), axis=-1)


def high_entropy_mask(entropies: jax.Array, mask: jax.Array, fraction: float) -> jax.Array:
    """Of the tokens [B, T] of the whole batch that the mask selects, the upper `fraction` by entropy (arXiv:2506.01939)."""
    if fraction == 1:
        return mask
    threshold = jnp.nanquantile(jnp.where(mask != 0, entropies, jnp.nan), 1 - fraction)
    return jnp.where(entropies >= threshold, mask, jnp.zeros_like(mask))


def adapt_coefficient(coefficient: jax.Array, entropy: jax.Array, target: float, step: float) -> jax.Array:
    """Next coefficient of the bonus: `step` more if the entropy is below the target, `step` less above, at least 0
    (arXiv:2505.22312)."""
    return jnp.maximum(coefficient + jnp.where(entropy < target, step, -step), 0.0)
