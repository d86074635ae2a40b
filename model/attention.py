"""Scaled dot-product attention with grouped queries, by one signature over its backends and over a mesh.

A query sees the keys of its segment that are not later and, with a window, nearer than it. Segment 0 is padding: it sees
nothing, nobody sees it, and its output is 0. What a backend cannot do is refused by `ModelConfig`.
Of a few new tokens to a cache, `flash` has a kernel of its own (`model/kernels/paged_decode.py`); more of them, and the other
backends, take plain JAX (`model/kernels/paged_attention.py`).

  reference  plain JAX over a mask; any device
  xla        plain JAX, in tiles that skip the keys after their end; tuned for CPUs
  flash      our Pallas kernel; TPUs
  cudnn      cuDNN's kernel through jax.nn, which reads a mask; GPUs

On a ring of devices (`model/ring_attention.py`) `xla` and `reference` are the same: over the mask, part by part. There is no
`cudnn` on a ring, and `TrainConfig` refuses it.

Axes: B rows, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from model.chips import chip_of
from model.config import AttentionBackend, check
from model.kernels.flash_attention import flash_attention, flash_gradients
from model.kernels.kv_pages import Pages
from model.kernels.paged_attention import CHUNK, paged_attention
from model.kernels.paged_decode import fits, paged_decode
from model.kernels.tiles import BlockSizes, Plan, make_plan
from model.kernels.xla_attention import allowed_pairs, masked_attention, masked_gradients, tiled_attention
from model.ring_attention import Part, ring_attention, ring_patterns
from model.sharding import Layout

# Which pairs are allowed, as the backend reads it: bool [B, T, S] or a plan of tiles; with a leading axis of steps for a ring.
Pattern = Plan | jax.Array


def runs_on(backend: AttentionBackend, platform: str) -> bool:
    return {"flash": "tpu", "cudnn": "gpu"}.get(backend, platform) == platform


def check_backend(backend: AttentionBackend, platform: str, field: str = "model") -> None:
    """Raises ValueError where attention is to be computed by a backend for other devices than there are.

    Args:
      field: of the config, which is to be changed.
    """
    best = {"tpu": "flash", "gpu": "cudnn"}.get(platform, "xla")
    check(
        runs_on(backend, platform),
        f"{field}.attention_backend={backend!r} is not for {platform!r} devices, which these are: set it to {best!r}",
    )


def make_pattern(
    q_segments: jax.Array,
    q_positions: jax.Array,
    kv_segments: jax.Array,
    kv_positions: jax.Array,
    *,
    window: int,
    backend: AttentionBackend,
    itemsize: int = 2,
    head_dim: int = 128,
    soft_cap: float = 0.0,
    layout: Layout | None = None,
) -> Pattern:
    """What all layers of a step with the same window share.

    Args:
      q_segments, q_positions: int32 [B, T].
      kv_segments, kv_positions: int32 [B, S]; those of the queries if a mesh splits the tokens of a row.
      window: a query sees keys at distances below it; 0 is no limit.
      itemsize, head_dim, soft_cap: bytes of an element, and dimensions, of the queries and keys that will be attended with, and
        the cap of their logits (0 is none).
    """
    make: Callable[..., Pattern] = functools.partial(allowed_pairs, window=window)
    if backend == "flash":
        devices = layout.mesh.devices.flat if layout else jax.devices()
        sizes = BlockSizes.of_chip(chip_of(devices[0].device_kind), head_dim, soft_cap).for_itemsize(itemsize)
        if layout is not None and (devices_of_row := layout.shards("sequence")) > 1:
            sizes = sizes.dividing(q_segments.shape[1] // (2 * devices_of_row))
        make = functools.partial(make_plan, window=window, sizes=sizes)
    if layout is None or layout.shards("sequence") == 1:
        return make(q_segments, q_positions, kv_segments, kv_positions)
    tokens = layout.spec("batch", "sequence")
    ids = jax.ShapeDtypeStruct(layout.sharding("batch", "sequence").shard_shape(q_segments.shape), jnp.int32)
    on_ring = functools.partial(ring_patterns, make)
    specs = jax.tree.map(lambda x: _pattern_spec(x.ndim + 1, layout), jax.eval_shape(make, ids, ids, ids, ids))
    return jax.shard_map(on_ring, mesh=layout.mesh, in_specs=(tokens, tokens), out_specs=specs, check_vma=False)(
        q_segments, q_positions
    )


def _pattern_spec(ndim: int, layout: Layout) -> PartitionSpec:
    """Over which mesh axes an array of a pattern lies: on a ring steps come first, then rows; tokens or tiles last."""
    batch, sequence = layout.spec("batch", "sequence")
    steps = (None,) if layout.shards("sequence") > 1 else ()
    return PartitionSpec(*steps, batch, *(None,) * (ndim - len(steps) - 2), sequence)


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    pattern: Pattern,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    cap: float = 0.0,
    backend: AttentionBackend = "reference",
    layout: Layout | None = None,
) -> jax.Array:
    """softmax(cap(scale * q k^T)) v over the allowed pairs; the softmax is float32.

    Args:
      v_BSKD: of as many dimensions as keys, or fewer.
      pattern: of `make_pattern`, for the same backend and layout.
      sinks_H: a logit per head that takes part in the softmax without a value (arXiv:2309.17453).
      cap: logits become cap * tanh(logits / cap); 0 is off.
      backend: `xla` needs queries and keys to be the same tokens in order.

    Returns:
      [B, T, H, dimensions of a value] of q's dtype. A query that sees nothing and has no sink gets 0.
    """
    named = {"query": q_BTHD, "key": k_BSKD, "value": v_BSKD}
    q, k, v = (checkpoint_name(x.swapaxes(1, 2), name) for name, x in named.items())
    width = v.shape[-1]
    if backend in ("flash", "cudnn"):  # kernels that take one width for keys and values
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - width)))
    on_ring = layout is not None and layout.shards("sequence") > 1
    attend = functools.partial(_attend_on_ring if on_ring else _attend, scale=scale, cap=cap, backend=backend)
    # The partitioner splits plain JAX by itself; a kernel and a ring are split by hand.
    if layout is not None and (on_ring or backend == "flash"):
        heads, kv_heads = (layout.spec("batch", axis, "sequence", None) for axis in ("heads", "kv_heads"))
        patterns = jax.tree.map(lambda x: _pattern_spec(x.ndim, layout), pattern)
        attend = jax.shard_map(
            attend,
            mesh=layout.mesh,
            in_specs=(heads, kv_heads, kv_heads, patterns, layout.spec("heads")),
            out_specs=heads,
            check_vma=False,
        )
    return attend(q, k, v, pattern, sinks_H).swapaxes(1, 2)[..., :width]


def cached_attention(
    q_BTHD: jax.Array,
    new_BTKD: tuple[jax.Array, jax.Array],
    pages: tuple[Pages, ...],
    table_BP: jax.Array,
    positions_BT: jax.Array,
    sinks_H: jax.Array | None = None,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    backend: AttentionBackend = "reference",
    layout: Layout | None = None,
) -> jax.Array:
    """Attention of new tokens to the pages that hold them and their past; see `paged_attention`.

    Args:
      pages: keys and values of the pool, or one array whose first columns are the values.
      layout: over which mesh axes `heads` and `kv_heads` lie. None is one device.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "cap": cap}
    tokens, queries = q_BTHD.shape[1], q_BTHD.shape[1] * q_BTHD.shape[2] // pages[0].shape[1]
    if backend != "flash" or tokens >= CHUNK or not fits(queries, q_BTHD.dtype):
        both = (pages[0], pages[-1])
        return paged_attention(q_BTHD, new_BTKD, both, table_BP, positions_BT, sinks_H, **options)
    attend = functools.partial(paged_decode, width=new_BTKD[1].shape[-1], **options)
    if layout is not None:
        heads, everywhere = layout.spec(None, None, "heads", None), layout.spec()
        attend = jax.shard_map(
            attend,
            mesh=layout.mesh,
            in_specs=(heads, layout.spec(None, "kv_heads"), everywhere, everywhere, layout.spec("heads")),
            out_specs=heads,
            check_vma=False,
        )
    return attend(q_BTHD, pages, table_BP, positions_BT, sinks_H)


def _attend(q, k, v, pattern: Any, sinks, *, scale: float, cap: float, backend: AttentionBackend) -> jax.Array:
    """[B, H, T, D] on one device."""
    if backend == "cudnn":
        tokens_first = (x.swapaxes(1, 2) for x in (q, k, v))
        out = jax.nn.dot_product_attention(*tokens_first, mask=pattern[:, None], scale=scale, implementation="cudnn")
        return jnp.where(jnp.any(pattern, axis=-1)[:, None, :, None], out.swapaxes(1, 2), 0)
    if backend == "xla":
        return tiled_attention(q, k, v, pattern, sinks, scale=scale, cap=cap)
    function = flash_attention if backend == "flash" else masked_attention
    return function(q, k, v, pattern, sinks, scale=scale, cap=cap)[0].astype(q.dtype)


def ring_part(*, scale: float, cap: float, backend: AttentionBackend) -> Part:
    """How `backend` attends to the keys of one device of a ring."""
    forward, gradients = masked_attention, masked_gradients
    if backend == "flash":
        forward, gradients = functools.partial(flash_attention, out_dtype=jnp.float32), flash_gradients
    return Part(functools.partial(forward, scale=scale, cap=cap), functools.partial(gradients, scale=scale, cap=cap))


def _attend_on_ring(q, k, v, patterns: Any, sinks, *, scale: float, cap: float, backend: AttentionBackend) -> jax.Array:
    return ring_attention(ring_part(scale=scale, cap=cap, backend=backend), patterns, q, k, v, sinks)
