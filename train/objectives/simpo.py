"""SimPO (arXiv:2405.14734): preference by log-probability per token, with a margin and without a reference."""

from __future__ import annotations

import jax

from train.objectives.config import SimPOConfig
from train.objectives.pairs import PairLogprobs


def simpo_losses(config: SimPOConfig, policy: PairLogprobs) -> jax.Array:
    """-log s(beta (mean chosen - mean rejected) - gamma), [N]."""
    return -jax.nn.log_sigmoid(config.beta * (policy.chosen_means - policy.rejected_means) - config.gamma)
