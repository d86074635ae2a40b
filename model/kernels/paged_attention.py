"""Attention of new tokens to a paged cache of keys and values (arXiv:2309.06180), in plain JAX.

A row's page table names the pages that hold its past. Pages are taken one after the other with a running softmax
(arXiv:1805.02867), as far as the longest row needs: one program serves every length, and what a row gets does not depend on the
rows beside it, for a page in which a row sees nothing changes not a bit of its sums.

Axes: B rows, T new tokens, H query heads, K key-value heads, P pages of a row, N pages of the pool, S slots of a page, D head
dimension, X the queries of one key-value head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.tiles import MASKED
from model.kernels.xla_attention import soft_cap


def paged_attention(
    q_BTHD: jax.Array,
    keys_NKSD: jax.Array,
    values_NKSD: jax.Array,
    table_BP: jax.Array,
    positions_BT: jax.Array,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> jax.Array:
    """softmax(cap(scale * q k^T)) v over slots 0..position of each query's row; the softmax is float32.

    Args:
      values_NKSD: of as many dimensions as keys, or fewer.
      table_BP: int32, slot s of page table[b, p] holds position p * S + s of row b.
      positions_BT: int32; a negative one is padding and gets 0.
      sinks_H: a logit per head that takes part in the softmax without a value (arXiv:2309.17453).
      window: a query sees slots at distances below it; 0 is no limit.

    Returns:
      [B, T, H, dimensions of a value] of q's dtype.
    """
    B, T, H, D = q_BTHD.shape
    K, S = keys_NKSD.shape[1:3]
    width = values_NKSD.shape[3]
    q_BKDX = (q_BTHD * scale).swapaxes(1, 2).reshape(B, K, H // K * T, D).swapaxes(2, 3)

    def page(p: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest, total, out = carry
        pages_B = jax.lax.dynamic_index_in_dim(table_BP, p, axis=1, keepdims=False)
        k_BKSD, v_BKSD = keys_NKSD[pages_B], values_NKSD[pages_B]
        # With few queries, XLA's CPU dots are nearly twice as fast with the keys on the left.
        scores_BKSX = jnp.einsum("bksd,bkdx->bksx", k_BKSD, q_BKDX, preferred_element_type=jnp.float32)
        scores_BKXS = scores_BKSX.swapaxes(2, 3)
        distance_BTS = positions_BT[:, :, None] - (p * S + jnp.arange(S, dtype=jnp.int32))
        seen_BTS = (distance_BTS >= 0) & (distance_BTS < window) if window else distance_BTS >= 0
        scores_BHTS = jnp.where(seen_BTS[:, None], soft_cap(scores_BKXS, cap).reshape(B, H, T, S), MASKED)
        new_highest = jnp.maximum(highest, jnp.max(scores_BHTS, axis=-1, keepdims=True))
        weights_BHTS = jnp.where(seen_BTS[:, None], jnp.exp(scores_BHTS - new_highest), 0.0)
        fade = jnp.exp(highest - new_highest)
        weighted = jnp.einsum(
            "bkxs,bksd->bkxd",
            weights_BHTS.astype(v_BKSD.dtype).reshape(B, K, H // K * T, S),
            v_BKSD,
            preferred_element_type=jnp.float32,
        )
        total = total * fade + jnp.sum(weights_BHTS, axis=-1, keepdims=True)
        return new_highest, total, out * fade + weighted.reshape(B, H, T, width)

    highest = jnp.full((B, H, T, 1), MASKED, jnp.float32)
    total = jnp.zeros((B, H, T, 1), jnp.float32)
    if sinks_H is not None:
        highest = jnp.broadcast_to(sinks_H.astype(jnp.float32)[:, None, None], highest.shape)
        total = jnp.ones_like(total)
    first = jnp.int32(0)
    if window:
        earliest = jnp.min(jnp.where(positions_BT < 0, jnp.iinfo(jnp.int32).max, positions_BT))
        first = jnp.maximum(earliest - window + 1, 0) // S
    pages = jnp.max(positions_BT) // S + 1
    _, total, out_BHTD = jax.lax.fori_loop(first, pages, page, (highest, total, jnp.zeros((B, H, T, width), jnp.float32)))
    return jnp.where(total > 0, out_BHTD / total, 0.0).swapaxes(1, 2).astype(q_BTHD.dtype)
