"""Layers that the blocks of the network are made of: projections, norms, the MLP.

Axes: B rows, T tokens, D model width, F MLP width. Parameters are cast to the activations' dtype where they are used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.lora import Adapted
from model.params import Params
from model.quantize import Quantized
from model.sharding import Layout, constrain


def linear(
    x: jax.Array,
    w: jax.Array | Quantized | Adapted,
    bias: jax.Array | None = None,
    *,
    contract: int = 1,
    layout: Layout | None = None,
) -> jax.Array:
    """x [..., c] times w [c, ...]: contracts x's last `contract` dimensions with w's first ones.

    On one device both are flattened to matrices: XLA's CPU backend runs 2-d dots 1.7 times faster than batched ones. On a mesh
    they are not: rows and tokens that lie over different axes of it cannot be one dimension.
    """
    if isinstance(w, Adapted):
        low_rank = linear(linear(x, w.a, contract=contract, layout=layout), w.b, layout=layout)
        return linear(x, w.base, bias, contract=contract, layout=layout) + low_rank * jnp.asarray(w.scale, x.dtype)
    if isinstance(w, Quantized):
        out = w.dot(x.reshape(*x.shape[: x.ndim - contract], -1)).astype(x.dtype)
        return out if bias is None else (out.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
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


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, between matmuls on TPUs.

    Their compiler would work it out inside each of the four matmuls of the backward pass that need it or its gradients, by the
    tile and over again: slower by its own estimate, and the longest part of compiling.
    """
    return jax.lax.optimization_barrier(activation(gate) * up)


def _gated_forward(activation, gate, up):
    return _gated(activation, gate, up), (gate, up)


def _gated_backward(activation, kept, d_out):
    _, pull = jax.vjp(lambda gate, up: activation(gate) * up, *kept)
    return jax.lax.optimization_barrier(pull(jax.lax.optimization_barrier(d_out)))


_gated.defvjp(_gated_forward, _gated_backward)


def mlp_block(x_BTD: jax.Array, params: Params, config: ModelConfig, layout: Layout | None) -> jax.Array:
    up_BTF = linear(x_BTD, params["up"], params.get("up_bias"), layout=layout)
    activation = ACTIVATIONS[config.mlp]
    hidden_BTF: jax.Array
    if config.gated_mlp:
        gate_BTF = linear(x_BTD, params["gate"], params.get("gate_bias"), layout=layout)
        on_tpu = layout is not None and layout.mesh.devices.flat[0].platform == "tpu"
        hidden_BTF = _gated(activation, gate_BTF, up_BTF) if on_tpu else activation(gate_BTF) * up_BTF
    else:
        hidden_BTF = activation(up_BTF)
    hidden_BTF = constrain(hidden_BTF, layout, "batch", "sequence", "mlp")
    return linear(hidden_BTF, params["down"], params.get("down_bias"), layout=layout)
