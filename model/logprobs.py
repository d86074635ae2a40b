"""Hidden states to token log-probabilities: the one function that pretraining loss, scoring, RL and evaluation all call.

Logits of one chunk exist at a time, so memory does not grow with vocabulary x tokens; the gradient is written out by hand and
recomputes a chunk's logits instead of keeping them. Log-sum-exp, probabilities and sums are float32.

Axes: B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.kernels.reductions import row_max
from model.kernels.xla_attention import soft_cap
from model.params import Params
from model.sharding import Layout, constrain
from model.transformer import head_weights


@flax.struct.dataclass
class TokenLogprobs:
    """Per token, float32 [B, T].

    Attributes:
      logprobs: of the target.
      log_z: log-sum-exp of the logits, whose square is the z-loss.
      entropy: of the whole distribution, nats.
      correct: 1 where the target is the most likely token; no gradient.
    """

    logprobs: jax.Array
    log_z: jax.Array
    entropy: jax.Array
    correct: jax.Array


class Head(NamedTuple):
    """Output matrix [D, V] and bias [V] or None."""

    matrix: jax.Array
    bias: jax.Array | None


def token_logprobs(
    params: Params,
    config: ModelConfig,
    hidden: jax.Array,
    targets: jax.Array,
    chunk_tokens: int = 0,
    layout: Layout | None = None,
) -> TokenLogprobs:
    """Log-probabilities of `targets` int32 [B, T] after `hidden` [B, T, D] (the output of `forward`).

    Args:
      chunk_tokens: how many tokens' logits may exist at once on each device. 0 keeps all logits for the backward pass, the
        fastest way for a small vocabulary.
      layout: where arrays live on a mesh. Each device then takes the tokens it has, and gradients of the output matrix meet
        once, not once per chunk.
    """
    head = Head(*head_weights(params, config))
    split = layout is not None and layout.shards("vocab") > 1
    in_chunks = functools.partial(_in_chunks, chunk_tokens=chunk_tokens, cap=config.logit_soft_cap, vocab_is_split=split)
    if layout is not None:
        hidden = constrain(hidden, layout, "batch", "sequence", None)
    return by_device(lambda heads, *tokens: in_chunks(*heads, *tokens), layout, [(head, hidden.dtype)], hidden, targets)


def by_device(
    function: Callable[..., Any], layout: Layout | None, heads: Sequence[tuple[Head, jnp.dtype]], *tokens: jax.Array
) -> Any:
    """function(heads, *tokens) -> arrays [B, T], of each device's own tokens [B, T, ...].

    Each output matrix is gathered once, in the dtype beside it, and its gradients meet once, not once per chunk of tokens.
    """
    if layout is None or not (by_hand := {*layout.rules["batch"], *layout.rules["sequence"]}):
        return function([head for head, _ in heads], *tokens)
    embed = layout.rules["embed"]

    def local(parts: list[tuple[jax.Array, jax.Array | None]], *own: jax.Array) -> Any:
        whole = []
        for (matrix, bias), (_, dtype) in zip(parts, heads, strict=True):
            matrix = matrix.astype(dtype)
            whole.append(Head(jax.lax.all_gather(matrix, embed, axis=0, tiled=True) if embed else matrix, bias))
        return function(whole, *own)

    # The vocabulary's axis is left to the partitioner.
    spread = layout.spec("batch", "sequence")
    specs = ([(layout.spec("embed", None), PartitionSpec())] * len(heads), *([spread] * len(tokens)))
    run = jax.shard_map(local, mesh=layout.mesh, axis_names=by_hand, in_specs=specs, out_specs=spread, check_vma=False)
    return run([(head.matrix, head.bias) for head, _ in heads], *tokens)


def _in_chunks(
    head: Head, hidden: jax.Array, targets: jax.Array, chunk_tokens: int, cap: float, vocab_is_split: bool
) -> TokenLogprobs:
    T = targets.shape[1]
    if not chunk_tokens:
        return _logprobs(cap, T, vocab_is_split, head, hidden, targets)
    # Cut along T, so that rows stay where they are.
    num_chunks = math.ceil(T / max(1, chunk_tokens // targets.shape[0]))
    chunk = math.ceil(T / num_chunks)
    padding = ((0, 0), (0, num_chunks * chunk - T))
    hidden, targets = jnp.pad(hidden, (*padding, (0, 0))), jnp.pad(targets, padding)
    return jax.tree.map(lambda x: x[:, :T], _logprobs(cap, chunk, vocab_is_split, head, hidden, targets))


def _wide(hidden: jax.Array) -> jnp.dtype:
    """float32, or float64 where the hidden states are."""
    return jnp.promote_types(hidden.dtype, jnp.float32)


def head_logits(cap: float, head: Head, hidden: jax.Array) -> jax.Array:
    """float32 [B, T, V] (float64 where the hidden states [B, T, D] are), soft-capped where `cap` is not 0."""
    B, T, D = hidden.shape
    dtype = _wide(hidden)
    logits = jnp.matmul(hidden.reshape(B * T, D), head.matrix.astype(hidden.dtype), preferred_element_type=dtype)
    logits = logits if head.bias is None else logits + head.bias.astype(dtype)
    return soft_cap(logits.reshape(B, T, -1), cap)


def _outputs(logits: jax.Array, targets: jax.Array, vocab_is_split: bool) -> TokenLogprobs:
    highest = row_max(logits)
    shifted = logits - highest
    unnormalised = jnp.exp(shifted)
    total = jnp.sum(unnormalised, axis=-1)
    if vocab_is_split:  # a look-up would gather the logits
        target_shifted = jnp.sum(jnp.where(_is_target(logits, targets), shifted, 0.0), axis=-1)
    else:
        target_shifted = jnp.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    log_total = jnp.log(total)
    return TokenLogprobs(
        logprobs=target_shifted - log_total,
        log_z=highest[..., 0] + log_total,
        entropy=log_total - jnp.sum(unnormalised * shifted, axis=-1) / total,
        correct=(target_shifted >= 0).astype(jnp.float32),
    )


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T / chunk, B, chunk, ...]."""
    B, T = x.shape[:2]
    return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """[chunks, B, chunk, ...] -> [B, chunks * chunk, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _logprobs(cap: float, chunk: int, vocab_is_split: bool, head: Head, hidden: jax.Array, targets: jax.Array) -> TokenLogprobs:
    return _logprobs_forward(cap, chunk, vocab_is_split, head, hidden, targets)[0]


def _logprobs_forward(cap: float, chunk: int, vocab_is_split: bool, head: Head, hidden: jax.Array, targets: jax.Array):
    if chunk == targets.shape[1]:
        logits = head_logits(cap, head, hidden)
        outputs = _outputs(logits, targets, vocab_is_split)
        return outputs, (head, hidden, targets, outputs, logits)

    def step(_, inputs):
        chunk_hidden, chunk_targets = inputs
        return None, _outputs(head_logits(cap, head, chunk_hidden), chunk_targets, vocab_is_split)

    _, outputs = jax.lax.scan(step, None, (_split(hidden, chunk), _split(targets, chunk)))
    outputs = jax.tree.map(_join, outputs)
    return outputs, (head, hidden, targets, outputs, None)


def _chunk_backward(cap: float, head: Head, hidden, targets, outputs: TokenLogprobs, cotangents: TokenLogprobs, logits):
    """Gradients with respect to the head (float32) and the hidden states of one chunk.

    With p the probabilities and H the entropy, of a logit z_v: d logprob = [v = target] - p, d log_z = p,
    d H = -p (log p + H), and the soft cap multiplies by 1 - (z / cap)^2.
    """
    log_p = logits - outputs.log_z[..., None]
    slope = (cotangents.log_z - cotangents.logprobs)[..., None] - cotangents.entropy[..., None] * (
        log_p + outputs.entropy[..., None]
    )
    d_logits = jnp.exp(log_p) * slope + jnp.where(_is_target(logits, targets), cotangents.logprobs[..., None], 0.0)
    if cap:
        d_logits = d_logits * (1 - jnp.square(logits / cap))
    B, T, V = logits.shape
    d_flat = d_logits.reshape(B * T, V).astype(hidden.dtype)
    hidden_flat = hidden.reshape(B * T, -1)
    d_hidden = (d_flat @ head.matrix.astype(hidden.dtype).T).reshape(hidden.shape)
    d_matrix = jnp.matmul(hidden_flat.T, d_flat, preferred_element_type=_wide(hidden))
    d_bias = None if head.bias is None else jnp.sum(d_logits, axis=(0, 1))
    return Head(d_matrix, d_bias), d_hidden


def _logprobs_backward(cap: float, chunk: int, vocab_is_split: bool, residuals, cotangents: TokenLogprobs):
    head, hidden, targets, outputs, logits = residuals
    if logits is not None:
        d_head, d_hidden = _chunk_backward(cap, head, hidden, targets, outputs, cotangents, logits)
    else:

        def step(d_head: Head, inputs):
            chunk_hidden, chunk_targets, chunk_outputs, chunk_cotangents = inputs
            d_chunk, d_hidden = _chunk_backward(
                cap, head, chunk_hidden, chunk_targets, chunk_outputs, chunk_cotangents, head_logits(cap, head, chunk_hidden)
            )
            return jax.tree.map(jnp.add, d_head, d_chunk), d_hidden

        inputs = jax.tree.map(lambda x: _split(x, chunk), (hidden, targets, outputs, cotangents))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(hidden)), head)
        d_head, d_hidden = jax.lax.scan(step, zeros, inputs)
        d_hidden = _join(d_hidden)
    d_head = jax.tree.map(lambda d, x: d.astype(x.dtype), d_head, head)
    return d_head, d_hidden, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)
