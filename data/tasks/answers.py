"""Finding the answer in a completion, strictly: what is not clearly one answer is none.

A reward is exploited where it is lenient. So two answers are refused even if one is right, text after the answer is refused,
and digits are ASCII digits (`int("٤")` is 4, an answer of "٤" is wrong).
"""

from __future__ import annotations

import re
from typing import Literal

AnswerFormat = Literal["bare", "hashes", "boxed", "tags", "last_number"]
SPACE = " \t\r\n"
MAX_CHARACTERS = 100_000

_NUMBER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
_NUMBERS = re.compile(rf"(?<![\w.,]){_NUMBER}(?![\w]|[.,][0-9])")


def extract(completion: str, answer_format: AnswerFormat) -> tuple[str | None, str]:
    """The answer without surrounding white space, or None and why there is none.

    Formats:
      bare: the whole completion.
      hashes: the rest of the line after the only `####`; nothing may follow that line.
      boxed: the braces of the only `\\boxed{...}`; only dollar signs, stops and closing brackets of mathematics may follow.
      tags: between the only `<answer>` and `</answer>`; nothing may follow.
      last_number: the last number that stands by itself, wherever it is: lenient, for models that were not told a format.

    Reasons: "no answer", "two answers", "unclosed answer", "text after the answer", "completion too long".
    """
    if len(completion) > MAX_CHARACTERS:
        return None, "completion too long"
    found, after = completion, ""
    if answer_format == "last_number":
        numbers = _NUMBERS.findall(completion)
        found = numbers[-1] if numbers else ""
    elif answer_format != "bare":
        marker = {"hashes": "####", "boxed": "\\boxed{", "tags": "<answer>"}[answer_format]
        before, _, found = completion.partition(marker)
        if before == completion:
            return None, "no answer"
        if marker in found:
            return None, "two answers"
        if answer_format == "hashes":
            found, _, after = found.lstrip(" \t").partition("\n")
        elif answer_format == "tags":
            found, end, after = found.partition("</answer>")
            if not end:
                return None, "unclosed answer"
        else:
            end = _closing_brace(found)
            if end is None:
                return None, "unclosed answer"
            found, after = found[:end], re.sub(r"\\[\])]|[$.]", "", found[end + 1 :])
    if after.strip(SPACE):
        return None, "text after the answer"
    found = found.strip(SPACE)
    return (found, "") if found else (None, "no answer")


def wrap(answer: str, answer_format: AnswerFormat, work: str = "") -> str:
    """A completion that gives `answer` after `work`, as `extract` finds it."""
    if answer_format == "bare":
        if work:
            raise ValueError("answer_format='bare' has no place for work before the answer")
        return answer
    marked = {"hashes": "#### {}", "boxed": "\\boxed{{{}}}", "tags": "<answer>{}</answer>", "last_number": "{}"}[answer_format]
    return "\n".join(part for part in (work, marked.format(answer)) if part)


def parse_number(text: str) -> str | None:
    """The canonical decimal of "$1,234.50" ("1234.5"), or None: one ASCII number with its dollar or percent sign and a stop."""
    matched = re.fullmatch(rf"(-?)\$?[ ]?({_NUMBER})[ ]?[%$]?\.?", text.strip(SPACE))
    if not matched:
        return None
    sign, number = matched.groups()
    if sign and number[0] in "+-":
        return None
    negative = bool(sign) or number[0] == "-"
    whole, _, fraction = number.lstrip("+-").replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    canonical = f"{whole}.{fraction}" if fraction else whole
    return f"-{canonical}" if negative and canonical != "0" else canonical


def _closing_brace(text: str) -> int | None:
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return position
    return None
