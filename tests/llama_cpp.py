"""Answers of llama.cpp, through the binding `xllamacpp`."""

from __future__ import annotations

import dataclasses
import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


@dataclasses.dataclass(frozen=True)
class Answer:
    """What llama.cpp found likeliest, one token after the other.

    Attributes:
      text: without the token that ended it, if one did.
      logprobs: per token, those of the likeliest tokens in its place.
    """

    text: str
    tokens: list[int]
    logprobs: list[dict[int, float]]


class LlamaCpp:
    def __init__(self, server) -> None:
        self._server = server

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are none, without <bos>."""
        asked = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", asked, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    def greedy(self, prompt: str | Sequence[int], max_tokens: int, top: int = 1) -> Answer:
        """Up to `max_tokens` tokens after a text, in which special tokens may stand, or after token ids."""
        asked = {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "logprobs": top, "cache_prompt": False}
        (choice,) = self._server.handle_completions(asked)["choices"]
        places = choice["logprobs"]["content"]
        logprobs = [{each["id"]: each["logprob"] for each in place["top_logprobs"]} for place in places]
        return Answer(choice["text"], [place["id"] for place in places], logprobs)


@contextmanager
def open_llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    """A model in llama.cpp, on one core, which keeps keys and values in float32; skips the test where there is none."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="the extra `bench` has it")
    asked = xllamacpp.CommonParams()
    asked.model.path = str(path)
    asked.n_ctx, asked.n_parallel, asked.n_gpu_layers, asked.fit_params = 256, 1, 0, False
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked.warmup, asked.verbosity = False, -1
    server = xllamacpp.Server(asked)
    yield LlamaCpp(server)
    del server
