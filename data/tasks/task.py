"""What every verifiable task is: its own config, examples that are a function of (task, seed, index), and a strict scorer.

    task = Reverse(min_length=5, max_length=8)
    example = task.example(index=0, seed=0, split="train")
    task.score(completion, example)                          # Score(reward=0.0, reason="wrong answer")
    task.solution(example)                                   # a right completion, for a warm start by SFT

The prompts of training and evaluation are disjoint by construction: which side a problem belongs to is decided by the hash of
the problem itself, whatever the seed, the index or the template.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import random
import string
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from data.tasks.answers import AnswerFormat, extract, wrap

Split = Literal["train", "eval"]
EVAL_SHARE = 10  # one problem in ten is held out
_MAX_DRAWS = 2000  # that all fall on the other side has a chance of 1e-91 in a large space


@dataclasses.dataclass(frozen=True)
class Example:
    """Attributes:
    prompt: what the model reads.
    answer: a right answer, as `Task.judge` takes it; where many are right, one of them.
    problem: what is asked, in a canonical form that two prompts share when they ask the same; the split is its hash.
    metadata: what the verifier needs besides, of plain JSON values.
    """

    prompt: str
    answer: str
    problem: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Score:
    """Attributes:
    reward: in [0, 1].
    reason: a short phrase out of few, so that reasons can be counted.
    """

    reward: float
    reason: str


RIGHT = Score(1.0, "right")
WRONG = Score(0.0, "wrong answer")


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A task is a frozen dataclass; its fields are its config and are validated when it is made.

    Attributes:
      template: the prompt, with the task's `placeholders` in braces.
      answer_format: how the completion must mark the answer (`data/tasks/answers.py`).
    """

    placeholders: ClassVar[tuple[str, ...]] = ()
    template: str = ""
    answer_format: AnswerFormat = "bare"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.answer_format not in typing.get_args(AnswerFormat):
            raise ValueError(
                f"{name}.answer_format={self.answer_format!r} is not of {', '.join(typing.get_args(AnswerFormat))}"
            )
        try:
            used = [field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None]
        except ValueError as error:
            raise ValueError(f"{name}.template={self.template!r}: {error}; a brace itself is written twice") from None
        if set(used) != set(self.placeholders):
            wanted = ", ".join("{" + field + "}" for field in self.placeholders)
            raise ValueError(f"{name}.template={self.template!r} must hold {wanted or 'no placeholder'} and no other")
        self.validate()

    def validate(self) -> None:  # noqa: B027, a task may have nothing to add
        """Raises ValueError, naming the field and the fix, where the config cannot be worked with."""

    def files(self) -> tuple[str, ...]:
        """Paths of what the examples are read from."""
        return ()

    @abc.abstractmethod
    def draw(self, rng: random.Random) -> Example:
        """A random example, of either side of the split."""

    def example(self, index: int, seed: int, split: Split = "train") -> Example:
        """Example `index` of an endless stream: a pure function of (task, seed, index, split).

        Raises:
          ValueError: no problem of this config belongs to `split`.
        """
        check_place(index, split)
        for attempt in range(_MAX_DRAWS):
            example = self.draw(random.Random(f"{seed}/{index}/{attempt}"))
            if split_of(example.problem) == split:
                return example
        raise ValueError(f"{self}: no problem found that belongs to {split!r}; there are too few problems: widen the ranges")

    def score(self, completion: str, example: Example) -> Score:
        """What `completion` (without the prompt) deserves."""
        answer, reason = extract(completion, self.answer_format)
        return Score(0.0, reason) if answer is None else self.judge(answer, example)

    def judge(self, answer: str, example: Example) -> Score:
        """What the extracted answer deserves: by default, to be `example.answer` to the letter."""
        return RIGHT if answer == example.answer else WRONG

    def solution(self, example: Example) -> str:
        """A completion that scores 1."""
        return wrap(example.answer, self.answer_format)


def check_place(index: int, split: str) -> None:
    if index < 0:
        raise ValueError(f"an example's index must not be negative, got {index}")
    if split not in typing.get_args(Split):
        raise ValueError(f"split={split!r} is neither 'train' nor 'eval'")


def check_range(task: Task, low: str, high: str, least: int) -> None:
    """Raises unless least <= task.<low> <= task.<high>."""
    values = getattr(task, low), getattr(task, high)
    if not least <= values[0] <= values[1]:
        raise ValueError(f"{type(task).__name__}: {least} <= {low} <= {high} is needed, got {values[0]} and {values[1]}")


def split_of(problem: str) -> Split:
    digest = hashlib.blake2b(problem.encode("utf-8", errors="surrogatepass"), digest_size=8, person=b"loam.split").digest()
    return "eval" if int.from_bytes(digest, "little") % EVAL_SHARE == 0 else "train"
