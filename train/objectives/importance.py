"""Ratios of policies, and weights for samples that another distribution drew.

Three policies are distinct: the sampler (what tokens were drawn from: another kernel, dtype or older weights), the trainer's at
the start of the update, and the one being trained. Surrogates take the ratio of the last two; the weights here, constants, are
the ratio of the first two: truncated (Ionides 2008), or zero outside of bounds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.objectives.aggregate import as_float, masked, sequence_means, sequence_sums
from train.objectives.config import ImportanceConfig

# e^20: beyond it a ratio says only that something is broken, and float32 overflows at e^88.
LOG_RATIO_LIMIT = 20.0


def log_ratio(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """log(new / old) per token [B, T], at most `LOG_RATIO_LIMIT` either way; 0 where the mask is 0."""
    difference = masked(logprobs, mask) - masked(old_logprobs, mask)
    return jnp.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def importance_weights(
    config: ImportanceConfig, trainer_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array
) -> jax.Array:
    """Constants [B, T] that multiply the policy loss of each token.

    What is rejected keeps its place in the normaliser: a weight of 0 is a weight. At token level only the choice of the token
    is corrected, not how likely its prefix was; at sequence level, untruncated, the gradient is unbiased.
    """
    logs = jax.lax.stop_gradient(log_ratio(trainer_logprobs, sampler_logprobs, mask))
    of_sequence = jnp.clip(sequence_sums(logs, mask), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)[:, None]
    weights = as_float(mask)
    match config.level:
        case "token":
            weights *= jnp.minimum(jnp.exp(logs), config.cap)
        case "sequence":
            weights *= jnp.minimum(jnp.exp(of_sequence), config.cap)
    match config.reject:
        case "none":
            return weights
        case "token":
            judged = jnp.exp(logs)
        case "sequence":
            judged = jnp.exp(of_sequence)
        case "geometric":
            judged = jnp.exp(sequence_means(logs, mask))[:, None]
    return weights * as_float((config.low <= judged) & (judged <= config.high))
