"""Multiple choice by likelihood, as lm-evaluation-harness scores it: the answer that is the most probable after the question.

The tokens of an answer are those that follow the question's own in the whole text, so that both are split as one. Of equals the
first wins. Lengths are characters of the answer, not tokens, and without the space before it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer
from inference.score import Scorer
from model.config import check


@dataclasses.dataclass(frozen=True)
class Question:
    """Attributes:
    prompt: what stands before an answer and the space that parts them.
    right: place of the right one among the choices.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int

    def __post_init__(self) -> None:
        check(bool(self.prompt.strip()), "a question without text: its answers would have nothing before them")
        check(0 <= self.right < len(self.choices), f"the right answer is {self.right}, of {len(self.choices)} choices")
        check(all(self.choices), f"a choice of {self.prompt!r} is empty")


def read_questions(path: str | Path, limit: int) -> list[Question]:
    """The first of a file of lines {"query", "choices", "gold"}, the query without its "Answer:".

    Raises:
      ValueError: a line is not such a thing; the message names it.
    """
    questions = []
    with open(path) as file:
        for number, line in zip(range(1, limit + 1), file, strict=False):
            try:
                read = json.loads(line)
                query = read["query"].rstrip("\n")
                questions.append(Question(f"{query}\nAnswer:", tuple(read["choices"]), read["gold"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                wanted = '{"query": text, "choices": [text, ...], "gold": place of the right one}'
                raise ValueError(f"{path}, line {number}: expected {wanted} ({type(error).__name__}: {error})") from error
    return questions


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of the whole, and how many of the last are the continuation's. Spaces that end the context belong to it."""
    stem = context.rstrip()
    whole = tokenizer.encode_prompt(context + continuation)
    return whole, len(whole) - len(tokenizer.encode_prompt(stem))


def choice_logprobs(tokenizer: Tokenizer, scorer: Scorer, questions: Sequence[Question]) -> list[np.ndarray]:
    """float64 [choices] for each question: log-probabilities, nats, of the choices after its prompt.

    Raises:
      ValueError: see `score`.
    """
    pairs = [encode_pair(tokenizer, question.prompt, f" {choice}") for question in questions for choice in question.choices]
    sums = np.zeros(len(pairs))
    for i, scores in scorer([tokens for tokens, _ in pairs]):
        sums[i] = scores.logprobs[-pairs[i][1] :].astype(np.float64).sum()
    ends = np.cumsum([len(question.choices) for question in questions])
    return np.split(sums, ends[:-1])


def chosen(questions: Sequence[Question], logprobs: Sequence[np.ndarray], *, per_character: bool = False) -> np.ndarray:
    """int [questions]: the choice that the model takes, by its log-probability or by that over its characters."""
    lengths = [[len(choice) if per_character else 1 for choice in question.choices] for question in questions]
    return np.array([np.argmax(values / length) for values, length in zip(logprobs, lengths, strict=True)])


def accuracy(questions: Sequence[Question], logprobs: Sequence[np.ndarray], *, per_character: bool = False) -> float:
    """Share of the questions that are answered right."""
    right = [question.right for question in questions]
    return float(np.mean(chosen(questions, logprobs, per_character=per_character) == right))
