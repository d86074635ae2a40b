"""Scaled dot-product attention with grouped queries, causal by position, isolated by segment; optional window and soft cap.

Axes: B rows, T queries, S keys, H query heads, K key-value heads, G query heads per key-value head, D head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Queries are taken in tiles of so many or more, in at most MAX_TILES of them.
TILE = 128
MAX_TILES = 8

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
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    allowed_BTS: jax.Array,
    *,
    scale: float,
    cap: float = 0.0,
    in_order: bool = False,
) -> jax.Array:
    """softmax(cap(scale * q k^T)) v over the allowed pairs.

    Softmax is taken in float32. Heads come before time, because XLA's CPU dots over [.., time, head_dim] are 2.7 times faster.

    Args:
      in_order: queries and keys are the same tokens (T = S), and none is allowed one that stands later in its row. Then tiles
        of queries meet only the keys up to their own end, which halves the work.

    Returns:
      [B, T, H, D] of q's dtype. A query with nothing allowed gets a mean of values; it never reaches the loss.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BKGTD = (q_BTHD * scale).reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k_BKSD, v_BKSD = k_BSKD.transpose(0, 2, 1, 3), v_BSKD.transpose(0, 2, 1, 3)
    if not in_order:
        out_BKGTD = _attend(q_BKGTD, k_BKSD, v_BKSD, allowed_BTS, cap)
    else:
        tile = max(TILE, -(-T // MAX_TILES))
        tiles = []
        for start in range(0, T, tile):
            rows, keys = slice(start, start + tile), slice(0, start + tile)
            tiles.append(
                _attend(q_BKGTD[..., rows, :], k_BKSD[:, :, keys], v_BKSD[:, :, keys], allowed_BTS[:, rows, keys], cap)
            )
        out_BKGTD = jnp.concatenate(tiles, axis=3)
    return out_BKGTD.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _attend(q_BKGTD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, allowed_BTS: jax.Array, cap: float) -> jax.Array:
    B, K, G, T, D = q_BKGTD.shape
    S = k_BKSD.shape[2]
    q_BKXD = q_BKGTD.reshape(B, K, G * T, D)
    scores_BKXS = jnp.einsum("bkxd,bksd->bkxs", q_BKXD, k_BKSD, preferred_element_type=jnp.float32)
    scores_BKGTS = soft_cap(scores_BKXS, cap).reshape(B, K, G, T, S)
    scores_BKGTS = jnp.where(allowed_BTS[:, None, None], scores_BKGTS, MASKED)
    highest_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
    weights_BKGTS = jnp.exp(scores_BKGTS - highest_BKGT1)
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    # Divided after the product with the values: that is S / D times less to divide.
    out_BKXD = jnp.einsum(
        "bkxs,bksd->bkxd",
        weights_BKGTS.astype(v_BKSD.dtype).reshape(B, K, G * T, S),
        v_BKSD,
        preferred_element_type=jnp.float32,
    )
    return (out_BKXD.reshape(B, K, G, T, D) / total_BKGT1).astype(v_BKSD.dtype)
