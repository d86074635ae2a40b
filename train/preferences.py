"""Preferences over packed rows: from rows that hold pairs, or labelled answers, to the losses of `train/objectives/`.

A row holds documents one after the other: segments 2 n + 1 and 2 n + 2 are the two answers of pair n (`PackedRows.read`), so a
pair never leaves its row, and sums over rows are sums over pairs however the rows are dealt out. Their normaliser is the number
of pairs (of labelled answers), over all micro-batches and devices.

What is a constant of the update is made before it, of the whole batch: the reference's log-probabilities, and KTO's reference
point, which would be another loss if each micro-batch had its own.

Solutions in steps are a segment each, with a label where a step ends: their normaliser is the number of labelled steps.

Axes: R rows, T targets of a row, N pairs that a row has room for.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from data.config import IGNORE
from model.config import ModelConfig
from model.logprobs import token_logprobs
from model.params import Params, ParamSpec
from model.sharding import Layout
from model.transformer import forward
from train.config import LossConfig
from train.micro_batches import join_rows, split_rows
from train.objectives.aggregate import as_float, divide, masked
from train.objectives.config import (
    KTOConfig,
    ObjectiveConfig,
    OutcomeModelConfig,
    PairConfig,
    ProcessModelConfig,
    RewardModelConfig,
)
from train.objectives.kto import class_balance, kto_losses, kto_reference_point
from train.objectives.pairs import PairLogprobs, preference_accuracy
from train.objectives.preference import pair_losses, pair_metrics
from train.objectives.reward_model import length_preference, outcome_losses, pairwise_losses, process_losses
from train.scalar_head import scalar_head, scalar_head_spec

if TYPE_CHECKING:
    from train.step import Batch, Metrics, Objective, Prepare

REWARD_HEAD = "reward_head"


def preference_objective(config: ObjectiveConfig, loss: LossConfig) -> Objective:
    match config.chosen:
        case RewardModelConfig() as chosen:
            return functools.partial(_reward_sums, config=chosen)
        case OutcomeModelConfig() as chosen:
            return functools.partial(_outcome_sums, config=chosen)
        case ProcessModelConfig():
            return _process_sums
        case KTOConfig() as chosen:
            return functools.partial(_kto_sums, config=chosen, loss=loss)
        case chosen:
            return functools.partial(_pair_sums, config=chosen, loss=loss)


def constants_of_update(config: ObjectiveConfig, loss: LossConfig) -> Prepare | None:
    """What is added to the whole batch before an update; None where an objective needs nothing."""
    if not config.needs_reference:
        return None
    return functools.partial(_add_reference, of_kto=config.kto is not None, loss=loss)


def head_specs(config: ObjectiveConfig | None, model: ModelConfig) -> dict[str, ParamSpec]:
    """Parameters that an objective reads besides those of the network."""
    return {REWARD_HEAD: scalar_head_spec(model)} if config is not None and config.has_head else {}


# --- Segments -------------------------------------------------------------------------------------------------------------


def _by_pair(x: jax.Array) -> jax.Array:
    """[R, 1 + 2 N] of segments, padding first, as [R, N, 2]."""
    return x[:, 1:].reshape(x.shape[0], -1, 2)


def _num_segments(row_tokens: int) -> int:
    """Of a sequence there are two targets at least: its stop token, and that once more."""
    return 1 + 2 * max(1, row_tokens // 4)


def segment_sums(x: jax.Array, batch: Batch) -> jax.Array:
    """Sums [R, N, 2] over what the model is to write, of `x` [R, T]; 0 where a row has fewer pairs."""
    sum_row = functools.partial(jax.ops.segment_sum, num_segments=_num_segments(x.shape[1]))
    return _by_pair(jax.vmap(sum_row)(masked(x, batch["weights"]), batch["segment_ids"]))


def segment_ends(batch: Batch) -> jax.Array:
    """Index [R, N, 2] in its row of each answer's last target, the stop token; 0 where a row has fewer pairs."""
    row_tokens = batch["weights"].shape[1]
    last = functools.partial(jax.ops.segment_max, num_segments=_num_segments(row_tokens))
    index = jnp.where(batch["weights"] != 0, jnp.arange(row_tokens), 0)
    return jnp.maximum(_by_pair(jax.vmap(last)(index, batch["segment_ids"])), 0)


def at_ends(x: jax.Array, ends: jax.Array) -> jax.Array:
    """[R, N, 2] of `x` [R, T] at the indices `ends`."""
    return jnp.take_along_axis(x, ends.reshape(ends.shape[0], -1), axis=1).reshape(ends.shape)


def at_stop_tokens(x: jax.Array, batch: Batch) -> jax.Array:
    """[R, N, 2] of `x` [R, T] where each answer's stop token is read: after it was the target."""
    return at_ends(x, segment_ends(batch) + 1)


def _lengths(batch: Batch) -> jax.Array:
    return segment_sums(jnp.ones_like(batch["weights"]), batch)


def _sums(losses: jax.Array, metrics: Metrics, valid: jax.Array) -> tuple[jax.Array, Metrics]:
    """Of losses and metrics [R, N], over the pairs, answers or steps that there are."""
    total = jnp.sum(masked(losses, valid))
    sums = {name: jnp.sum(masked(x, valid)) for name, x in metrics.items()}
    return total, {"loss": total, **sums, "weight": jnp.sum(as_float(valid))}


# --- Objectives -----------------------------------------------------------------------------------------------------------


def row_logprobs(params: Params, model: ModelConfig, batch: Batch, layout: Layout | None, loss: LossConfig) -> jax.Array:
    """Of each target, [R, T]."""
    hidden, _, _ = forward(params, model, batch["tokens"], batch["positions"], batch["segment_ids"], layout=layout)
    return token_logprobs(params, model, hidden, batch["targets"], loss.chunk_tokens, layout).logprobs


def pair_logprobs(logprobs: jax.Array, batch: Batch) -> PairLogprobs:
    """Of the targets' log-probabilities [R, T]; each [R, N], 0 where a row has fewer pairs."""
    sums, lengths = segment_sums(logprobs, batch), _lengths(batch)
    return PairLogprobs(sums[..., 0], sums[..., 1], lengths[..., 0], lengths[..., 1])


def _pair_sums(
    params: Params, model: ModelConfig, batch: Batch, layout: Layout | None, *, config: PairConfig, loss: LossConfig
) -> tuple[jax.Array, Metrics]:
    policy = pair_logprobs(row_logprobs(params, model, batch, layout, loss), batch)
    reference = pair_logprobs(batch["reference_logprobs"], batch) if "reference_logprobs" in batch else None
    valid = policy.chosen_lengths * policy.rejected_lengths > 0
    return _sums(pair_losses(config, policy, reference), pair_metrics(config, policy, reference), valid)


def _kto_sums(
    params: Params, model: ModelConfig, batch: Batch, layout: Layout | None, *, config: KTOConfig, loss: LossConfig
) -> tuple[jax.Array, Metrics]:
    """`kl` is the reference point, `class_balance` of the batch. An answer is classed rightly if its reward is above that of
    the reference point where it is desirable, and below it where it is not."""
    policy = segment_sums(row_logprobs(params, model, batch, layout, loss), batch)[..., 0]
    reference = segment_sums(batch["reference_logprobs"], batch)[..., 0]
    desirable, point = (at_ends(batch[name], segment_ends(batch))[..., 0] for name in ("labels", "reference_point"))
    rewards = config.beta * (policy - reference)
    right = jnp.where(desirable != 0, 1, -1) * (policy - reference - point)
    share = at_ends(batch["desirable_share"], segment_ends(batch))[..., 0]
    # Divided by the number of all answers, these give means over the answers of a class.
    of_class = {"chosen": divide(desirable, share), "rejected": divide(1 - desirable, 1 - share)}
    metrics = {
        "kl": point,
        "class_balance": class_balance(config, share),
        "accuracy": preference_accuracy(right, jnp.zeros_like(right)),
        **{f"reward_{name}": weight * rewards for name, weight in of_class.items()},
        "reward_margin": (of_class["chosen"] - of_class["rejected"]) * rewards,
        **{f"logprob_{name}": weight * policy for name, weight in of_class.items()},
    }
    return _sums(kto_losses(config, policy, reference, desirable, point), metrics, _lengths(batch)[..., 0] > 0)


def answer_scores(params: Params, model: ModelConfig, batch: Batch, layout: Layout | None = None) -> jax.Array:
    """Scores [R, T] of a reward model: entry t is its judgement after it has read token t."""
    hidden, _, _ = forward(params, model, batch["tokens"], batch["positions"], batch["segment_ids"], layout=layout)
    return scalar_head(params[REWARD_HEAD], hidden)


def _reward_sums(
    params: Params, model: ModelConfig, batch: Batch, layout: Layout | None, *, config: RewardModelConfig
) -> tuple[jax.Array, Metrics]:
    lengths = _lengths(batch)
    scores = at_stop_tokens(answer_scores(params, model, batch, layout), batch)
    chosen, rejected = scores[..., 0], scores[..., 1]
    metrics = {
        "accuracy": preference_accuracy(chosen, rejected),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
        **length_preference(chosen, rejected, lengths[..., 0], lengths[..., 1]),
    }
    losses = pairwise_losses(config, chosen, rejected, at_ends(batch["labels"], segment_ends(batch))[..., 0])
    return _sums(losses, metrics, jnp.prod(lengths, axis=-1) > 0)


def _outcome_sums(
    params: Params, model: ModelConfig, batch: Batch, layout: Layout | None, *, config: OutcomeModelConfig
) -> tuple[jax.Array, Metrics]:
    """With `all_tokens`, an answer's loss is the mean over its tokens; it is always judged by the last."""
    read = answer_scores(params, model, batch, layout)
    logits, labels = at_stop_tokens(read, batch)[..., 0], at_ends(batch["labels"], segment_ends(batch))[..., 0]
    lengths = _lengths(batch)[..., 0]
    losses = outcome_losses(logits, labels)
    if config.all_tokens:
        # Where a token is the target, it is read next.
        of_tokens = outcome_losses(jnp.roll(read, -1, axis=1), batch["labels"])
        losses = divide(segment_sums(of_tokens, batch)[..., 0], lengths)
    metrics = {
        "accuracy": preference_accuracy(jnp.where(labels != 0, logits, -logits), jnp.zeros_like(logits)),
        "reward": logits,
    }
    return _sums(losses, metrics, lengths > 0)


def _process_sums(params: Params, model: ModelConfig, batch: Batch, layout: Layout | None) -> tuple[jax.Array, Metrics]:
    """Of labelled steps. A chance above 1/2 counts as right in the accuracy."""
    labels = jnp.where(batch["segment_ids"] > 0, batch["labels"], IGNORE)
    logits = answer_scores(params, model, batch, layout)
    losses, judged = process_losses(logits, labels)
    side = jnp.where(labels > 0.5, logits, -logits)
    return _sums(losses, {"accuracy": preference_accuracy(side, jnp.zeros_like(side)), "reward": logits}, judged)


# --- Constants of an update -----------------------------------------------------------------------------------------------


def _add_reference(
    params: Params,
    reference: Params,
    batch: Batch,
    *,
    model: ModelConfig,
    accumulation: int,
    layout: Layout | None,
    of_kto: bool,
    loss: LossConfig,
) -> Batch:
    """The batch with `reference_logprobs` [R, T] and, for KTO, `reference_point` and `desirable_share`, the same for all its
    answers. By micro-batches, as the update is, so that both compute the same."""

    def of_rows(micro: Batch) -> Batch:
        found = {"reference_logprobs": row_logprobs(reference, model, micro, layout, loss)}
        return found | {"policy_logprobs": row_logprobs(params, model, micro, layout, loss)} if of_kto else found

    found = join_rows(jax.lax.map(of_rows, split_rows(batch, accumulation, layout)))
    batch = batch | {"reference_logprobs": found["reference_logprobs"]}
    if of_kto:
        # Of every second answer, which is to another's prompt.
        policy, frozen = (segment_sums(found[name], batch)[..., 1] for name in ("policy_logprobs", "reference_logprobs"))
        valid = as_float(_lengths(batch)[..., 0] > 0)
        desirable = at_ends(batch["labels"], segment_ends(batch))[..., 0]
        point = kto_reference_point(policy, frozen, valid)
        share = divide(jnp.sum(valid * desirable), jnp.sum(valid))
        shape = batch["weights"].shape
        batch |= {"reference_point": jnp.broadcast_to(point, shape), "desirable_share": jnp.broadcast_to(share, shape)}
    return batch
