"""Beam search on the engine: each step asks it for the most probable tokens after every beam, whose past it still holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from inference.engine import Engine
from inference.request import Request
from inference.sampling import TOP_LOGPROBS, Sampling
from model.config import check


@dataclasses.dataclass(frozen=True)
class Beam:
    """Attributes:
    tokens: of the answer, the stop token included.
    logprob: of the answer, under the model's own distribution.
    score: logprob / len(tokens) ** length_penalty.
    finished: whether a stop token ends it.
    """

    tokens: tuple[int, ...]
    logprob: float
    score: float
    finished: bool


def beam_search(
    engine: Engine,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    length_penalty: float = 1.0,
    num_best: int = 1,
) -> list[Beam]:
    """The answers of the highest scores that a search with `num_beams` open beams finds, best first.

    A beam is closed by a stop token or at `max_tokens`. The search ends when no open beam could still score higher than the
    worst of the answers that would be returned.

    Args:
      length_penalty: 0 compares sums of log-probabilities, which favours short answers; 1 compares means.

    Raises:
      ValueError: numbers off limits, and what `Engine.submit` refuses.
    """
    widest = TOP_LOGPROBS - len(stop_ids)
    check(0 < num_beams <= widest, f"num_beams={num_beams} must lie in [1, {widest}] with {len(stop_ids)} stop tokens")
    check(0 < num_best <= num_beams, f"num_best={num_best} must lie in [1, num_beams={num_beams}]")
    check(max_tokens > 0, f"max_tokens={max_tokens} must be positive")
    check(length_penalty >= 0, f"length_penalty={length_penalty} must not be negative")
    num_tokens = min(num_beams + len(stop_ids), engine.vocab_size)

    def closed(tokens: tuple[int, ...], logprob: float, finished: bool) -> Beam:
        return Beam(tokens, logprob, logprob / len(tokens) ** length_penalty, finished)

    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    answers: list[Beam] = []
    for length in range(1, max_tokens + 1):
        requests = [
            Request([*prompt, *tokens], Sampling(temperature=0.0), max_tokens=1, top_logprobs=num_tokens) for tokens, _ in beams
        ]
        longer: list[tuple[tuple[int, ...], float]] = []
        for (tokens, logprob), ((answer,),) in zip(beams, engine.generate(requests), strict=True):
            assert answer.top is not None
            # Of the tokens that may be drawn; what they have in common makes up for those that may not.
            others = answer.raw_logprob - answer.top.logprobs[answer.top.tokens.index(answer.token)]
            longer += [
                ((*tokens, token), logprob + added + others)
                for token, added in zip(answer.top.tokens, answer.top.logprobs, strict=True)
            ]
        longer.sort(key=lambda beam: -beam[1])
        answers += [closed(*beam, True) for beam in longer if beam[0][-1] in stop_ids]
        beams = [beam for beam in longer if beam[0][-1] not in stop_ids][:num_beams]
        answers = sorted(answers, key=lambda beam: -beam.score)[:num_best]
        # Log-probabilities only fall, so the best an open beam can come to is what it has, over the greatest length.
        reachable = beams[0][1] / max_tokens**length_penalty if beams else float("-inf")
        if not beams or (len(answers) == num_best and length < max_tokens and answers[-1].score >= reachable):
            return answers
    answers += [closed(*beam, False) for beam in beams]
    return sorted(answers, key=lambda beam: -beam.score)[:num_best]
