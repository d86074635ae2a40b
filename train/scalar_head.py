"""One number per token, read off the hidden states: the value of a state (PPO), or the score of an answer (reward models)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.params import ParamSpec


def scalar_head_spec(model: ModelConfig) -> ParamSpec:
    """Zero at first: a value function then explains none of the variance, rather than adding to it; a reward model prefers
    nothing."""
    return ParamSpec((model.d_model, 1), ("embed", None), "zeros", dtype=model.param_dtype)


def scalar_head(head: jax.Array, hidden: jax.Array) -> jax.Array:
    """[B, T] of hidden states [B, T, D], in float32 or more."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return (hidden.astype(wide) @ head.astype(wide))[..., 0]
