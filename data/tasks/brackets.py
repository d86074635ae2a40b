"""Complete an opening into a balanced string of brackets of an exact length. Many answers are right; none is stored as such."""

from __future__ import annotations

import dataclasses
import random
from typing import ClassVar

from data.tasks.task import RIGHT, Example, Score, Task, check_range

_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclasses.dataclass(frozen=True)
class Brackets(Task):
    """Attributes:
    min_length, max_length: of the whole string, opening included; even lengths only are drawn.
    kinds: opening brackets that may occur, of ( [ { <
    opening: how many brackets the prompt gives; 0 < opening < min_length, so that prompts differ by more than a length.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("length", "opening")
    template: str = "brackets {length}: {opening}"
    min_length: int = 8
    max_length: int = 16
    kinds: str = "(["
    opening: int = 4

    def validate(self) -> None:
        check_range(self, "min_length", "max_length", least=2)
        if self.min_length % 2 or self.max_length % 2:
            raise ValueError(f"Brackets: lengths {self.min_length} and {self.max_length} must be even, as balanced strings are")
        if not 0 < self.opening < self.min_length:
            raise ValueError(f"Brackets.opening={self.opening} must lie between 0 and min_length={self.min_length}")
        if not self.kinds or set(self.kinds) - set(_PAIRS) or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"Brackets.kinds={self.kinds!r} must be different ones of {''.join(_PAIRS)}")

    def draw(self, rng: random.Random) -> Example:
        length = 2 * rng.randint(self.min_length // 2, self.max_length // 2)
        text, closers = "", []
        while len(text) < length:
            must_close, must_open = len(closers) == length - len(text), not closers
            if must_open or (not must_close and rng.random() < 0.5):
                kind = rng.choice(self.kinds)
                text += kind
                closers.append(_PAIRS[kind])
            else:
                text += closers.pop()
        opening, answer = text[: self.opening], text[self.opening :]
        prompt = self.template.format(length=length, opening=opening)
        return Example(prompt, answer, f"{length} {opening}", {"length": length, "opening": opening})

    def judge(self, answer: str, example: Example) -> Score:
        """`answer` continues the opening. Brackets of kinds that the config does not name are refused."""
        text = example.metadata["opening"] + answer
        closers: list[str] = []
        for character in text:
            if character in self.kinds:
                closers.append(_PAIRS[character])
            elif not closers or closers.pop() != character:
                return Score(0.0, "not balanced")
        if closers:
            return Score(0.0, "not balanced")
        return RIGHT if len(text) == example.metadata["length"] else Score(0.0, "wrong length")
