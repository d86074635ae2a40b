"""Write a string backwards."""

from __future__ import annotations

import dataclasses
import random
import string
from typing import ClassVar

from data.tasks.task import Example, Task, check_range


@dataclasses.dataclass(frozen=True)
class Reverse(Task):
    """Attributes:
    min_length, max_length: letters of the string.
    alphabet: what it is drawn from.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("text",)
    template: str = "reverse {text} = "
    min_length: int = 3
    max_length: int = 5
    alphabet: str = string.ascii_lowercase

    def validate(self) -> None:
        check_range(self, "min_length", "max_length", least=1)
        if len(set(self.alphabet)) < 2 or any(c.isspace() for c in self.alphabet):
            raise ValueError(f"Reverse.alphabet={self.alphabet!r} needs two different characters, and no white space")

    def draw(self, rng: random.Random) -> Example:
        text = "".join(rng.choices(self.alphabet, k=rng.randint(self.min_length, self.max_length)))
        return Example(self.template.format(text=text), text[::-1], text)
