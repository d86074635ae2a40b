"""Wrong answers that look like right ones, for preferences that need no model."""

from __future__ import annotations

import random
import re
import string

from data.tasks.answers import wrap
from data.tasks.task import Example, Task

_MAX_TRIES = 200


def mistaken(task: Task, example: Example, rng: random.Random) -> str:
    """A completion that scores below 1: what the task says is tempting, or else the right answer with one character left out,
    doubled, exchanged or moved.

    Raises:
      ValueError: none of many tries is wrong.
    """
    if "tempting" in example.metadata:
        return wrap(example.metadata["tempting"], task.answer_format)
    for _ in range(_MAX_TRIES):
        answer = _slip(example.answer, rng)
        completion = wrap(answer, task.answer_format)
        if answer.strip() and task.score(completion, example).reward < 1:
            return completion
    raise ValueError(f"{task}: changing a character of {example.answer!r} never makes it wrong; give wrong answers in a file")


def mistaken_steps(task: Task, example: Example, rng: random.Random) -> tuple[list[str], list[bool]]:
    """The lines of the task's worked solution up to one with a slip, the first wrong step, at which annotators stop
    (arXiv:2305.20050); and whether each is right.

    The slip is another last number of a line, what the line comes to; of an answer without numbers, a character's. So it always
    says something else than the right step, and what is written up to it scores below 1.

    Raises:
      ValueError: none of many tries is wrong.
    """
    steps = task.solution(example).split("\n")
    last = len(steps) - 1
    wrong = rng.choice([i for i, step in enumerate(steps) if i == last or re.search("[0-9]", step)])
    for _ in range(_MAX_TRIES):
        step = _misstated(steps[wrong], rng)
        written = [*steps[:wrong], step]
        differs = step.strip() and "".join(step.split()) != "".join(steps[wrong].split())
        if differs and task.score("\n".join(written), example).reward < 1:
            return written, [True] * wrong + [False]
    raise ValueError(f"{task}: changing {steps[wrong]!r} never makes it wrong; give wrong steps in a file")


def _misstated(step: str, rng: random.Random) -> str:
    """With another digit in its last number; where it has none, with a slip."""
    numbers = list(re.finditer("[0-9]+", step))
    if not numbers:
        return _slip(step, rng)
    i = rng.randrange(*numbers[-1].span())
    return step[:i] + rng.choice([digit for digit in string.digits if digit != step[i]]) + step[i + 1 :]


def _slip(answer: str, rng: random.Random) -> str:
    i = rng.randrange(len(answer))
    match rng.randrange(4):
        case 0:
            return answer[:i] + answer[i + 1 :]
        case 1:
            return answer[: i + 1] + answer[i:]
        case 2:
            return answer[:i] + rng.choice(answer) + answer[i + 1 :]
        case _:
            j = rng.randrange(len(answer))
            rest = answer[:i] + answer[i + 1 :]
            return rest[:j] + answer[i] + rest[j:]
