"""Wrong answers that look like right ones, for preferences that need no model."""

from __future__ import annotations

import random

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
    (arXiv:2305.20050); and whether each is right."""
    steps = task.solution(example).split("\n")
    wrong = rng.randrange(len(steps))
    for _ in range(_MAX_TRIES):
        step = _slip(steps[wrong], rng)
        if step.strip() and step != steps[wrong]:
            return [*steps[:wrong], step], [True] * wrong + [False]
    raise ValueError(f"{task}: changing a character of {steps[wrong]!r} never makes it another step")


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
