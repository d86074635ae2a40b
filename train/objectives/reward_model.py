"""Reward models: pairs (Bradley-Terry), outcomes, and single steps of a solution.

The score of an answer is read at its last token, the stop token (`train.preferences.at_stop_tokens`); scores and losses want
float32 or more.

Axes: N pairs, B answers, T tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from data.config import IGNORE
from train.objectives.aggregate import as_float, masked, sequence_sums
from train.objectives.config import RewardModelConfig, StepAggregation
from train.objectives.pairs import preference_accuracy
from train.objectives.ppo import last_action


def pairwise_losses(
    config: RewardModelConfig, chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0
) -> jax.Array:
    """-log s(chosen - rejected - margin) + centring x (chosen + rejected)^2, [N] of scores [N].

    (arXiv:2203.02155; margin: arXiv:2307.09288; centring: arXiv:2312.09244.)
    """
    losses = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return losses + config.centring * jnp.square(chosen + rejected)


def length_preference(
    chosen: jax.Array, rejected: jax.Array, chosen_lengths: jax.Array, rejected_lengths: jax.Array
) -> dict[str, jax.Array]:
    """Of each pair, all [N]: whether the longer answer has the higher score, and whether it is the preferred one; a tie is 1/2.
    Their means say how scores go with lengths (2 x mean - 1 is Kendall's rank correlation within pairs), and labels do."""
    longer = jnp.sign(chosen_lengths - rejected_lengths)
    return {
        "longer_scored_higher": preference_accuracy(longer * chosen, longer * rejected),
        "longer_chosen": preference_accuracy(chosen_lengths, rejected_lengths),
    }


def outcome_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross-entropy of logits with labels in [0, 1], of one shape: at the last token, or at all (arXiv:2110.14168)."""
    return -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(-logits)


def process_losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Losses and mask [B, T]: binary cross-entropy where a step ends, nothing where the label is `IGNORE`.

    Labels may be soft, such as the share of continuations that succeed (arXiv:2305.20050, arXiv:2312.08935).
    """
    mask = as_float(labels != IGNORE)
    return masked(outcome_losses(masked(logits, mask), masked(labels, mask)), mask), mask


def solution_scores(logits: jax.Array, step_ends: jax.Array, aggregation: StepAggregation) -> jax.Array:
    """Score [B] in [0, 1] of a solution, of its steps' logits [B, T] where `step_ends` is 1; 1 if it has no steps."""
    log_p = masked(jax.nn.log_sigmoid(masked(logits, step_ends)), step_ends)
    match aggregation:
        case "min":
            return jnp.exp(jnp.min(log_p, axis=-1))
        case "product":
            return jnp.exp(jnp.sum(log_p, axis=-1))
        case "last":
            return jnp.exp(sequence_sums(log_p, last_action(step_ends)))
