"""Weights in 8 or 4 bits, for decoding: what is read of them per token shrinks; activations and sums stay what they are.

Rounding is to nearest and symmetric, by one scale per output (int8) or per output and group of inputs (int4). Embeddings, norms
and biases are kept, as are experts (not shared ones) and what latent attention makes keys and values with and its projections
down; a tied head becomes one of its own, for the table that tokens are looked up in stays exact.
A matrix is kept as [outputs, inputs]: XLA's CPU backend multiplies with such int8 without unpacking them first, three times as
fast as it reads float32. int4 saves memory there and no time: no form was found that it multiplies without unpacking.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from model.config import ModelConfig, check
from model.params import Params, path_name

Bits = Literal[8, 4]
# How many of a projection's first dimensions are inputs.
INPUT_DIMENSIONS = {"query": 1, "key": 1, "value": 1, "out": 2, "up": 1, "gate": 1, "down": 1}
INT4_GROUP = 32  # inputs that share a scale


@flax.struct.dataclass
class Quantized:
    """A projection w [inputs..., outputs...].

    Attributes:
      values: int8 or int4 [O, C], outputs and inputs flattened.
      scales: float32 [O, groups of C].
      outputs: shape of the outputs.
    """

    values: jax.Array
    scales: jax.Array
    outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def dot(self, x: jax.Array) -> jax.Array:
        """x [..., C] times w: float32 [..., *outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        one_scale = self.scales.shape[1] == 1
        if one_scale:
            matrix_OC = self.values.astype(x.dtype)  # exact in bfloat16 too
        else:
            # In bfloat16 scaled weights would be rounded once more, or not, as XLA fuses the product of so many rows.
            matrix_OC, rows = self._float32(), rows.astype(jnp.float32)
        # Written as a transposed matrix, this is the form that XLA's CPU backend multiplies without unpacking.
        out = jnp.matmul(rows, matrix_OC.T, preferred_element_type=jnp.float32)
        out = out * self.scales[:, 0] if one_scale else out
        return out.reshape(*x.shape[:-1], *self.outputs)

    def dequantized(self) -> jax.Array:
        """float32 [C, *outputs]."""
        return self._float32().T.reshape(-1, *self.outputs)

    def _float32(self) -> jax.Array:
        grouped = self.values.reshape(*self.scales.shape, -1).astype(jnp.float32)
        return (grouped * self.scales[:, :, None]).reshape(self.values.shape)


@functools.partial(jax.jit, static_argnums=(1, 2))  # One program keeps nothing of what is between.
def quantized(w: jax.Array, input_dimensions: int, bits: Bits) -> Quantized:
    """w [inputs..., outputs...], rounded."""
    shape = w.shape[:input_dimensions], w.shape[input_dimensions:]
    inputs, outputs = map(math.prod, shape)
    group = inputs if bits == 8 else INT4_GROUP
    check(inputs % group == 0, f"{inputs} inputs do not part into groups of {group} that share a scale: use int8")
    grouped = w.astype(jnp.float32).reshape(inputs, outputs).T.reshape(outputs, -1, group)
    largest = 2 ** (bits - 1) - 1
    scales = jnp.max(jnp.abs(grouped), axis=2) / largest
    values = jnp.round(grouped / jnp.where(scales == 0, 1.0, scales)[:, :, None]).reshape(outputs, inputs)
    return Quantized(values.astype(jnp.int8 if bits == 8 else jnp.int4), scales, shape[1])


def rounding(config: ModelConfig, bits: Bits) -> Callable[[str, jax.Array], jax.Array | Quantized]:
    """What makes of a parameter, given its path, what is kept of it.

    Raises:
      ValueError: stacked layers, other bits; the result raises it for inputs that do not part into groups.
    """
    check(bits in (4, 8), f"weights of {bits} bits are not implemented: 8 or 4")
    check(not config.scan_layers, "quantised weights do not go with model.scan_layers")
    latent = ("key", "value") if config.mla else ()  # not always multiplied as a projection is

    def kept(path: str, leaf: jax.Array) -> jax.Array | Quantized:
        *_, kind, name = ("", *path.split("/"))
        projection = kind in ("attention", "mlp", "shared_experts") and name in INPUT_DIMENSIONS
        if projection and not (kind == "attention" and name in latent):
            return quantized(leaf, INPUT_DIMENSIONS[name], bits)
        return quantized(leaf, 1, bits) if path == "head" else leaf

    return kept


def with_own_head(params: Params, config: ModelConfig, bits: Bits) -> tuple[Params, ModelConfig]:
    """Rounded parameters with a rounded head beside the table of embeddings, if they were one."""
    if not config.tie_embeddings:
        return params, config
    head = quantized(params["embedding"].T, 1, bits)
    return params | {"head": head}, dataclasses.replace(config, tie_embeddings=False)


def quantize(params: Params, config: ModelConfig, bits: Bits = 8) -> tuple[Params, ModelConfig]:
    """The network with the matrices of its attention, MLPs and head rounded; see `rounding` for errors."""
    kept = rounding(config, bits)
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: kept(path_name(path), leaf), params)
    return with_own_head(params, config, bits)
