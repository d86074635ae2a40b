"""New instructions like known ones (self-instruct, arXiv:2212.10560): written by the model after a few examples, filtered, and
answered by it.

Deviations: 1. one instruction is written at a time, after a list of examples, so none is cut off by the next; 2. examples are
drawn from seeds and kept ones alike; 3. answers are written to the bare instruction.
"""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Sequence
from typing import Any

from data.chat import Message
from data.overlap import rouge_l, words
from data.tokenizer import NO_TEXT
from train.synthesis.config import InstructionConfig
from train.synthesis.writer import Answer, Write


def write_instructions(
    config: InstructionConfig,
    seeds: Sequence[str],
    known: Sequence[str],
    round_number: int,
    batch: int,
    seed: int,
    write: Write,
) -> tuple[list[dict[str, Any]], collections.Counter[str]]:
    """Rows with `prompt` and `completion` of one round, and how many new instructions were left out for what.

    Args:
      seeds, known: those given, and those that earlier rounds kept.
      round_number: of which, with the seed and what is known, the examples that are shown are a function.
    """
    counts: collections.Counter[str] = collections.Counter(written=batch)
    pool = [*seeds, *known]
    numbers = range(round_number * batch, (round_number + 1) * batch)
    asked = [_asks(pool, config.shown, random.Random(f"{seed}/examples/{number}")) for number in numbers]
    accepted: dict[int, str] = {}
    texts = [words(text) for text in pool]
    for number, answer in zip(numbers, write(asked, 0, numbers), strict=True):
        text = "" if answer is None else first_line(answer.text)
        why = "too_long" if answer is None else "truncated" if cut_off(answer) else refusal(config, text, texts)
        if not why and len(known) + len(accepted) >= config.number:
            why = "more_than_wanted"
        if why:
            counts[why] += 1
        else:
            accepted[number] = text
            texts.append(words(text))
    rows = []
    answers = write([[{"role": "user", "content": text}] for text in accepted.values()], 1, list(accepted))
    for text, answer in zip(accepted.values(), answers, strict=True):
        if answer is None or not answer.complete or not answer.text.strip():
            counts["unanswered"] += 1
        elif answer.no_text:
            counts["no_text"] += 1
        else:
            rows.append({"prompt": text, "completion": answer.text})
    return rows, counts


def _asks(pool: Sequence[str], shown: int, rng: random.Random) -> list[Message]:
    examples = rng.sample(list(pool), min(shown, len(pool)))
    lines = "".join(f"{i}. {' '.join(text.split())}\n" for i, text in enumerate(examples, start=1))
    return [{"role": "user", "content": f"A list of different tasks, one in each line.\n{lines}{len(examples) + 1}. "}]


def cut_off(answer: Answer) -> bool:
    """Whether the limit of tokens lies in the first line that says something."""
    return not answer.complete and "\n" not in answer.text.lstrip()


def first_line(text: str) -> str:
    """The first line that says something, without its number in a list."""
    line = next((line.strip() for line in text.split("\n") if line.strip()), "")
    return re.sub(r"^(?:\d+[.)]|[-*])\s+", "", line)


def refusal(config: InstructionConfig, text: str, known: Sequence[Sequence[str]]) -> str:
    """Why an instruction is not kept; "" if it is.

    Args:
      known: the words of the instructions that there are.
    """
    if NO_TEXT in text:
        return "no_text"
    found = words(text)
    if not config.min_words <= len(found) <= config.max_words:
        return "too_few_words" if len(found) < config.min_words else "too_many_words"
    if not text[0].isalnum():
        return "no_sentence"
    if set(found) & {word.lower() for word in config.forbidden}:
        return "forbidden"
    if any(rouge_l(found, other) >= config.max_similarity for other in known):
        return "similar"
    return ""
