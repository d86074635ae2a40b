"""DPO (arXiv:2305.18290) and its variants, functions of how much more than the reference the policy prefers the
chosen answer: h.

| kind | loss | paper |
|---|---|---|
| sigmoid | -log s(beta h) | arXiv:2305.18290 |
| conservative | -(1 - e) log s(beta h) - e log s(-beta h) | Mitchell 2023 |
| robust | [-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2 e), unbiased if e of the labels are flipped | arXiv:2403.00409 |
| hinge | max(0, 1 - beta h) | arXiv:2309.06657 |
| ipo | (h - 1 / (2 beta))^2, h of log-probabilities per token | arXiv:2310.12036 |

Axis: N pairs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.objectives.aggregate import divide
from train.objectives.config import DPOConfig
from train.objectives.pairs import PairLogprobs


def dpo_losses(config: DPOConfig, policy: PairLogprobs, reference: PairLogprobs) -> jax.Array:
    """Losses [N]. With `nll_coefficient` the chosen answer's negative log-likelihood per token is added (arXiv:2404.19733)."""
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    if config.length_normalised:
        chosen, rejected = divide(chosen, policy.chosen_lengths), divide(rejected, policy.rejected_lengths)
    h = chosen - rejected
    likelier, flipped, e = -jax.nn.log_sigmoid(config.beta * h), -jax.nn.log_sigmoid(-config.beta * h), config.label_smoothing
    match config.kind:
        case "sigmoid":
            losses = likelier
        case "conservative":
            losses = (1 - e) * likelier + e * flipped
        case "robust":
            losses = ((1 - e) * likelier - e * flipped) / (1 - 2 * e)
        case "hinge":
            losses = jnp.maximum(0, 1 - config.beta * h)
        case "ipo":
            losses = jnp.square(h - 1 / (2 * config.beta))
    if config.nll_coefficient:
        losses -= config.nll_coefficient * policy.chosen_means
    return losses
