"""Loads a run's newest checkpoint and continues prompts with it (`loam sample`), or writes it for others (`loam convert`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from data.tokenizer import Tokenizer, load_tokenizer
from experiments.config import build
from inference.generate import generate
from inference.sampling import Sampling
from model.convert.huggingface import save
from model.params import Params, abstract_params, param_specs
from train.checkpoint import Checkpoints
from train.config import TrainConfig, check


def open_run(run_dir: Path, step: int) -> tuple[TrainConfig, Tokenizer, Params]:
    """The config, tokenizer and weights of a run; the moving average of the weights if it keeps one.

    Args:
      step: of the checkpoint; below 0 the newest.

    Raises:
      ValueError, FileNotFoundError: the directory is not that of a run, or has no such checkpoint.
    """
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir} is not the directory of a run (it has no config.json): give one under runs/")
    config = build(TrainConfig, json.loads((run_dir / "config.json").read_text()))
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    name = "ema" if config.optimizer.ema_decay else "params"
    abstract = {name: abstract_params(param_specs(config.model))}
    checkpoints = Checkpoints(str(run_dir / "checkpoints"), keep=None)
    if step >= 0:
        steps = checkpoints.steps()
        check(step in steps, f"{run_dir} has no checkpoint of step {step}; there are {steps}")
        state, _ = checkpoints.restore(step, abstract, partial=True)
    else:
        restored = checkpoints.restore_newest(abstract, print, partial=True)
        if restored is None:
            raise FileNotFoundError(f"{run_dir} has no checkpoint yet: wait for the first, or run its config")
        state = restored[0]
    return config, tokenizer, state[name]


def convert_run(arguments: argparse.Namespace) -> None:
    """Writes a run's weights as a Hugging Face checkpoint.

    Raises:
      ValueError, FileNotFoundError: as `open_run`, or no family has words for the model, or the target is not empty.
    """
    config, tokenizer, params = open_run(Path(arguments.run_dir), arguments.step)
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    save(arguments.target, params, config.model, arguments.family, settings=special)


def sample_run(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(prompt, continuation) for each prompt.

    Raises:
      ValueError, FileNotFoundError: as `open_run`, or a sampling option is off limits.
    """
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    config, tokenizer, params = open_run(Path(arguments.run_dir), arguments.step)
    prompts = arguments.prompt or list(config.eval.sample_prompts) or ["The "]
    outputs = generate(
        params,
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
