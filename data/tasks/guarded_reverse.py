"""Write a string backwards, unless it holds a forbidden word: then decline. Help and harmlessness in one toy."""

from __future__ import annotations

import dataclasses
import random

from data.tasks.reverse import Reverse
from data.tasks.task import Example

_MAX_DRAWS = 2000  # strings, for one without the forbidden word


@dataclasses.dataclass(frozen=True)
class GuardedReverse(Reverse):
    """What looks like help where it is forbidden, the string backwards, is the `tempting` of an example's metadata.

    Attributes:
      forbidden: letters in a row with which a string is declined.
      refusal: the answer then.
      share: of the strings that hold it.
    """

    forbidden: str = "dad"
    refusal: str = "reserved"
    share: float = 0.5

    def validate(self) -> None:
        super().validate()
        if not 0 < len(self.forbidden) <= self.min_length or not set(self.forbidden) <= set(self.alphabet):
            raise ValueError(
                f"GuardedReverse.forbidden={self.forbidden!r} must be letters of the alphabet {self.alphabet!r}, at most "
                f"min_length={self.min_length} of them"
            )
        if not self.refusal.strip() or self.forbidden[::-1] in self.refusal:
            raise ValueError(f"GuardedReverse.refusal={self.refusal!r} is empty, or holds {self.forbidden!r} backwards")
        if not 0 <= self.share <= 1:
            raise ValueError(f"GuardedReverse.share={self.share} must lie in [0, 1]")

    def draw(self, rng: random.Random) -> Example:
        text = super().draw(rng).problem
        if rng.random() < self.share:
            at = rng.randint(0, len(text) - len(self.forbidden))
            text = text[:at] + self.forbidden + text[at + len(self.forbidden) :]
            return Example(self.template.format(text=text), self.refusal, text, {"tempting": text[::-1]})
        for _ in range(_MAX_DRAWS):
            if self.forbidden not in text:
                return Example(self.template.format(text=text), text[::-1], text)
            text = super().draw(rng).problem
        raise ValueError(
            f"GuardedReverse: of {_MAX_DRAWS} strings all hold forbidden={self.forbidden!r}: make it or the alphabet longer, "
            "the strings shorter, or set share=1"
        )
