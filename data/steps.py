"""Steps of a solution: its lines. One ends at the token with the line break, the last at the token that ends the answer."""

from __future__ import annotations

import numpy as np

from data.tokenizer import Tokenizer


def line_breaks(tokenizer: Tokenizer) -> np.ndarray:
    """bool [vocab_size]: tokens whose text holds a line break."""
    return np.array([b"\n" in data for data in tokenizer.token_bytes])


def step_ends(tokens: np.ndarray, written: np.ndarray, breaks: np.ndarray) -> np.ndarray:
    """bool [..., T]: where a step ends.

    Args:
      tokens: int [..., T].
      written: bool [..., T], the tokens of the answer.
      breaks: of `line_breaks`; tokens beyond them break no line.
    """
    from_here = np.flip(np.cumsum(np.flip(written, -1), -1), -1)
    is_break = breaks[np.minimum(tokens, breaks.size - 1)] & (tokens < breaks.size)
    return written & (is_break | (from_here == 1))
