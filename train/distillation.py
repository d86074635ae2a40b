"""Learning from a teacher's distributions beside the texts: the objective of `TrainConfig.distillation`; and, of the policy's
own answers, a part of that of `RLConfig`.

Axes: R rows, T targets of a row, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.logprobs import token_logprobs
from model.params import Params
from model.sharding import Layout
from model.transformer import forward, unembed
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
    divergence = weighted_sum(weights, divergences(params, model, hidden, taught, config, loss.chunk_tokens))
    total = (1 - config.share) * nll + config.share * divergence
    return total, {
        "loss": nll,
        "teacher_kl": divergence,
        "entropy": jnp.sum(weights * out.entropy),
        "accuracy": jnp.sum(weights * out.correct),
        "weight": jnp.sum(weights),
    }


def divergences(
    params: Params, model: ModelConfig, hidden: jax.Array, taught: jax.Array, config: DistillationConfig, chunk_tokens: int
) -> jax.Array:
    """KL [R, T] between the next tokens' distributions of the student and of the teacher, of hidden states [R, T, D] of each.

    Args:
      params: of the student, with those of the teacher under TEACHER, which get no gradient.
    """
    losses = forward_kl_losses if config.direction == "forward" else reverse_kl_losses

    def of_tokens(hidden: jax.Array, taught: jax.Array) -> jax.Array:
        logits, aims = unembed(params, model, hidden), unembed(params[TEACHER], config.model, taught)
        return losses(logits, aims, config.temperature)

    return _in_chunks(of_tokens, hidden, taught, chunk_tokens)


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
