"""KTO (arXiv:2402.01306): answers that are each desirable or not, judged against the policy's mean distance from the reference.

Axis: B answers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.objectives.aggregate import divide, masked_mean
from train.objectives.config import KTOConfig


def kto_reference_point(policy: jax.Array, reference: jax.Array, valid: jax.Array) -> jax.Array:
    """z0, a constant: mean of log policy - log reference over answers [B] to other prompts, at least 0.

    Once per update, over the whole batch: a z0 of each micro-batch would be another loss.
    """
    return jax.lax.stop_gradient(jnp.maximum(masked_mean(policy - reference, valid), 0))


def kto_losses(
    config: KTOConfig, policy: jax.Array, reference: jax.Array, desirable: jax.Array, reference_point: jax.Array
) -> jax.Array:
    """Losses [B] of sums of log-probabilities [B] and labels [B] (1 desirable, 0 not), class weights included."""
    z = config.beta * (policy - reference - reference_point)
    gain = config.desirable_weight * jax.nn.sigmoid(-z)
    return jnp.where(desirable != 0, gain, config.undesirable_weight * jax.nn.sigmoid(z))


def class_balance(config: KTOConfig, desirable_share: jax.Array) -> jax.Array:
    """(desirable weight x count) / (undesirable weight x count), which should lie in [1, 4/3]; 0 without undesirable ones."""
    return divide(config.desirable_weight * desirable_share, config.undesirable_weight * (1 - desirable_share))
