"""Steps of a solution: its lines that say something. One ends at the token with the line break, the last at the token that ends
the answer, unless that comes after a break: then it has ended. So blank lines, of which no step that is learned from consists,
are none; of an answer that says nothing, its last token is the end of the only step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.tokenizer import Tokenizer


class LineTokens(NamedTuple):
    """bool [vocab_size] each: whether the text of a token holds a line break; and something other than white space."""

    breaks: np.ndarray
    says: np.ndarray


def line_tokens(tokenizer: Tokenizer) -> LineTokens:
    """Special tokens have no text, so they say nothing."""
    texts = tokenizer.token_bytes
    return LineTokens(np.array([b"\n" in text for text in texts]), np.array([bool(text.strip()) for text in texts]))


def step_ends(tokens: np.ndarray, written: np.ndarray, lines: LineTokens) -> np.ndarray:
    """bool [..., T]: where a step ends.

    Args:
      tokens: int [..., T].
      written: bool [..., T], the tokens of the answer.
      lines: of the tokenizer; tokens beyond it break no line, and say what is no text.
    """
    known = np.minimum(tokens, lines.breaks.size - 1)
    beyond = tokens >= lines.breaks.size
    breaks = written & lines.breaks[known] & ~beyond
    said = np.cumsum(written & (lines.says[known] | beyond), -1)
    at_last_break = np.maximum.accumulate(np.where(breaks, said, 0), -1)
    before = np.concatenate([np.zeros_like(said[..., :1]), at_last_break[..., :-1]], -1)
    last = written & (np.flip(np.cumsum(np.flip(written, -1), -1), -1) == 1)
    return (breaks | last) & (said > before) | last & (said[..., -1:] == 0)
