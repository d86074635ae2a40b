"""Engine against trainer from the command line: what is printed, and that precision shows."""

import json
import os
import subprocess
import sys

import jax
import pytest

from experiments import cli, parity
from model.config import RopeConfig
from model.convert import gguf
from model.params import init_params, param_specs
from model.presets import preset
from tests.data.gguf_metadata import byte_bpe_metadata
from tests.networks import random_params


@pytest.fixture
def model(tmp_path):
    """A small llama in a file."""
    tokenizer = {key: value for key, value in byte_bpe_metadata().items() if key.startswith("tokenizer.")}
    config = preset("tiny-llama", vocab_size=len(tokenizer["tokenizer.ggml.tokens"]), max_seq_len=64, rope=RopeConfig())
    gguf.save(tmp_path / "tiny.gguf", init_params(param_specs(config), jax.random.key(0)), config, "F32", tokenizer)
    return str(tmp_path / "tiny.gguf")


@pytest.fixture
def compared(model, capsys):
    """What comparing it prints: the lines, and the JSON of the last."""

    def compare(*options):
        parity.compare(cli.parse(["parity", model, "--samples=3", *options]), os.environ)
        lines = capsys.readouterr().out.splitlines()
        return lines, json.loads(lines[-1])

    return compare


def trained_here(source, dtype, rows, prompt, environment):
    return parity.trainers_logprobs(*parity.open_to_train(source, dtype), rows, prompt, parity.CHUNK_TOKENS)


def test_what_is_printed_is_the_difference_in_the_precision_that_was_asked_for(compared, monkeypatch):
    lines, exact = compared("--tokens=9")
    assert lines[0] == "tiny, activations in float32: 3 samples of 9 tokens"
    assert lines[2].split()[-2:] == [f"{exact[name]:.3g}" for name in ("largest", "mean")]
    assert lines[3].split()[-2:] == [f"{exact[name]:.3g}" for name in ("drawn_largest", "drawn_mean")]
    assert lines[4].split()[-2:] == [f"{exact[name]:.3g}" for name in ("reported_largest", "reported_mean")]
    assert 0 < exact["mean"] < exact["largest"] < 1e-4
    monkeypatch.setattr(parity, "in_another_process", trained_here)
    lines, rounded = compared("--tokens=9", "--dtype=bfloat16")
    assert lines[0] == "tiny, activations in bfloat16: 3 samples of 9 tokens"
    # Weights are small at first: so may be what is rounded.
    assert rounded["mean"] > 10 * exact["mean"]


def test_the_trainer_gets_stacked_layers_that_are_recomputed(model):
    _, config = parity.open_to_train(model, "bfloat16")
    assert (config.scan_layers, config.remat, config.dtype, config.param_dtype) == (True, "full", "bfloat16", "float32")


@pytest.mark.slow
def test_what_a_process_reports_that_decodes_in_bfloat16_is_what_the_trainer_finds(tmp_path):
    """Weights are bfloat16 numbers and layers add nothing, so that no rounding is left but that of a head of four rows; logits
    are up to 10, and would be wrong by 1/32. Processes are set up as a command's are."""
    tokenizer = {key: value for key, value in byte_bpe_metadata().items() if key.startswith("tokenizer.")}
    vocab_size = len(tokenizer["tokenizer.ggml.tokens"])
    config = preset("tiny-llama", vocab_size=vocab_size, max_seq_len=64, rope=RopeConfig(), tie_embeddings=False)
    params = random_params(config)
    silent = {"out": 0.0, "down": 0.0}
    blocks = jax.tree.map_with_path(lambda path, leaf: leaf * silent.get(path[-1].key, 1.0), params["blocks"])
    params |= {"blocks": blocks, "head": 3 * params["head"]}
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), params)
    gguf.save(tmp_path / "tiny.gguf", rounded, config, "F32", tokenizer)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = ["parity", str(tmp_path / "tiny.gguf"), "--dtype=bfloat16", "--samples=4", "--tokens=8"]
    output = subprocess.check_output([sys.executable, "-m", "experiments.cli", *command], env=environment, text=True)
    found = json.loads(output.splitlines()[-1])
    assert 0 < max(found[name] for name in ("largest", "drawn_largest", "reported_largest")) < 5e-5, found


def test_the_trainers_process_is_not_set_up_to_decode(monkeypatch):
    given = []
    monkeypatch.setenv("XLA_FLAGS", "--of_the_user")
    monkeypatch.setattr("model.xla.configure", lambda **_: os.environ.update(XLA_FLAGS="--of_the_user --to_decode"))
    monkeypatch.setattr(parity, "compare", lambda arguments, environment: given.append(environment["XLA_FLAGS"]))
    assert cli.parity(cli.parse(["parity", "tiny"])) == 0
    assert given == ["--of_the_user"]


def test_samples_of_nothing_or_of_more_than_the_context_are_refused(compared):
    with pytest.raises(ValueError, match="--tokens=0 must be positive"):
        compared("--tokens=0")
    with pytest.raises(ValueError, match="--tokens=64 exceed the context of 64"):
        compared("--tokens=64")
