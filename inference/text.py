"""Tokens to text as they come: whole characters only, and nothing of a stop string, across the borders of tokens."""

from __future__ import annotations

import codecs
import collections
import dataclasses
from collections.abc import Callable, Sequence

from inference.request import Request, Token


def _length_of_beginning(text: str, stop: str) -> int:
    """How many of the last characters of `text` could be the first of `stop`, at most all but one of them."""
    longest = min(len(text), len(stop) - 1)
    return next(length for length in range(longest, -1, -1) if text.endswith(stop[:length]))


class TextStream:
    """The text of one answer. Bytes that are not UTF-8 become U+FFFD.

    Args:
      token_bytes: what each id decodes to, empty for special tokens.
      stop: strings that end the answer and are not part of it: the one that is complete first, of several the longest, however
        the text is cut into tokens.
      min_tokens: a stop string that is complete before so many tokens is text like any other.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = (), min_tokens: int = 0):
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._tokens_missing = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown now that `token` has come."""
        data = self._token_bytes[token] if token < len(self._token_bytes) else b""
        num_seen = len(self._held)
        self._held += self._decoder.decode(data)
        self._tokens_missing -= 1
        # Where each stands with its end among what is new: what is complete in the rest came too early.
        places = [(stop, self._held.find(stop, max(num_seen - len(stop) + 1, 0))) for stop in self._stop]
        found = [(at + len(stop), at) for stop, at in places if at >= 0]
        if found and self._tokens_missing <= 0:
            self.stopped = True
            _, start = min(found)
            shown, self._held = self._held[:start], ""
            return shown
        held = max((_length_of_beginning(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        return shown

    def finish(self) -> str:
        """What was held back, once no token follows."""
        rest = "" if self.stopped else self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return rest


class Answers:
    """Text beside the tokens of one request, which has to be submitted as `request`; `text` is asked once for each token.

    Args:
      request: to be watched; its `min_tokens` hold for stop strings too.
      token_bytes, stop: see `TextStream`.
    """

    def __init__(self, request: Request, token_bytes: Sequence[bytes], stop: Sequence[str] = ()):
        if not all(stop):
            raise ValueError("a stop string is empty: leave it out")
        if request.watch:
            raise ValueError("the request is watched already: leave one of the two out")
        self.request = dataclasses.replace(request, watch=self._watch)
        self._token_bytes, self._stop = token_bytes, stop
        self._samples: dict[int, tuple[TextStream, collections.deque[str]]] = {}

    def _watch(self, sample: int) -> Callable[[int], bool]:
        stream = TextStream(self._token_bytes, self._stop, self.request.min_tokens)
        pieces = collections.deque[str]()
        self._samples[sample] = stream, pieces

        def see(token: int) -> bool:
            pieces.append(stream.push(token))
            return stream.stopped

        return see

    def text(self, token: Token) -> str:
        """What `token` adds to its answer; of the last one, with what was held back."""
        stream, pieces = self._samples[token.sample]
        return pieces.popleft() + (stream.finish() if token.finish_reason else "")
