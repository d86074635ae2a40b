"""Estimates of KL(policy, reference) from samples of the policy (Schulman 2020), and what each does as a penalty.

With d = log policy - log reference of a sampled token:

| estimate | value | unbiased | gradient as a loss, samples from the policy |
|---|---|---|---|
| k1 | d | yes | 0 in expectation: noise only |
| k2 | d^2 / 2 | no | that of KL(policy, reference) |
| k3 | exp(-d) - 1 + d | yes, >= 0 | that of KL(reference, policy): the other direction |

k1 subtracted from the reward, as a constant, gives the gradient of KL(policy, reference). All this holds for whole sequences if
d is the sequence's; per token, k2 in the loss is the gradient of the KL of each next token while the distribution of prefixes
is held fixed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.objectives.aggregate import masked
from train.objectives.config import KLEstimator, RatioUse

# k3 grows like exp(-d); e^40 squared is still finite in float32.
CLAMP = 40.0


def kl_values(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array, estimator: KLEstimator) -> jax.Array:
    """Estimates per token, same shape as the arguments; 0 where the mask is 0. Detach them to put them in a reward."""
    d = jnp.clip(masked(logprobs, mask) - masked(reference_logprobs, mask), -CLAMP, CLAMP)
    match estimator:
        case "k1":
            return d
        case "k2":
            return jnp.square(d) / 2
        case "k3":
            return jnp.expm1(-d) + d


def kl_losses(
    logprobs: jax.Array,
    reference_logprobs: jax.Array,
    mask: jax.Array,
    estimator: KLEstimator,
    log_ratio: jax.Array | None = None,
    ratio: RatioUse = "none",
) -> jax.Array:
    """Losses per token, whose gradients are those of the table above.

    Args:
      log_ratio: of the policy to the one that sampled, per token.
      ratio: for samples of an older policy. `detached` restores the gradients of the table; `differentiated` makes the gradient
        that of the estimate's expectation, so of KL(policy, reference) for k1 and k3.
    """
    values = kl_values(logprobs, reference_logprobs, mask, estimator)
    if ratio == "none":
        return values
    assert log_ratio is not None
    weight = jnp.exp(log_ratio)
    return values * (jax.lax.stop_gradient(weight) if ratio == "detached" else weight)
