"""The network: one forward function for training, scoring, prefill and decode.

Axes: B rows, T tokens, S key slots, D model width, H query heads, K key-value heads, F MLP width, V vocabulary.
Parameters are kept in `param_dtype` and cast to `dtype` where they are used; norms, rotations and softmax are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.attention import Pattern, attention, cached_attention, make_pattern
from model.config import CacheDType, ModelConfig, check
from model.kernels.kv_pages import Int8Pages, Pages, as_kept, write
from model.kernels.paged_decode import slots_multiple
from model.kernels.tiles import LANES, round_up
from model.kernels.xla_attention import soft_cap
from model.layers import linear, mlp_block, norm, rms_norm
from model.mla import absorbed_queries, keys_and_values, latents, queries, values_of_latents
from model.moe import Routing, moe_block
from model.params import Params, block_layout
from model.quantize import Quantized
from model.rope import apply_rope, rope_table
from model.sharding import Dimensions, Layout, constrain


@flax.struct.dataclass
class Context:
    """What every layer reads beside its input.

    Attributes:
      positions: int32 [B, T].
      patterns: window size -> which pairs are allowed.
      rope: whether the layer is a sliding-window one -> (cos, sin); empty without RoPE.
      real: bool [B, T], False for padding.
      page_table: of the cache, if there is one.
      layout: where activations live; None on one device.
      decode_layout: of the cache.
    """

    positions: jax.Array
    patterns: dict[int, Pattern]
    rope: dict[bool, tuple[jax.Array, jax.Array]]
    real: jax.Array
    page_table: jax.Array | None
    layout: Layout | None = flax.struct.field(pytree_node=False)
    decode_layout: Layout | None = flax.struct.field(pytree_node=False)


# Of one layer: pages of keys and of values, each [pages, K, slots, head_dim]; with latent attention one of both.
LayerPages = tuple[Pages, ...]


@flax.struct.dataclass
class KVCache:
    """What attention keeps of past tokens, in pages that rows may share (arXiv:2309.06180).

    Attributes:
      pages: per layer.
      table: int32 [B, P]; slot s of page `table[b, p]` holds position p * slots + s of row b.
      layout: over which axes of a mesh `heads` of queries, `kv_heads` of pages and `experts` lie; None is one device.
    """

    pages: tuple[LayerPages, ...]
    table: jax.Array
    layout: Layout | None = flax.struct.field(pytree_node=False, default=None)


def empty_pages(
    config: ModelConfig, num_pages: int, page_size: int, cache_dtype: CacheDType = "model"
) -> tuple[LayerPages, ...]:
    """Pages for all layers, each [num_pages, key-value heads, page_size, width] of zeros in `config.dtype` or rounded to int8.

    For the flash backend's kernel, widths are rounded up to whole registers, which take as much memory as what is in them: XLA
    would lay out a narrower array otherwise than the kernel reads it, and copy it whole in every step. So are rows of scales.

    Raises:
      ValueError: a page size that this kernel cannot read.
    """
    if config.mla:
        widths = (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim,)
        heads = 1
    else:
        widths, heads = (config.head_dim, config.head_dim), config.num_kv_heads
    dtype, row = (config.dtype if cache_dtype == "model" else cache_dtype), page_size
    if config.attention_backend == "flash":
        multiple = slots_multiple(dtype)
        check(
            page_size % multiple == 0,
            f"engine.page_size={page_size} must be a multiple of {multiple} for model.attention_backend='flash' with "
            f"{dtype} pages: change one of them",
        )
        *widths, row = (round_up(width, LANES) for width in (*widths, row))

    def make(width: int) -> Pages:
        values = jnp.zeros((num_pages, heads, page_size, width), dtype)
        return Int8Pages(values, jnp.zeros((num_pages, heads, 1, row))) if cache_dtype == "int8" else values

    return tuple(tuple(map(make, widths)) for _ in range(config.num_layers))


def remember(pages: LayerPages, new: tuple[jax.Array, ...], table: jax.Array, positions: jax.Array) -> LayerPages:
    """The pages with what belongs to new tokens, each [B, T, K, width], at their positions int32 [B, T]; none if negative."""
    return tuple(write(old, x, table, positions) for old, x in zip(pages, new, strict=True))


def qk_norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
    """RMSNorm of queries or keys [B, T, heads, head_dim], per head or over all heads (arXiv:2302.05442)."""
    scale = scale + 1.0 if config.norm_zero_centered else scale
    return rms_norm(x, scale, config.norm_eps, axes=(-1,) if config.qk_norm == "head" else (-2, -1))


def attention_block(
    x_BTD: jax.Array,
    params: Params,
    config: ModelConfig,
    context: Context,
    window: int,
    pages: LayerPages | None,
    rotates: bool,
) -> tuple[jax.Array, LayerPages | None]:
    layout, table = context.layout, context.rope[window > 0] if rotates else None
    k_BTKD = v_BTKD = None
    if config.mla:
        assert table is not None
        q_BTHD = queries(x_BTD, params, config, config.mla, table, window, layout)
        new = latents(x_BTD, params, config, config.mla, table, layout)
        if pages is None:
            k_BTKD, v_BTKD = keys_and_values(new, params, layout)
        else:
            new = (jnp.concatenate(new, axis=-1)[:, :, None],)
            q_BTHD = absorbed_queries(q_BTHD, params, config.mla)
    else:
        q_BTHD = linear(x_BTD, params["query"], params.get("query_bias"), layout=layout)
        k_BTKD = linear(x_BTD, params["key"], params.get("key_bias"), layout=layout)
        v_BTKD = linear(x_BTD, params["value"], params.get("value_bias"), layout=layout)
        if config.qk_norm != "none":
            q_BTHD = qk_norm(q_BTHD, params["query_norm"], config)
            k_BTKD = qk_norm(k_BTKD, params["key_norm"], config)
        if table is not None:
            q_BTHD, k_BTKD = apply_rope(q_BTHD, table), apply_rope(k_BTKD, table)
        new = (k_BTKD, v_BTKD)
    q_BTHD = constrain(q_BTHD, layout, "batch", "sequence", "heads", None)
    options: dict[str, Any] = {
        "scale": config.attention_scale or config.head_dim**-0.5,
        "cap": config.attention_soft_cap,
    }
    if pages is None:
        assert k_BTKD is not None
        assert v_BTKD is not None
        out_BTHD = attention(
            q_BTHD,
            constrain(k_BTKD, layout, "batch", "sequence", "kv_heads", None),
            constrain(v_BTKD, layout, "batch", "sequence", "kv_heads", None),
            context.patterns[window],
            params.get("sinks"),
            backend=config.attention_backend,
            layout=layout,
            **options,
        )
    else:
        assert context.page_table is not None
        kept = tuple(map(as_kept, new, pages))
        pages = remember(pages, new, context.page_table, context.positions)
        out_BTHD = cached_attention(
            q_BTHD,
            (kept[0], kept[0][..., : config.mla.kv_lora_rank] if config.mla else kept[-1]),
            pages,
            context.page_table,
            context.positions,
            params.get("sinks"),
            window=window,
            backend=config.attention_backend,
            layout=context.decode_layout,
            **options,
        )
        if config.mla:
            out_BTHD = values_of_latents(out_BTHD, params)
    return linear(out_BTHD, params["out"], params.get("out_bias"), contract=2, layout=layout), pages


def feed_forward(x_BTD: jax.Array, params: Params, config: ModelConfig, context: Context) -> tuple[jax.Array, Routing | None]:
    """The MLP or, in a layer that has them, the experts."""
    layout = context.layout
    if "experts" not in params:
        return mlp_block(x_BTD, params["mlp"], config, layout), None
    assert config.moe is not None
    out_BTD, routing = moe_block(x_BTD, params, config, config.moe, context.real, layout, context.decode_layout)
    if "shared_experts" in params:
        out_BTD += mlp_block(x_BTD, params["shared_experts"], config, layout)
    return out_BTD, routing


def block(
    x_BTD: jax.Array, params: Params, config: ModelConfig, context: Context, layer: int, pages: LayerPages | None = None
) -> tuple[jax.Array, LayerPages | None, Routing | None]:
    """One layer, of the window and rotation of layer number `layer`. The norms that exist in `params` say where they stand
    (`norm_placement`)."""
    layout = context.layout

    def norm_if(name: str, x: jax.Array) -> jax.Array:
        return norm(x, params[name], config) if name in params else x

    # Between layers, and in norms, tokens lie over more axes of the mesh than in attention and MLP.
    def gathered(x: jax.Array) -> jax.Array:
        return constrain(x, layout, "batch", "sequence", None)

    def scattered(x: jax.Array) -> jax.Array:
        return constrain(x, layout, "batch", "residual", None)

    attention_in = gathered(norm_if("attention_norm", x_BTD))
    window, rotates = config.window(layer), config.rotates(layer)
    attention_out, pages = attention_block(attention_in, params["attention"], config, context, window, pages, rotates)
    if config.parallel_block:
        mlp_out, routing = feed_forward(attention_in, params, config, context)
        return x_BTD + scattered(attention_out + mlp_out), pages, routing
    x_BTD = x_BTD + norm_if("attention_out_norm", scattered(attention_out))
    mlp_out, routing = feed_forward(gathered(norm_if("mlp_norm", x_BTD)), params, config, context)
    return x_BTD + norm_if("mlp_out_norm", scattered(mlp_out)), pages, routing


def remat(function: Callable[..., Any], config: ModelConfig, **static: Any) -> Callable[..., Any]:
    """`function` with `static` bound, recomputing in the backward pass what `config.remat` does not keep."""
    function = functools.partial(function, **static)
    if config.remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "attention": policies.save_only_these_names("query", "key", "value", "attention_out", "attention_lse", "expert_out"),
        "dots": policies.dots_with_no_batch_dims_saveable,
    }[config.remat]
    return jax.checkpoint(function, policy=policy)


def activations(batch_size: int, seq_len: int) -> list[Dimensions]:
    """What a mesh must divide beside the parameters."""
    return [
        Dimensions("the rows of a micro-batch", (batch_size,), ("batch",)),
        Dimensions("the tokens of a row", (seq_len,), ("residual",)),
        # Zigzag order deals out halves, see model/ring_attention.py.
        Dimensions("half the tokens of a row", (seq_len // 2,), ("sequence",)),
    ]


def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, KVCache | None, Routing | None]:
    """Runs the network up to the final norm; `unembed` turns the result into logits.

    Args:
      tokens, positions: int32 [B, T]. Positions ascend along a row within a segment. With a cache, a token is written to the
        slot of its position and sees those up to it, which must have been written by then; one at a negative position is
        padding.
      segment_ids: int32 [B, T]; tokens see only their own segment, those of segment 0 (padding) nothing. None is one segment
        per row. Not with a cache.
      layout: where activations live on a mesh. None is one device, or the inside of a shard_map. Tokens that lie over several
        devices may stand in any order (`model.ring_attention.zigzag`). Not with a cache.

    Returns:
      hidden states [B, T, D] of `config.dtype`, the updated cache, and what the routers of all layers with experts did.

    Raises:
      ValueError: a cache together with scan_layers (see `unstack_layers`) or segment_ids.
    """
    if cache is not None and (config.scan_layers or segment_ids is not None):
        raise ValueError("a KV cache needs scan_layers=False (model.params.unstack_layers) and no segment_ids")
    # Rows are taken before they are cast: their gradients add up in the parameters' dtype, not in a narrower one.
    x_BTD = constrain(params["embedding"][tokens].astype(config.dtype), layout, "batch", "residual", None)
    if config.scale_embeddings:
        x_BTD = x_BTD * jnp.asarray(config.d_model**0.5, x_BTD.dtype)
    if config.positions == "learned":
        x_BTD = x_BTD + params["position_embedding"][positions].astype(config.dtype)

    windows = set(config.window_pattern)
    segments = segment_ids if segment_ids is not None else jnp.ones_like(positions)
    patterns: dict[int, Pattern] = {}
    if cache is None:
        shape = {"itemsize": jnp.dtype(config.dtype).itemsize, "head_dim": config.head_dim}
        make = functools.partial(
            make_pattern, backend=config.attention_backend, soft_cap=config.attention_soft_cap, layout=layout, **shape
        )
        patterns = {w: make(segments, positions, segments, positions, window=w) for w in windows}
    context = Context(
        positions,
        patterns,
        {w > 0: rope_table(positions, config.rope, config.rotary_dim, w > 0) for w in windows}
        if config.positions == "rope"
        else {},
        segments != 0 if cache is None else positions >= 0,  # A prompt that answers share has a negative one.
        None if cache is None else cache.table,
        layout,
        None if cache is None else cache.layout,
    )

    def layer(x: jax.Array, layer_params: Params, context: Context, number: int) -> tuple[jax.Array, Routing | None]:
        x, _, routing = block(x, layer_params, config, context, number)
        return x, routing

    routings: list[Routing] = []  # of one layer or more each

    def run(x: jax.Array, blocks: tuple[Params, ...], first: int) -> jax.Array:
        """Layers that are not scanned, the first of which is like layer `first`."""
        for i, layer_params in enumerate(blocks):
            x, routing = remat(layer, config, number=first + i)(x, layer_params, context)
            if routing is not None:
                routings.append(jax.tree.map(lambda leaf: leaf[None], routing))
        return x

    first = 0
    if config.scan_layers:
        first = block_layout(config)[0]
        x_BTD = run(x_BTD, params.get("dense_blocks", ()), 0)
    if config.scan_layers and params["scanned_blocks"]:

        def period(x: jax.Array, stacked: tuple[Params, ...]) -> tuple[jax.Array, list[Routing | None]]:
            of_layers = []
            for i, layer_params in enumerate(stacked):
                x, routing = remat(layer, config, number=first + i)(x, layer_params, context)
                of_layers.append(routing)
            return x, of_layers

        x_BTD, of_layers = jax.lax.scan(period, x_BTD, params["scanned_blocks"])
        if config.moe:
            routings.append(jax.tree.map(lambda *leaves: jnp.concatenate(jnp.stack(leaves, axis=1)), *of_layers))

    if cache is None:
        # After a scan these are the layers left over; it ran whole periods of the pattern.
        x_BTD = run(x_BTD, params["blocks"], first)
    else:
        written = []
        for i, layer_params in enumerate(params["blocks"]):
            x_BTD, pages, _ = block(x_BTD, layer_params, config, context, i, cache.pages[i])
            written.append(pages)
        cache = KVCache(tuple(written), cache.table, cache.layout)
    routing = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routings) if routings else None
    return norm(x_BTD, params["final_norm"], config), cache, routing


def head_weights(params: Params, config: ModelConfig) -> tuple[jax.Array, jax.Array | None]:
    """The output matrix [D, V] and its bias [V], of `param_dtype`."""
    matrix = params["embedding"].T if config.tie_embeddings else params["head"]
    return matrix.dequantized() if isinstance(matrix, Quantized) else matrix, params.get("head_bias")


def unembed(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D], by weights of their dtype (but see `_YNNPACK`, model/xla.py)."""
    if isinstance(params.get("head"), Quantized):
        logits, bias = params["head"].dot(hidden), params.get("head_bias")
    else:
        matrix, bias = head_weights(params, config)
        logits = jnp.matmul(hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    return soft_cap(logits, config.logit_soft_cap)
