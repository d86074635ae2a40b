"""GSPO (arXiv:2507.18071): PPO's clipped loss with one ratio per sequence, the geometric mean of its tokens' ratios.

Weighed by `seq_mean`, so that each sequence counts once. The ratio is per token of the sequence (hence bounds of about 3e-4);
the product would leave any bounds after a few tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.objectives.aggregate import masked, sequence_means
from train.objectives.ppo import clipped_losses


def sequence_log_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """The sequence's mean log-ratio at each of its tokens [B, T], with the token's own gradient (the paper's GSPO-token).

    The mean over a sequence then has the value and the gradient of the sequence-level loss.
    """
    mean = jax.lax.stop_gradient(sequence_means(log_ratio, mask))[:, None]
    return masked(jnp.broadcast_to(mean, log_ratio.shape) + log_ratio - jax.lax.stop_gradient(log_ratio), mask)


def gspo_losses(
    log_ratio: jax.Array, mask: jax.Array, advantages: jax.Array, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> jax.Array:
    """Losses [B, T] of the tokens' log-ratios to the old policy and advantages, all [B, T]."""
    return clipped_losses(sequence_log_ratio(log_ratio, mask), advantages, clip_low, clip_high)
