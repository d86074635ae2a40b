"""Write a string of a given length whose letters are worth much: a dense reward that stands for a taste.

Nothing is right or wrong, and the best policy under a penalty on the distance from a uniform one is known in closed form
(`experiments/reward_frontier.py`), so it shows how much of the reward that can be had at a distance an algorithm gets.
"""

from __future__ import annotations

import dataclasses
import random
import string
from typing import ClassVar

from data.tasks.task import Example, Score, Task


@dataclasses.dataclass(frozen=True)
class Worth(Task):
    """The reward is the mean worth of the answer's letters, and 0 if they are not `length` letters of the alphabet.

    Attributes:
      length: letters of the answer.
      topic_length: letters of the prompt, which do not matter.
      alphabet: worth from 0, the first letter, to 1, the last, in equal steps.
      informed: solutions are the best string; if False any string, as somebody would write who does not know the taste.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("topic",)
    template: str = "{topic}: "
    length: int = 8
    topic_length: int = 4
    alphabet: str = string.ascii_lowercase
    informed: bool = True

    def validate(self) -> None:
        if self.length < 1 or self.topic_length < 1:
            raise ValueError(f"Worth: length={self.length} and topic_length={self.topic_length} must be at least 1")
        if len(set(self.alphabet)) < max(2, len(self.alphabet)) or any(c.isspace() for c in self.alphabet):
            raise ValueError(
                f"Worth.alphabet={self.alphabet!r} needs at least two characters, all different, and no white space"
            )

    def draw(self, rng: random.Random) -> Example:
        topic = "".join(rng.choices(self.alphabet, k=self.topic_length))
        answer = self.alphabet[-1] * self.length if self.informed else "".join(rng.choices(self.alphabet, k=self.length))
        return Example(self.template.format(topic=topic), answer, topic)

    def judge(self, answer: str, example: Example) -> Score:
        if len(answer) != self.length or not set(answer) <= set(self.alphabet):
            return Score(0.0, f"not {self.length} letters")
        return Score(sum(map(self.alphabet.index, answer)) / (len(self.alphabet) - 1) / self.length, "letters")
