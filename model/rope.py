"""Rotary position embedding (arXiv:2104.09864) and the three ways checkpoints extend its context.

Halves are rotated against each other (dimension i with i + rotary_dim/2), the layout of Hugging Face checkpoints.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from model.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, rotary_dim: int, local: bool = False) -> tuple[np.ndarray, float]:
    """Radians per position of each rotated pair, and the factor that cos and sin are multiplied by (YaRN's temperature).

    Args:
      local: of a sliding-window layer; `rope.local_theta`, if set, then takes the place of `theta` and scaling.

    Returns:
      float64 [rotary_dim / 2] and a float.
    """
    use_local = local and rope.local_theta > 0
    theta = rope.local_theta if use_local else rope.theta
    frequencies = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if use_local or rope.scaling == "none":
        return frequencies, 1.0
    if rope.scaling == "linear":  # arXiv:2306.15595
        return frequencies / rope.factor, 1.0
    if rope.scaling == "llama3":
        # Interpolate long wavelengths, keep short ones, and blend between the two bounds.
        turns = rope.original_max_len * frequencies / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / rope.factor), 1.0
    # YaRN, arXiv:2309.00071: the same blend, linear in the dimension's number, and attention sharpened by a temperature.

    def dimension_with(turns: float) -> float:
        return rotary_dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_with(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_with(rope.beta_slow)), rotary_dim - 1)
    # As transformers has it, which lets the ramp run downwards where so few positions were trained on that high < low.
    keep = 1 - np.clip((np.arange(rotary_dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / rope.factor), 0.1 * math.log(rope.factor) + 1.0


def rope_table(positions: jax.Array, rope: RopeConfig, rotary_dim: int, local: bool = False) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, 1, rotary_dim / 2], of int32 positions [B, T]."""
    frequencies, temperature = inverse_frequencies(rope, rotary_dim, local)
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return temperature * jnp.cos(angles), temperature * jnp.sin(angles)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first 2 * table width dimensions of x [B, T, heads, head_dim]; the others pass through."""
    cos, sin = table
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated_first = (first * cos - second * sin).astype(x.dtype)
    rotated_second = (second * cos + first * sin).astype(x.dtype)
    return jnp.concatenate([rotated_first, rotated_second, rest], axis=-1)
