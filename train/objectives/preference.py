"""Losses of preference pairs by their config, and what is reported of them.

Axis: N pairs.
"""

from __future__ import annotations

import jax

from train.objectives.aggregate import divide
from train.objectives.config import CPOConfig, DPOConfig, ORPOConfig, PairConfig, SimPOConfig
from train.objectives.cpo import cpo_losses
from train.objectives.dpo import dpo_losses
from train.objectives.orpo import orpo_losses
from train.objectives.pairs import PairLogprobs, preference_accuracy
from train.objectives.simpo import simpo_losses


def pair_losses(config: PairConfig, policy: PairLogprobs, reference: PairLogprobs | None) -> jax.Array:
    """Losses [N] of the pairs, to be weighed by `train.objectives.aggregate.sequence_weights`; a reference is for DPO only."""
    match config:
        case DPOConfig():
            assert reference is not None
            return dpo_losses(config, policy, reference)
        case SimPOConfig():
            return simpo_losses(config, policy)
        case ORPOConfig():
            return orpo_losses(config, policy)
        case CPOConfig():
            return cpo_losses(config, policy)


def implicit_rewards(config: PairConfig, policy: PairLogprobs, reference: PairLogprobs | None) -> tuple[jax.Array, jax.Array]:
    """Rewards [N] of the chosen and the rejected answers that the policy stands for: what the loss tells apart."""
    match config:
        case DPOConfig():
            assert reference is not None
            chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
            if config.length_normalised:
                chosen, rejected = divide(chosen, policy.chosen_lengths), divide(rejected, policy.rejected_lengths)
            return config.beta * chosen, config.beta * rejected
        case SimPOConfig():
            return config.beta * policy.chosen_means, config.beta * policy.rejected_means
        case ORPOConfig():
            return policy.chosen_means, policy.rejected_means
        case CPOConfig():
            return config.beta * policy.chosen, config.beta * policy.rejected


def pair_metrics(config: PairConfig, policy: PairLogprobs, reference: PairLogprobs | None) -> dict[str, jax.Array]:
    """Each [N]. Log-probabilities are among them because those of chosen answers may well fall."""
    chosen, rejected = implicit_rewards(config, policy, reference)
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
        "accuracy": preference_accuracy(chosen, rejected),
        "logprob_chosen": policy.chosen,
        "logprob_rejected": policy.rejected,
    }
