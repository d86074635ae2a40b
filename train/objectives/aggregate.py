"""Weights that turn losses of tokens or sequences into one number: every objective is the sum of weights x losses.

Weights are made once, of the mask of the whole batch, before it is cut into micro-batches. Sums over micro-batches and devices
then add up to the same loss and gradient however the rows are dealt out; no mean is ever taken of a part.

Axes: B sequences, one per row; T tokens. Entry t of a [B, T] array belongs to the token that is predicted at position t.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.objectives.config import Aggregation


def as_float(mask: jax.Array) -> jax.Array:
    """0 and 1 in the default float type."""
    return jnp.asarray(mask, jnp.result_type(float))


def masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` where the mask is set, else 0: neither the value nor the gradient of the rest gets through, even if it is NaN."""
    return jnp.where(mask != 0, x, 0)


def divide(total: jax.Array, count: jax.Array) -> jax.Array:
    """`total / count`, and 0 where there is nothing to count."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)


def sequence_sums(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums [..., T] -> [...] over masked tokens."""
    return jnp.sum(masked(x, mask), axis=-1)


def sequence_means(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Means [..., T] -> [...] over masked tokens; 0 where there are none."""
    return divide(sequence_sums(x, mask), jnp.sum(as_float(mask), axis=-1))


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over all that the mask selects; 0 if that is nothing."""
    return divide(jnp.sum(masked(x, mask)), jnp.sum(as_float(mask)))


def token_weights(mask: jax.Array, aggregation: Aggregation, max_length: int = 0) -> jax.Array:
    """Weights [B, T] of tokens, of the mask [B, T] of the whole batch. Sequences without a masked token do not count.

    token_mean: all tokens alike (DAPO, arXiv:2503.14476).
    seq_mean: mean of the sequences' means (GRPO, arXiv:2402.03300), so that a token of a long answer counts less.
    seq_sum: mean of the sequences' sums, whose policy gradient is unbiased.
    dr_grpo: seq_sum divided by the constant `max_length` (arXiv:2503.20783).
    """
    mask = as_float(mask)
    lengths = jnp.sum(mask, axis=-1, keepdims=True)
    sequences = jnp.sum(jnp.where(lengths > 0, 1.0, 0.0))
    match aggregation:
        case "token_mean":
            return divide(mask, jnp.sum(lengths))
        case "seq_mean":
            return divide(divide(mask, lengths), sequences)
        case "seq_sum":
            return divide(mask, sequences)
        case "dr_grpo":
            return divide(mask, sequences * max_length)


def normalised_apart(weights: jax.Array, parts: int) -> jax.Array:
    """The mistake of a mean taken of each micro-batch and then of those means: weights [B, T] whose sum is the same in each of
    `parts` micro-batches (row r is in that of number r % parts), whatever they hold. For studies (`policy.bugs`)."""
    apart = weights.reshape(weights.shape[0] // parts, parts, weights.shape[1])
    totals = jnp.sum(apart, axis=(0, 2), keepdims=True)
    return (divide(apart, totals) * jnp.sum(totals) / parts).reshape(weights.shape)


def sequence_weights(valid: jax.Array) -> jax.Array:
    """Weights [B] of the sequences or pairs of the whole batch that count."""
    valid = as_float(valid)
    return divide(valid, jnp.sum(valid))


def weighted_sum(weights: jax.Array, losses: jax.Array) -> jax.Array:
    """Sum of weights x losses; what has no weight may be anything, even NaN."""
    return jnp.sum(weights * masked(losses, weights))
