"""Guesses for speculative decoding (arXiv:2211.17192): tokens that the engine checks together in one step.

A guess stands if it is the token that the engine draws there anyway, with the random numbers of that token. So guessing changes
neither the distribution nor, given a seed, the answer: only how many steps it takes. A draft model guesses with the same random
numbers, which makes it agree with the model wherever their distributions are close.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from inference.config import EngineConfig
from inference.engine import Engine, Guess
from inference.models import LoadedModel
from inference.request import Request
from inference.schedule import Ongoing
from model.config import check


def prompt_lookup(ongoing: Sequence[Ongoing], counts: Sequence[int], longest: int = 3) -> list[list[int]]:
    """What followed the last few tokens, at best `longest`, the last time that they stood there before."""
    return [_lookup(sample.tokens, count, longest) for sample, count in zip(ongoing, counts, strict=True)]


def _lookup(tokens: Sequence[int], count: int, longest: int) -> list[int]:
    for length in range(min(longest, len(tokens) - 1), 0, -1):
        last = list(tokens[-length:])
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start] == last[0] and list(tokens[start : start + length]) == last:
                return list(tokens[start + length : start + length + count])
    return []


class DraftModel:
    """A smaller model of the same tokenizer, in an engine of its own, which keeps what it has seen of every sequence."""

    def __init__(self, engine: Engine, vocab_size: int):
        """
        Args:
          vocab_size: of the tokenizer of the model for which it guesses; either's table may be padded beyond it.

        Raises:
          ValueError: its own vocabulary is another.
        """
        ours = engine.vocab_size
        check(ours == vocab_size, f"the draft model has {ours} tokens and the model {vocab_size}: take two of one tokenizer")
        self._engine = engine

    def warm_up(self) -> None:
        """Compiles every shape."""
        self._engine.warm_up()

    def __call__(self, ongoing: Sequence[Ongoing], counts: Sequence[int]) -> list[list[int]]:
        requests, guessed = [], []
        for sample, count in zip(ongoing, counts, strict=True):
            room = min(count, self._engine.max_len - len(sample.tokens))
            guessed.append(room > 0)
            if room > 0:
                answer = sample.tokens[len(sample.request.prompt) :]
                requests.append(self._request(sample, answer, room))
        answers = iter(self._engine.generate(requests))
        return [[token.token for token in next(answers)[0]] if has else [] for has in guessed]

    @staticmethod
    def _request(sample: Ongoing, answer: Sequence[int], count: int) -> Request:
        return dataclasses.replace(
            sample.request,
            answer=tuple(answer),
            first_sample=sample.sample,
            num_samples=1,
            max_tokens=len(answer) + count,
            min_tokens=0,
            stop_ids=frozenset(),
            top_logprobs=0,
            watch=None,
        )


def guesser(config: EngineConfig, vocab_size: int, draft: LoadedModel | None = None) -> Guess | None:
    """What guesses in an engine of these settings: the `draft` model or, without one, prompt look-up; None if nothing is to.

    Raises:
      ValueError: see `DraftModel`.
    """
    if not config.num_guesses:
        return None
    if draft is None:
        return prompt_lookup
    # A page more for each sequence: what is known of its last one is copied, not computed anew.
    tokens = config.cache_tokens + config.max_batch * config.page_size
    settings = dataclasses.replace(config, num_guesses=0, cache_tokens=tokens)
    return DraftModel(Engine(draft.params, draft.config, settings, vocab_size=draft.tokenizer.vocab_size), vocab_size)
