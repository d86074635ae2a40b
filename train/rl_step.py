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
from model.kernels.xla_attention import SHARED
from model.logprobs import token_logprobs
from model.moe import Routing
from model.params import Params
from model.sharding import Layout
from model.transformer import forward
from train.distillation import TEACHER, divergences
from train.objectives.aggregate import weighted_sum
from train.objectives.policy_gradient import PolicyBatch, policy_sums
from train.rl_config import RLConfig
from train.scalar_head import scalar_head
from train.step import Batch, Metrics

POLICY_FIELDS = tuple(field.name for field in dataclasses.fields(PolicyBatch))


@flax.struct.dataclass
class Scores:
    """float32 [B, T], of each target: its log-probability, the entropy it was drawn with (None where unknown), both 0 where no
    answer can be, and the value of the state before it (None without a value function). What routers of experts did is of all
    tokens together."""

    logprobs: jax.Array
    entropies: jax.Array | None
    values: jax.Array | None
    routing: Routing | None = None


def score(
    params: Params,
    model: ModelConfig,
    rows: Batch,
    temperature: float,
    max_tokens: int,
    chunk_tokens: int = 0,
    layout: Layout | None = None,
    shared: int = 1,
) -> Scores:
    """What the policy thinks of `rows`, at the temperature at which they were drawn.

    The head, a fifth of a small network's work, reads the answers alone: as many targets as an answer may have, from the first
    that was drawn.

    Args:
      max_tokens: of an answer.
      shared: how many rows in turn answer one prompt, which the network then reads but once.
    """
    first = _first_drawn(rows["mask"], shared)
    answers, routing = _hidden_of_answers(params, model, rows, first, max_tokens, layout, shared)
    return _scores(params, model, rows, first, answers, temperature, chunk_tokens, layout, routing)


def _first_drawn(mask: jax.Array, shared: int) -> jax.Array:
    """[B], the first target of each row that was drawn. One whose reward is missing has no mask, and the prompt of the others
    that answer it."""
    first = jnp.argmax(mask > 0, axis=1).reshape(-1, shared)
    return jnp.broadcast_to(jnp.max(first, axis=1, keepdims=True), first.shape).reshape(-1)


def _scores(
    params: Params,
    model: ModelConfig,
    rows: Batch,
    first: jax.Array,
    answers: jax.Array,
    temperature: float,
    chunk_tokens: int,
    layout: Layout | None,
    routing: Routing | None,
) -> Scores:
    targets = _window(rows["targets"], first, answers.shape[1])
    out = token_logprobs(params, model, answers / temperature, targets, chunk_tokens, layout)
    width = rows["targets"].shape[1]
    put = jax.vmap(lambda x, start: jax.lax.dynamic_update_slice(jnp.zeros(width, x.dtype), x, (start,)))
    values = put(scalar_head(params["value_head"], answers), first) if "value_head" in params else None
    return Scores(put(out.logprobs, first), put(out.entropy, first), values, routing)


def _hidden_of_answers(
    params: Params, model: ModelConfig, rows: Batch, first: jax.Array, max_tokens: int, layout: Layout | None, shared: int
) -> tuple[jax.Array, Routing | None]:
    """Hidden states [B, max_tokens, D] from which the answers are predicted."""
    if shared > 1:
        return _hidden_of_groups(params, model, rows, first, max_tokens, layout, shared)
    hidden, _, routing = forward(params, model, rows["tokens"], rows["positions"], rows["segment_ids"], layout=layout)
    return _window(hidden, first, max_tokens), routing


def _hidden_of_groups(
    params: Params, model: ModelConfig, rows: Batch, first: jax.Array, max_tokens: int, layout: Layout | None, shared: int
) -> tuple[jax.Array, Routing | None]:
    """The same of `shared` answers side by side in one row: their prompt but its last token once, and after it each answer as a
    segment of its own that sees the prompt."""
    groups, prefix = len(first) // shared, rows["tokens"].shape[1] - max_tokens

    def in_row(before: jax.Array, name: str) -> jax.Array:
        """[groups, prefix + shared * max_tokens]: `before`, and behind it the windows of the rows."""
        return jnp.concatenate([before, _window(rows[name], first, max_tokens).reshape(groups, -1)], axis=1)

    number = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (groups, prefix))
    of_prompt = jnp.where(number < first[::shared, None], SHARED, 0)
    tokens, positions = in_row(rows["tokens"][::shared, :prefix], "tokens"), in_row(number, "positions")
    segments = in_row(of_prompt, "segment_ids")
    answer = jnp.repeat(jnp.arange(shared, dtype=jnp.int32), max_tokens)
    segments = segments.at[:, prefix:].add(jnp.where(segments[:, prefix:] > 0, answer, 0))
    hidden, _, routing = forward(params, model, tokens, positions, segments, layout=layout)
    return hidden[:, prefix:].reshape(len(first), max_tokens, -1), routing


def _window(x: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """[B, size, ...]: x[b, first[b] : first[b] + size] of each row."""
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))(x, first)


def policy_objective(
    params: Params, model: ModelConfig, batch: Batch, layout: Layout | None, *, config: RLConfig
) -> tuple[jax.Array, Metrics]:
    """The loss of some of an update's rows, and what is reported: sums, for the weights in the batch hold the normaliser.

    A teacher's divergence is a mean over all actions, whatever their advantages.
    The routers' losses are means over all that these rows read, and count by the share of the update's actions that is in them.
    """
    rollouts = config.rollouts
    # Micro-batches take their rows in turn, and so as many of each group.
    shared = config.policy.group_size // config.accumulation if config.share_prompts else 1
    first = _first_drawn(batch["mask"], shared)
    read = batch, first, rollouts.max_tokens, layout, shared
    answers, routing = _hidden_of_answers(params, model, *read)
    scores = _scores(params, model, batch, first, answers, rollouts.temperature, config.chunk_tokens, layout, routing)
    constants = PolicyBatch(**{name: batch.get(name) for name in POLICY_FIELDS})  # pyright: ignore[reportArgumentType]
    total, sums = policy_sums(config.policy, constants, scores.logprobs, scores.entropies, scores.values)
    if config.distillation is not None:
        taught, _ = _hidden_of_answers(jax.lax.stop_gradient(params[TEACHER]), config.distillation.model, *read)
        apart = divergences(params, model, answers, taught, config.distillation, config.chunk_tokens, layout)
        teacher_kl = weighted_sum(_window(constants.token_weights, first, rollouts.max_tokens), apart)
        total = (1 - config.distillation.share) * total + config.distillation.share * teacher_kl
        sums |= {"loss": total, "teacher_kl": teacher_kl}
    if scores.routing is None:
        return total, sums
    assert model.moe is not None
    share = jnp.sum(constants.token_weights)
    router = {
        "balance_loss": model.moe.balance_loss * share * jnp.sum(scores.routing.balance_loss),
        "router_z_loss": model.moe.z_loss * share * jnp.sum(scores.routing.z_loss),
    }
    total += sum(router.values())
    return total, sums | router | {"loss": total, "expert_load": scores.routing.load}
