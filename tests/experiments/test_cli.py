"""The command line: what each command prints and how it ends.  One tiny job is trained in a process of its own, as users do."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.cli
import experiments.sampling
import model.xla
from data.chat_encoder import DEFAULT_TEMPLATE
from data.chat_template import encode_chat
from data.config import TokenizerConfig
from data.tokenizer import load_tokenizer, train_tokenizer
from experiments import bench_infer, chat
from experiments.cli import load_train_config, main, parse
from experiments.sampling import open_any, open_to_decode, tensor_shardings
from inference.config import EngineConfig
from inference.engine import Engine
from inference.request import Request
from model.config import ModelConfig
from model.convert.gguf import save
from model.convert.huggingface import load
from model.params import init_params, param_specs, unstack_layers
from model.transformer import forward, unembed
from tests.data.gguf_metadata import byte_bpe_metadata
from tests.inference.engine_reference import CHAIN, MODEL, ROOMY, check_answer
from tests.networks import random_params
from tests.tiny import write_tiny_job
from train.checkpoint import Checkpoints
from train.step import make_trainer

ROOT = Path(__file__).parents[2]
# One layer and nothing that needs another program: most of the time goes into starting and compiling.
OVERRIDES = [
    "--config.steps=6",
    "--config.checkpoint.every=3",
    "--config.cpu_devices=2",
    "--config.model.num_layers=1",
    "--config.eval.sample_prompts=()",
    "--config.writers=()",
]
POSITIONS = np.arange(32, dtype=np.int32)[None]


def loam(*words):
    """Runs `loam` in a process of its own."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    command = [sys.executable, "-m", "experiments.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The tiny job's config file, its config with some overrides, and what running it printed."""
    path = write_tiny_job(tmp_path_factory.mktemp("job"))
    return path, load_train_config(str(path), OVERRIDES), loam("run", f"--config={path}", *OVERRIDES)


@pytest.fixture
def here(monkeypatch):
    """`main` in this process, whose jax is configured already."""
    monkeypatch.setattr(model.xla, "configure", lambda cpu_devices, decoding=False: None)


@pytest.fixture
def gguf_model(tmp_path):
    """A tiny llama with a tokenizer, as a .gguf file."""
    keys = {key: value for key, value in byte_bpe_metadata().items() if key.startswith("tokenizer.")}
    vocab_size = len(keys["tokenizer.ggml.tokens"])
    config = ModelConfig(vocab_size=vocab_size, num_layers=1, d_model=16, num_heads=2, d_ff=24, max_seq_len=64)
    save(tmp_path / "tiny.gguf", init_params(param_specs(config), jax.random.key(0)), config, "F32", keys)
    return tmp_path / "tiny.gguf"


@pytest.fixture
def run_copy(job, tmp_path):
    return Path(shutil.copytree(job[1].run_dir, tmp_path / "run"))


# --- The parser -------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands():
    result = loam("--help")
    assert result.returncode == 0
    for command in ("run", "inspect", "sample", "convert", "ckpt", "report"):
        assert re.search(rf"^    {command} ", result.stdout, re.MULTILINE), command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum"], "invalid choice: 'rum'"),
        ([], "required: COMMAND"),
        (["run"], "required: --config"),
        (["ckpt", "repair", "runs/x"], "invalid choice: 'repair'"),
        (["sample", "runs/x", "--config.steps=3"], "`loam sample` takes no config"),
        (["sample", "runs/x", "--max-tokens=many"], "invalid int value: 'many'"),
        (["chat", "runs/x", "--dtype=int2"], "invalid choice: 'int2'"),
        (["sample", "runs/x", "--dtype=int8"], "use --weights=int8"),
        (["bench-infer", "runs/x", "--cache-dtype=int4"], "invalid choice: 'int4'"),
    ],
)
def test_a_malformed_command_line_ends_with_the_usage_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "usage: loam" in error
    assert message in error


# --- Configs ----------------------------------------------------------------------------------------------------------


def refused(words, capsys):
    """The one-paragraph error of a command that must end with status 1."""
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("loam: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_mistakes_in_the_config_are_told_before_jax_starts(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model.xla, "configure", lambda _: pytest.fail("jax was configured"))
    path = write_tiny_job(tmp_path)
    assert f"{path}x' does not exist" in refused([command, f"--config={path}x"], capsys)
    assert "Did you mean 'steps'?" in refused([command, f"--config={path}", "--config.step=3"], capsys)
    error = refused([command, f"--config={path}", "--config.optimizer.learning_rate=high"], capsys)
    assert "config.optimizer.learning_rate='high' must be of type float" in error
    assert "'100' is not of the form" in refused([command, f"--config={path}", "--config.steps", "100"], capsys)
    assert not (tmp_path / "run").exists()


def test_a_missing_shakespeare_says_where_to_get_it(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("shakespeare_gpt2", "shakespeare_modern"):
        error = refused(["run", f"--config={ROOT}/configs/{name}.py", "--config.batch_size=16"], capsys)
        assert "'tinyshakespeare.txt' is neither a file" in error
        assert "github.com/karpathy/char-rnn" in error


def test_a_missing_optional_package_is_an_error_of_the_input(here, tmp_path, monkeypatch, capsys):
    def needs_package(config, log, group, began):
        assert began == experiments.cli.BEGAN
        raise ModuleNotFoundError("reading x needs the package 'y', which is not installed")

    monkeypatch.setattr("train.loop.train", needs_package)
    assert "needs the package 'y'" in refused(["run", f"--config={write_tiny_job(tmp_path)}"], capsys)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_counts_what_is_there(here, job, capsys):
    path = job[0]
    assert main(["inspect", f"--config={path}", "--config.model.mlp=gelu", "--config.steps=6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = {line[2:30].strip(): float(line[30:].split()[0].replace(",", "")) for line in lines if line.startswith("  ")}
    vocab, d, heads, kv_heads, head_dim, ff, layers, seq_len = 300, 32, 4, 2, 8, 64, 2, 64
    attention, mlp = layers * d * head_dim * (2 * heads + 2 * kv_heads), layers * 2 * d * ff
    norms = {"blocks/attention_norm": layers * d, "blocks/mlp_norm": layers * d, "final_norm": d}
    counts = {"blocks/attention": attention, "blocks/mlp": mlp, "embedding": vocab * d, "head": vocab * d, **norms}
    assert {name: numbers[name] for name in counts} == counts
    total = sum(counts.values())
    assert lines[0] == f"tiny: {total:,} parameters"
    # Every pair of a query and a key that the layer's window lets it see, counted one by one.
    pairs = sum(1 for window in (8, seq_len) for q in range(seq_len) for k in range(q + 1) if q - k < window)
    forward_flops = 2 * (attention + mlp + vocab * d) + 4 * heads * head_dim * pairs / seq_len
    assert numbers["forward"] == round(forward_flops)
    assert numbers["forward and backward"] == round(3 * forward_flops)
    # Adam keeps two float32 copies; the moving average and the gradients one each. Printed to 0.1 MiB.
    for name, copies in (("parameters", 1), ("optimizer state", 2), ("moving average", 1), ("gradients", 1)):
        assert numbers[name] == pytest.approx(copies * 4 * total / 2**20, abs=0.06)
    assert lines[-1].startswith("run: 6 steps x 512 tokens = 3,072 tokens, ")
    assert float(lines[-1].split()[-2]) == pytest.approx(3072 * 3 * forward_flops, rel=0.01)


# --- A run and what reads it ------------------------------------------------------------------------------------------


def test_run_trains_and_leaves_its_files(job):
    _, config, result = job
    assert result.returncode == 0, result.stderr
    run_dir = Path(config.run_dir)
    assert json.loads((run_dir / "result.json").read_text())["steps"] == 6
    assert json.loads((run_dir / "result.json").read_text())["val_loss"] < np.log(300)
    assert json.loads((run_dir / "config.json").read_text())["steps"] == 6
    assert json.loads((run_dir / "provenance.json").read_text())["devices"]["count"] == 2
    assert "step 6/6" in result.stdout
    assert (run_dir / "report.html").stat().st_size > 1000


def test_run_refuses_the_directory_of_another_config(here, job, capsys):
    path = job[0]
    error = refused(["run", f"--config={path}", *OVERRIDES, "--config.seed=1"], capsys)
    assert "holds a run of another config; different are seed (there 0, here 1)" in error


def test_greedy_samples_are_those_of_the_full_forward(here, job, capsys):
    _, config, _ = job
    words = ["sample", config.run_dir, "--prompt=the one", "--max-tokens=6", "--temperature=0"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    trainer = make_trainer(config)
    checkpoints = Checkpoints(f"{config.run_dir}/checkpoints", keep=None)
    params = checkpoints.restore(6, trainer.abstract_state)[0].ema
    tokenizer = load_tokenizer(f"{config.run_dir}/tokenizer")
    tokens = prompt = tokenizer.encode_prompt("the one")
    logits = jax.jit(lambda row: unembed(params, config.model, forward(params, config.model, row, POSITIONS)[0]))
    for _ in range(6):
        row = np.zeros(POSITIONS.shape, np.int32)
        row[0, : len(tokens)] = tokens
        tokens = [*tokens, int(jnp.argmax(logits(row)[0, len(tokens) - 1]))]
    assert printed == f"--- 'the one'\nthe one{tokenizer.decode(tokens[len(prompt) :])}\n"
    assert main(words) == 0
    assert capsys.readouterr().out == printed


def test_sample_refuses_what_is_no_run_and_a_step_that_is_not_there(here, job, tmp_path, capsys):
    assert f"{tmp_path} is not the directory of a run" in refused(["sample", tmp_path], capsys)
    assert "top_p=0.0 must lie in (0, 1]" in refused(["sample", job[1].run_dir, "--top-p=0"], capsys)
    error = refused(["sample", job[1].run_dir, "--step=5"], capsys)
    assert "no checkpoint of step 5" in error
    assert "3, 6" in error
    error = refused(["sample", job[1].run_dir, "--max-tokens=200"], capsys)
    assert "exceed model.max_seq_len=128" in error


def test_convert_writes_the_newest_weights_as_hugging_face_has_them(here, job, tmp_path, capsys):
    _, config, _ = job
    target = tmp_path / "out"
    assert main(["convert", config.run_dir, str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    written, model = load(target)
    checkpoints = Checkpoints(f"{config.run_dir}/checkpoints", keep=None)
    average = checkpoints.restore(6, make_trainer(config).abstract_state)[0].ema
    assert model.window(0) == config.model.window(0) == 8
    jax.tree.map(np.testing.assert_array_equal, written, average)
    values = json.loads((target / "config.json").read_text())
    assert (values["model_type"], values["eos_token_id"]) == ("mistral", load_tokenizer(f"{config.run_dir}/tokenizer").eos_id)
    assert "not an empty directory" in refused(["convert", config.run_dir, target], capsys)
    error = refused(["convert", config.run_dir, tmp_path / "no", "--family=llama"], capsys)
    assert "llama family cannot express model.window_pattern=(8,)" in error
    assert "no checkpoint of step 5" in refused(["convert", config.run_dir, tmp_path / "no", "--step=5"], capsys)
    assert "--type is for GGUF" in refused(["convert", config.run_dir, tmp_path / "no", "--type=Q8_0"], capsys)
    error = refused(["convert", config.run_dir, tmp_path / "no.gguf"], capsys)
    assert "no architecture of llama, qwen2, qwen3" in error
    assert not (tmp_path / "no.gguf").exists()


def test_a_run_is_written_with_its_tokenizer_and_template(here, run_copy, tmp_path, capsys):
    """transformers encodes, decodes and lays out a chat as the run does, and what is written can be sampled from."""
    transformers = pytest.importorskip("transformers", reason="the extra `bench` has it")
    (run_copy / "tokenizer/chat_template.jinja").write_text(DEFAULT_TEMPLATE)
    target = str(tmp_path / "out")
    assert main(["convert", str(run_copy), target]) == 0
    ours, theirs = load_tokenizer(run_copy / "tokenizer"), transformers.AutoTokenizer.from_pretrained(target)
    for text in ("the one of them, 1234 ünïcödé 你好\n\n\t two  spaces!", "it's", " of the"):
        assert theirs.encode(text) == ours.encode_prompt(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    chat = [{"role": "user", "content": "the one?"}]
    expected = encode_chat(ours, DEFAULT_TEMPLATE, chat, add_generation_prompt=True)
    assert theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == expected
    ends = transformers.GenerationConfig.from_pretrained(target).eos_token_id
    assert {ends} == open_any(target).stop_ids == open_any(str(run_copy)).stop_ids
    capsys.readouterr()
    assert main(["sample", target, "--prompt=the one", "--max-tokens=4"]) == 0
    assert capsys.readouterr().out.startswith("--- 'the one'\nthe one")


def test_a_tokenizer_that_cannot_be_written_is_told(here, run_copy, tmp_path, capsys):
    train_tokenizer(TokenizerConfig(kind="chars"), ["the one"]).save(run_copy / "tokenizer")
    assert main(["convert", str(run_copy), str(tmp_path / "out")]) == 0
    assert "written without a tokenizer: a chars tokenizer has no form that other programs read" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_model_of_the_store_is_listed_sampled_and_converted(here, gguf_model, tmp_path, monkeypatch, capsys):
    """Into GGUF and Hugging Face's form and back; all of them write the same text, and end at the same tokens."""
    monkeypatch.setenv("LOAM_HOME", str(tmp_path / "home"))
    assert main(["pull", str(gguf_model), "--as=small"]) == 0
    capsys.readouterr()
    assert main(["models"]) == 0
    assert re.search(r"small +[\d,]+ +gguf F32 +[\d.]+ MiB +" + re.escape(str(gguf_model)), capsys.readouterr().out)
    assert main(["convert", "small", str(tmp_path / "hf")]) == 0
    assert open_any("small").stop_ids == open_any(str(tmp_path / "hf")).stop_ids == {0, 2}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == [2, 0]  # of a chat, before that of documents
    (tmp_path / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 5]}))
    for name in ("again.gguf", "again-hf"):
        assert main(["convert", str(tmp_path / "hf"), str(tmp_path / name), *(["--type=F32"] if "gguf" in name else [])]) == 0
        assert open_any(str(tmp_path / name)).stop_ids == {0, 2, 5}
    capsys.readouterr()
    printed = []
    for source in ("small", tmp_path / "hf", tmp_path / "again.gguf"):
        assert main(["sample", str(source), "--prompt=the fox", "--max-tokens=8", "--temperature=0"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].startswith("--- 'the fox'\nthe fox")
    assert printed[0] == printed[1] == printed[2]
    assert "--step is for runs" in refused(["sample", "small", "--step=3"], capsys)
    assert "exists: choose another name" in refused(["pull", gguf_model, "--as=small"], capsys)
    assert "did you mean 'small'" in refused(["sample", "smal"], capsys)


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        ("float32", "float32"),
        ("float32", "int8"),
        pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow),
        pytest.param("bfloat16", "int8", marks=pytest.mark.slow),
    ],
)
def test_the_commands_that_decode_take_a_precision_and_devices(here, gguf_model, monkeypatch, capsys, dtype, weights):
    """Over two devices the same greedy text as on one, each with its own half of a matrix."""
    printed, words = [], []
    for tensor in (1, 2):
        rounded = ["--weights=int8"] if weights == "int8" else []
        words = [str(gguf_model), f"--dtype={dtype}", f"--tensor={tensor}", *rounded]
        loaded = open_to_decode(parse(["bench-infer", *words]))
        up = loaded.params["blocks"][0]["mlp"]["up"]
        matrix = up.values if rounded else up
        assert (matrix.dtype, loaded.config.dtype) == (weights, dtype)
        assert [shard.data.size * tensor for shard in matrix.addressable_shards] == [matrix.size] * tensor
        asked = ["--prompt=the fox", "--max-tokens=8", "--temperature=0"]
        assert main(["sample", *words, *asked]) == 0
        printed.append(capsys.readouterr().out)
        pieces = []
        chat.chat(parse(["chat", *words, *asked]), write=pieces.append)
        assert "".join(pieces) == printed[-1].split("the fox", 2)[2]
    assert printed[0] == printed[1]
    monkeypatch.setattr(bench_infer, "read_bandwidth", lambda num_devices: 1e9 * num_devices)
    assert main(["bench-infer", *words, "--batch-sizes=2", "--prompt-tokens=5", "--new-tokens=3"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["dtype"], result["weights"], result["tensor"]) == (dtype, weights, 2)


def test_the_commands_that_decode_take_a_cache_of_8_bits(here, gguf_model, monkeypatch, capsys):
    made, plain = [], EngineConfig.__post_init__
    monkeypatch.setattr(EngineConfig, "__post_init__", lambda self: made.append(self.cache_dtype) or plain(self))
    monkeypatch.setattr(bench_infer, "read_bandwidth", lambda num_devices: 1e9)
    asked = {"sample": ["--prompt=the fox", "--max-tokens=4"], "chat": ["--prompt=the fox", "--max-tokens=4"]}
    asked["bench-infer"] = ["--batch-sizes=1", "--prompt-tokens=5", "--new-tokens=3"]
    for command, options in asked.items():
        for cache, expected in ([], "model"), (["--cache-dtype=int8"], "int8"):
            assert main([command, str(gguf_model), *options, *cache]) == 0
            assert made.pop() == expected
            assert not made
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cache_dtype"] == "int8"


def test_the_commands_that_decode_take_guesses(here, gguf_model, monkeypatch, capsys):
    """By look-up or by the model itself as its draft, they change no text."""
    made, plain = [], EngineConfig.__post_init__
    monkeypatch.setattr(EngineConfig, "__post_init__", lambda self: made.append(self.num_guesses) or plain(self))
    monkeypatch.setattr(bench_infer, "read_bandwidth", lambda num_devices: 1e9)
    drafted = ["--guesses=2", f"--draft={gguf_model}"]
    words = [str(gguf_model), "--prompt=the fox the fox", "--max-tokens=12", "--temperature=0"]
    printed = []
    for guesses in ([], ["--guesses=2"]):
        assert main(["sample", *words, *guesses]) == 0
        printed.append(capsys.readouterr().out)
    pieces = []
    chat.chat(parse(["chat", *words, *drafted]), write=pieces.append)
    assert printed[0] == printed[1] == f"--- 'the fox the fox'\nthe fox the fox{''.join(pieces)}"
    assert made == [0, 2, 2, 0]
    sizes = ["--batch-sizes=2", "--prompt-tokens=5", "--new-tokens=3"]
    assert main(["bench-infer", str(gguf_model), *sizes, *drafted]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["guesses"], found["draft"], found["batches"][0]["accepted_share"]) == (2, "tiny", 1)


def test_guesses_that_do_not_go_together_are_refused_before_a_model_is_read(here, job, gguf_model, monkeypatch, capsys):
    monkeypatch.setattr(experiments.sampling, "open_any", lambda *_: pytest.fail("a model was read"))
    for command in ("sample", "chat", "bench-infer"):
        assert "--guesses=-1 must not be negative" in refused([command, gguf_model, "--guesses=-1"], capsys)
        assert "add --guesses=4" in refused([command, gguf_model, f"--draft={gguf_model}"], capsys)
        error = refused([command, job[1].run_dir, "--guesses=2", f"--draft={gguf_model}"], capsys)
        assert f"--draft={gguf_model} has another tokenizer than {job[1].run_dir}" in error


def test_a_run_is_sampled_over_devices_too(here, job, capsys):
    words = ["sample", job[1].run_dir, "--prompt=the one", "--max-tokens=6", "--temperature=0"]
    for options in ([], ["--tensor=2"]):
        assert main([*words, "--dtype=float32", *options]) == 0
    first, second = capsys.readouterr().out.split("---")[1:]
    assert first == second


def test_devices_that_there_are_not_or_that_divide_no_head_are_refused(here, gguf_model, capsys):
    assert "--tensor=0 must be positive" in refused(["sample", gguf_model, "--tensor=0"], capsys)
    error = refused(["chat", gguf_model, "--tensor=4"], capsys)
    assert ": heads = 2 does not divide over tensor=4. It may be 1, 2" in error
    wide = open_any(str(gguf_model)).config
    wide = dataclasses.replace(wide, vocab_size=480, num_heads=16, num_kv_heads=16, d_ff=32)
    with pytest.raises(ValueError, match=r"--tensor=16 does not fit: there are 8 cpu devices here. It may be 1, 2, 4, 8"):
        tensor_shardings(wide, 16)


@pytest.mark.parametrize(("num_kv_heads", "tensor"), [(1, 2), (2, 4)])
def test_heads_of_keys_that_are_fewer_than_the_devices_are_copies(num_kv_heads, tensor):
    network = dataclasses.replace(MODEL, num_layers=1, num_kv_heads=num_kv_heads)
    shardings, params = tensor_shardings(network, tensor), random_params(network)
    attention = shardings["blocks"][0]["attention"]
    assert "tensor" in attention["query"].spec
    assert attention["key"].is_fully_replicated
    engine, request = Engine(jax.device_put(params, shardings), network, ROOMY), Request(CHAIN[:9], max_tokens=6)
    check_answer(request, 0, engine.generate([request])[0][0], params, network)


def test_checkpoints_are_listed_and_found_sound(here, job, capsys):
    assert main(["ckpt", "list", job[1].run_dir]) == 0
    assert json.loads(capsys.readouterr().out) == [3, 6]
    assert main(["ckpt", "verify", job[1].run_dir]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 3", "step 6"]
    assert all(line.endswith(" sound") for line in lines)


def test_a_flipped_byte_is_found(here, run_copy, capsys):
    files = [path for path in (run_copy / "checkpoints" / "3").rglob("*") if path.is_file()]
    array = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 16
    array.write_bytes(content)
    assert main(["ckpt", "verify", str(run_copy)]) == 1
    damaged, sound = capsys.readouterr().out.splitlines()
    assert damaged.startswith("step 3: ")
    assert "DAMAGED: " in damaged
    assert sound.endswith(" sound")


def test_verifying_nothing_is_an_error(here, tmp_path, capsys):
    assert "is not a directory of checkpoints" in refused(["ckpt", "verify", tmp_path], capsys)
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoint yet" in refused(["ckpt", "verify", tmp_path], capsys)


def test_report_is_written_for_a_run_and_for_nothing_else(run_copy, tmp_path, capsys):
    (run_copy / "report.html").unlink()
    assert main(["report", str(run_copy)]) == 0
    assert capsys.readouterr().out == f"{run_copy}/report.html\n"
    assert "<svg" in (run_copy / "report.html").read_text()
    for other in (tmp_path, tmp_path / "nowhere"):
        assert f"{other} is not the directory of a run" in refused(["report", other], capsys)
    assert not (tmp_path / "report.html").exists()


def test_a_run_is_opened_with_rounded_weights(run_copy):
    plain, loaded = open_any(str(run_copy)), open_to_decode(parse(["sample", str(run_copy), "--weights=int8"]))
    expected = unstack_layers(plain.params, plain.config)[0]["blocks"][0]["mlp"]["up"]
    found = loaded.params["blocks"][0]["mlp"]["up"].dequantized()
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 253)


def test_a_run_of_a_tpu_is_opened_elsewhere(run_copy):
    config = json.loads((run_copy / "config.json").read_text())
    config["model"]["attention_backend"] = "flash"
    (run_copy / "config.json").write_text(json.dumps(config))
    assert open_any(str(run_copy)).config.attention_backend == "xla"
