"""Every benchmark runs, and its last line is JSON with the names that others read."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import train_step

ROOT = Path(__file__).parent.parent.parent


def last_line(script: str, *arguments: str) -> dict:
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def assert_positive(result: dict, *names: str) -> None:
    for name in names:
        assert math.isfinite(result[name]), name
        assert result[name] > 0, name


@pytest.mark.slow
def test_train_step():
    pytest.importorskip("torch")
    result = last_line("train_step", "--quick")
    names = ("speed_vs_torch", "tokens_per_second", "torch_tokens_per_second")
    assert_positive(result, *names, *(f"{name}_10m" for name in names), "mfu", "mfu_10m")
    ratio = result["tokens_per_second"] / result["torch_tokens_per_second"]
    assert result["speed_vs_torch"] == pytest.approx(ratio, rel=1e-3)
    assert result["loss_difference"] < train_step.LOSS_TOLERANCE


def test_train_step_says_how_to_get_torch(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_step.py"])
    monkeypatch.setattr(train_step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make bench"):
        train_step.main()


@pytest.mark.slow
def test_attention_schedule():
    """Against splash attention at its best, by the bundles of all tiles: what docs/kernels.md says of one chip."""
    pytest.importorskip("libtpu")
    result = last_line("attention_schedule", "--chips", "v5e")
    for case in ("causal_forward", "causal_backward"):
        assert 0 < result[f"{case}_vs_splash"] <= 1
    for case in ("packed_forward", "packed_backward"):
        assert 0 < result[f"{case}_vs_splash"] <= 1 / 3


@pytest.mark.slow
def test_paged_decode_schedule():
    """The kernel waits for memory, not memory for it."""
    pytest.importorskip("libtpu")
    result = last_line("paged_decode_schedule", "--chips", "v5e")
    assert 0.9 < result["32 heads, 8 of keys"] <= 1


@pytest.mark.slow
def test_decode():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    result = last_line("decode", "--quick")
    ratios = ("batch1_vs_transformers", "batch32_vs_transformers", "prefill_vs_transformers", "int8_vs_float32_batch1")
    assert_positive(result, *ratios, "bandwidth_share_batch1")
    assert result["llama_cpp_batch1_tokens_per_second"] is None


@pytest.mark.slow
def test_loss_memory():
    result = last_line("loss_memory", "--quick")
    assert_positive(result, "peak_vs_plain", "chunked_bytes", "plain_bytes")
    assert result["peak_vs_plain"] == pytest.approx(result["chunked_bytes"] / result["plain_bytes"], abs=1e-4)


@pytest.mark.slow
def test_loader(tmp_path):
    result = last_line("loader", "--seconds", "0.2", "--cache_dir", str(tmp_path))
    assert_positive(result, "tokens_per_second")
