"""A policy-gradient update: `prepare` makes constants of the whole batch of rollouts, `policy_sums` the loss of a part of it.

`prepare` has no gradient and sees all rows, so group statistics, whitening and normalisers are those of the whole batch. Its
result has only [B, ...] arrays, which may be dealt out to micro-batches and devices by rows; the losses of the parts add up.

Axes: B samples, one per row; T tokens.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from train.objectives.aggregate import as_float, masked, masked_mean, sequence_sums, token_weights, weighted_sum
from train.objectives.cispo import cispo_losses
from train.objectives.config import GROUP_ADVANTAGES, PolicyConfig
from train.objectives.entropy import high_entropy_mask
from train.objectives.grpo import (
    group_advantages,
    group_statistics,
    maxrl_advantages,
    multi_reward_advantages,
    overlong_penalty,
)
from train.objectives.gspo import gspo_losses, sequence_log_ratio
from train.objectives.importance import importance_weights, log_ratio
from train.objectives.kl import kl_losses, kl_values
from train.objectives.metrics import clip_fractions, effective_sample_fraction, sampler_mismatch
from train.objectives.ppo import (
    adaptive_lambda,
    clipped_losses,
    explained_variance,
    generalised_advantages,
    token_rewards,
    value_losses,
    whiten,
)
from train.objectives.reinforce import leave_one_out_baseline, reinforce_losses, rewards_to_go
from train.objectives.sapo import sapo_losses

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Rollouts:
    """A whole batch of samples. What a config does not need may be None.

    Attributes:
      mask: [B, T], 1 on generated tokens, stop token included; 0 on prompt, tool output and padding.
      sampler_logprobs: [B, T], of the distribution that was sampled from.
      trainer_logprobs: [B, T], of the policy before its first update on this batch, at the same temperature.
      rewards: [B]. A row whose reward is not finite (or negative, with maxrl) is left out, and counted.
      groups: int [B] in [0, B), equal for samples of one prompt.
      valid: [B], 0 for rows that were not judged, or without their baseline; they are left out, and counted alike.
      truncated: [B], 1 for samples that reached the length limit.
      reference_logprobs: [B, T], at the same temperature.
      values: [B, T], of the state before each token.
      entropies: [B, T], of the policy before its first update, for `entropy_fraction` < 1.
      baseline: scalar for `ema`, or rewards [B] of greedy answers for `greedy`.
      parts, part_weights: [B, K] and [K], what the rewards are the sum of, for `normalise_parts`.
    """

    mask: jax.Array
    sampler_logprobs: jax.Array
    trainer_logprobs: jax.Array
    rewards: jax.Array
    groups: jax.Array
    valid: jax.Array
    truncated: jax.Array
    reference_logprobs: jax.Array | None = None
    values: jax.Array | None = None
    entropies: jax.Array | None = None
    baseline: jax.Array | None = None
    parts: jax.Array | None = None
    part_weights: jax.Array | None = None


@flax.struct.dataclass
class PolicyBatch:
    """Constants of an update, each [B, T]; weights are those of the whole batch.

    Attributes:
      weights: of the policy loss, importance weights included.
      kl_weights: of the KL loss: the same aggregation, over all actions.
      token_weights: a mean over all actions, of entropy, values and what is reported.
      entropy_weights: the same times the coefficient of the bonus, if there is one.
    """

    mask: jax.Array
    old_logprobs: jax.Array
    advantages: jax.Array
    weights: jax.Array
    kl_weights: jax.Array
    token_weights: jax.Array
    reference_logprobs: jax.Array | None
    old_values: jax.Array | None
    returns: jax.Array | None
    entropy_weights: jax.Array | None = None


def prepare(
    config: PolicyConfig,
    rollouts: Rollouts,
    kl_coefficient: jax.Array | float,
    entropy_coefficient: jax.Array | float | None = None,
) -> tuple[PolicyBatch, Metrics]:
    """Constants of the update and metrics of the rollouts.

    `effective_batch_fraction` is of all rows those that the policy loss pushes anywhere, whatever the advantages are made of;
    `zero_variance_fraction` only knows of rewards that are equal within a group. `bad_reward_fraction` is of all rows those
    that are left out, for want of a reward or of a baseline; `lone_fraction` those that are compared with their group, of which
    no other row is left: the policy loss leaves them out, or they would be pushed by what their prompt pays. `return_mean` is
    that of the returns from which a baseline is taken, with all that is added to rewards.

    Args:
      kl_coefficient: of k1 in the reward; `config.kl.reward_coefficient`, or what has become of it.
      entropy_coefficient: what has become of `config.entropy_coefficient`; None is that itself.
    """
    counts = as_float(rollouts.valid) * jnp.isfinite(rollouts.rewards)
    if config.advantage == "maxrl":
        counts *= rollouts.rewards >= 0
    mask = as_float(rollouts.mask) * counts[:, None]
    scores = shaped_rewards(config, rollouts.rewards, rollouts.truncated, jnp.sum(mask, axis=-1))
    group = group_statistics(scores, rollouts.groups, counts)
    equal = group.all_equal
    compared = counts * (group.size > 1) if config.advantage in GROUP_ADVANTAGES else counts
    kl, metrics = None, {}
    if config.kl.needs_reference:
        reference = _given(rollouts.reference_logprobs, "reference_logprobs")
        kl = kl_values(rollouts.trainer_logprobs, reference, mask, "k1")
        metrics["reference_kl"] = masked_mean(sequence_sums(kl, mask), counts)
    per_token = token_rewards(scores, mask, kl if config.kl.reward_coefficient else None, kl_coefficient)
    returns = None
    if config.value is not None:
        if config.value.whiten_rewards:
            per_token = whiten(per_token, mask, shift_mean=False)
        values = _given(rollouts.values, "values")
        advantages, returns = generalised_advantages(per_token, values, mask, config.value.discount, config.value.gae_lambda)
        if config.value.adaptive_lambda:
            of_lengths = adaptive_lambda(mask, config.value.adaptive_lambda)
            advantages, _ = generalised_advantages(per_token, values, mask, config.value.discount, of_lengths)
        metrics["explained_variance"] = explained_variance(values, returns, mask)
    else:
        advantages = masked(_advantages(config, rollouts, per_token, mask, counts), compared[:, None])
        metrics["return_mean"] = masked_mean(sequence_sums(per_token, mask), counts)
    actions = _without_stop_tokens(mask, rollouts.truncated) if "stop_token_untrained" in config.bugs else mask
    trained = actions * compared[:, None]
    if config.truncation == "mask":
        trained = trained * (1 - as_float(rollouts.truncated))[:, None]
    if config.zero_variance != "keep":
        trained = trained * ~equal[:, None]
    if config.whiten:
        advantages = whiten(advantages, trained)
    if config.entropy_fraction < 1:
        trained = high_entropy_mask(_given(rollouts.entropies, "entropies"), trained, config.entropy_fraction)
    importance = importance_weights(config.importance, rollouts.trainer_logprobs, rollouts.sampler_logprobs, mask)
    of_tokens = token_weights(mask, "token_mean")
    bonus = config.entropy_coefficient if entropy_coefficient is None else entropy_coefficient
    batch = PolicyBatch(
        mask=mask,
        old_logprobs=masked(rollouts.trainer_logprobs, mask),
        advantages=masked(advantages, mask),
        weights=token_weights(trained, config.aggregation, config.max_length) * importance,
        kl_weights=token_weights(actions, config.aggregation, config.max_length) * importance,
        token_weights=of_tokens,
        reference_logprobs=rollouts.reference_logprobs,
        old_values=None if rollouts.values is None else masked(rollouts.values, mask),
        returns=returns,
        entropy_weights=bonus * of_tokens if config.entropy_coefficient or config.entropy_target else None,
    )
    pushed = jnp.any(batch.weights * batch.advantages != 0, axis=-1)
    return jax.lax.stop_gradient(batch), metrics | {
        "zero_variance_fraction": masked_mean(as_float(equal), counts),
        "effective_batch_fraction": jnp.mean(as_float(pushed)),
        "bad_reward_fraction": jnp.mean(1 - counts),
        "lone_fraction": jnp.mean(counts - compared),
        "effective_sample_fraction": effective_sample_fraction(importance, mask),
        "advantage_std": jnp.sqrt(masked_mean(jnp.square(advantages - masked_mean(advantages, trained)), trained)),
        **sampler_mismatch(rollouts.trainer_logprobs, rollouts.sampler_logprobs, mask),
    }


def _given(x: jax.Array | None, name: str) -> jax.Array:
    if x is None:
        raise ValueError(f"this policy objective needs {name}, and they are None")
    return x


def _without_stop_tokens(mask: jax.Array, truncated: jax.Array) -> jax.Array:
    """The mask without the last token of answers that ended themselves."""
    last = jnp.cumsum(mask, axis=-1) == jnp.sum(mask, axis=-1, keepdims=True)
    return mask * ~(last & (as_float(truncated) == 0)[:, None])


def shaped_rewards(config: PolicyConfig, rewards: jax.Array, truncated: jax.Array, lengths: jax.Array) -> jax.Array:
    """Rewards [B] with what truncation costs, of answers of so many tokens: those that groups are judged by."""
    match config.truncation:
        case "zero_reward":
            return masked(rewards, 1 - as_float(truncated))
        case "penalty":
            return rewards - config.truncation_penalty * as_float(truncated)
        case "soft_penalty":
            return rewards + overlong_penalty(lengths, config.max_length, config.overlong_cache)
        case _:
            return rewards


def _advantages(
    config: PolicyConfig, rollouts: Rollouts, per_token: jax.Array, mask: jax.Array, counts: jax.Array
) -> jax.Array:
    """[B, T]."""
    returns = sequence_sums(per_token, mask)
    match config.advantage:
        case "group" if config.normalise_parts:
            parts, part_weights = _given(rollouts.parts, "parts"), _given(rollouts.part_weights, "part_weights")
            advantages = multi_reward_advantages(parts.T, part_weights, rollouts.groups, counts, config.scale)
            return masked(advantages[:, None], mask)
        case "group":
            advantages = group_advantages(returns, rollouts.groups, counts, config.scale)
            return masked(advantages[:, None], mask)
        case "maxrl":
            return masked(maxrl_advantages(returns, rollouts.groups, counts)[:, None], mask)
        case "batch":
            baseline = masked_mean(returns, counts)
        case "rloo":
            baseline = leave_one_out_baseline(returns, rollouts.groups, counts)
        case "ema" | "greedy":
            baseline = _given(rollouts.baseline, "baseline")
        case _:
            baseline = 0.0
    returns = rewards_to_go(per_token, mask) if config.reward_to_go else returns[:, None]
    return masked(returns - jnp.broadcast_to(baseline, counts.shape)[:, None], mask)


def policy_sums(
    config: PolicyConfig,
    batch: PolicyBatch,
    logprobs: jax.Array,
    entropies: jax.Array | None = None,
    values: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of some of the batch's rows, and metrics; both are to be added up over all rows.

    Args:
      logprobs: [B, T], of the policy that is trained; differentiable, like the other two.
      entropies: [B, T], reported, and rewarded by `PolicyBatch.entropy_weights`.
      values: [B, T], for `gae`.
    """
    mask, weights = batch.mask, batch.token_weights
    logprobs = masked(logprobs, mask)
    logs = log_ratio(logprobs, batch.old_logprobs, mask)
    clipped_logs = logs
    match config.surrogate:
        case "reinforce":
            losses = reinforce_losses(logprobs, batch.advantages)
        case "clipped":
            losses = clipped_losses(logs, batch.advantages, config.clip_low, config.clip_high, config.dual_clip)
        case "gspo":
            losses = gspo_losses(logs, mask, batch.advantages, config.clip_low, config.clip_high)
            clipped_logs = sequence_log_ratio(logs, mask)
        case "cispo":
            losses = cispo_losses(logprobs, logs, batch.advantages, config.clip_high)
        case "sapo":
            losses = sapo_losses(logs, batch.advantages, config.sapo_positive, config.sapo_negative)
    total = weighted_sum(batch.weights, losses)
    sums = {"policy_loss": total, "update_kl": weighted_sum(weights, jnp.expm1(logs) - logs)}
    if config.surrogate in ("clipped", "gspo", "cispo"):
        fractions = clip_fractions(config, clipped_logs, batch.advantages)
        sums |= {name: weighted_sum(weights, of_token) for name, of_token in fractions.items()}
    if config.kl.loss_coefficient:
        reference = _given(batch.reference_logprobs, "reference_logprobs")
        kl = kl_losses(logprobs, reference, mask, config.kl.loss_estimator, logs, config.kl.ratio)
        sums["kl_loss"] = weighted_sum(batch.kl_weights, kl)
        total += config.kl.loss_coefficient * sums["kl_loss"]
    if entropies is not None:
        sums["entropy"] = weighted_sum(weights, entropies)
        if batch.entropy_weights is not None:
            total -= weighted_sum(batch.entropy_weights, entropies)
    if config.value is not None:
        values, old_values = masked(_given(values, "values"), mask), _given(batch.old_values, "values")
        of_value = value_losses(values, old_values, _given(batch.returns, "returns"), config.value.clip)
        sums["value_loss"] = weighted_sum(weights, of_value)
        sums["value_mean"] = weighted_sum(weights, values)
        if config.value.clip:
            moved = jnp.abs(values - old_values) > config.value.clip
            sums["value_clip_fraction"] = weighted_sum(weights, as_float(moved))
        total += config.value.coefficient * sums["value_loss"]
    return total, sums | {"loss": total}
