"""Write a text that meets constraints which a program can check: a word it must contain, how many words, how it ends
(the idea of IFEval, Zhou et al. 2023, arXiv:2311.07911; the constraints are our own)."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any, ClassVar

from data.tasks.answers import wrap
from data.tasks.task import RIGHT, Example, Score, Task, check_range

_NOUNS = (
    "apple ball bear bird boat book box bread cake cat chair cloud cow dog door duck egg fish flower forest friend frog garden "
    "girl grass hat hill horse house kite lake lamp leaf lion moon mouse nest owl park pig rain river road sea sheep ship shoe "
    "sky snow star stone sun table train tree truck water wind window"
)
_PHRASES = {
    "contains": 'contains the word "{}"',
    "starts": 'starts with the word "{}"',
    "min_words": "has at least {} words",
    "max_words": "has at most {} words",
    "ends": 'ends with "{}"',
    "lowercase": "has no capital letters",
    "no_commas": "has no commas",
    "sentences": "has exactly {} sentences, each ended by a full stop",
}


@dataclasses.dataclass(frozen=True)
class Constraints(Task):
    """The reward is 1 if all constraints are met, otherwise 0, and the reason names the first that is not.

    Attributes:
      words: what `contains` and `starts` ask for, of ASCII letters in lower case.
      max_constraints: how many are asked at most, besides the longest length, which always is.
      max_words: the largest longest length.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("constraints",)
    template: str = "Write a text that {constraints}.\n"
    words: tuple[str, ...] = tuple(_NOUNS.split())
    max_constraints: int = 3
    max_words: int = 20

    def validate(self) -> None:
        if len(set(self.words)) < 2 or not all(re.fullmatch("[a-z]+", word) for word in self.words):
            raise ValueError("Constraints.words needs two different words, of letters a to z alone")
        check_range(self, "max_constraints", "max_constraints", least=1)
        if self.max_words < 8:
            raise ValueError(f"Constraints.max_words={self.max_words} must be at least 8, or constraints exclude each other")

    def draw(self, rng: random.Random) -> Example:
        longest = rng.randint(8, self.max_words)
        values: dict[str, Any] = {
            "contains": rng.choice(self.words),
            "starts": rng.choice(self.words),
            "min_words": rng.randint(2, longest),
            "ends": rng.choice(".!?"),
            "lowercase": True,
            "no_commas": True,
            "sentences": rng.randint(1, 3),
        }
        kinds = rng.sample(sorted(values), k=min(rng.randint(1, self.max_constraints), len(values)))
        if "sentences" in kinds and "ends" in kinds:
            kinds.remove("ends")  # sentences end by a full stop already
        chosen = {kind: values[kind] for kind in kinds} | {"max_words": longest}
        phrases = [_PHRASES[kind].format(value) for kind, value in chosen.items()]
        problem = "; ".join(sorted(phrases))
        return Example(self.template.format(constraints=", ".join(phrases)), _obedient_text(chosen), problem, chosen)

    def judge(self, answer: str, example: Example) -> Score:
        for kind, value in example.metadata.items():
            if not _meets(answer, kind, value):
                return Score(0.0, f"constraint not met: {kind}")
        return RIGHT

    def solution(self, example: Example) -> str:
        """Meets the constraints, and says nothing: for tests, not for a warm start of a model that is to write well."""
        return wrap(example.answer, self.answer_format)


def _words(text: str) -> list[str]:
    """Runs of letters, digits and apostrophes, in any script."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text)


def _meets(text: str, kind: str, value: Any) -> bool:
    words = [word.lower() for word in _words(text)]
    sentences = text.rstrip().split(".")
    return {
        "contains": lambda: value in words,
        "starts": lambda: words[:1] == [value],
        "min_words": lambda: len(words) >= value,
        "max_words": lambda: 0 < len(words) <= value,
        "ends": lambda: text.rstrip().endswith(value),
        "lowercase": lambda: text == text.lower(),
        "no_commas": lambda: not re.search("[,،、，]", text),
        "sentences": lambda: sentences[-1] == "" and len(sentences) - 1 == value and all(_words(s) for s in sentences[:-1]),
    }[kind]()


def _obedient_text(constraints: dict[str, Any]) -> str:
    words = [constraints[kind] for kind in ("starts", "contains") if kind in constraints]
    sentences = constraints.get("sentences", 1)
    # The least number of words that is allowed: the longest length is at least 8, more than any of these needs.
    words += ["and", "so", "on"] * constraints["max_words"]
    words = words[: max(constraints.get("min_words", 3), 3)]
    breaks = [f"{word}." for word in words[: sentences - 1]]
    return " ".join(breaks + words[sentences - 1 :]) + constraints.get("ends", ".")
