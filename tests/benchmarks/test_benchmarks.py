"""Every benchmark runs, and its last line is JSON with the names that others read."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import decode_profile, grpo_step, quantization, train_step
from data.tokenizer import ByteTokenizer
from experiments import sampling
from inference.models import LoadedModel
from model.convert import gguf
from model.params import param_specs, parameter_groups
from model.presets import preset
from tests.data.gguf_metadata import byte_bpe_metadata
from tests.libtpu import require_libtpu
from tests.networks import random_params

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
def test_grpo_step():
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    result = last_line("grpo_step", "--quick")
    assert_positive(result, "time_vs_trl", "rollout_tokens_per_second", "update_tokens_per_second")
    assert result["time_vs_trl"] == pytest.approx(result["step_seconds"] / result["trl_step_seconds"], rel=1e-3)


def test_grpo_step_says_what_the_peer_lacks(monkeypatch):
    monkeypatch.setattr(grpo_step, "PEERS", ("json", "no_such_peer"))
    monkeypatch.setattr(sys, "argv", ["grpo_step.py"])
    with pytest.raises(SystemExit, match="lacks no_such_peer, which this needs: `make bench` installs it, or give --peer"):
        grpo_step.main()


@pytest.mark.slow
def test_attention_schedule():
    """Against splash attention at its best, by the bundles of all tiles: what docs/kernels.md says of one chip."""
    require_libtpu()
    result = last_line("attention_schedule", "--chips", "v5e")
    for case in ("causal_forward", "causal_backward"):
        assert 0 < result[f"{case}_vs_splash"] <= 1
    for case in ("packed_forward", "packed_backward", "shifted_forward", "shifted_backward"):
        assert 0 < result[f"{case}_vs_splash"] <= 1 / 3
    for case in ("uneven_forward", "uneven_backward"):
        assert 0 < result[f"{case}_vs_splash"] <= 0.36


@pytest.mark.slow
def test_paged_decode_schedule():
    """The kernel waits for memory, not memory for it."""
    require_libtpu()
    result = last_line("paged_decode_schedule", "--chips", "v5e")
    assert 0.9 < result["32 heads, 8 of keys"] <= 1


@pytest.mark.slow
def test_decode_profile():
    result = last_line("decode_profile", "--quick")
    for name in ("prefill", "batch32"):
        assert_positive(result, f"{name}_seconds", f"{name}_products_share", f"{name}_share_of_matmul_peak")
        # The whole holds the products, as often as the clock of so small a model can tell.
        assert result[f"{name}_products_share"] < 2


def test_the_products_of_the_profile_are_all_that_the_network_multiplies():
    """By the count of parameters: all matrices but the embedding's rows, which are looked up."""
    model = preset("smollm2-135m")
    groups = parameter_groups(param_specs(model))
    matrices = sum(size for name, size in groups.items() if name.startswith("blocks/") and "norm" not in name)
    assert decode_profile.flops(model, 1, 0) == 2 * matrices
    assert decode_profile.flops(model, 0, 1) == 2 * model.vocab_size * model.d_model


@pytest.mark.slow
@pytest.mark.parametrize("with_llama_cpp", [False, True])
def test_decode(with_llama_cpp, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setenv("LOAM_HOME", str(tmp_path / "home"))
    arguments = []
    if with_llama_cpp:
        pytest.importorskip("xllamacpp")
        tokenizer = {key: value for key, value in byte_bpe_metadata().items() if key.startswith("tokenizer.")}
        config = preset("tiny-llama", vocab_size=len(tokenizer["tokenizer.ggml.tokens"]))
        gguf.save(tmp_path / "tiny.gguf", random_params(config), config, "F32", tokenizer)
        arguments = ["--gguf", str(tmp_path / "tiny.gguf")]
    result = last_line("decode", "--quick", *arguments)
    ratios = ("batch1_vs_transformers", "batch32_vs_transformers", "prefill_vs_transformers", "int8_vs_float32_batch1")
    assert_positive(result, *ratios, "bandwidth_share_batch1")
    if with_llama_cpp:
        assert_positive(result, "llama_cpp_batch1_tokens_per_second", "llama_cpp_prefill_tokens_per_second")
    else:
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


def test_quantization(monkeypatch, capsys, tmp_path):
    """A random network in a table: rounding costs a little, fewer bits more; the same weights would answer the same."""
    tokenizer = ByteTokenizer("bytes", b"", document_boundaries=True)
    config = preset("tiny-llama", vocab_size=tokenizer.vocab_size, max_seq_len=24)
    loaded = LoadedModel(random_params(config), config, tokenizer, None, frozenset(), "tiny")
    monkeypatch.setattr(quantization, "configure", lambda **_: None)
    monkeypatch.setattr(sampling, "open_any", lambda source: loaded)
    text, questions = tmp_path / "text.txt", tmp_path / "sums.jsonl"
    text.write_text("".join(map(chr, range(32, 126))) * 8)
    asked = [{"query": f"{i} + 1?", "choices": [str(i + 1), str(i), "so"], "gold": 0} for i in range(40)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked))
    quantization.main(["tiny", f"--text={text}", "--bytes=300", f"--questions={questions}", "--documents=20"])
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    plain, int8, int4, cache = (result["rows"][name] for name in ("as they are", "int8", "int4", "int8 cache"))
    assert table[0] == "tiny: 300 bytes of text, 20 of sums"
    assert [line.count("|") for line in table[1:]] == [6] * 6
    assert plain["weight_bytes"] > 3 * int8["weight_bytes"]
    assert int8["weight_bytes"] > 1.5 * int4["weight_bytes"]
    bits = [row["bits_per_byte"] for row in (plain, int8, int4)]
    assert 0 < abs(bits[1] - bits[0]) < abs(bits[2] - bits[0]) < 0.1 * bits[0]
    assert 0 < abs(cache["bits_per_byte"] - bits[0]) < 0.01 * bits[0]
    assert plain["sums_changed"] == 0
    for row in (plain, int8, int4, cache):
        assert abs(row["sums_right"] - plain["sums_right"]) <= row["sums_changed"] / 20 + 1e-9
        assert row["sums_right_per_character"] in [i / 20 for i in range(21)]


def test_quantization_needs_something_to_measure(capsys):
    with pytest.raises(SystemExit):
        quantization.main(["tiny"])
    assert "--text, --questions, or both" in capsys.readouterr().err
