"""ORPO (arXiv:2403.07691): the chosen answer's likelihood and, in one stage with it, an odds ratio against the rejected one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.objectives.config import ORPOConfig
from train.objectives.pairs import PairLogprobs


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) of x <= 0 without cancellation (Mächler 2012); at 0 as if at -eps, where it is still finite."""
    x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
    near = x > -jnp.log(2.0)
    # Each branch sees only arguments that it can differentiate.
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1))), jnp.log1p(-jnp.exp(jnp.where(near, -1, x))))


def log_odds_ratio(policy: PairLogprobs) -> jax.Array:
    """log of odds(chosen) / odds(rejected) [N], where p is the geometric mean of the tokens' probabilities."""
    chosen, rejected = policy.chosen_means, policy.rejected_means
    return chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))


def orpo_losses(config: ORPOConfig, policy: PairLogprobs) -> jax.Array:
    """-mean chosen - coefficient x log s(log-odds ratio), [N]."""
    return -policy.chosen_means - config.coefficient * jax.nn.log_sigmoid(log_odds_ratio(policy))
