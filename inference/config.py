"""The settings of a decode engine. No jax."""

from __future__ import annotations

import dataclasses

from model.config import CacheDType, check, check_choices


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Attributes:
    max_batch: sequences that are decoded at once.
    cache_tokens: tokens that the pages hold together, at least those of one request.
    page_size: tokens of a page, the unit in which sequences share and grow.
    prefill_chunk: tokens of prompts computed in a step, at most; running sequences wait for them.
    num_guesses: tokens of a sequence that a step may check beside the one it is at (speculative decoding); 0 is off.
    cache_dtype: of the pages: that of the `model`, or `int8` with a scale per token and head (`model/kernels/kv_pages.py`).
    """

    max_batch: int = 32
    cache_tokens: int = 16_384
    page_size: int = 64
    prefill_chunk: int = 512
    num_guesses: int = 0
    cache_dtype: CacheDType = "model"

    def __post_init__(self) -> None:
        check_choices("engine", self)
        for name in ("max_batch", "cache_tokens", "page_size", "prefill_chunk"):
            check(getattr(self, name) > 0, f"engine.{name}={getattr(self, name)} must be positive")
        check(self.num_guesses >= 0, f"engine.num_guesses={self.num_guesses} must not be negative (0 is off)")
        check(
            self.cache_tokens >= self.page_size,
            f"engine.cache_tokens={self.cache_tokens} is less than a page of engine.page_size={self.page_size}: raise it",
        )

    @property
    def num_pages(self) -> int:
        return self.cache_tokens // self.page_size
