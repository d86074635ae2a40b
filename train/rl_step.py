"""Scoring samples and updating the policy that drew them, as pure functions, and compiled for a mesh.

A step of reinforcement learning has three programs: `score` (log-probabilities of what was drawn, under the policy or the
reference), `prepare` of `train/objectives/policy_gradient.py` (advantages and weights, of the whole batch), and the update,
that of `train/step.py` with another objective.

Axes: B samples, one per row; T targets of a row; D model width.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.logprobs import token_logprobs
from model.params import Params
from model.sharding import Layout
from model.transformer import forward
from train.objectives.policy_gradient import PolicyBatch, policy_sums
from train.rl_config import RLConfig
from train.scalar_head import scalar_head
from train.step import Batch, Metrics

POLICY_FIELDS = tuple(field.name for field in dataclasses.fields(PolicyBatch))


@flax.struct.dataclass
class Scores:
    """float32 [B, T], of each target: its log-probability, the entropy it was drawn with (None where unknown), both 0 where no
    answer can be, and the value of the state before it (None without a value function)."""

    logprobs: jax.Array
    entropies: jax.Array | None
    values: jax.Array | None


def score(
    params: Params,
    model: ModelConfig,
    rows: Batch,
    temperature: float,
    max_tokens: int,
    chunk_tokens: int = 0,
    layout: Layout | None = None,
) -> Scores:
    """What the policy thinks of `rows`, at the temperature at which they were drawn.

    The head, a fifth of a small network's work, reads the answers alone: as many targets as an answer may have, from the first
    that was drawn.

    Args:
      max_tokens: of an answer.
    """
    hidden, _, _ = forward(params, model, rows["tokens"], rows["positions"], rows["segment_ids"], layout=layout)
    first = jnp.argmax(rows["mask"] > 0, axis=1)
    answers, targets = (_window(x, first, max_tokens) for x in (hidden, rows["targets"]))
    out = token_logprobs(params, model, answers / temperature, targets, chunk_tokens, layout)
    put = jax.vmap(lambda x, start: jax.lax.dynamic_update_slice(jnp.zeros(hidden.shape[1], x.dtype), x, (start,)))
    values = scalar_head(params["value_head"], hidden) if "value_head" in params else None
    return Scores(put(out.logprobs, first), put(out.entropy, first), values)


def _window(x: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """[B, size, ...]: x[b, first[b] : first[b] + size] of each row."""
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))(x, first)


def policy_objective(
    params: Params, model: ModelConfig, batch: Batch, layout: Layout | None, *, config: RLConfig
) -> tuple[jax.Array, Metrics]:
    """The loss of some of an update's rows, and what is reported: sums, for the weights in the batch hold the normaliser."""
    rollouts = config.rollouts
    scores = score(params, model, batch, rollouts.temperature, rollouts.max_tokens, config.chunk_tokens, layout)
    constants = PolicyBatch(**{name: batch.get(name) for name in POLICY_FIELDS})  # pyright: ignore[reportArgumentType]
    return policy_sums(config.policy, constants, scores.logprobs, scores.entropies, scores.values)
