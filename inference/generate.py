"""Continues a few prompts with an engine of their own, for `loam sample` and samples during training."""

from __future__ import annotations

from collections.abc import Sequence

from inference.config import EngineConfig
from inference.engine import Engine
from inference.models import LoadedModel
from inference.request import Request
from inference.sampling import Sampling, derived_seed
from inference.speculate import guesser
from model.config import CacheDType, ModelConfig, check
from model.params import Params


def generate(
    params: Params,
    model: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    vocab_size: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    cache_dtype: CacheDType = "model",
    num_guesses: int = 0,
    draft: LoadedModel | None = None,
) -> list[list[int]]:
    """The answer to each prompt; it depends on the prompt, its place and the seed. On several processes all make this call.

    Args:
      num_guesses, draft: for speculative decoding, see `inference.speculate.guesser`.

    Raises:
      ValueError: see `Request`, `Engine.submit` and `guesser`.
    """
    requests = [
        Request(prompt, sampling, max_tokens=max_tokens, stop_ids=stop_ids, seed=derived_seed("prompt", seed, i))
        for i, prompt in enumerate(prompts)
    ]
    check(bool(requests), "a prompt needs at least one token: give some text, or a <bos> token")
    page_size = EngineConfig.page_size
    pages = sum(-(-(len(prompt) + max_tokens) // page_size) for prompt in prompts)
    vocab_size = model.vocab_size if vocab_size is None else vocab_size
    config = EngineConfig(
        max_batch=len(requests), cache_tokens=pages * page_size, num_guesses=num_guesses, cache_dtype=cache_dtype
    )
    engine = Engine(params, model, config, vocab_size=vocab_size, guess=guesser(config, vocab_size, draft))
    return [[token.token for token in answer] for (answer,) in engine.generate(requests)]
