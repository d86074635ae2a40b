"""Pages of a KV cache in 8 bits: a quarter of float32's memory, half of bfloat16's, and of what a step reads.

Rounding is to nearest and symmetric, by one scale for each token and key-value head, the largest magnitude of its dimensions
over 127; with latent attention one for the latent and its rotated key together. What attends to the pages sees the rounded
keys and values of new tokens too, so an answer depends neither on chunks nor on what was shared.

Axes: N pages, K key-value heads, S slots of a page, D head dimension.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Int8Pages:
    """Attributes:
    values: int8 [N, K, S, D].
    scales: float32 [N, K, 1, S], or wider.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Pages = jax.Array | Int8Pages


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., D] and float32 scales [..., 1], whose product is x within half a scale."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(scales == 0, 1.0, scales)).astype(jnp.int8), scales


def as_kept(x: jax.Array, pages: Pages) -> jax.Array:
    """New keys or values as `pages` give them back."""
    if not isinstance(pages, Int8Pages):
        return x
    values, scales = rounded(x)
    return (values * scales).astype(x.dtype)


def write(pages: Pages, x_BTKD: jax.Array, table_BP: jax.Array, positions_BT: jax.Array) -> Pages:
    """The pages with new tokens at their positions; none if negative. What is wider than they gets zeros.

    Positions ascend by one along a row, padding comes last, and no two rows write to the same page.
    """
    num_pages, _, page_size, width = pages.shape
    page_BT = jnp.take_along_axis(table_BP, positions_BT // page_size, axis=1, mode="clip")
    page_BT = jnp.where(positions_BT < 0, num_pages, page_BT)
    slot_BT = positions_BT % page_size

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))

    if not isinstance(pages, Int8Pages):
        return pages.at[page_BT, :, slot_BT].set(padded(x_BTKD.astype(pages.dtype)), mode="drop")
    values, scales = rounded(x_BTKD)
    return Int8Pages(
        _write_whole_pages(pages.values, padded(values), table_BP, positions_BT),
        pages.scales.at[page_BT, :, 0, slot_BT].set(scales[..., 0], mode="drop"),
    )


def _write_whole_pages(pages_NKSD: jax.Array, x_BTKD: jax.Array, table_BP: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """As `write`, a page at a time: an int8 register holds 32 slots, and to write single ones XLA copies all pages on TPUs."""
    (B, T, _, D), (N, K, S, _) = x_BTKD.shape, pages_NKSD.shape
    touched = (T + S - 2) // S + 1  # pages of a row, at most
    first_B = jnp.maximum(positions_BT[:, 0], 0)
    number_BG = (first_B // S)[:, None] + jnp.arange(touched)
    page_BG = jnp.take_along_axis(table_BP, number_BG, axis=1, mode="clip")
    page_BG = jnp.where(number_BG <= jnp.max(positions_BT, axis=1, keepdims=True) // S, page_BG, N)
    token_BL = jnp.arange(touched * S) - (first_B % S)[:, None]
    at_BL = jnp.clip(token_BL, 0, T - 1)
    new_BL = (token_BL == at_BL) & (jnp.take_along_axis(positions_BT, at_BL, axis=1) >= 0)
    x_BLKD = jnp.take_along_axis(x_BTKD, at_BL[:, :, None, None], axis=1)
    x_BGKSD = x_BLKD.reshape(B, touched, S, K, D).swapaxes(2, 3)
    old_BGKSD = pages_NKSD.at[page_BG].get(mode="clip")
    mixed = jnp.where(new_BL.reshape(B, touched, 1, S, 1), x_BGKSD, old_BGKSD)
    return pages_NKSD.at[page_BG].set(mixed, mode="drop")


def take(pages: Pages, which_B: jax.Array, width: int, dtype: jnp.dtype) -> jax.Array:
    """The first `width` columns of some pages [B, K, S, width]; rounded ones as `dtype`."""
    if not isinstance(pages, Int8Pages):
        return pages[which_B][..., :width]
    scales_BKS1 = pages.scales[which_B][..., : pages.shape[2]].swapaxes(2, 3)
    return (pages.values[which_B][..., :width] * scales_BKS1).astype(dtype)
