"""Learning from a teacher's distributions beside the texts: the objective of `TrainConfig.distillation`; and, of the policy's
own answers, a part of that of `RLConfig`.

Axes: R rows, T targets of a row, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.logprobs import Head, by_device, head_logits, token_logprobs
from model.params import Params
from model.sharding import Layout, constrain
from model.transformer import forward, head_weights
from train.config import DistillationConfig, LossConfig
from train.objectives.aggregate import weighted_sum
from train.objectives.distillation import forward_kl_losses, reverse_kl_losses

if TYPE_CHECKING:
    from train.step import Batch, Metrics

TEACHER = "teacher"


def distillation_sums(
    params: Params,
    model: ModelConfig,
    batch: Batch,
    layout: Layout | None,
    *,
    config: DistillationConfig,
    loss: LossConfig,
) -> tuple[jax.Array, Metrics]:
    """Sums over the weighted tokens: (1 - share) x negative log-likelihood + share x divergence, and what is reported.

    Args:
      params: of the student, with those of the teacher under TEACHER.
    """
    student = {name: leaf for name, leaf in params.items() if name != TEACHER}
    teacher = jax.lax.stop_gradient(params[TEACHER])
    read = batch["tokens"], batch["positions"], batch["segment_ids"]
    hidden, _, _ = forward(student, model, *read, layout=layout)
    taught, _, _ = forward(teacher, config.model, *read, layout=layout)
    out = token_logprobs(student, model, hidden, batch["targets"], loss.chunk_tokens, layout)
    weights = batch["weights"]
    nll = -jnp.sum(weights * out.logprobs)
    divergence = weighted_sum(weights, divergences(params, model, hidden, taught, config, loss.chunk_tokens, layout))
    total = (1 - config.share) * nll + config.share * divergence
    return total, {
        "loss": nll,
        "teacher_kl": divergence,
        "entropy": jnp.sum(weights * out.entropy),
        "accuracy": jnp.sum(weights * out.correct),
        "weight": jnp.sum(weights),
    }


def divergences(
    params: Params,
    model: ModelConfig,
    hidden: jax.Array,
    taught: jax.Array,
    config: DistillationConfig,
    chunk_tokens: int,
    layout: Layout | None,
) -> jax.Array:
    """KL [R, T] between the next tokens' distributions of the student and of the teacher, of hidden states [R, T, D] of each.

    Args:
      params: of the student, with those of the teacher under TEACHER, which get no gradient.
      chunk_tokens, layout: see `model.logprobs.token_logprobs`.
    """
    losses = forward_kl_losses if config.direction == "forward" else reverse_kl_losses
    student = Head(*head_weights(params, model))
    teacher = Head(*head_weights(jax.lax.stop_gradient(params[TEACHER]), config.model))

    def of_tokens(heads: list[Head], hidden: jax.Array, taught: jax.Array) -> jax.Array:
        logits = head_logits(model.logit_soft_cap, heads[0], hidden)
        aims = head_logits(config.model.logit_soft_cap, heads[1], taught)
        return losses(logits, aims, config.temperature)

    def in_chunks(heads: list[Head], hidden: jax.Array, taught: jax.Array) -> jax.Array:
        return _in_chunks(functools.partial(of_tokens, heads), hidden, taught, chunk_tokens)

    if layout is not None:
        hidden, taught = (constrain(x, layout, "batch", "sequence", None) for x in (hidden, taught))
    heads = [(student, hidden.dtype), (teacher, taught.dtype)]
    return by_device(in_chunks, layout, heads, hidden, taught)


def _in_chunks(divergences, hidden: jax.Array, taught: jax.Array, chunk_tokens: int) -> jax.Array:
    """[R, T] of hidden states [R, T, D]. Logits of about `chunk_tokens` tokens exist at a time, and again in the backward."""
    R, T = hidden.shape[:2]
    if not chunk_tokens:
        return divergences(hidden, taught)
    num_chunks = math.ceil(T / max(1, chunk_tokens // R))
    size = math.ceil(T / num_chunks)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - T), (0, 0)))
        return jnp.moveaxis(x.reshape(R, num_chunks, size, -1), 1, 0)

    found = jax.lax.map(lambda pair: jax.checkpoint(divergences)(*pair), (split(hidden), split(taught)))
    return jnp.moveaxis(found, 0, 1).reshape(R, -1)[:, :T]
