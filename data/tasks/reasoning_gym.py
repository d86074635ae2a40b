"""Any data set of `reasoning-gym` (https://github.com/open-thought/reasoning-gym; `pip install 'loam[rl]'`) as a task."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import random
from types import ModuleType
from typing import Any, ClassVar

from data.tasks.answers import AnswerFormat
from data.tasks.task import RIGHT, Example, Score, Task


@dataclasses.dataclass(frozen=True)
class ReasoningGym(Task):
    """Attributes:
    dataset: its name there, such as "spell_backward".
    options: its config, as (field, value) pairs.
    partial_credit: hand on scores between 0 and 1. Off by default: some data sets give wrong answers credit for every
      character in place, which reads as progress and is none.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("question",)
    template: str = "{question}\n"
    answer_format: AnswerFormat = "tags"
    dataset: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    partial_credit: bool = False

    def validate(self) -> None:
        gym = _gym()
        names = gym.factory.DATASETS
        if self.dataset not in names:
            raise ValueError(f"ReasoningGym.dataset={self.dataset!r} is not among its {len(names)}: {', '.join(sorted(names))}")
        try:
            _dataset(self.dataset, self.options)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"ReasoningGym: {self.dataset} does not take options {dict(self.options)}: {error}") from None

    def draw(self, rng: random.Random) -> Example:
        number = rng.randrange(2**31)
        try:
            entry = _dataset(self.dataset, self.options)[number]
        except IndexError:  # some list their items when they are made; then the number serves as the seed
            entry = _dataset.__wrapped__(self.dataset, self.options, seed=number)[0]
        question = entry["question"]
        return Example(self.template.format(question=question), str(entry["answer"]), question, {"entry": entry})

    def judge(self, answer: str, example: Example) -> Score:
        reward = float(_dataset(self.dataset, self.options).score_answer(answer, example.metadata["entry"]))
        if reward == 1.0:
            return RIGHT
        return Score(reward if self.partial_credit else 0.0, "partly right" if reward > 0 else "wrong answer")


@functools.lru_cache(maxsize=16)  # making one may take seconds: some read a book first
def _dataset(name: str, options: tuple[tuple[str, Any], ...], seed: int = 0) -> Any:
    return _gym().create_dataset(name, seed=seed, size=1, **dict(options))


def _gym() -> ModuleType:
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("this task needs the package reasoning-gym: pip install 'loam[rl]'") from None
