"""One declaration of the parameters.  From a tree of `ParamSpec` come initialisation, abstract shapes, shardings and counts.

The tree is a nested dict.  Without `scan_layers`, `blocks` is a tuple of per-layer dicts; with it, the layers of one period of
the window and rope patterns are separate entries whose leaves are stacked over the repetitions (`block_layout`), so that a
scan runs over the repetitions and every layer still knows its kind statically. Dense layers that come before those with
experts are `dense_blocks` then.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from model.config import MlaConfig, ModelConfig, MoeConfig
from model.sharding import Dimensions, Layout

Params = Any  # nested dicts and tuples of jax.Array, of the structure of `param_specs`


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Declares one parameter.

    Attributes:
      axes: logical name of each dimension; the rules of a mesh map them to mesh axes.
      init: `normal` with standard deviation `scale`, or a constant.
      trained: whether the optimizer moves it.
      exact: whether it is float32 whatever `param_dtype` is.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"
    scale: float = 0.02
    dtype: str = "float32"
    trained: bool = True
    exact: bool = False

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), self

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def block_layout(config: ModelConfig) -> tuple[int, int, int]:
    """(first, period, repetitions): after `first` layers that are unlike the others (dense before experts) the scan runs
    `repetitions` times over `period` layers; the rest follows unrolled."""
    first = config.num_dense_layers if config.moe else 0
    period = math.lcm(len(config.window_pattern), len(config.rope_pattern))
    return first, period, (config.num_layers - first) // period


def _norm_spec(config: ModelConfig) -> dict[str, ParamSpec]:
    # Vectors as wide as the model are kept whole: gathering them would cost more than they weigh.
    spec = {"scale": ParamSpec((config.d_model,), (None,), "zeros" if config.norm_zero_centered else "ones")}
    if config.norm_bias:
        spec["bias"] = ParamSpec((config.d_model,), (None,), "zeros")
    return spec


def _attention_spec(config: ModelConfig, out_std: float) -> dict[str, Any]:
    d_model, heads, kv_heads, head_dim = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    spec: dict[str, Any] = {
        "query": ParamSpec((d_model, heads, head_dim), ("embed", "heads", "head_dim"), scale=config.init_std),
        "key": ParamSpec((d_model, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), scale=config.init_std),
        "value": ParamSpec((d_model, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), scale=config.init_std),
        "out": ParamSpec((heads, head_dim, d_model), ("heads", "head_dim", "embed"), scale=out_std),
    }
    if config.qkv_bias:
        spec["query_bias"] = ParamSpec((heads, head_dim), ("heads", "head_dim"), "zeros")
        spec["key_bias"] = ParamSpec((kv_heads, head_dim), ("kv_heads", "head_dim"), "zeros")
        spec["value_bias"] = ParamSpec((kv_heads, head_dim), ("kv_heads", "head_dim"), "zeros")
    if config.attention_out_bias:
        spec["out_bias"] = ParamSpec((d_model,), (None,), "zeros")
    if config.attention_sinks:
        spec["sinks"] = ParamSpec((heads,), ("heads",), "zeros")
    init = "zeros" if config.norm_zero_centered else "ones"
    if config.qk_norm == "head":
        spec["query_norm"] = ParamSpec((head_dim,), ("head_dim",), init)
        spec["key_norm"] = ParamSpec((head_dim,), ("head_dim",), init)
    elif config.qk_norm == "full":
        spec["query_norm"] = ParamSpec((heads, head_dim), ("heads", "head_dim"), init)
        spec["key_norm"] = ParamSpec((kv_heads, head_dim), ("kv_heads", "head_dim"), init)
    return spec


def _mla_spec(config: ModelConfig, mla: MlaConfig, out_std: float) -> dict[str, Any]:
    d_model, heads, std = config.d_model, config.num_heads, config.init_std
    per_head = ("embed", "heads", "head_dim")
    spec = {
        "kv_down": ParamSpec((d_model, mla.kv_lora_rank + mla.qk_rope_head_dim), ("embed", None), scale=std),
        "kv_norm": ParamSpec((mla.kv_lora_rank,), (None,), "ones"),
        "key": ParamSpec((mla.kv_lora_rank, heads, mla.qk_nope_head_dim), per_head, scale=std),
        "value": ParamSpec((mla.kv_lora_rank, heads, mla.v_head_dim), per_head, scale=std),
        "query": ParamSpec((mla.q_lora_rank or d_model, heads, config.head_dim), per_head, scale=std),
        "out": ParamSpec((heads, mla.v_head_dim, d_model), ("heads", "head_dim", "embed"), scale=out_std),
    }
    if mla.q_lora_rank:
        spec["query_down"] = ParamSpec((d_model, mla.q_lora_rank), ("embed", None), scale=std)
        spec["query_norm"] = ParamSpec((mla.q_lora_rank,), (None,), "ones")
    if config.attention_out_bias:
        spec["out_bias"] = ParamSpec((d_model,), (None,), "zeros")
    if config.attention_sinks:
        spec["sinks"] = ParamSpec((heads,), ("heads",), "zeros")
    return spec


def _mlp_spec(config: ModelConfig, d_ff: int, out_std: float) -> dict[str, ParamSpec]:
    d_model = config.d_model
    spec = {
        "up": ParamSpec((d_model, d_ff), ("embed", "mlp"), scale=config.init_std),
        "down": ParamSpec((d_ff, d_model), ("mlp", "embed"), scale=out_std),
    }
    if config.gated_mlp:
        spec["gate"] = ParamSpec((d_model, d_ff), ("embed", "mlp"), scale=config.init_std)
    if config.mlp_bias:
        spec["up_bias"] = ParamSpec((d_ff,), ("mlp",), "zeros")
        spec["down_bias"] = ParamSpec((d_model,), (None,), "zeros")
        if config.gated_mlp:
            spec["gate_bias"] = ParamSpec((d_ff,), ("mlp",), "zeros")
    return spec


def _moe_spec(config: ModelConfig, moe: MoeConfig, out_std: float) -> dict[str, Any]:
    d_model, d_ff, num_experts = config.d_model, moe.d_ff, moe.num_experts
    router = {"kernel": ParamSpec((d_model, num_experts), ("embed", None), scale=config.init_std)}
    if moe.selection_bias:
        router["bias"] = ParamSpec((num_experts,), (None,), "zeros", trained=False, exact=True)  # Small steps decide.
    into, out_of = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
    experts = {
        "up": ParamSpec((num_experts, d_model, d_ff), into, scale=config.init_std),
        "down": ParamSpec((num_experts, d_ff, d_model), out_of, scale=out_std),
    }
    if config.gated_mlp:
        experts["gate"] = ParamSpec((num_experts, d_model, d_ff), into, scale=config.init_std)
    spec: dict[str, Any] = {"router": router, "experts": experts}
    if moe.num_shared_experts:
        spec["shared_experts"] = _mlp_spec(config, moe.num_shared_experts * d_ff, out_std)
    return spec


def _block_spec(config: ModelConfig, moe: MoeConfig | None) -> dict[str, Any]:
    # Residual outputs start smaller by sqrt(2 * layers), so that the stream's variance does not grow with depth (GPT-2).
    out_std = config.init_std / math.sqrt(2 * config.num_layers)
    attention = _mla_spec(config, config.mla, out_std) if config.mla else _attention_spec(config, out_std)
    mlp = _moe_spec(config, moe, out_std) if moe else {"mlp": _mlp_spec(config, config.d_ff, out_std)}
    spec: dict[str, Any] = {"attention": attention, **mlp}
    norms = {
        "pre": ("attention_norm",) if config.parallel_block else ("attention_norm", "mlp_norm"),
        "post": ("attention_out_norm", "mlp_out_norm"),
        "sandwich": ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"),
    }
    for name in norms[config.norm_placement]:
        spec[name] = _norm_spec(config)
    return spec


def param_specs(config: ModelConfig) -> Params:
    """The tree of ParamSpec of a model."""
    vocab, d_model = config.vocab_size, config.d_model
    specs: dict[str, Any] = {"embedding": ParamSpec((vocab, d_model), ("vocab", "embed"), scale=config.init_std)}
    if config.positions == "learned":
        specs["position_embedding"] = ParamSpec((config.max_seq_len, d_model), (None, "embed"), scale=config.init_std)
    dense, block = _block_spec(config, None), _block_spec(config, config.moe)
    if config.scan_layers:
        first, period, repetitions = block_layout(config)

        def stack(spec: ParamSpec) -> ParamSpec:
            return dataclasses.replace(spec, shape=(repetitions, *spec.shape), axes=("layers", *spec.axes))

        stacked = jax.tree.map(stack, block, is_leaf=is_spec)
        if first:
            specs["dense_blocks"] = tuple(dense for _ in range(first))
        specs["scanned_blocks"] = tuple(stacked for _ in range(period)) if repetitions else ()
        specs["blocks"] = tuple(block for _ in range(config.num_layers - first - period * repetitions))
    else:
        specs["blocks"] = tuple(dense if i < config.num_dense_layers else block for i in range(config.num_layers))
    specs["final_norm"] = _norm_spec(config)
    if not config.tie_embeddings:
        specs["head"] = ParamSpec((d_model, vocab), ("embed", "vocab"), scale=config.init_std)
    if config.head_bias:
        specs["head_bias"] = ParamSpec((vocab,), ("vocab",), "zeros")
    return jax.tree.map(lambda s: s if s.exact else dataclasses.replace(s, dtype=config.param_dtype), specs, is_leaf=is_spec)


def unstack_layers(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """The same network with a separate entry per layer (`scan_layers=False`), which decoding with a cache needs."""
    if not config.scan_layers:
        return params, config
    _, _, repetitions = block_layout(config)
    scanned = params["scanned_blocks"]
    blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], layer) for i in range(repetitions) for layer in scanned]
    unstacked = {name: leaf for name, leaf in params.items() if name not in ("dense_blocks", "scanned_blocks")}
    unstacked["blocks"] = (*params.get("dense_blocks", ()), *blocks, *params["blocks"])
    return unstacked, dataclasses.replace(config, scan_layers=False)


def path_name(path: tuple[Any, ...]) -> str:
    """`blocks/0/attention/query` for a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init_params(specs: Params, key: jax.Array, shardings: Params | None = None) -> Params:
    """Draws every parameter from its own key, folded from its path: adding one parameter changes no other.

    Args:
      shardings: where each parameter is made, a tree of NamedSharding; None is the default device.
    """

    def init(path: tuple[Any, ...], spec: ParamSpec, sharding: NamedSharding | None = None) -> jax.Array:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        # One program per shape, shared by all layers, compiles many times faster than one program for the whole tree.
        draw = jax.jit(_draw, static_argnames="spec", out_shardings=sharding)
        return draw(leaf_key, spec=dataclasses.replace(spec, axes=(None,) * len(spec.axes)))

    trees = (specs,) if shardings is None else (specs, shardings)
    return jax.tree_util.tree_map_with_path(init, *trees, is_leaf=is_spec)


def _draw(key: jax.Array, spec: ParamSpec) -> jax.Array:
    if spec.init == "normal":
        return (spec.scale * jax.random.normal(key, spec.shape, jnp.float32)).astype(spec.dtype)
    return jnp.full(spec.shape, 0.0 if spec.init == "zeros" else 1.0, spec.dtype)


def abstract_params(specs: Params) -> Params:
    """ShapeDtypeStruct of every parameter."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)), specs, is_leaf=is_spec)


def dimensions(specs: Params) -> list[Dimensions]:
    """What a mesh must divide."""
    return [
        Dimensions(f"parameter {path_name(path)}", spec.shape, spec.axes)
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    ]


def param_shardings(specs: Params, layout: Layout) -> Params:
    """NamedSharding of every parameter."""
    return jax.tree.map(lambda spec: layout.sharding(*spec.axes), specs, is_leaf=is_spec)


def num_parameters(specs: Params) -> int:
    return sum(spec.size for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def parameter_groups(specs: Params) -> dict[str, int]:
    """Parameters per top-level group and per kind of block parameter, for `loam inspect`."""
    groups: dict[str, int] = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec):
        names = path_name(path).split("/")
        group = f"blocks/{names[2]}" if names[0] in ("blocks", "dense_blocks", "scanned_blocks") else names[0]
        groups[group] = groups.get(group, 0) + spec.size
    return groups


def active_parameters(config: ModelConfig) -> dict[str, int]:
    """`parameter_groups` with those experts alone that one token goes to."""
    groups = parameter_groups(param_specs(config))
    if config.moe:
        groups["blocks/experts"] = groups["blocks/experts"] * config.moe.experts_per_token // config.moe.num_experts
    return groups
