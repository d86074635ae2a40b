"""CPO (arXiv:2401.08417): DPO's loss without the reference, held in place by the chosen answer's likelihood."""

from __future__ import annotations

import jax

from train.objectives.config import CPOConfig
from train.objectives.pairs import PairLogprobs


def cpo_losses(config: CPOConfig, policy: PairLogprobs) -> jax.Array:
    """-log s(beta (chosen - rejected)) - coefficient x mean chosen, [N]."""
    return -jax.nn.log_sigmoid(config.beta * (policy.chosen - policy.rejected)) - config.nll_coefficient * policy.chosen_means
