"""How much two short texts have in common: ROUGE-L (Lin 2004), by which new instructions are told from known ones."""

from __future__ import annotations

import re
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, of any script. Where a script has no spaces, as Chinese, all between two marks
    is one word: there only whole phrases are alike."""
    return re.findall(r"[^\W_]+", text.lower())


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest sequence that is in both in order, not necessarily in one piece."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]; 0 where one has none."""
    return 2 * common_subsequence(a, b) / (len(a) + len(b)) if a and b else 0.0
