"""Count a letter in a word."""

from __future__ import annotations

import dataclasses
import random
import string
from typing import ClassVar

from data.tasks.answers import wrap
from data.tasks.task import Example, Task, check_range


@dataclasses.dataclass(frozen=True)
class LetterCount(Task):
    """Words are random strings in which the letter asked for is as frequent as a number drawn first says.

    Attributes:
      min_length, max_length: letters of the word.
      alphabet: what it is drawn from.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("letter", "word")
    template: str = "count {letter} in {word} = "
    min_length: int = 3
    max_length: int = 10
    alphabet: str = string.ascii_lowercase

    def validate(self) -> None:
        check_range(self, "min_length", "max_length", least=1)
        if len(set(self.alphabet)) < 2 or any(c.isspace() for c in self.alphabet):
            raise ValueError(f"LetterCount.alphabet={self.alphabet!r} needs two different characters, and no white space")

    def draw(self, rng: random.Random) -> Example:
        length, letter = rng.randint(self.min_length, self.max_length), rng.choice(self.alphabet)
        count = rng.randint(0, length)
        others = [c for c in self.alphabet if c != letter]
        characters = [letter] * count + rng.choices(others, k=length - count)
        rng.shuffle(characters)
        word = "".join(characters)
        prompt = self.template.format(letter=letter, word=word)
        return Example(prompt, str(count), f"{letter} {word}", {"letter": letter, "word": word})

    def solution(self, example: Example) -> str:
        """The answer; before it, where the format leaves room, the word spelled with a running count."""
        if self.answer_format == "bare":
            return wrap(example.answer, self.answer_format)
        letter, count, steps = example.metadata["letter"], 0, []
        for character in example.metadata["word"]:
            count += character == letter
            steps.append(f"{character}{count}")
        return wrap(example.answer, self.answer_format, work=" ".join(steps))
