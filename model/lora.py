"""LoRA (arXiv:2106.09685): projections w + (alpha / rank) A B, of which A and B alone are trained.

The base may be rounded to 8 or 4 bits first, which stay as they are (QLoRA, arXiv:2305.14314; deviations: 1. the symmetric int8
and int4 of `model/quantize.py` instead of NF4; 2. no paging). A is drawn with the variance of the reference implementation's
uniform initialisation, 1 / (3 inputs), from a normal distribution; B is zero, so that the first step sees the base itself.
"""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.config import LoraConfig, ModelConfig, check
from model.params import Params, ParamSpec, is_spec, param_specs, path_name
from model.quantize import INPUT_DIMENSIONS, Quantized, quantize


@flax.struct.dataclass
class Adapted:
    """A projection w [inputs..., outputs...] with its adapter; `model.layers.linear` takes it in place of w.

    Attributes:
      base: the projection, or it rounded; frozen.
      a, b: [inputs..., rank] and [rank, outputs...].
      scale: alpha / rank.
    """

    base: jax.Array | Quantized
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def merged(self) -> jax.Array:
        """base + scale A B, of the base's shape, or float32 [inputs, outputs...] of a rounded one."""
        base = self.base.dequantized() if isinstance(self.base, Quantized) else self.base
        stacked = self.a.ndim + self.b.ndim - 2 > base.ndim and not isinstance(self.base, Quantized)
        product = _product_of_stack(self.a, self.b) if stacked else jnp.tensordot(self.a, self.b, 1)
        return (base + self.scale * product.reshape(base.shape)).astype(base.dtype)


def _product_of_stack(a: jax.Array, b: jax.Array) -> jax.Array:
    """A B of each layer of a scan."""
    return jax.vmap(lambda one, other: jnp.tensordot(one, other, 1))(a, b)


def adapter_specs(config: ModelConfig, lora: LoraConfig) -> Params:
    """The tree of ParamSpec of the adapters: that of the model, cut down to the targets, each of which is `a` and `b`.

    Raises:
      ValueError: a target that names no projection of the model; latent attention, or experts as a target.
    """
    check(config.mla is None, "LoRA does not go with model.mla: absorbed projections are no plain ones")
    found: set[str] = set()
    names: set[str] = set()

    def adapters(path: tuple[Any, ...], spec: ParamSpec) -> Params:
        *_, kind, name = ("", *path_name(path).split("/"))
        if name not in INPUT_DIMENSIONS or kind == "experts":
            return None
        names.add(name)
        if name not in lora.targets:
            return None
        found.add(name)
        lead = spec.axes[0] == "layers"
        cut = INPUT_DIMENSIONS[name] + lead
        inputs = math.prod(spec.shape[lead:cut])
        a = ParamSpec((*spec.shape[:cut], lora.rank), (*spec.axes[:cut], None), scale=(3 * inputs) ** -0.5, dtype=spec.dtype)
        shape, axes = (*spec.shape[:lead], lora.rank, *spec.shape[cut:]), (*spec.axes[:lead], None, *spec.axes[cut:])
        return {"a": a, "b": ParamSpec(shape, axes, "zeros", dtype=spec.dtype)}

    specs = jax.tree_util.tree_map_with_path(adapters, param_specs(config), is_leaf=is_spec)
    missing = sorted(set(lora.targets) - found)
    check(not missing, f"lora.targets: the model has no projection {', '.join(missing)}; it has {', '.join(sorted(names))}")
    return _without_empty(specs)


def _without_empty(tree: Params) -> Params:
    """The tree without what has no leaves in it; layers keep their places."""
    if isinstance(tree, tuple):
        return tuple(_without_empty(item) for item in tree)
    if isinstance(tree, dict):
        kept = {name: _without_empty(item) for name, item in tree.items() if item is not None}
        return {name: item for name, item in kept.items() if is_spec(item) or jax.tree.leaves(item, is_leaf=is_spec)}
    return tree


def frozen_base(params: Params, config: ModelConfig, lora: LoraConfig) -> tuple[Params, ModelConfig]:
    """The parameters that stay, and the config of the network with them: rounded if `lora.base_bits` says so."""
    return quantize(params, config, lora.base_bits) if lora.base_bits else (params, config)  # pyright: ignore[reportArgumentType]


def adapt(base: Any, adapters: Params, lora: LoraConfig) -> Params:
    """The base with an Adapted in place of every projection that has an adapter: what `forward` takes.

    Args:
      base: parameters, or a tree of anything else of their structure (shardings), which then is in the result.
    """
    if isinstance(adapters, dict) and adapters.keys() == {"a", "b"}:
        return Adapted(base, adapters["a"], adapters["b"], lora.alpha / lora.rank)
    if isinstance(adapters, tuple):
        return tuple(adapt(one, other, lora) for one, other in zip(base, adapters, strict=True))
    return base | {name: adapt(base[name], item, lora) for name, item in adapters.items()}


def merge(params: Params, shapes: Params) -> Params:
    """Plain parameters of adapted ones, rounded bases taken back to float32; of the structure of `shapes` (ParamSpec)."""

    def plain(leaf: Any) -> Any:
        return leaf.merged() if isinstance(leaf, Adapted) else leaf.dequantized() if isinstance(leaf, Quantized) else leaf

    is_projection = lambda leaf: isinstance(leaf, Adapted | Quantized)  # noqa: E731
    merged = jax.tree.map(plain, params, is_leaf=is_projection)
    merged = {name: merged[name] for name in shapes}  # a rounded head of tied embeddings is left out
    return jax.tree.map(lambda spec, leaf: leaf.reshape(spec.shape).astype(spec.dtype), shapes, merged, is_leaf=is_spec)
