"""What a sequence asks of the draw (`inference/sampling.py`), and what becomes of the token that was drawn for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference.request import Alternatives, FinishReason, Request, Token
from inference.sampling import Draws, History, Rows, Sampling
from inference.schedule import Ongoing
from model.config import check
from model.kernels.tiles import MASKED

_NOBODY = Ongoing(-1, Request([0], Sampling(temperature=0.0)), 0, -1, [0], 1, None, None)
_DTYPES = {
    "slot": np.int32,
    "reads_history": bool,
    "top_k": np.int32,
    "seed": np.uint32,
    "sample": np.uint32,
    "num_drawn": np.uint32,
    "top_logprobs": np.int32,
}


def columns(rows: Sequence[Ongoing], size: int, no_slot: int) -> Rows:
    """Arrays [size] of the host; what rows without a sequence add to `no_slot`, which does not exist, is dropped."""
    wanted = [seq.asked | {"slot": seq.slot, "num_drawn": seq.num_drawn} for seq in rows]
    wanted += [_NOBODY.asked | {"slot": no_slot, "num_drawn": 0}] * (size - len(rows))
    values: dict[str, Any] = {
        field.name: np.array([row[field.name] for row in wanted], _DTYPES.get(field.name, np.float32))
        for field in dataclasses.fields(Rows)
    }
    return Rows(**values)


def history_row(sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], vocab_size: int) -> History:
    bias = np.zeros(vocab_size, np.float32)
    for token, value in sampling.logit_bias:
        bias[token] = value
    counts = np.bincount(np.asarray(answer, np.int64), minlength=vocab_size).astype(np.int32)
    in_prompt = np.zeros(vocab_size, bool)
    in_prompt[np.asarray(prompt, np.int64)] = True
    return History(*map(jnp.asarray, (bias, counts, in_prompt)))


def allowed(seq: Ongoing, in_vocabulary: np.ndarray) -> np.ndarray:
    """uint32 [words], as `Constraint.allowed`; what raises, or allows nothing, is an error of the sequence."""
    may = in_vocabulary.copy()
    try:
        ends = seq.request.stop_ids if seq.num_drawn < seq.request.min_tokens else frozenset[int]()
        if seq.constraint:
            may &= seq.constraint.allowed()
            ends = seq.request.stop_ids - {seq.constraint.stop_id}
        for token in ends:
            may[token // 32] &= ~np.uint32(1 << (token % 32))
        check(bool(may.any()), "no token is allowed here, by the constraint, or min_tokens and stop_ids")
    except Exception as error:
        seq.error = error
        return in_vocabulary
    return may


def drawn_token(seq: Ongoing, draws: Draws, row: int, turn: int) -> Token:
    """The token at [row, turn], of which the sequence's constraint and watcher are told; what they raise is its error."""
    token = int(draws.token[row, turn])
    request = seq.request
    finish_reason: FinishReason | None = "length" if len(seq.tokens) + 1 == seq.max_len else None
    if token in request.stop_ids:
        finish_reason = "stop"
    raw_logprob = float(draws.raw_logprob[row, turn])
    try:
        if not math.isfinite(raw_logprob):
            raise FloatingPointError(
                f"the logits after token {len(seq.tokens) - 1} are not finite: look at the weights and model.dtype"
            )
        if seq.constraint:
            seq.constraint.advance(token)
        if seq.watcher and seq.watcher(token) and seq.num_drawn + 1 >= request.min_tokens:
            finish_reason = "length" if seq.constraint else "stop"
    except Exception as error:
        seq.error = seq.error or error
    if seq.error is not None:
        finish_reason = "error"

    def best(tokens: jax.Array, logprobs: jax.Array) -> Alternatives | None:
        if not request.top_logprobs:
            return None
        ids, values = tokens[row, turn, : request.top_logprobs], logprobs[row, turn, : request.top_logprobs]
        possible = values > MASKED / 2  # There may be fewer than were asked for.
        return Alternatives(tuple(map(int, ids[possible])), tuple(map(float, values[possible])))

    return Token(
        seq.request_id,
        seq.sample,
        token,
        float(draws.logprob[row, turn]),
        raw_logprob,
        best(draws.top_tokens, draws.top_logprobs),
        best(draws.raw_top_tokens, draws.raw_top_logprobs),
        finish_reason,
        seq.error,
    )
