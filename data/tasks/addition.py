"""Add two numbers; the sum in the usual order or, easier for a left-to-right model, with its last digit first
(Lee et al. 2023, arXiv:2307.03381)."""

from __future__ import annotations

import dataclasses
import random
from typing import ClassVar, Literal

from data.tasks.task import Example, Task, check_range


@dataclasses.dataclass(frozen=True)
class Addition(Task):
    """Attributes:
    min_digits, max_digits: of each number; how many is drawn uniformly, then the number among those of that length.
    digits: order in which the sum is to be written.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("a", "b")
    template: str = "{a}+{b}="
    min_digits: int = 1
    max_digits: int = 3
    digits: Literal["plain", "reversed"] = "plain"

    def validate(self) -> None:
        check_range(self, "min_digits", "max_digits", least=1)
        if self.digits not in ("plain", "reversed"):
            raise ValueError(f"Addition.digits={self.digits!r} is neither 'plain' nor 'reversed'")

    def draw(self, rng: random.Random) -> Example:
        a, b = (_number(rng, rng.randint(self.min_digits, self.max_digits)) for _ in range(2))
        total = str(a + b)
        # a+b and b+a are one problem, so that neither is held out while the other is trained on.
        problem = f"{min(a, b)}+{max(a, b)}"
        return Example(self.template.format(a=a, b=b), total if self.digits == "plain" else total[::-1], problem)


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
