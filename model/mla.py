"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads come from one narrow vector per
token, and only that vector and one rotated key, which all heads share, are kept for decoding.

Rotation is that of `model/rope.py`, halves against each other. DeepSeek's checkpoints rotate neighbours: to convert one, put
the even rotated dimensions of queries and of the shared key before the odd ones.
YaRN's temperature sharpens the whole of a logit, as in DeepSeek-V3, not the rotated part alone.

Axes: B rows, T tokens, S keys, D model width, H heads; N dimensions without rotation, R with it, V of a value; C kv_lora_rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.config import MlaConfig, ModelConfig
from model.layers import linear, rms_norm
from model.params import Params
from model.rope import apply_rope, inverse_frequencies
from model.sharding import Layout, constrain

Latents = tuple[jax.Array, jax.Array]  # [B, S, C] after its norm and [B, S, R] after its rotation


def latents(
    x_BTD: jax.Array,
    params: Params,
    config: ModelConfig,
    mla: MlaConfig,
    table: tuple[jax.Array, jax.Array],
    layout: Layout | None,
) -> Latents:
    """What keys and values are made from, and the key that all heads share."""
    down = linear(x_BTD, params["kv_down"], layout=layout)
    latent_BTC = rms_norm(down[..., : mla.kv_lora_rank], params["kv_norm"], config.norm_eps)
    shared_BT1R = apply_rope(down[..., None, mla.kv_lora_rank :], table)
    return latent_BTC, shared_BT1R[..., 0, :]


def queries(
    x_BTD: jax.Array,
    params: Params,
    config: ModelConfig,
    mla: MlaConfig,
    table: tuple[jax.Array, jax.Array],
    window: int,
    layout: Layout | None,
) -> jax.Array:
    """[B, T, H, N + R], the last R dimensions rotated."""
    if mla.q_lora_rank:
        x_BTD = rms_norm(linear(x_BTD, params["query_down"], layout=layout), params["query_norm"], config.norm_eps)
    q_BTHD = linear(x_BTD, params["query"], layout=layout)
    # The table holds YaRN's temperature for query and key each; the dimensions without rotation get both here.
    temperature = inverse_frequencies(config.rope, config.rotary_dim, window > 0)[1]
    nope, rope = q_BTHD[..., : mla.qk_nope_head_dim], q_BTHD[..., mla.qk_nope_head_dim :]
    nope = nope if temperature == 1 else (nope.astype(jnp.float32) * temperature**2).astype(nope.dtype)
    return jnp.concatenate([nope, apply_rope(rope, table)], axis=-1)


def keys_and_values(past: Latents, params: Params, layout: Layout | None) -> tuple[jax.Array, jax.Array]:
    """[B, S, H, N + R] and [B, S, H, V]."""
    latent_BSC, shared_BSR = past
    nope_BSHN = linear(latent_BSC, params["key"], layout=layout)
    shared_BSHR = jnp.broadcast_to(shared_BSR[:, :, None], (*nope_BSHN.shape[:3], shared_BSR.shape[-1]))
    keys = jnp.concatenate([constrain(nope_BSHN, layout, "batch", "sequence", "kv_heads", None), shared_BSHR], axis=-1)
    return keys, linear(latent_BSC, params["value"], layout=layout)


def absorbed_queries(q_BTHD: jax.Array, params: Params, mla: MlaConfig) -> jax.Array:
    """[B, T, H, C + R]: queries to meet latents themselves, as the given ones [B, T, H, N + R] meet keys made from them."""
    nope, rope = q_BTHD[..., : mla.qk_nope_head_dim], q_BTHD[..., mla.qk_nope_head_dim :]
    absorbed = jnp.einsum("bthn,chn->bthc", nope, params["key"].astype(nope.dtype))
    return jnp.concatenate([absorbed, rope], axis=-1)


def values_of_latents(mixed_BTHC: jax.Array, params: Params) -> jax.Array:
    """[B, T, H, V]: the values of a mixture of latents, per head."""
    return jnp.einsum("bthc,chv->bthv", mixed_BTHC, params["value"].astype(mixed_BTHC.dtype))
