"""Does the engine give what the trainer computes (`loam parity`)? Samples are drawn from a model; after each of their tokens
log-probabilities of the whole vocabulary, by the programs that decode, are compared with those of the forward that trains.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from experiments.sampling import open_any
from inference.engine import Engine, EngineConfig, Request
from inference.parity import parity
from model.config import check


def compare(arguments: argparse.Namespace) -> None:
    """Prints the differences and one line of JSON.

    Raises:
      ValueError, FileNotFoundError: see `open_any`; samples that do not fit the context.
    """
    samples, new = arguments.samples, arguments.tokens
    check(samples > 0 and new > 0, f"--samples={samples} and --tokens={new} must be positive")
    loaded = open_any(arguments.source)
    prompt = loaded.tokenizer.encode_prompt(arguments.prompt)
    config = dataclasses.replace(loaded.config, dtype=arguments.dtype)
    check(
        len(prompt) + new < config.max_seq_len,
        f"a prompt of {len(prompt)} tokens, --tokens={new} and one after them exceed the context of {config.max_seq_len}",
    )
    pages = samples * (-(-(len(prompt) + new) // EngineConfig.page_size) + 1)
    settings = EngineConfig(max_batch=samples, cache_tokens=pages * EngineConfig.page_size)
    engine = Engine(loaded.params, config, settings, vocab_size=loaded.tokenizer.vocab_size)
    (answers,) = engine.generate([Request(prompt, num_samples=samples, max_tokens=new, seed=arguments.seed)])
    rows = [[*prompt, *(token.token for token in answer)] for answer in answers]
    found = parity(engine, rows, len(prompt) - 1)
    print(f"{loaded.name}, activations in {config.dtype}: {samples} samples of {new} tokens")
    print("|engine - trainer|, nats       largest        mean")
    print(f"of the whole vocabulary    {found.largest:11.3g} {found.mean:11.3g}")
    print(f"of the tokens drawn        {found.drawn_largest:11.3g} {found.drawn_mean:11.3g}")
    facts = {"benchmark": "parity", "model": loaded.name, "dtype": config.dtype, "samples": samples, "tokens": new}
    print(json.dumps(facts | dataclasses.asdict(found)))
