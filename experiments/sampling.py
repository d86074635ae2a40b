"""Loads a run's newest checkpoint and continues prompts with it (`loam sample`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from data.tokenizer import load_tokenizer
from experiments.config import build
from inference.generate import generate
from inference.sampling import Sampling
from model.params import abstract_params, param_specs
from train.checkpoint import Checkpoints
from train.config import TrainConfig, check


def sample_run(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(prompt, continuation) for each prompt; the moving average of the weights if the run keeps one.

    Raises:
      ValueError, FileNotFoundError: the directory is not that of a run, has no checkpoint, or a sampling option is off limits.
    """
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    run_dir = Path(arguments.run_dir)
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir} is not the directory of a run (it has no config.json): give one under runs/")
    config = build(TrainConfig, json.loads((run_dir / "config.json").read_text()))
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    name = "ema" if config.optimizer.ema_decay else "params"
    abstract = {name: abstract_params(param_specs(config.model))}
    checkpoints = Checkpoints(str(run_dir / "checkpoints"), keep=None)
    if arguments.step >= 0:
        steps = checkpoints.steps()
        check(arguments.step in steps, f"{run_dir} has no checkpoint of step {arguments.step}; there are {steps}")
        state, _ = checkpoints.restore(arguments.step, abstract, partial=True)
    else:
        restored = checkpoints.restore_newest(abstract, print, partial=True)
        if restored is None:
            raise FileNotFoundError(f"{run_dir} has no checkpoint yet: wait for the first, or run its config")
        state = restored[0]
    prompts = arguments.prompt or list(config.eval.sample_prompts) or ["The "]
    outputs = generate(
        state[name],
        config.model,
        [tokenizer.encode_prompt(prompt) for prompt in prompts],
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
        stop_ids=frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id}),
    )
    for prompt, tokens in zip(prompts, outputs, strict=True):
        yield prompt, tokenizer.decode(tokens)
