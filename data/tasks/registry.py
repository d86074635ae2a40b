"""Tasks by name, as a config gives them: make_task("addition", max_digits=2)."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from data.tasks.addition import Addition
from data.tasks.brackets import Brackets
from data.tasks.constraints import Constraints
from data.tasks.countdown import Countdown
from data.tasks.gcd import Gcd
from data.tasks.gsm8k import Gsm8k
from data.tasks.guarded_reverse import GuardedReverse
from data.tasks.json_schema import JsonSchema
from data.tasks.letter_count import LetterCount
from data.tasks.python_programs import PythonPrograms
from data.tasks.reasoning_gym import ReasoningGym
from data.tasks.reverse import Reverse
from data.tasks.sort import Sort
from data.tasks.task import Task
from data.tasks.worth import Worth

TASKS: dict[str, type[Task]] = {
    "reverse": Reverse,
    "guarded_reverse": GuardedReverse,
    "addition": Addition,
    "sort": Sort,
    "gcd": Gcd,
    "countdown": Countdown,
    "brackets": Brackets,
    "letter_count": LetterCount,
    "constraints": Constraints,
    "gsm8k": Gsm8k,
    "python_programs": PythonPrograms,
    "json_schema": JsonSchema,
    "reasoning_gym": ReasoningGym,
    "worth": Worth,
}


def make_task(name: str, **options: Any) -> Task:
    """The task called `name` with these fields changed.

    Raises:
      ValueError: no such task or field, with the nearest that there is; or a value that the task refuses.
      FileNotFoundError, ModuleNotFoundError: what the task reads is not there.
    """
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r}{_nearest(name, list(TASKS))}")
    fields = [field.name for field in dataclasses.fields(TASKS[name])]
    for option in options:
        if option not in fields:
            raise ValueError(f"task {name!r} has no field {option!r}{_nearest(option, fields)}")
    return TASKS[name](**options)


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"
