"""Constitutional AI (arXiv:2212.08073): the model criticises its answer by a principle, revises it, and says which is better.

The result are pairs for DPO and for reward models. Deviations: 1. the preference is the mean over both orders of the two
answers, since models favour a place; 2. pairs that are not clear are left out, instead of kept with their probability.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.chat import Message
from train.synthesis.config import CritiqueConfig, Principle
from train.synthesis.writer import Answer, Weigh, Write

_REPLIES = ("A", "B")


def criticise(
    config: CritiqueConfig, prompts: Sequence[Sequence[Message]], first: int, seed: int, write: Write, weigh: Weigh
) -> tuple[list[dict[str, Any]], collections.Counter[str]]:
    """Rows with `prompt`, `chosen`, `rejected`, and how many prompts were left out for what.

    Args:
      first: number of the first prompt, of which with the seed its principles are a function.
    """
    counts: collections.Counter[str] = collections.Counter(prompts=len(prompts))
    open_ones = dict(enumerate(prompts))  # by place, while nothing went wrong

    def answered(conversations: dict[int, list[Message]], stage: int) -> dict[int, str]:
        """Complete answers of text; the others are counted, and their prompts left out."""
        answers = write(list(conversations.values()), stage, [first + place for place in conversations])
        kept = {}
        for place, answer in zip(conversations, answers, strict=True):
            if answer is None or (why := _fault(answer)):
                counts["too_long" if answer is None else why] += 1
                del open_ones[place]
            else:
                kept[place] = answer.text
        return kept

    originals = answered({place: list(prompt) for place, prompt in open_ones.items()}, 0)
    revised, used = dict(originals), {}
    for number in range(config.revisions):
        for place in open_ones:
            used[place] = random.Random(f"{seed}/principle/{first + place}/{number}").choice(config.principles)
        talks = {
            place: [*prompt, _says("assistant", revised[place]), _says("user", used[place].critique)]
            for place, prompt in open_ones.items()
        }
        critiques = answered(talks, 1 + 2 * number)
        talks = {
            place: [*talks[place], _says("assistant", critiques[place]), _says("user", used[place].revision)]
            for place in open_ones
        }
        revised |= answered(talks, 2 + 2 * number)
    rows = []
    preferred = _preferences(config, open_ones, originals, revised, used, weigh)
    for place, prompt in open_ones.items():
        before, after, p = originals[place], revised[place], preferred[place]
        if before == after:
            counts["unchanged"] += 1
        elif np.isnan(p):
            counts["too_long"] += 1
        elif 1 - config.min_preference < p < config.min_preference:
            counts["undecided"] += 1
        else:
            better = p > 0.5
            counts["revision_preferred" if better else "original_preferred"] += 1
            chosen, rejected = (after, before) if better else (before, after)
            row = {"prompt": list(prompt), "chosen": chosen, "rejected": rejected}
            rows.append(row | {"score_chosen": max(p, 1 - p), "score_rejected": min(p, 1 - p)})
    return rows, counts


def _fault(answer: Answer) -> str:
    """Why an answer cannot be used; "" if it can."""
    if not answer.complete:
        return "truncated"
    return "no_text" if answer.no_text else "" if answer.text.strip() else "empty"


def _preferences(
    config: CritiqueConfig,
    prompts: dict[int, Sequence[Message]],
    originals: dict[int, str],
    revised: dict[int, str],
    used: dict[int, Principle],
    weigh: Weigh,
) -> dict[int, float]:
    """Probability that the revision is better, 1 where nobody is asked, NaN where the question is too long."""
    if not config.min_preference or not prompts:
        return dict.fromkeys(prompts, 1.0)
    found = []
    for revision_first in (True, False):
        questions = []
        for place, prompt in prompts.items():
            pair = (revised[place], originals[place]) if revision_first else (originals[place], revised[place])
            questions.append([_says("user", _question(prompt, *pair, used[place].preference))])
        logprobs = weigh(questions, _REPLIES)
        of_first = 1 / (1 + np.exp(logprobs[:, 1] - logprobs[:, 0]))
        found.append(of_first if revision_first else 1 - of_first)
    return dict(zip(prompts, np.mean(found, axis=0).tolist(), strict=True))


def _question(prompt: Sequence[Message], a: str, b: str, asked: str) -> str:
    talk = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return f"A conversation:\n\n{talk}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\n{asked}\nReply with the letter A or B alone: "


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}
