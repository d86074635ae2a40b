"""REINFORCE (Williams 1992): -A log p, where the advantage A is a return minus a baseline that does not depend on the sample.

Baselines: an average of earlier batches, the mean of the batch, of the other samples of the prompt (RLOO, arXiv:2402.14740), or
the reward of the greedy answer (ReMax, arXiv:2310.10505). The batch mean includes the sample itself, which scales the expected
gradient by 1 - 1/B and changes nothing else.

Axes: B sequences, T tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.objectives.aggregate import as_float, divide, masked
from train.objectives.grpo import group_statistics


def reinforce_losses(logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    """Losses [B, T] of log-probabilities and advantages [B, T]."""
    return -jax.lax.stop_gradient(advantages) * logprobs


def rewards_to_go(rewards: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum [B, T] of the rewards [B, T] of each token and those after it."""
    return masked(jnp.cumsum(masked(rewards, mask)[:, ::-1], axis=1)[:, ::-1], mask)


def leave_one_out_baseline(rewards: jax.Array, groups: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean reward [B] of the group's other valid rows, to the bit where all are equal; 0 for a row alone.

    Args:
      rewards: [B], of the whole batch, so that a group may lie on several devices.
      groups: int [B] in [0, B), equal for samples of one prompt.
      valid: [B], 0 for rows that are no samples.
    """
    B = rewards.shape[0]
    valid = as_float(valid)
    total = jax.ops.segment_sum(masked(rewards, valid), groups, B)[groups] - masked(rewards, valid)
    mean = divide(total, jax.ops.segment_sum(valid, groups, B)[groups] - valid)
    return jnp.where(group_statistics(rewards, groups, valid).all_equal, rewards, mean)


def update_ema(ema: jax.Array, mean: jax.Array, decay: float) -> jax.Array:
    """Of the next batch, after one whose returns had this mean; this batch's own would bias its gradient.

    Args:
      ema: [2], decaying sums of the means and of ones, at first 0.
    """
    return decay * ema + (1 - decay) * jnp.stack([mean, jnp.ones_like(mean)])


def ema_baseline(ema: jax.Array) -> jax.Array:
    """The average that `ema` holds, not drawn to 0 by how it began; 0 before there is one."""
    return divide(ema[0], ema[1])
