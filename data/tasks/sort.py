"""Sort numbers."""

from __future__ import annotations

import dataclasses
import random
from typing import ClassVar

from data.tasks.task import Example, Task, check_range


@dataclasses.dataclass(frozen=True)
class Sort(Task):
    """Attributes:
    min_length, max_length: how many numbers.
    max_number: the largest that may occur; 0 is the smallest.
    separator: between numbers, in the prompt and in the answer.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("numbers",)
    template: str = "sort {numbers} = "
    min_length: int = 3
    max_length: int = 5
    max_number: int = 9
    separator: str = " "

    def validate(self) -> None:
        check_range(self, "min_length", "max_length", least=2)
        if self.max_number < 1:
            raise ValueError(f"Sort.max_number={self.max_number} must be at least 1")
        if any(c.isdigit() for c in self.separator) or (not self.separator and self.max_number > 9):
            raise ValueError(f"Sort.separator={self.separator!r} must tell numbers up to {self.max_number} apart")

    def draw(self, rng: random.Random) -> Example:
        numbers = [rng.randint(0, self.max_number) for _ in range(rng.randint(self.min_length, self.max_length))]
        asked, answer = (self.separator.join(map(str, items)) for items in (numbers, sorted(numbers)))
        return Example(self.template.format(numbers=asked), answer, " ".join(map(str, numbers)))
