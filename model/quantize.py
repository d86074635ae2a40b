"""Weights in 8 or 4 bits, for decoding: what is read of them per token shrinks; activations and sums stay what they are.

Rounding is to nearest and symmetric, by one scale per output (int8) or per output and group of inputs (int4). Embeddings, norms
and biases are kept; a tied head becomes one of its own, for the table that tokens are looked up in stays exact.
A matrix is kept as [outputs, inputs]: XLA's CPU backend multiplies with such int8 without unpacking them first, three times as
fast as it reads float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from model.config import ModelConfig, check
from model.params import Params

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
        """float32 x [..., C] times w: [..., *outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        one_scale = self.scales.shape[1] == 1
        matrix_OC = (self.values if one_scale else self._float32()).astype(x.dtype)
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


def quantize(params: Params, config: ModelConfig, bits: Bits = 8) -> tuple[Params, ModelConfig]:
    """The network with the matrices of its attention, MLPs and head rounded.

    Raises:
      ValueError: experts, latent attention, stacked layers, or inputs that do not part into groups.
    """
    check(bits in (4, 8), f"weights of {bits} bits are not implemented: 8 or 4")
    cannot = {"model.moe": config.moe, "model.mla": config.mla, "model.scan_layers": config.scan_layers}
    found = [name for name, asked in cannot.items() if asked]
    check(not found, f"quantised weights do not go with {', '.join(found)}")

    def block(part: Params) -> Params:
        return {
            name: quantized(leaf, INPUT_DIMENSIONS[name], bits) if name in INPUT_DIMENSIONS else leaf
            for name, leaf in part.items()
        }

    blocks = tuple(layer | {"attention": block(layer["attention"]), "mlp": block(layer["mlp"])} for layer in params["blocks"])
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    return params | {"blocks": blocks, "head": quantized(head, 1, bits)}, dataclasses.replace(config, tie_embeddings=False)
