"""Make a target out of given numbers by + - * / and brackets, each number used exactly once (Gandhi et al. 2024,
arXiv:2404.03683). Many expressions are right; they are evaluated exactly, in fractions, by a parser of our own."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from fractions import Fraction
from typing import ClassVar

from data.tasks.task import RIGHT, WRONG, Example, Score, Task

_MAX_CHARACTERS = 200  # also bounds the depth of recursion


@dataclasses.dataclass(frozen=True)
class Countdown(Task):
    """Attributes:
    num_numbers: how many are given, at most 6.
    max_number: the largest given; 1 is the smallest.
    max_target: the largest target; 1 is the smallest.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("numbers", "target")
    template: str = "{numbers} -> {target}: "
    num_numbers: int = 3
    max_number: int = 9
    max_target: int = 50

    def validate(self) -> None:
        if not 2 <= self.num_numbers <= 6:
            raise ValueError(f"Countdown.num_numbers={self.num_numbers} must lie in 2..6")
        if self.max_number < 1 or self.max_target < 1:
            raise ValueError(f"Countdown: max_number={self.max_number} and max_target={self.max_target} must be at least 1")

    def draw(self, rng: random.Random) -> Example:
        """Always solvable: the target is the value of a random expression."""
        while True:
            numbers = [rng.randint(1, self.max_number) for _ in range(self.num_numbers)]
            value, expression = _random_expression(rng, numbers)
            if value is not None and value.denominator == 1 and 1 <= value <= self.max_target:
                break
        prompt = self.template.format(numbers=" ".join(map(str, numbers)), target=value)
        problem = f"{sorted(numbers)} {value}"  # the order of the numbers makes no other problem
        return Example(prompt, expression, problem, {"numbers": numbers, "target": int(value)})

    def judge(self, answer: str, example: Example) -> Score:
        try:
            value, used = evaluate(answer)
        except ZeroDivisionError:
            return Score(0.0, "division by zero")
        except ValueError:
            return Score(0.0, "not an expression")
        if Counter(used) != Counter(example.metadata["numbers"]):
            return Score(0.0, "other numbers")
        return RIGHT if value == example.metadata["target"] else WRONG


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Value of an expression of non-negative integers, + - * / and ( ), and the integers in it in order.

    No sign, power, point or name is understood, and no digit but ASCII ones.

    Raises:
      ValueError: it is not such an expression, or longer than 200 characters.
      ZeroDivisionError: it divides by zero.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError("too long")
    used: list[int] = []
    position = 0

    def peek() -> str:
        nonlocal position
        while position < len(text) and text[position] == " ":
            position += 1
        return text[position] if position < len(text) else ""

    def factor() -> Fraction:
        nonlocal position
        if peek() == "(":
            position += 1
            value = terms()
            if peek() != ")":
                raise ValueError("unclosed bracket")
            position += 1
            return value
        start = position
        while position < len(text) and text[position] in "0123456789":
            position += 1
        if start == position or (text[start] == "0" and position > start + 1):
            raise ValueError(f"a number is missing at character {start}")
        used.append(int(text[start:position]))
        return Fraction(used[-1])

    def products() -> Fraction:
        nonlocal position
        value = factor()
        while (operator := peek()) and operator in "*/":
            position += 1
            right = factor()
            value = value * right if operator == "*" else value / right
        return value

    def terms() -> Fraction:
        nonlocal position
        value = products()
        while (operator := peek()) and operator in "+-":
            position += 1
            right = products()
            value = value + right if operator == "+" else value - right
        return value

    value = terms()
    if peek():
        raise ValueError(f"unexpected {text[position]!r}")
    return value, used


def _random_expression(rng: random.Random, numbers: list[int]) -> tuple[Fraction | None, str]:
    """Value (None if it divides by zero) and text of a random tree over `numbers`, with as few brackets as its value allows."""
    # (value, text, precedence): 1 for + and -, 2 for * and /, 3 for a number
    items = [(Fraction(n), str(n), 3) for n in numbers]
    while len(items) > 1:
        (a, a_text, a_level), (b, b_text, b_level) = (items.pop(rng.randrange(len(items))) for _ in range(2))
        operator = rng.choice("+-*/")
        if operator == "/" and not b:
            return None, ""
        level = 1 if operator in "+-" else 2
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[operator]
        a_text = f"({a_text})" if a_level < level else a_text
        b_text = f"({b_text})" if b_level < level or (b_level == level and operator in "-/") else b_text
        items.append((value, f"{a_text}{operator}{b_text}", level))
    return items[0][0], items[0][1]
