"""What an answer looks like, whatever it says: verifiers of form, for any task, as further parts of a reward."""

from __future__ import annotations

import dataclasses
import re
import typing

from data.tasks.answers import AnswerFormat, extract
from data.tasks.task import RIGHT, Example, Score


@dataclasses.dataclass(frozen=True)
class Length:
    """Attributes:
    min_characters, max_characters: how long the completion may be, without white space around it.
    """

    max_characters: int
    min_characters: int = 1

    def __post_init__(self) -> None:
        limits = (self.min_characters, self.max_characters)
        if not all(type(limit) is int for limit in limits) or not 0 <= limits[0] <= limits[1]:
            raise ValueError(f"Length: 0 <= min_characters <= max_characters is needed, whole numbers; got {limits}")

    def score(self, completion: str, example: Example) -> Score:
        length = len(completion.strip())
        if length > self.max_characters:
            return Score(0.0, "too long")
        return RIGHT if length >= self.min_characters else Score(0.0, "too short")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Attributes:
    pattern: a regular expression that the whole completion must match; `(?s).*` stands for any text.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"Pattern.pattern={self.pattern!r} is no regular expression: {error}") from None

    def score(self, completion: str, example: Example) -> Score:
        return RIGHT if re.fullmatch(self.pattern, completion) else Score(0.0, "no match")


@dataclasses.dataclass(frozen=True)
class Marked:
    """Attributes:
    answer_format: in which the completion must hold one answer (`data/tasks/answers.py`).
    """

    answer_format: AnswerFormat

    def __post_init__(self) -> None:
        if self.answer_format not in typing.get_args(AnswerFormat):
            raise ValueError(
                f"Marked.answer_format={self.answer_format!r} is not of {', '.join(typing.get_args(AnswerFormat))}"
            )

    def score(self, completion: str, example: Example) -> Score:
        answer, reason = extract(completion, self.answer_format)
        return Score(0.0, reason) if answer is None else RIGHT


Form = Length | Pattern | Marked
FORMS: dict[str, type[Form]] = {"length": Length, "pattern": Pattern, "answer_format": Marked}
