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

from model.kernels.kv_pages import Pages, take
from model.kernels.reductions import row_max
from model.kernels.tiles import MASKED
from model.kernels.xla_attention import TILE, allowed_pairs, masked_attention, soft_cap

# From so many new tokens on, they attend to each other apart from the pages, in tiles of queries.
CHUNK = 16


def paged_attention(
    q_BTHD: jax.Array,
    new_BTKD: tuple[jax.Array, jax.Array],
    pages_NKSD: tuple[Pages, Pages],
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
      new_BTKD: keys and values of the new tokens, as the pages keep them; values of as many dimensions as keys, or fewer.
      pages_NKSD: keys and values of the pool, those of the new tokens among them; what is wider than a new one is cut off.
      table_BP: int32, slot s of page table[b, p] holds position p * S + s of row b.
      positions_BT: int32, ascending by one; a negative one is padding, which comes last and gets 0.
      sinks_H: a logit per head that takes part in the softmax without a value (arXiv:2309.17453).
      window: a query sees slots at distances below it; 0 is no limit.

    Returns:
      [B, T, H, dimensions of a value] of q's dtype.
    """
    B, T, H, D = q_BTHD.shape
    K, S = pages_NKSD[0].shape[1:3]
    width = new_BTKD[1].shape[-1]
    q_BHTD = q_BTHD.swapaxes(1, 2)
    q_BKXD = (q_BHTD * scale).reshape(B, K, H // K * T, D)
    if T < CHUNK:
        end_BT = positions_BT + 1
        highest = jnp.full((B, H, T, 1), MASKED, jnp.float32)
        total = jnp.zeros((B, H, T, 1), jnp.float32)
        if sinks_H is not None:
            highest = jnp.broadcast_to(sinks_H.astype(jnp.float32)[:, None, None], highest.shape)
            total = jnp.ones_like(total)
        out = jnp.zeros((B, H, T, width), jnp.float32)
    else:
        # What comes before the first of them is left to the pages.
        end_BT = jnp.broadcast_to(positions_BT[:, :1], positions_BT.shape)
        k_BKTD, v_BKTD = (x.swapaxes(1, 2) for x in new_BTKD)
        out, highest = _among_new(q_BHTD, k_BKTD, v_BKTD, positions_BT, sinks_H, scale=scale, window=window, cap=cap)
        total = jnp.where(highest <= MASKED / 2, 0.0, 1.0)  # of a NaN 1, so that it stays one

    def page(p: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest, total, out = carry
        pages_B = jax.lax.dynamic_index_in_dim(table_BP, p, axis=1, keepdims=False)
        k_BKSD, v_BKSD = (take(x, pages_B, new.shape[-1], q_BTHD.dtype) for x, new in zip(pages_NKSD, new_BTKD, strict=True))
        scores_BKXS = jnp.einsum("bkxd,bksd->bkxs", q_BKXD, k_BKSD, preferred_element_type=jnp.float32)
        slot_S = p * S + jnp.arange(S, dtype=jnp.int32)
        seen_BTS = slot_S < end_BT[:, :, None]
        if window:
            seen_BTS &= positions_BT[:, :, None] - slot_S < window
        scores_BHTS = jnp.where(seen_BTS[:, None], soft_cap(scores_BKXS, cap).reshape(B, H, T, S), MASKED)
        new_highest = jnp.maximum(highest, row_max(scores_BHTS))
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

    first = jnp.int32(0)
    if window:
        earliest = jnp.min(jnp.where(positions_BT < 0, jnp.iinfo(jnp.int32).max, positions_BT))
        first = jnp.maximum(earliest - window + 1, 0) // S
    pages = (jnp.max(end_BT) + S - 1) // S
    _, total, out_BHTD = jax.lax.fori_loop(first, pages, page, (highest, total, out))
    return jnp.where(total == 0, 0.0, out_BHTD / total).swapaxes(1, 2).astype(q_BTHD.dtype)


def _among_new(
    q_BHTD: jax.Array,
    k_BKTD: jax.Array,
    v_BKTD: jax.Array,
    positions_BT: jax.Array,
    sinks_H: jax.Array | None,
    *,
    scale: float,
    window: int,
    cap: float,
) -> tuple[jax.Array, jax.Array]:
    """New tokens to each other: float32 [B, H, T, D] and the log-sum-exp [B, H, T, 1]; see `masked_attention`."""
    real = (positions_BT >= 0).astype(jnp.int32)
    outs, lses = [], []
    for start in range(0, q_BHTD.shape[2], TILE):
        rows, keys = slice(start, start + TILE), slice(0, start + TILE)
        allowed = allowed_pairs(real[:, rows], positions_BT[:, rows], real[:, keys], positions_BT[:, keys], window)
        k, v = k_BKTD[:, :, keys], v_BKTD[:, :, keys]
        out, lse = masked_attention(q_BHTD[:, :, rows], k, v, allowed, sinks_H, scale=scale, cap=cap)
        outs.append(out)
        lses.append(lse[..., None])
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)
