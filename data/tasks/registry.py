"""Tasks and verifiers of form by name, as a config gives them: make_task("addition", max_digits=2)."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from data.tasks.addition import Addition
from data.tasks.brackets import Brackets
from data.tasks.constraints import Constraints
from data.tasks.countdown import Countdown
from data.tasks.forms import FORMS, Form
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

T = TypeVar("T")

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
    return _make("task", TASKS, name, options)


def make_form(name: str, **options: Any) -> Form:
    """The verifier of `data/tasks/forms.py` called `name` with these fields.

    Raises:
      ValueError: as of `make_task`; or a field without a default is missing.
    """
    return _make("form", FORMS, name, options)


def _make(what: str, kinds: Mapping[str, type[T]], name: str, options: Mapping[str, Any]) -> T:
    if name not in kinds:
        raise ValueError(f"no {what} is called {name!r}{_nearest(name, list(kinds))}")
    return _build(f"{what} {name!r}", kinds[name], options)


def _build(what: str, kind: type[T], options: Mapping[str, Any]) -> T:
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for option in options:
        if option not in fields:
            raise ValueError(f"{what} has no field {option!r}{_nearest(option, list(fields))}")
    missing = [name for name, field in fields.items() if _is_required(field) and name not in options]
    if missing:
        raise ValueError(f"{what} needs a value of {', '.join(missing)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(f"{name} of {what}", hints[name], value) for name, value in options.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(what: str, kind: Any, value: Any) -> Any:
    """`value` as a field holds it: JSON and a command line have lists for tuples, and objects for dataclasses."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        try:
            return _build(what, kind, value)
        except TypeError as error:  # it compares a number with what is none
            raise ValueError(f"{what}={dict(value)!r}: {error}") from None
    return _tuples(value) if typing.get_origin(kind) is tuple else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"
