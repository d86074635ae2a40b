"""Attention in plain JAX over a mask of allowed pairs: whole, in tiles of queries, and its gradients for a part of the keys.

Axes: B rows, T queries, S keys, H query heads, K key-value heads, G query heads per key-value head, D head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.reductions import row_max
from model.kernels.tiles import MASKED

# Queries are taken in tiles of so many or more, in at most MAX_TILES of them.
TILE = 128
MAX_TILES = 8
# The segment whose tokens all segments of their row see, as answers to one prompt do; it sees nothing but itself.
SHARED = -1


def allowed_pairs(
    q_segments: jax.Array, q_positions: jax.Array, kv_segments: jax.Array, kv_positions: jax.Array, window: int
) -> jax.Array:
    """Which keys a query may see: of its segment or the SHARED one, not later, and within the window (0: no limit). Segment 0
    sees nothing, nobody sees it.

    Args:
      q_segments, q_positions: int32 [B, T].
      kv_segments, kv_positions: int32 [B, S].

    Returns:
      bool [B, T, S].
    """
    distance_BTS = q_positions[:, :, None] - kv_positions[:, None, :]
    seen_BTS = (q_segments[:, :, None] == kv_segments[:, None, :]) | (kv_segments[:, None, :] == SHARED)
    allowed_BTS = (distance_BTS >= 0) & seen_BTS & (q_segments[:, :, None] != 0)
    return allowed_BTS & (distance_BTS < window) if window else allowed_BTS


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap): keeps |x| below cap with gradients everywhere (Gemma 2). 0 is off."""
    return cap * jnp.tanh(x / cap) if cap else x


def masked_attention(
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    allowed_BTS: jax.Array,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    cap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """softmax(cap(scale * q k^T)) v over the allowed pairs, the softmax in float32.

    Heads come before time, because XLA's CPU dots over [.., time, head_dim] are 2.7 times faster.

    Args:
      sinks_H: a logit per head that takes part in the softmax without a value (arXiv:2309.17453).

    Returns:
      float32 [B, H, T, D], and the log-sum-exp of each query's logits, float32 [B, H, T]. A query that sees nothing and has no
      sink gets 0 and MASKED.
    """
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    q_BKXD = (q_BHTD * scale).reshape(B, K, H // K * T, D)
    scores_BKXS = jnp.einsum("bkxd,bksd->bkxs", q_BKXD, k_BKSD, preferred_element_type=jnp.float32)
    scores_BHTS = jnp.where(allowed_BTS[:, None], soft_cap(scores_BKXS, cap).reshape(B, H, T, S), MASKED)
    highest_BHT1 = row_max(scores_BHTS)
    sinks_H11 = None if sinks_H is None else sinks_H.astype(jnp.float32)[:, None, None]
    if sinks_H11 is not None:
        highest_BHT1 = jnp.maximum(highest_BHT1, jax.lax.stop_gradient(sinks_H11))
    weights_BHTS = jnp.exp(scores_BHTS - highest_BHT1)
    total_BHT1 = jnp.sum(weights_BHTS, axis=-1, keepdims=True)
    if sinks_H11 is not None:
        total_BHT1 += jnp.exp(sinks_H11 - highest_BHT1)
    # Divided after the product with the values: that is S / D times less to divide.
    out_BKXD = jnp.einsum(
        "bkxs,bksd->bkxd",
        weights_BHTS.astype(v_BKSD.dtype).reshape(B, K, H // K * T, S),
        v_BKSD,
        preferred_element_type=jnp.float32,
    )
    empty_BHT1 = highest_BHT1 <= MASKED / 2
    out_BHTD = out_BKXD.reshape(B, H, T, -1) * jnp.where(empty_BHT1, 0.0, 1.0 / total_BHT1)
    lse_BHT1 = jnp.where(empty_BHT1, MASKED, highest_BHT1 + jnp.log(total_BHT1))
    return out_BHTD, lse_BHT1[..., 0]


def tiled_attention(
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    allowed_BTS: jax.Array,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    cap: float = 0.0,
) -> jax.Array:
    """`masked_attention` of tokens in order (T = S, no key is allowed that stands later in its row), of q's dtype.

    Tiles of queries meet only the keys up to their own end, which halves the work.
    """
    T = q_BHTD.shape[2]
    tile = max(TILE, -(-T // MAX_TILES))
    tiles = []
    for start in range(0, T, tile):
        rows, keys = slice(start, start + tile), slice(0, start + tile)
        k, v, allowed = k_BKSD[:, :, keys], v_BKSD[:, :, keys], allowed_BTS[:, rows, keys]
        out, _ = masked_attention(q_BHTD[:, :, rows], k, v, allowed, sinks_H, scale=scale, cap=cap)
        tiles.append(out.astype(q_BHTD.dtype))
    return jnp.concatenate(tiles, axis=2)


def masked_gradients(
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    allowed_BTS: jax.Array,
    d_out_BHTD: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    *,
    scale: float,
    cap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What some of the keys add to the gradients of an attention over more keys than these (ring attention).

    Args:
      lse_BHT: log-sum-exp over all keys.
      delta_BHT: out . d_out, over all keys.

    Returns:
      float32 gradients of q, of these keys and of their values.
    """
    B, H, T, D = q_BHTD.shape
    K = k_BKSD.shape[1]
    q, d_out = (x.astype(jnp.float32).reshape(B, K, H // K, T, -1) for x in (q_BHTD, d_out_BHTD))
    k, v = k_BKSD.astype(jnp.float32), v_BKSD.astype(jnp.float32)
    lse, delta = (x.reshape(B, K, H // K, T, 1) for x in (lse_BHT, delta_BHT))
    logits = soft_cap(jnp.einsum("bkgtd,bksd->bkgts", q * scale, k), cap)
    weights = jnp.where(allowed_BTS[:, None, None], jnp.exp(logits - lse), 0.0)
    d_logits = weights * (jnp.einsum("bkgtd,bksd->bkgts", d_out, v) - delta)
    d_scores = scale * (d_logits * (1 - jnp.square(logits / cap)) if cap else d_logits)
    dq = jnp.einsum("bkgts,bksd->bkgtd", d_scores, k).reshape(B, H, T, D)
    return dq, jnp.einsum("bkgts,bkgtd->bksd", d_scores, q), jnp.einsum("bkgts,bkgtd->bksd", weights, d_out)
