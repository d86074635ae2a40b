"""Log-probabilities of given tokens, for evaluation, by the trainer's own forward and log-probability functions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data.tokenizer import Tokenizer
from model.config import CacheDType, ModelConfig, check
from model.logprobs import token_logprobs
from model.params import Params
from model.transformer import KVCache, empty_pages, forward


@dataclasses.dataclass(frozen=True)
class Scores:
    """Attributes:
    logprobs: float32, of each token after those before it.
    greedy: bool, whether it is the most likely one there.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


# What scores rows of tokens as `score` does, of some network in some precision.
Scorer = Callable[[Sequence[Sequence[int]]], Iterator[tuple[int, Scores]]]


PAGE_SIZE = 64  # of the pages whose rounding is measured, which does not depend on it


@functools.partial(jax.jit, static_argnames=("config", "chunk_tokens", "cache_dtype"))
def _score(
    params: Params, config: ModelConfig, tokens: jax.Array, chunk_tokens: int, cache_dtype: CacheDType | None
) -> tuple[jax.Array, jax.Array]:
    """Of int32 tokens [B, T + 1] but the first ones, [B, T] each."""
    rows, length = len(tokens), tokens.shape[1] - 1
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    cache = None
    if cache_dtype is not None:
        pages = -(-length // PAGE_SIZE)
        table = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
        cache = KVCache(empty_pages(config, rows * pages, PAGE_SIZE, cache_dtype), table)
    hidden, _, _ = forward(params, config, tokens[:, :-1], positions, cache=cache)
    scores = token_logprobs(params, config, hidden, tokens[:, 1:], chunk_tokens)
    return scores.logprobs, scores.correct


def score(
    params: Params,
    config: ModelConfig,
    rows: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = 4096,
    cache_dtype: CacheDType | None = None,
) -> Iterator[tuple[int, Scores]]:
    """(index of a row, scores of its tokens but the first), the longest rows first, so that what does not fit fails at once.

    Rows are padded to few lengths, and as many are taken together as `tokens_per_batch` allows.

    Args:
      cache_dtype: tokens see those before them as a cache of this type keeps them ("int8": rounded), as in the engine; layers
        must not be stacked. None: as they are, as in training.

    Raises:
      ValueError: a row of less than two tokens, of a token outside the vocabulary, or beyond the context.
    """
    for i, row in enumerate(rows):
        check(len(row) >= 2, f"row {i} has {len(row)} tokens: two are needed, for the first has nothing before it")
        check(len(row) <= config.max_seq_len + 1, f"row {i} has {len(row)} tokens, but model.max_seq_len={config.max_seq_len}")
        check(
            min(row) >= 0 and max(row) < config.vocab_size,
            f"row {i} holds token ids {min(row)}..{max(row)}, but the vocabulary is 0..{config.vocab_size - 1}",
        )
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        length = _padded_length(len(rows[order[0]]) - 1)
        count = max(1, tokens_per_batch // length)
        batch, order = order[:count], order[count:]
        tokens = np.zeros((count, length + 1), np.int32)
        for row, i in zip(tokens, batch, strict=False):
            row[: len(rows[i])] = rows[i]
        logprobs, greedy = jax.device_get(_score(params, config, tokens, max(256, length), cache_dtype))
        for row, i in enumerate(batch):
            used = slice(0, len(rows[i]) - 1)
            yield i, Scores(logprobs[row, used], greedy[row, used] > 0)


def _padded_length(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, ...: at most half is padding, two shapes for each doubling."""
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power


def bits_per_byte(tokenizer: Tokenizer, scorer: Scorer, text: str, row_tokens: int = 1024) -> float:
    """What the text takes, coded by the model, over its length. Rows of so many tokens are read each by itself.

    A row begins with <bos>, or else with the token before it; the first token of all, which nothing predicts, does not count.

    Raises:
      ValueError: see `score`; the text is too short.
    """
    start, tokens = tokenizer.encode_prompt(""), tokenizer.encode(text)
    first = 0 if start else 1
    check(len(tokens) > first, f"a text of {len(tokens)} tokens has nothing to predict: give a longer one")
    rows = [[*(start or tokens[i - 1 : i]), *tokens[i : i + row_tokens]] for i in range(first, len(tokens), row_tokens)]
    nats = -sum(scores.logprobs.astype(np.float64).sum() for _, scores in scorer(rows))
    return float(nats / math.log(2) / tokenizer.byte_lengths[tokens[first:]].sum())
