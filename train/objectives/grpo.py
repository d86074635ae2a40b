"""GRPO (arXiv:2402.03300) and its kin: advantages by comparison with other samples of the same prompt.

Groups are ids, not blocks: rows of one prompt may lie anywhere in the batch, on any device, and statistics are always over the
whole group. Rewards that are all equal are found by exact comparison, since a standard deviation of 1e-8 of pure rounding would
make advantages of any size. The policy loss is PPO's (`train.objectives.ppo.clipped_losses`); how tokens are weighed is
`train.objectives.aggregate.token_weights`.

Axes: B sequences, K kinds of reward, P prompts. `groups` is int [B] in [0, B); `valid` [B] is 0 for rows that are no samples.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from train.objectives.aggregate import as_float, divide, masked, masked_mean
from train.objectives.config import Scale


class GroupStatistics(NamedTuple):
    """Each [B], of the row's group: mean, standard deviation (1 / (n - 1)), rows, whether all rewards are equal.

    By convention a row alone in its group has mean 0 and standard deviation 1: its advantage is its reward. An update leaves it
    out (`train.objectives.policy_gradient.prepare`).
    """

    mean: jax.Array
    std: jax.Array
    size: jax.Array
    all_equal: jax.Array


def group_statistics(rewards: jax.Array, groups: jax.Array, valid: jax.Array) -> GroupStatistics:
    B = rewards.shape[0]
    valid = as_float(valid)
    size = jax.ops.segment_sum(valid, groups, B)[groups]
    mean = divide(jax.ops.segment_sum(masked(rewards, valid), groups, B)[groups], size)
    squares = jax.ops.segment_sum(masked(jnp.square(rewards - mean), valid), groups, B)[groups]
    highest = jax.ops.segment_max(jnp.where(valid > 0, rewards, -jnp.inf), groups, B)[groups]
    lowest = jax.ops.segment_min(jnp.where(valid > 0, rewards, jnp.inf), groups, B)[groups]
    alone = size <= 1
    return GroupStatistics(
        mean=jnp.where(alone, 0, mean),
        std=jnp.where(alone, 1, jnp.sqrt(divide(squares, size - 1))),
        size=size,
        all_equal=(highest == lowest) & ~alone,
    )


def group_advantages(
    rewards: jax.Array, groups: jax.Array, valid: jax.Array, scale: Scale = "none", eps: float = 1e-4
) -> jax.Array:
    """Reward minus the group's mean [B]; exactly 0 where all of the group's rewards are equal.

    `scale` divides by (standard deviation + eps) of the group's rewards, which lifts very easy and very hard prompts
    (arXiv:2503.20783), or of the batch's. Without it the gradient is (1 - 1/n) times the unbiased one of RLOO.
    """
    group = group_statistics(rewards, groups, valid)
    advantages = rewards - group.mean
    match scale:
        case "group":
            advantages /= group.std + eps
        case "batch":
            rows = jnp.sum(as_float(valid))
            squares = jnp.sum(masked(jnp.square(rewards - masked_mean(rewards, valid)), valid))
            advantages /= jnp.sqrt(divide(squares, rows - 1)) + eps
    return masked(advantages, as_float(valid) * ~group.all_equal)


def maxrl_advantages(rewards: jax.Array, groups: jax.Array, valid: jax.Array) -> jax.Array:
    """(reward - mean) / mean of the group [B], 0 where that mean is 0 (arXiv:2602.02710). No reward may be negative."""
    group = group_statistics(rewards, groups, valid)
    return masked(divide(rewards - group.mean, group.mean), as_float(valid) * ~group.all_equal)


def multi_reward_advantages(
    rewards: jax.Array, coefficients: jax.Array, groups: jax.Array, valid: jax.Array, scale: Scale
) -> jax.Array:
    """Advantages [B] of rewards [K, B]: the sum, with coefficients [K], of each kind's own (GDPO, arXiv:2601.05242), where a
    kind of small spread is not drowned by another."""
    return coefficients @ jax.vmap(lambda kind: group_advantages(kind, groups, valid, scale))(rewards)


def overlong_penalty(lengths: jax.Array, max_length: int, cache: int) -> jax.Array:
    """Added to the reward [B] of so many generated tokens: 0 up to `max_length - cache`, from there linearly down to -1
    (DAPO, arXiv:2503.14476)."""
    return -jnp.clip((lengths - (max_length - cache)) / cache, 0.0, 1.0)


def select_groups(informative: jax.Array, wanted: int) -> tuple[jax.Array, jax.Array]:
    """Dynamic sampling (DAPO): which of P sampled prompts to train on, and how many more must be sampled.

    Args:
      informative: bool [P], false where all rewards are equal, in the order sampled.

    Returns:
      Indices [wanted] of the first informative prompts, filled up with others where there are too few; and the number missing.
    """
    order = jnp.argsort(~informative, stable=True)
    return order[:wanted], jnp.maximum(wanted - jnp.sum(informative), 0)
