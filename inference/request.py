"""What is asked of the decode engine, and the tokens that it answers with."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from inference.sampling import SAMPLING, TOP_LOGPROBS, Sampling
from model.config import check

FinishReason = Literal["stop", "length", "error"]

MAX_SAMPLES = 16_384  # of a request
FAILED = "watcher, constraint or guess failed, or its logits are not finite"


class Constraint(Protocol):
    """What an answer may consist of, token by token (`inference/grammar.py`).

    Attributes:
      stop_id: the token that it allows after what is complete.
    """

    stop_id: int

    def allowed(self) -> np.ndarray:
        """uint32 [words]: bit i of word w is set where token 32 w + i may come next. At least one may."""
        ...

    def advance(self, token: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Request:
    """Attributes:
    prompt: token ids, at least one.
    num_samples: answers that are drawn independently of each other.
    first_sample: number of the first of them; samples of a seed differ by their number alone.
    answer: tokens that were drawn before, as of an answer that was broken off; what is drawn goes on from there.
    max_tokens: of an answer, with what was drawn before; None is as many as the context holds.
    min_tokens: before them no token of `stop_ids` is drawn, and a watcher that says stop is not heeded.
    stop_ids: tokens that end an answer and are its last.
    seed: with it and the weights, an answer is always the same, whatever else the engine does.
    top_logprobs: alternatives reported for each token.
    watch: makes, for a sample by its number, a function that is told its tokens and says whether to stop there.
    constraint: makes, for each sample, what its tokens must satisfy; of `stop_ids` only its own may then be drawn, so that an
      answer that ends with `stop` is complete.
    """

    prompt: Sequence[int]
    sampling: Sampling = SAMPLING
    num_samples: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    first_sample: int = 0
    answer: Sequence[int] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    top_logprobs: int = 0
    watch: Callable[[int], Callable[[int], bool]] | None = None
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_tokens", "min_tokens", "seed", "first_sample", "top_logprobs"):
            value = getattr(self, name)
            check(value is None or isinstance(value, numbers.Integral), f"{name}={value} must be a whole number")
        for name in ("prompt", "answer", "stop_ids"):
            strange = [token for token in getattr(self, name) if not isinstance(token, numbers.Integral)]
            check(not strange, f"{name} holds {strange[:1]}: tokens are whole numbers")
        check(len(self.prompt) > 0, "a prompt needs at least one token: give some text, or a <bos> token")
        check(0 < self.num_samples <= MAX_SAMPLES, f"num_samples={self.num_samples} must lie in [1, {MAX_SAMPLES}]")
        check(self.max_tokens is None or self.max_tokens > 0, f"max_tokens={self.max_tokens} must be positive")
        check(self.min_tokens >= 0, f"min_tokens={self.min_tokens} must not be negative")
        check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}",
        )
        check(
            self.max_tokens is None or len(self.answer) < self.max_tokens,
            f"the answer has {len(self.answer)} tokens already, and max_tokens={self.max_tokens}",
        )
        check(
            not (self.answer and (self.watch or self.constraint)),
            "an answer that was broken off cannot be watched or constrained: leave it out, and it is drawn again the same",
        )
        check(
            not (self.constraint and self.min_tokens),
            f"min_tokens={self.min_tokens} does not go with a constraint, which may allow nothing but its end: leave it out",
        )
        check(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2^32)")
        check(0 <= self.first_sample < 2**31, f"first_sample={self.first_sample} must lie in [0, 2^31)")
        check(0 <= self.top_logprobs <= TOP_LOGPROBS, f"top_logprobs={self.top_logprobs} must lie in [0, {TOP_LOGPROBS}]")


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """The most probable tokens at a place and their log-probabilities, the most probable first."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
      request, sample: whose.
      logprob: under the distribution it was drawn from (0 where the most likely one was taken).
      raw_logprob: under the model's own distribution, as the trainer computes it.
      finish_reason: if it is the last: `stop` (a stop token, or the watcher said so), `length` (cut off: as long as it may
        become, or the watcher said so of an answer with a constraint, which nobody knows to be complete there), or `error`.
      error: what the request's own watcher or constraint raised, or the guesses at it, or that the model's logits are not
        finite; the token then says nothing.
    """

    request: int
    sample: int
    token: int
    logprob: float
    raw_logprob: float
    top: Alternatives | None
    raw_top: Alternatives | None
    finish_reason: FinishReason | None
    error: Exception | None = None
