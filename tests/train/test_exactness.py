"""Twenty SIGKILLs and five SIGTERMs at random moments of one run end in the same bits as no interruption at all."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.cli import load_train_config
from tests.tiny import write_tiny_job
from train.checkpoint import Checkpoints, verify
from train.step import make_trainer

OVERRIDES = ["--config.steps=3000", "--config.checkpoint.every=40", "--config.eval.every=1000", "--config.writers=()"]
KILLS, TERMS = 20, 5


def start(config_file: Path, run_dir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.cli", "run", f"--config={config_file}", f"--config.run_dir={run_dir}"]
    root = Path(__file__).parents[2]
    return subprocess.Popen([*command, *OVERRIDES], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def interrupt(process: subprocess.Popen, which: signal.Signals, rng: random.Random) -> int:
    """Sends the signal within 1.5 s of the first step; every fourth kill comes at any moment from the start of the process on
    (preparing data, compiling, restoring). Returns the exit status."""
    assert process.stdout is not None
    said = []
    early = which == signal.SIGKILL and rng.random() < 0.25
    delay = rng.uniform(0.0, 8.0 if early else 1.5)
    for line in () if early else process.stdout:
        said.append(line)
        if line.startswith("step"):
            break
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(which)
    rest, _ = process.communicate()
    assert process.returncode in (0, 42, -which), "".join(said) + rest
    return process.returncode


@pytest.mark.slow
def test_twenty_kills_and_five_terms_leave_no_trace(tmp_path):
    config_file = write_tiny_job(tmp_path)
    whole = start(config_file, tmp_path / "whole")
    output, _ = whole.communicate()
    assert whole.returncode == 0, output

    rng = random.Random(0)
    signals = [signal.SIGKILL] * KILLS + [signal.SIGTERM] * TERMS
    rng.shuffle(signals)
    statuses = [interrupt(start(config_file, tmp_path / "broken"), which, rng) for which in signals]
    assert statuses == [42 if which == signal.SIGTERM else -signal.SIGKILL for which in signals]
    last = start(config_file, tmp_path / "broken")
    output, _ = last.communicate()
    assert last.returncode == 0, output

    for name in ("metrics.jsonl", "samples.jsonl"):
        whole_bytes, broken_bytes = ((tmp_path / run / name).read_bytes() for run in ("whole", "broken"))
        assert whole_bytes == broken_bytes
    config = load_train_config(str(config_file), OVERRIDES)
    abstract = make_trainer(config).abstract_state
    stores = [Checkpoints(str(tmp_path / name / "checkpoints"), keep=None) for name in ("whole", "broken")]
    states = [store.restore(config.steps, abstract) for store in stores]
    (state, metadata), (other, other_metadata) = states
    assert metadata == other_metadata
    jax.tree.map(np.testing.assert_array_equal, state, other)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "broken")]
    assert results[0]["val_loss"] == results[1]["val_loss"]
    assert not any(report.problem for report in verify(str(tmp_path / "broken" / "checkpoints")))
