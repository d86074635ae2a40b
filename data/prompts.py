"""Prompts for reinforcement learning: step -> prompts, in the same pseudo-random order as all other data (`data/loader.py`)."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.chat import Message


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """Attributes:
    ids: int32 [num_tokens], up to where the assistant is to answer.
    info: what the row said beside the prompt, for the verifier.
    row: which of its source's prompts it is.
    """

    ids: np.ndarray
    messages: Sequence[Message]
    info: Mapping[str, Any]
    row: int


class PromptRows:
    """The prompts of one split of one source. Picklable."""

    def __init__(self, path: Path):
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> EncodedPrompt:
        prompt = json.loads(self._lines[row])
        return EncodedPrompt(np.array(prompt["ids"], np.int32), prompt["messages"], prompt["info"], row)

    @functools.cached_property
    def _lines(self) -> list[str]:
        # Not splitlines(): a JSON text may hold U+2028.
        return self.path.read_text(encoding="utf-8").split("\n")[:-1]
