"""How fast a model is decoded here (`loam bench-infer`): time to the first token, time per token, throughput by batch size, and
the shares of what the machine can do: of the memory's bandwidth when every step reads all weights, of its matmuls in a prefill.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np

from experiments.sampling import open_draft, open_to_decode
from inference.config import EngineConfig
from inference.engine import Engine
from inference.request import Request
from inference.sampling import Sampling
from inference.speculate import DraftModel, guesser
from model.chips import chip_of
from model.config import ModelConfig, check
from model.flops import forward_flops_per_token
from model.params import Params, unstack_layers
from model.xla import num_cores
from train.peak import peak_flops

_GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one batch size.

    Attributes:
      first_token_seconds: of a whole batch's prompts, up to the first token of each.
      token_seconds: of a token of each row, by steps that give every row one or, where guesses are right, more; others, while
        rows begin and end, are not counted.
      tokens_per_second: of all rows.
      bandwidth_share: bytes of weights (of a draft model none), as they are kept, per second, over what the memory gives; a CPU
        unpacks int4, and reads and writes more.
      accepted_share: of the tokens that were guessed, those that stand; None if none were guessed.
    """

    batch: int
    first_token_seconds: float
    token_seconds: float
    tokens_per_second: float
    bandwidth_share: float
    accepted_share: float | None


def read_bandwidth(megabytes: int = 256, num_devices: int = 1) -> float:
    """Bytes a second: of so many TPUs' data sheet, or what threads read together that each sum an array of their own."""
    chip = chip_of(jax.devices()[0].device_kind)
    if chip:
        return chip.hbm_bandwidth * num_devices
    threads = num_cores()
    arrays = [np.ones(megabytes << 18, np.float32) for _ in range(threads)]
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(np.sum, arrays))
            best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - start))
    return best


def weight_bytes(params: Params, config: ModelConfig) -> int:
    """Bytes of the weights that a step needs, as they are kept: all but a table that tokens are only looked up in."""
    leaves = dict(params)
    if not config.tie_embeddings:
        del leaves["embedding"]
    leaves.pop("position_embedding", None)
    bits = {"int4": 4}
    return sum(leaf.size * bits.get(str(leaf.dtype), leaf.dtype.itemsize * 8) // 8 for leaf in jax.tree.leaves(leaves))


def measure(engine: Engine, batch: int, prompt: int, new: int, bandwidth: float) -> Measured:
    """One batch of random prompts, from the first token until `new` steps have given each row one, or more by guesses."""
    rng = np.random.default_rng(batch)
    most = most_tokens(engine.config.num_guesses, batch, new)
    for row in rng.integers(0, engine.vocab_size, (batch, prompt)).tolist():
        engine.submit(Request(row, _GREEDY, max_tokens=most))
    start = time.perf_counter()
    first, num_tokens = 0.0, 0
    begun: set[int] = set()
    steps: list[float] = []
    while engine.has_work and len(steps) < new:
        before, all_begun = time.perf_counter(), len(begun) == batch
        tokens = engine.step()
        after = time.perf_counter()
        given = {token.request for token in tokens}
        if all_begun and len(given) == batch:
            steps.append(after - before)
            num_tokens += len(tokens)
        begun |= given
        if not all_begun and len(begun) == batch:
            first = after - start
    tokens_per_second = num_tokens / sum(steps)
    reads = weight_bytes(engine.params, engine.model) * len(steps) / sum(steps)
    accepted = engine.stats.guessed_right / engine.stats.guessed if engine.stats.guessed else None
    return Measured(batch, first, batch / tokens_per_second, tokens_per_second, reads / bandwidth, accepted)


def most_tokens(num_guesses: int, batch: int, new: int) -> int:
    """Of an answer: a step begins one prompt, in which the rows before it go on, and none may end before the last has begun and
    had its share."""
    return (new + batch) * (1 + num_guesses)


def bench(arguments: argparse.Namespace) -> None:
    """Prints a table and one line of JSON.

    Raises:
      ValueError, FileNotFoundError: see `open_to_decode` and `open_draft`; numbers that leave nothing to measure.
    """
    batches = sorted({int(size) for size in arguments.batch_sizes.split(",")})
    check(batches[0] > 0, f"--batch-sizes={arguments.batch_sizes} must be positive")
    check(arguments.prompt_tokens > 1 and arguments.new_tokens > 1, "--prompt-tokens and --new-tokens must be at least 2")
    draft = open_draft(arguments)
    loaded = open_to_decode(arguments)
    params, config = unstack_layers(loaded.params, loaded.config)
    prompt, new = arguments.prompt_tokens, arguments.new_tokens
    bandwidth = read_bandwidth(num_devices=arguments.tensor)
    results = []
    for batch in batches:
        page_size = EngineConfig.page_size
        pages = (-(-(prompt + most_tokens(arguments.guesses, batch, new)) // page_size) + 1) * batch
        settings = EngineConfig(
            max_batch=batch,
            cache_tokens=pages * page_size,
            prefill_chunk=prompt,
            num_guesses=arguments.guesses,
            cache_dtype=arguments.cache_dtype,
        )
        vocab_size = loaded.tokenizer.vocab_size
        guess = guesser(settings, vocab_size, draft)
        engine = Engine(params, config, settings, vocab_size=vocab_size, guess=guess)
        engine.warm_up()
        if isinstance(guess, DraftModel):
            guess.warm_up()
        results.append(measure(engine, batch, prompt, new, bandwidth))
    one = results[0]
    head_flops = 2 * config.d_model * config.vocab_size  # of a prompt's last token alone
    prefill_flops = one.batch * (prompt * (forward_flops_per_token(config, prompt) - head_flops) + head_flops)
    prefill_share = prefill_flops / one.first_token_seconds / peak_flops(jax.devices()[: arguments.tensor], config.dtype)
    print(f"{loaded.name}: {jax.devices()[0].device_kind}, memory {bandwidth / 1e9:.1f} GB/s")
    print(f"{'batch':>5} {'first token':>12} {'per token':>12} {'tokens/s':>10} {'of bandwidth':>13} {'accepted':>9}")
    for row in results:
        accepted = "-" if row.accepted_share is None else f"{row.accepted_share:.1%}"
        print(
            f"{row.batch:>5} {row.first_token_seconds * 1e3:>9.0f} ms {row.token_seconds * 1e3:>9.1f} ms "
            f"{row.tokens_per_second:>10.1f} {row.bandwidth_share:>13.1%} {accepted:>9}"
        )
    summary: dict[str, Any] = {
        "benchmark": "bench-infer",
        "model": loaded.name,
        "dtype": config.dtype,
        "weights": arguments.weights or config.param_dtype,
        "cache_dtype": arguments.cache_dtype,
        "guesses": arguments.guesses,
        "draft": draft.name if draft else None,
        "tensor": arguments.tensor,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "bandwidth_bytes_per_second": bandwidth,
        "prefill_share_of_matmul_peak": prefill_share,
        "batches": [dataclasses.asdict(row) for row in results],
    }
    print(json.dumps(summary))
