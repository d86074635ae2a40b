"""Answers that must satisfy a JSON schema, a regular expression or a grammar, through `llguidance`.

Every answer that ends with `finish_reason="stop"` satisfies it, without its stop token: that of the grammar may be drawn only
where the answer is complete, and no other of `stop_ids` at all. One that `max_tokens` or a stop string cuts off, both
`finish_reason="length"`, is only the beginning of one that does. Schemas and grammars come from strangers: what is too large,
or cannot be had, is refused before it is queued.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import llguidance
import llguidance.numpy
import numpy as np

from model.config import check

Kind = Literal["json_schema", "regex", "lark"]
MAX_CHARACTERS = 100_000  # of a schema or a grammar


class _Vocabulary:
    """The tokens as `llguidance` asks for them."""

    def __init__(self, token_bytes: Sequence[bytes], stop_id: int, encode: Callable[[str], list[int]]):
        self.eos_token_id, self.bos_token_id = stop_id, None
        self.special_token_ids = [i for i, token in enumerate(token_bytes) if not token]
        self.tokens = [token or f"<special {i}>".encode() for i, token in enumerate(token_bytes)]
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", errors="replace"))


class Grammars:
    """Makes constraints over one tokenizer's tokens.

    Args:
      token_bytes: what each id decodes to, empty for special tokens.
      stop_id: the token that ends an answer, to be among the request's `stop_ids`.
      encode: text to ids.
      vocab_size: of the model, whose tokens beyond those are never allowed.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        stop_id: int,
        encode: Callable[[str], list[int]],
        vocab_size: int,
    ):
        """
        Raises:
          ValueError: the model has fewer tokens than the tokenizer.
        """
        unused = vocab_size - len(token_bytes)
        check(unused >= 0, f"{len(token_bytes)} tokens do not fit a model of {vocab_size}: take its own tokenizer")
        self._size, self._stop_id = vocab_size, stop_id
        # llguidance counts what it is given, whatever size it is told.
        wrapper = llguidance.TokenizerWrapper(_Vocabulary([*token_bytes, *[b""] * unused], stop_id, encode))
        self._tokenizer = llguidance.LLTokenizer(wrapper)

    def constraint(self, kind: Kind, source: str | dict[str, Any]) -> Callable[[], LlguidanceConstraint]:
        """For `Request.constraint`.

        Args:
          source: a JSON schema as an object or its text, a regular expression, or a grammar in Lark's syntax.

        Raises:
          ValueError: it is too large, malformed, impossible, or uses what is not supported.
        """
        text = source if isinstance(source, str) else json.dumps(source)
        check(len(text) <= MAX_CHARACTERS, f"a {kind} of {len(text)} characters exceeds {MAX_CHARACTERS}: give a smaller one")
        make = {
            "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "lark": llguidance.LLMatcher.grammar_from_lark,
        }
        check(kind in make, f"constraint {kind!r} is not one of {', '.join(make)}")
        try:
            if kind == "json_schema":
                json.loads(text)
            grammar = make[kind](text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the {kind} cannot be read: {error}") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        check(not matcher.is_error(), f"the {kind} cannot be satisfied or is not supported: {matcher.get_error()}")
        return lambda: LlguidanceConstraint(matcher.deep_copy(), self._size, self._stop_id)


class LlguidanceConstraint:
    """See `inference.request.Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, stop_id: int):
        self._matcher, self.stop_id = matcher, stop_id
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def allowed(self) -> np.ndarray:
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        return self._mask[0].view(np.uint32)

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar refuses token {token}, which it allowed: {self._matcher.get_error()}")
