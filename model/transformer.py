"""The network: one forward function for training, scoring, prefill and decode.

Axes: B rows, T tokens, S key slots, D model width, H query heads, K key-value heads, F MLP width, V vocabulary.
Parameters are kept in `param_dtype` and cast to `dtype` where they are used; norms, rotations and softmax are float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.attention import Pattern, attention, make_pattern
from model.config import ModelConfig
from model.kernels.xla_attention import soft_cap
from model.params import Params
from model.rope import apply_rope, rope_table
from model.sharding import Dimensions, Layout, constrain


@flax.struct.dataclass
class Context:
    """What every layer reads beside its input.

    Attributes:
      positions: int32 [B, T]; also the cache slots that new keys and values go to.
      patterns: window size -> which pairs are allowed.
      rope: whether the layer is a sliding-window one -> (cos, sin); empty without RoPE.
      layout: where activations live; None on one device.
    """

    positions: jax.Array
    patterns: dict[int, Pattern]
    rope: dict[bool, tuple[jax.Array, jax.Array]]
    layout: Layout | None = flax.struct.field(pytree_node=False)


LayerCache = tuple[jax.Array, jax.Array]  # keys and values of one layer, each [B, max_len, K, head_dim]


@flax.struct.dataclass
class KVCache:
    """Keys and values of past tokens, per layer; slot i of a row holds its position i."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, max_len: int) -> KVCache:
        shape = (batch_size, max_len, config.num_kv_heads, config.head_dim)
        return cls(tuple((jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.num_layers)))


def linear(
    x: jax.Array, w: jax.Array, bias: jax.Array | None = None, *, contract: int = 1, layout: Layout | None = None
) -> jax.Array:
    """x [..., c] times w [c, ...]: contracts x's last `contract` dimensions with w's first ones.

    On one device both are flattened to matrices: XLA's CPU backend runs 2-d dots 1.7 times faster than batched ones. On a mesh
    they are not: rows and tokens that lie over different axes of it cannot be one dimension.
    """
    w = w.astype(x.dtype)
    if layout is None:
        width = math.prod(w.shape[:contract])
        out = x.reshape(-1, width) @ w.reshape(width, -1)
        out = out.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])
    else:
        out = jnp.tensordot(x, w, contract)
    # In float32, so that the bias's gradient, a sum over all tokens, is.
    return out if bias is None else (out.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """x / rms(x) * scale in float32, of x's dtype (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """(x - mean) / std * scale + bias in float32, of x's dtype (arXiv:1607.06450)."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    out = normed * scale.astype(jnp.float32)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


def norm(x: jax.Array, params: Params, config: ModelConfig) -> jax.Array:
    scale = params["scale"] + 1.0 if config.norm_zero_centered else params["scale"]
    if config.norm == "rmsnorm":
        return rms_norm(x, scale, config.norm_eps)
    return layer_norm(x, scale, params.get("bias"), config.norm_eps)


def qk_norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
    """RMSNorm of queries or keys [B, T, heads, head_dim], per head or over all heads (arXiv:2302.05442)."""
    scale = scale + 1.0 if config.norm_zero_centered else scale
    return rms_norm(x, scale, config.norm_eps, axes=(-1,) if config.qk_norm == "head" else (-2, -1))


def attention_block(
    x_BTD: jax.Array, params: Params, config: ModelConfig, context: Context, window: int, cache: LayerCache | None
) -> tuple[jax.Array, LayerCache | None]:
    layout = context.layout
    q_BTHD = linear(x_BTD, params["query"], params.get("query_bias"), layout=layout)
    k_BTKD = linear(x_BTD, params["key"], params.get("key_bias"), layout=layout)
    v_BTKD = linear(x_BTD, params["value"], params.get("value_bias"), layout=layout)
    if config.qk_norm != "none":
        q_BTHD = qk_norm(q_BTHD, params["query_norm"], config)
        k_BTKD = qk_norm(k_BTKD, params["key_norm"], config)
    if config.positions == "rope":
        table = context.rope[window > 0]
        q_BTHD, k_BTKD = apply_rope(q_BTHD, table), apply_rope(k_BTKD, table)
    if cache is not None:
        rows = jnp.arange(x_BTD.shape[0])[:, None]
        k_BTKD = cache[0].at[rows, context.positions].set(k_BTKD, mode="drop")
        v_BTKD = cache[1].at[rows, context.positions].set(v_BTKD, mode="drop")
        cache = (k_BTKD, v_BTKD)
    out_BTHD = attention(
        constrain(q_BTHD, layout, "batch", "sequence", "heads", None),
        constrain(k_BTKD, layout, "batch", "sequence", "kv_heads", None),
        constrain(v_BTKD, layout, "batch", "sequence", "kv_heads", None),
        context.patterns[window],
        params.get("sinks"),
        scale=config.attention_scale or config.head_dim**-0.5,
        cap=config.attention_soft_cap,
        backend=config.attention_backend if cache is None else "reference",
        layout=layout,
    )
    return linear(out_BTHD, params["out"], params.get("out_bias"), contract=2, layout=layout), cache


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def mlp_block(x_BTD: jax.Array, params: Params, config: ModelConfig, layout: Layout | None) -> jax.Array:
    up_BTF = linear(x_BTD, params["up"], params.get("up_bias"), layout=layout)
    activation = ACTIVATIONS[config.mlp]
    if config.gated_mlp:
        hidden_BTF = activation(linear(x_BTD, params["gate"], params.get("gate_bias"), layout=layout)) * up_BTF
    else:
        hidden_BTF = activation(up_BTF)
    hidden_BTF = constrain(hidden_BTF, layout, "batch", "sequence", "mlp")
    return linear(hidden_BTF, params["down"], params.get("down_bias"), layout=layout)


def block(
    x_BTD: jax.Array, params: Params, config: ModelConfig, context: Context, window: int, cache: LayerCache | None = None
) -> tuple[jax.Array, LayerCache | None]:
    """One layer. The norms that exist in `params` say where they stand (`norm_placement`)."""
    layout = context.layout

    def norm_if(name: str, x: jax.Array) -> jax.Array:
        return norm(x, params[name], config) if name in params else x

    # Between layers, and in norms, tokens lie over more axes of the mesh than in attention and MLP.
    def gathered(x: jax.Array) -> jax.Array:
        return constrain(x, layout, "batch", "sequence", None)

    def scattered(x: jax.Array) -> jax.Array:
        return constrain(x, layout, "batch", "residual", None)

    attention_in = gathered(norm_if("attention_norm", x_BTD))
    attention_out, cache = attention_block(attention_in, params["attention"], config, context, window, cache)
    if config.parallel_block:
        return x_BTD + scattered(attention_out + mlp_block(attention_in, params["mlp"], config, layout)), cache
    x_BTD = x_BTD + norm_if("attention_out_norm", scattered(attention_out))
    mlp_out = mlp_block(gathered(norm_if("mlp_norm", x_BTD)), params["mlp"], config, layout)
    return x_BTD + norm_if("mlp_out_norm", scattered(mlp_out)), cache


def remat(function: Callable[..., Any], config: ModelConfig, **static: Any) -> Callable[..., Any]:
    """`function` with `static` bound, recomputing in the backward pass what `config.remat` does not keep."""
    function = functools.partial(function, **static)
    if config.remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "attention": policies.save_only_these_names("query", "key", "value", "attention_out", "attention_lse"),
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
) -> tuple[jax.Array, KVCache | None]:
    """Runs the network up to the final norm; `unembed` turns the result into logits.

    Args:
      tokens, positions: int32 [B, T]. Positions ascend along a row within a segment. With a cache, a token at position p is
        written to slot p and sees slots 0..p, so every slot up to p must have been written by then; a position of max_len or
        more is computed but not written.
      segment_ids: int32 [B, T]; tokens see only their own segment, those of segment 0 (padding) nothing. None is one segment
        per row. Not with a cache.
      layout: where activations live on a mesh. None is one device, or the inside of a shard_map. Tokens that lie over several
        devices may stand in any order (`model.ring_attention.zigzag`). Not with a cache.

    Returns:
      hidden states [B, T, D] of `config.dtype`, and the updated cache.

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

    if cache is None:
        kv_positions = positions
    else:
        slots = cache.layers[0][0].shape[1]
        kv_positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (tokens.shape[0], slots))
    segments = segment_ids if segment_ids is not None else jnp.ones_like(positions)
    kv_segments = segments if cache is None else jnp.ones_like(kv_positions)
    backend = config.attention_backend if cache is None else "reference"
    windows = set(config.window_pattern)
    context = Context(
        positions,
        {
            w: make_pattern(segments, positions, kv_segments, kv_positions, window=w, backend=backend, layout=layout)
            for w in windows
        },
        {w > 0: rope_table(positions, config.rope, config.rotary_dim, w > 0) for w in windows}
        if config.positions == "rope"
        else {},
        layout,
    )

    def layer(x: jax.Array, layer_params: Params, context: Context, window: int) -> jax.Array:
        return block(x, layer_params, config, context, window)[0]

    if config.scan_layers and params["scanned_blocks"]:

        def period(x: jax.Array, stacked: tuple[Params, ...]) -> tuple[jax.Array, None]:
            for i, layer_params in enumerate(stacked):
                x = remat(layer, config, window=config.window(i))(x, layer_params, context)
            return x, None

        x_BTD, _ = jax.lax.scan(period, x_BTD, params["scanned_blocks"])

    if cache is None:
        # After a scan these are the layers left over; it ran whole periods of the pattern, so their windows count from 0.
        for i, layer_params in enumerate(params["blocks"]):
            x_BTD = remat(layer, config, window=config.window(i))(x_BTD, layer_params, context)
    else:
        layers = []
        for i, layer_params in enumerate(params["blocks"]):
            x_BTD, written = block(x_BTD, layer_params, config, context, config.window(i), cache.layers[i])
            layers.append(written)
        cache = KVCache(tuple(layers))
    return norm(x_BTD, params["final_norm"], config), cache


def head_weights(params: Params, config: ModelConfig) -> tuple[jax.Array, jax.Array | None]:
    """The output matrix [D, V] and its bias [V], of `param_dtype`."""
    matrix = params["embedding"].T if config.tie_embeddings else params["head"]
    return matrix, params.get("head_bias")


def unembed(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D]."""
    matrix, bias = head_weights(params, config)
    logits = jnp.matmul(hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    return soft_cap(logits, config.logit_soft_cap)
