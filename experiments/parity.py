"""Does the engine give what the trainer computes (`loam parity`)? Samples are drawn from a model, all at once. What was then
reported of their tokens, and log-probabilities of the whole vocabulary after each of them, by the programs that decode, a row
at a time, are compared with those of the trainer's update: its gradient's own forward pass, with stacked layers that are
recomputed and a loss in chunks. The engine's weights are of the activations' dtype, as by `loam sample --dtype`; the trainer's
are float32 and rounded where they are used. On a CPU a process that decodes multiplies matrices otherwise than one that trains
(`model/xla.py`), and so the trainer gets a process of its own.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sampling import is_run, open_any
from inference.config import EngineConfig
from inference.engine import Engine
from inference.models import describe_model
from inference.request import Request, Token
from model.config import DType, ModelConfig, check
from model.logprobs import token_logprobs
from model.params import Params
from model.transformer import forward, unembed
from model.xla import configure
from train.rl_step import score

Rows = Sequence[Sequence[int]]
CHUNK_TOKENS = 128  # of the trainer's loss


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """float32 [B, T, V] of the whole vocabulary and [B, T] of the tokens drawn; T is that of the longest answer."""

    everything: np.ndarray
    drawn: np.ndarray


@dataclasses.dataclass(frozen=True)
class Parity:
    """Absolute differences of log-probabilities, nats, over the whole vocabulary; `drawn` over the tokens drawn alone, each row
    decoded again by itself; `reported` over the same as the engine reported them when it drew them."""

    largest: float
    mean: float
    drawn_largest: float
    drawn_mean: float
    reported_largest: float
    reported_mean: float


def trainers_logprobs(params: Params, model: ModelConfig, rows: Rows, prompt: int, chunk_tokens: int) -> Logprobs:
    """What the trainer finds when it takes the gradient of a batch of these rows: the drawn tokens by the scorer of
    reinforcement learning, the others by the same forward pass and normaliser.

    Args:
      rows: token ids, of which `prompt` each were not drawn, and at least one was.
    """
    shape = (len(rows), max(map(len, rows)) - 1)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    for i, row in enumerate(rows):
        for array, values in ((tokens, row[:-1]), (targets, row[1:]), (segments, 1)):
            array[i, : len(row) - 1] = values
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    mask = (segments > 0) & (positions >= prompt - 1)
    host = {"tokens": tokens, "targets": targets, "segment_ids": segments, "positions": positions, "mask": mask}
    batch = {name: jnp.asarray(array) for name, array in host.items()}

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def update(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        scores = score(params, model, batch, 1.0, shape[1] - prompt + 1, chunk_tokens)
        hidden, _, _ = forward(params, model, batch["tokens"], batch["positions"], batch["segment_ids"])
        log_z = token_logprobs(params, model, hidden, batch["targets"], chunk_tokens).log_z
        everything = unembed(params, model, hidden) - log_z[..., None]
        return -jnp.sum(jnp.where(batch["mask"], scores.logprobs, 0)), (everything, scores.logprobs)

    _, found = update(params)
    return Logprobs(*(np.asarray(x)[:, prompt - 1 :] for x in found))


def parity(engine: Engine, prompt: Sequence[int], answers: Sequence[Sequence[Token]], trained: Logprobs) -> Parity:
    """How far the two are apart.

    Args:
      engine: one without work; what it holds of other prompts is left alone.
      prompt: token ids. All but the last are prefilled; the last, and answers, are decoded.
      answers: that this engine gave to the prompt.
      trained: of the prompt with each of them.
    """
    every, of_drawn, of_reported = [], [], []
    for answer, everything, drawn in zip(answers, trained.everything, trained.drawn, strict=True):
        tokens = np.array([token.token for token in answer])
        logits = engine.logits_along([*prompt, *tokens[:-1].tolist()], len(prompt) - 1)
        decoded = np.asarray(jax.nn.log_softmax(logits), np.float64)
        every.append(np.abs(decoded - everything[: len(tokens)]))
        of_drawn.append(np.abs(decoded[np.arange(len(tokens)), tokens] - drawn[: len(tokens)]))
        of_reported.append(np.abs(np.array([token.raw_logprob for token in answer]) - drawn[: len(tokens)]))
    gathered = (np.concatenate([d.ravel() for d in ds]) for ds in (every, of_drawn, of_reported))
    return Parity(*(float(x) for differences in gathered for x in (differences.max(), differences.mean())))


def open_to_train(source: str, dtype: DType) -> tuple[Params, ModelConfig]:
    """A run's model as it was trained, another with stacked layers that are recomputed."""
    if is_run(source):
        loaded = open_any(source)
        return loaded.params, dataclasses.replace(loaded.config, dtype=dtype)
    described = describe_model(source)
    model = dataclasses.replace(described.config, dtype=dtype, scan_layers=True, remat="full")
    return described.load(model), model


def in_another_process(source: str, dtype: DType, rows: Rows, prompt: int, environment: Mapping[str, str]) -> Logprobs:
    """`trainers_logprobs` by a process that is set up to train."""
    with tempfile.TemporaryDirectory() as scratch:
        task, found = Path(scratch, "task.json"), Path(scratch, "logprobs.npz")
        task.write_text(json.dumps([source, dtype, rows, prompt]))
        subprocess.run([sys.executable, "-m", "experiments.parity", task, found], env=environment, check=True)
        with np.load(found) as arrays:
            return Logprobs(**arrays)


def compare(arguments: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Prints the differences and one line of JSON.

    Args:
      environment: for a process that trains.

    Raises:
      ValueError, FileNotFoundError: see `open_any`; samples that do not fit the context.
    """
    samples, new = arguments.samples, arguments.tokens
    check(samples > 0 and new > 0, f"--samples={samples} and --tokens={new} must be positive")
    loaded = open_any(arguments.source, dtype=arguments.dtype)
    prompt = loaded.tokenizer.encode_prompt(arguments.prompt)
    check(
        len(prompt) + new <= loaded.config.max_seq_len,
        f"a prompt of {len(prompt)} tokens and --tokens={new} exceed the context of {loaded.config.max_seq_len}",
    )
    pages = samples * (-(-(len(prompt) + new) // EngineConfig.page_size) + 1)
    settings = EngineConfig(max_batch=samples, cache_tokens=pages * EngineConfig.page_size)
    engine = Engine(loaded.params, loaded.config, settings, vocab_size=loaded.tokenizer.vocab_size)
    (answers,) = engine.generate([Request(prompt, num_samples=samples, max_tokens=new, seed=arguments.seed)])
    rows = [[*prompt, *(token.token for token in answer)] for answer in answers]
    if jax.default_backend() == "cpu":
        trained = in_another_process(arguments.source, arguments.dtype, rows, len(prompt), environment)
    else:  # One process at a time has the devices, and theirs are the same flags.
        trained = trainers_logprobs(*open_to_train(arguments.source, arguments.dtype), rows, len(prompt), CHUNK_TOKENS)
    found = parity(engine, prompt, answers, trained)
    print(f"{loaded.name}, activations in {arguments.dtype}: {samples} samples of {new} tokens")
    print("|engine - trainer|, nats       largest        mean")
    print(f"of the whole vocabulary    {found.largest:11.3g} {found.mean:11.3g}")
    print(f"of the tokens drawn        {found.drawn_largest:11.3g} {found.drawn_mean:11.3g}")
    print(f"as they were reported      {found.reported_largest:11.3g} {found.reported_mean:11.3g}")
    facts = {"benchmark": "parity", "model": loaded.name, "dtype": arguments.dtype, "samples": samples, "tokens": new}
    print(json.dumps(facts | dataclasses.asdict(found)))


if __name__ == "__main__":
    task, target = map(Path, sys.argv[1:])
    configure(cpu_devices=1)
    source, dtype, rows, prompt = json.loads(task.read_text())
    np.savez(target, **vars(trainers_logprobs(*open_to_train(source, dtype), rows, prompt, CHUNK_TOKENS)))
