"""Rollouts: a group of answers to each prompt of a step, drawn by the decode engine, and their rows for the update.

What is drawn is a function of (weights, seed, step): the prompts of a step, and the random numbers of every answer. So a run
that was killed draws the same again.

Axes: B answers (all samples of a prompt side by side), T targets of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import numpy as np

from data.tasks.task import Example
from inference.config import EngineConfig
from inference.engine import Engine
from inference.request import Request, Token
from inference.sampling import Sampling, derived_seed
from train.rl_config import RLConfig

Array = Any  # of the host, or in a checkpoint of the devices
_MOST_LEFT_OUT = 100


@flax.struct.dataclass
class Samples:
    """What stands at index t of a row belongs to the token that is predicted there.

    Attributes:
      tokens, targets: int32 [B, T]; prompt and answer, and the same one later.
      segment_ids: int32 [B, T]; 1, and 0 for padding. positions: int32 [B, T].
      mask: float32 [B, T]; 1 where the target was drawn, its stop token among them: the actions.
      behavior_logprobs: float32 [B, T]; of the distribution that it was drawn from, 0 elsewhere.
      truncated: bool [B]; the answer reached its limit of tokens, and has no stop token.
      group: int32 [B]; which prompt of the step it answers.
    """

    tokens: Array
    targets: Array
    segment_ids: Array
    positions: Array
    mask: Array
    behavior_logprobs: Array
    truncated: Array
    group: Array

    def answers(self) -> list[list[int]]:
        """The drawn tokens of each row, without a stop token."""
        stopped = ~self.truncated
        return [
            row[drawn > 0].tolist()[: -1 if stop else None]
            for row, drawn, stop in zip(self.targets, self.mask, stopped, strict=True)
        ]


def engine_config(config: RLConfig) -> EngineConfig:
    """With room for whole rows of all that is decoded at once."""
    most = max(config.num_rows, config.eval.prompts * config.eval.samples)
    rows = min(config.rollouts.max_batch, most)
    pages = -(-(config.row_tokens + 1) // 16) * rows + 1
    return EngineConfig(max_batch=rows, cache_tokens=pages * 16, page_size=16, prefill_chunk=256)


def prompt_seed(seed: int, step: int, number: int) -> int:
    """Of the random numbers of all answers to a step's prompt of that number."""
    return derived_seed("rollout", seed, step, number)


def draw(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    row_tokens: int,
    max_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    seed: int,
    step: int,
    first_prompt: int = 0,
) -> Samples:
    """`samples` answers to each prompt, in rows of `row_tokens` targets.

    Args:
      prompts: token ids, each with `max_tokens` no longer than `row_tokens` + 1.
      first_prompt: the number in its step of the first of them.

    Raises:
      ValueError: a prompt does not fit, see `Engine.submit`.
    """
    requests = [
        Request(
            prompt,
            sampling,
            num_samples=samples,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            seed=prompt_seed(seed, step, first_prompt + i),
        )
        for i, prompt in enumerate(prompts)
    ]
    return to_rows(prompts, engine.generate(requests), row_tokens)


def fitting(
    example: Callable[[int], Example], encode: Callable[[Example], list[int]], numbers: range, limit: int, stride: int
) -> tuple[list[Example], list[list[int]], list[Example]]:
    """Examples of these numbers and their prompts, of 1 to `limit` tokens each; and those that were left out.

    Args:
      example: that of a number.
      stride: where one does not fit, that of a number so much higher stands in for it, and so on.

    Raises:
      ValueError: none of many fits.
    """
    found, left_out = [], []
    for first in numbers:
        for number in range(first, first + _MOST_LEFT_OUT * stride, stride):
            candidate = example(number)
            prompt = encode(candidate)
            if 0 < len(prompt) <= limit:
                found.append((candidate, prompt))
                break
            left_out.append(candidate)
        else:
            raise ValueError(
                f"of {_MOST_LEFT_OUT} prompts none has 1 to rollouts.max_prompt_tokens={limit} tokens, the last is "
                f"{left_out[-1].prompt!r}: raise it"
            )
    return [candidate for candidate, _ in found], [prompt for _, prompt in found], left_out


def to_rows(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[Token]]], row_tokens: int) -> Samples:
    """One row for each answer, prompts in order."""
    pairs = [(i, prompt, answer) for i, prompt in enumerate(prompts) for answer in answers[i]]
    shape = (len(pairs), row_tokens)
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    mask, behavior = (np.zeros(shape, np.float32) for _ in range(2))
    for row, (_, prompt, answer) in enumerate(pairs):
        whole = np.array([*prompt, *(token.token for token in answer)], np.int32)
        drawn = slice(len(prompt) - 1, len(whole) - 1)
        tokens[row, : len(whole) - 1], targets[row, : len(whole) - 1] = whole[:-1], whole[1:]
        segments[row, : len(whole) - 1], positions[row, : len(whole) - 1] = 1, np.arange(len(whole) - 1)
        mask[row, drawn], behavior[row, drawn] = 1, [token.logprob for token in answer]
    truncated = np.array([answer[-1].finish_reason == "length" for _, _, answer in pairs])
    group = np.array([i for i, _, _ in pairs], np.int32)
    return Samples(tokens, targets, segments, positions, mask, behavior, truncated, group)


def shuffled_rows(generator: np.random.Generator, num_rows: int, size: int) -> np.ndarray:
    """[num_rows] of int: whose reward each row gets where they are dealt out at random among every `size` rows.

    Given the rewards, each row's is on average the mean of those it is dealt from: less that mean it teaches nothing. And
    groups keep their rewards, and with them their share of the noise.
    """
    return generator.permuted(np.arange(num_rows).reshape(-1, size), axis=1).reshape(-1)
