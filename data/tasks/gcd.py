"""Find the greatest common divisor of two numbers."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import ClassVar

from data.tasks.answers import wrap
from data.tasks.task import Example, Task


@dataclasses.dataclass(frozen=True)
class Gcd(Task):
    """Half of the problems have a common factor by construction; otherwise the answer would be 1 in 61 % of them.

    Attributes:
      max_number: the largest that may occur; 1 is the smallest.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("a", "b")
    template: str = "gcd({a},{b})="
    max_number: int = 99

    def validate(self) -> None:
        if self.max_number < 4:
            raise ValueError(f"Gcd.max_number={self.max_number} must be at least 4")

    def draw(self, rng: random.Random) -> Example:
        factor = rng.randint(2, self.max_number // 2) if rng.random() < 0.5 else 1
        a, b = (factor * rng.randint(1, self.max_number // factor) for _ in range(2))
        return Example(self.template.format(a=a, b=b), str(math.gcd(a, b)), f"{min(a, b)},{max(a, b)}", {"a": a, "b": b})

    def solution(self, example: Example) -> str:
        """The answer; before it, where the format leaves room, the steps of Euclid's algorithm."""
        if self.answer_format == "bare":
            return wrap(example.answer, self.answer_format)
        a, b, steps = example.metadata["a"], example.metadata["b"], []
        while b:
            steps.append(f"{a} mod {b} = {a % b}")
            a, b = b, a % b
        return wrap(example.answer, self.answer_format, work="\n".join(steps))
