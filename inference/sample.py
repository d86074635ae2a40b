"""Continues prompts from a model's weights: one jitted loop with a KV cache, for `loam sample` and samples during training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from model.config import ModelConfig, check
from model.kernels.tiles import MASKED
from model.params import Params, unstack_layers
from model.transformer import KVCache, forward, unembed


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: only the k most likely tokens; 0 is off.
    top_p: only the most likely tokens that together reach this probability (arXiv:1904.09751); 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check(self.temperature >= 0, f"temperature={self.temperature} must be >= 0 (0 is greedy)")
        check(self.top_k >= 0, f"top_k={self.top_k} must be >= 0 (0 is off)")
        check(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1] (1 is off)")


def sample_token(logits: jax.Array, key: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Draws one token, int32 [], from float32 logits [V]: temperature first, then top-k, then top-p."""
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    logits = logits / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    by_rank = jnp.argsort(-logits)
    ranked = logits[by_rank]
    if sampling.top_k:
        ranked = jnp.where(jnp.arange(ranked.size) < sampling.top_k, ranked, MASKED)
    probabilities = jax.nn.softmax(ranked)
    mass_before = jnp.cumsum(probabilities) - probabilities
    ranked = jnp.where(mass_before < sampling.top_p, ranked, MASKED)
    return by_rank[jax.random.categorical(key, ranked)].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "max_new_tokens", "vocab_size", "eos_id"))
def _generate(
    params: Params,
    config: ModelConfig,
    prompts: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: SamplingConfig,
    max_new_tokens: int,
    vocab_size: int,
    eos_id: int,
) -> jax.Array:
    """int32 [B, max_new_tokens] after right-padded prompts [B, P] of the given lengths; -1 after an end token."""
    batch_size, width = prompts.shape
    cache = KVCache.empty(config, batch_size, width + max_new_tokens)
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch_size))

    def draw(hidden: jax.Array, step: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, step))(row_keys)
        logits = unembed(params, config, hidden)[:, :vocab_size]
        return jax.vmap(lambda row, k: sample_token(row, k, sampling))(logits, keys)

    # Padding gets a position past the cache: it is computed, and written nowhere.
    positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
    slots = jnp.where(positions < lengths[:, None], positions, width + max_new_tokens)
    hidden, cache, _ = forward(params, config, prompts, slots, cache=cache)
    token = draw(hidden[jnp.arange(batch_size), lengths - 1], jnp.int32(0))
    out = jnp.full((batch_size, max_new_tokens), -1, jnp.int32).at[:, 0].set(token)

    def unfinished(carry):
        step, _, _, _, done = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(carry):
        step, token, cache, out, done = carry
        hidden, cache, _ = forward(params, config, token[:, None], (lengths + step - 1)[:, None], cache=cache)
        token = draw(hidden[:, 0], step)
        out = out.at[:, step].set(jnp.where(done, -1, token))
        return step + 1, token, cache, out, done | (token == eos_id)

    carry = (jnp.int32(1), token, cache, out, token == eos_id)
    return jax.lax.while_loop(unfinished, advance, carry)[3]


def generate(
    params: Params,
    config: ModelConfig,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    vocab_size: int | None = None,
    seed: int = 0,
    sampling: SamplingConfig = SamplingConfig(),
    eos_id: int = -1,
) -> list[list[int]]:
    """Continues every prompt by up to `max_new_tokens` tokens; an end token is included and ends its row.

    Args:
      vocab_size: the tokenizer's; what the model's (the default) has beyond it is never drawn.

    Raises:
      ValueError: an empty prompt, a token id outside the vocabulary, or prompt + max_new_tokens beyond the context.
    """
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    lengths = [len(prompt) for prompt in prompts]
    check(bool(prompts) and min(lengths) > 0, "a prompt needs at least one token: give some text, or a <bos> token")
    check(max_new_tokens > 0, f"max_new_tokens={max_new_tokens} must be positive")
    highest = max(max(prompt) for prompt in prompts)
    lowest = min(min(prompt) for prompt in prompts)
    check(
        lowest >= 0 and highest < vocab_size,
        f"a prompt holds token ids {lowest}..{highest}, but the vocabulary is 0..{vocab_size - 1}: "
        "was it encoded with another tokenizer?",
    )
    check(
        max(lengths) + max_new_tokens <= config.max_seq_len,
        f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones exceed model.max_seq_len={config.max_seq_len}: "
        "shorten one of them",
    )
    params, config = unstack_layers(params, config)
    # Widths are rounded up to powers of two, so that few shapes are ever compiled.
    width = min(1 << (max(lengths) - 1).bit_length(), config.max_seq_len - max_new_tokens)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    key = jax.random.key(seed)
    tokens = _generate(params, config, padded, np.asarray(lengths), key, sampling, max_new_tokens, vocab_size, eos_id)
    if not tokens.is_fully_replicated:  # As on several processes, which all make this call.
        tokens = multihost_utils.process_allgather(tokens, tiled=True)
    return [[int(token) for token in row if token >= 0] for row in np.asarray(tokens)]
