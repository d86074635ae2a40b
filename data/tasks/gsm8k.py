"""Grade-school mathematics in words (Cobbe et al. 2021, arXiv:2110.14168), from local files."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from data.permutation import permute
from data.tasks.answers import AnswerFormat, parse_number, wrap
from data.tasks.task import RIGHT, WRONG, Example, Score, Split, Task, check_place

_ORIGIN = "https://github.com/openai/grade-school-math (grade_school_math/data)"


@dataclasses.dataclass(frozen=True)
class Gsm8k(Task):
    """Every question of a split occurs once before any occurs again, in an order that the seed gives.

    Numbers are compared by value: "$1,234.50" is 1234.5. Questions of the training file that occur in the other are an error.

    Attributes:
      train_path, eval_path: JSONL files with `question` and `answer`, the answer's last line "#### number".
      answer_format: `hashes` as in the data; `boxed`; `last_number` for models that were not told a format.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("question",)
    template: str = "Question: {question}\nAnswer:"
    answer_format: AnswerFormat = "hashes"
    train_path: str = ""
    eval_path: str = ""

    def validate(self) -> None:
        if not self.train_path and not self.eval_path:
            raise ValueError(f"Gsm8k: train_path or eval_path is needed, a JSONL file from {_ORIGIN}")
        both = {question for question, _ in _read(self.train_path)} & {question for question, _ in _read(self.eval_path)}
        if both:
            raise ValueError(
                f"Gsm8k: {len(both)} questions of {self.eval_path} are in {self.train_path} too, as {sorted(both)[0][:80]!r}"
            )

    def files(self) -> tuple[str, ...]:
        return tuple(path for path in (self.train_path, self.eval_path) if path)

    def draw(self, rng: random.Random) -> Example:
        raise NotImplementedError("questions come from files: see example")

    def example(self, index: int, seed: int, split: Split = "train") -> Example:
        check_place(index, split)
        path = self.train_path if split == "train" else self.eval_path
        if not path:
            raise ValueError(f"Gsm8k.{split}_path is not set, so there are no examples of split {split!r}")
        rows = _read(path)
        epoch, position = divmod(index, len(rows))
        question, work = rows[int(permute(np.array([position]), len(rows), f"gsm8k/{seed}/{epoch}")[0])]
        work, _, answer = work.rpartition("####")
        metadata = {"work": re.sub(r"<<[^<>]*>>", "", work).strip()}  # without the calculator's annotations
        return Example(self.template.format(question=question), answer.strip().replace(",", ""), question, metadata)

    def judge(self, answer: str, example: Example) -> Score:
        number = parse_number(answer)
        if number is None:
            return Score(0.0, "not a number")
        return RIGHT if number == parse_number(example.answer) else WRONG

    def solution(self, example: Example) -> str:
        return wrap(example.answer, self.answer_format, work=example.metadata["work"])


@functools.lru_cache(maxsize=4)
def _read(path: str) -> tuple[tuple[str, str], ...]:
    """(question, answer with its work) of each line; nothing for no path."""
    if not path:
        return ()
    if not Path(path).is_file():
        raise FileNotFoundError(f"Gsm8k: {path} is not there; get it from {_ORIGIN}")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            question, answer = row["question"].strip(), row["answer"]
            if not question or parse_number(answer.rpartition("####")[2]) is None:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{path}:{number}: a JSON object with "question" and "answer", ended by "#### number", is needed'
            ) from None
        rows.append((question, answer))
    if not rows:
        raise ValueError(f"{path} is empty")
    return tuple(rows)
