"""Best of n and rejection sampling: which of the answers to a prompt are kept."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

from train.synthesis.config import BestOfConfig
from train.synthesis.writer import Answer


def select(
    config: BestOfConfig, prompt: Any, answers: Sequence[Answer], scores: Sequence[float]
) -> tuple[list[dict[str, Any]], collections.Counter[str]]:
    """Rows of a data set, and how many answers were left out for what.

    An answer that was cut off teaches not to end, and is never kept; nor is one with tokens that are no text, or whose score is
    not finite, nor the same text twice. Of equal scores the first counts.

    Args:
      prompt: as it is to stand in the rows.
      scores: of the answers; all are 0 where nothing is judged.
    """
    counts: collections.Counter[str] = collections.Counter(answers=len(answers))
    found: dict[str, float] = {}
    for answer, score in zip(answers, scores, strict=True):
        if not answer.complete:
            counts["truncated"] += 1
        elif answer.no_text:
            counts["no_text"] += 1
        elif not answer.text.strip():
            counts["empty"] += 1
        elif not math.isfinite(score):
            counts["unjudged"] += 1
        elif answer.text in found:
            counts["duplicate"] += 1
        else:
            found[answer.text] = score
    if config.min_score is not None and config.keep != "pairs":
        counts["below_min_score"] = sum(score < config.min_score for score in found.values())
        found = {text: score for text, score in found.items() if score >= config.min_score}
    ranked = sorted(found.items(), key=lambda item: -item[1])
    if config.keep == "pairs":
        if not ranked or ranked[0][1] == ranked[-1][1] or (config.min_score is not None and ranked[0][1] < config.min_score):
            counts["prompts_without_a_pair"] += 1
            return [], counts
        (chosen, high), (rejected, low) = ranked[0], min(ranked, key=lambda item: item[1])
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "score_chosen": high, "score_rejected": low}
        return [row], counts
    kept = ranked[: 1 if config.keep == "best" else config.max_kept]
    if not kept:
        counts["prompts_without_an_answer"] += 1
    return [{"prompt": prompt, "completion": text, "score": score} for text, score in kept], counts
