"""PPO (arXiv:1707.06347) for token sequences: rewards per token, generalised advantage estimation, clipped losses.

Entry t of `values` is the value of the state before the token that is predicted at position t, so it comes from the same hidden
state as that token's log-probability. Tokens outside of the mask (tool output) are part of the state, not actions: they have
no reward, no error, and the return passes over them unchanged.

Axes: B sequences, T tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.objectives.aggregate import as_float, divide, masked, masked_mean


def last_action(mask: jax.Array) -> jax.Array:
    """1 at the last masked token of each row [B, T], which is the stop token unless the sample was cut off; else 0."""
    mask = as_float(mask)
    after = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    return mask * (after == 1)


def token_rewards(scores: jax.Array, mask: jax.Array, kl: jax.Array | None = None, coefficient: jax.Array | float = 0.0):
    """Rewards [B, T]: the score [B] at the last action, less `coefficient` x `kl` [B, T] at each; constants."""
    rewards = masked(scores[:, None], last_action(mask))
    if kl is not None:
        rewards -= coefficient * masked(kl, mask)
    return jax.lax.stop_gradient(rewards)


def generalised_advantages(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, discount: float, gae_lambda: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns (advantage + value), both [B, T] constants, 0 outside of the mask (arXiv:1506.02438).

    The state after the last action is terminal, of value 0, also for a sample that was cut off: what that costs is for the
    reward to say. `gae_lambda` is one for all rows, or [B].
    """
    mask = as_float(mask)
    rewards, values = masked(rewards, mask), masked(values, mask)

    def step(carry, inputs):
        next_value, next_advantage = carry
        reward, value, acts = inputs
        error = reward + discount * next_value - value
        advantage = error + discount * gae_lambda * next_advantage
        acts = acts != 0
        carry = (jnp.where(acts, value, next_value), jnp.where(acts, advantage, next_advantage))
        return carry, jnp.where(acts, advantage, 0)

    zeros = jnp.zeros_like(values[:, 0] + rewards[:, 0])
    _, advantages = jax.lax.scan(step, (zeros, zeros), (rewards.T, values.T, mask.T), reverse=True)
    advantages = jax.lax.stop_gradient(advantages.T)
    return advantages, jax.lax.stop_gradient(masked(advantages + values, mask))


def adaptive_lambda(mask: jax.Array, a: float) -> jax.Array:
    """Lambda [B] of answers by their lengths: 1 - 1 / (a x length), at least 0 (VAPO, arXiv:2504.05118)."""
    return jnp.maximum(1 - divide(jnp.ones(()), a * jnp.sum(as_float(mask), axis=-1)), 0)


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
    """`x` with mean 0 (unless the mean is to stay) and variance 1 over the masked entries of the whole batch; 0 elsewhere."""
    mean = masked_mean(x, mask)
    count = jnp.sum(as_float(mask))
    variance = divide(jnp.sum(masked(jnp.square(x - mean), mask)), count - 1)
    whitened = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return masked(whitened if shift_mean else whitened + mean, mask)


def clipped_losses(
    log_ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> jax.Array:
    """-min(r A, clip(r) A) per token, of log r and A of any one shape.

    For A < 0 that has no lower bound on r A: with `dual_clip` c the loss is at most c |A| (arXiv:1912.09729).
    """
    ratio = jnp.exp(log_ratio)
    advantages = jax.lax.stop_gradient(advantages)
    objective = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip:
        objective = jnp.where(advantages < 0, jnp.maximum(objective, dual_clip * advantages), objective)
    return -objective


def value_losses(values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float = 0.0) -> jax.Array:
    """Half the squared error, the larger of those of the value and of the value clipped to within `clip` of the old one."""
    loss = jnp.square(values - returns)
    if clip:
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        loss = jnp.maximum(loss, jnp.square(near - returns))
    return loss / 2


def adapt_kl_coefficient(coefficient: jax.Array, kl: jax.Array, sequences: int, target: float, horizon: float) -> jax.Array:
    """Next coefficient, after `sequences` samples whose mean KL per sequence was `kl` (arXiv:1909.08593, section 2.2)."""
    return coefficient * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * sequences / horizon)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - Var(return - value) / Var(return) over the masked tokens; 0 if returns do not vary."""

    def variance(x: jax.Array) -> jax.Array:
        return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)

    total = variance(returns)
    return jnp.where(total > 0, 1 - divide(variance(returns - values), total), 0)
