"""Adapters of `peft` through the commands: a run's are written, and opened as the model that the run is."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import model.xla
import train.loop
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.gguf_tokenizer import tokenizer_of
from experiments.cli import main
from experiments.sampling import open_any, tensor_shardings
from inference.models import describe_model, open_model
from model.config import LoraConfig, ModelConfig
from model.convert import gguf, huggingface
from model.params import init_params, param_specs
from model.quantize import quantize
from tests.data.gguf_metadata import byte_bpe_metadata
from train.config import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
from train.initial import open_initial
from train.step import make_trainer

VOCAB_SIZE = len(byte_bpe_metadata()["tokenizer.ggml.tokens"])
MODEL = ModelConfig(vocab_size=VOCAB_SIZE, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, max_seq_len=96)
LORA = LoraConfig(rank=2, alpha=6.0, targets=("query", "out", "down"))


def write_base(directory, config=MODEL):
    huggingface.save(directory, init_params(param_specs(config), jax.random.key(0)), config)
    (directory / "tokenizer.json").write_bytes(tokenizer_of(byte_bpe_metadata(), "test").model)
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base as Hugging Face has it, and a run of fine-tuning that trained adapters of it."""
    root = tmp_path_factory.mktemp("adapters")
    write_base(root / "base")
    rows = [{"prompt": f"say {i % 7}", "completion": f"it is {i % 7}"} for i in range(40)]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        (SourceConfig("chats", "files", path=str(root / "chats.jsonl"), held_out_fraction=0.2),),
        content="conversations",
        tokenizer=TokenizerConfig("bytes"),
        seq_len=96,
        cache_dir=str(root / "cache"),
        loader_threads=0,
    )
    config = TrainConfig(
        "adapted",
        MODEL,
        data,
        run_dir=str(root / "run"),
        initial_weights=str(root / "base"),
        lora=LORA,
        steps=2,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=0.1),
        checkpoint=CheckpointConfig(every=2),
        eval=EvalConfig(every=2, max_batches=1),
        writers=(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "make_trainer", functools.partial(make_trainer, devices=jax.devices()[:1]))
        assert train.loop.train(config, log=lambda _: None) == 0
    return root, config


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """`main` in this process, whose jax is configured already; an empty store."""
    monkeypatch.setattr(model.xla, "configure", lambda cpu_devices, decoding=False: None)
    monkeypatch.setenv("LOAM_HOME", str(tmp_path / "home"))


@pytest.fixture
def written(trained, tmp_path):
    assert main(["convert", trained[1].run_dir, str(tmp_path / "written"), "--adapters"]) == 0
    return tmp_path / "written"


def refused(words, capsys):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    return capsys.readouterr().err


def change(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same(found, expected, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol), found, expected)


def test_the_adapters_of_a_run_are_written_and_are_the_run(trained, written, tmp_path, capsys):
    root, config = trained
    described = json.loads((written / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["r"], described["lora_alpha"]) == (str(root / "base"), 2, 6.0)
    assert not (written / "config.json").exists()
    for source, name in ((config.run_dir, "merged"), (written, "again")):
        assert main(["convert", str(source), str(tmp_path / name)]) == 0
    base, merged, again = (load_file(d / "model.safetensors") for d in (root / "base", tmp_path / "merged", tmp_path / "again"))
    tensors, changed = load_file(written / "adapter_model.safetensors"), 0
    for name, weight in base.items():
        module, expected = f"base_model.model.{name.removesuffix('.weight')}", weight.astype(np.float64)
        if f"{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
            assert np.abs(b @ a).max() > 1e-3
            expected, changed = expected + 3.0 * b @ a, changed + 1
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)
        np.testing.assert_allclose(again[name], expected, atol=1e-6)
    assert changed == len(tensors) / 2 == 6
    capsys.readouterr()
    assert main(["sample", str(written), "--prompt=the fox", "--max-tokens=2"]) == 0
    assert capsys.readouterr().out.startswith("--- 'the fox'\nthe fox")
    run, opened = open_any(config.run_dir), open_any(str(written))
    assert (opened.stop_ids, opened.chat_template, opened.name) == (run.stop_ids, run.chat_template, "written")
    assert opened.chat_template is not None
    assert "generation" in opened.chat_template
    assert opened.tokenizer.token_bytes == run.tokenizer.token_bytes
    assert_same(opened.params, run.params, atol=1e-6)


def test_adapters_are_merged_wherever_a_model_is_opened(trained, written):
    """Into layers that are stacked, over devices, in bfloat16, and before weights are rounded."""
    expected = open_any(trained[1].run_dir).params
    assert_same(open_model(written, place=lambda config: tensor_shardings(config, 2)).params, expected, atol=1e-6)
    half = open_model(written, param_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    begun = open_any(str(trained[0] / "base")).params["blocks"][1]["mlp"]["down"]
    wanted = begun.astype("bfloat16").astype("float32") + (expected["blocks"][1]["mlp"]["down"] - begun)  # rounded once more
    assert np.mean(half.params["blocks"][1]["mlp"]["down"] == wanted.astype("bfloat16")) > 0.99
    rounded = open_model(written, bits=8)
    assert_same(rounded.params, quantize(expected, describe_model(written).config, 8)[0], atol=1e-6)
    stacked = dataclasses.replace(MODEL, scan_layers=True)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, "float32", sharding=here),
        param_specs(stacked),
        is_leaf=lambda x: hasattr(x, "axes"),
    )
    began = open_initial(str(written), stacked).load(abstract)
    for layer in range(2):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], began["scanned_blocks"][0])
        assert_same(one, expected["blocks"][layer], atol=1e-6)


def test_a_base_is_found_by_its_name_and_one_that_is_not_here_is_told(trained, written, tmp_path, capsys):
    root, expected = trained[0], open_any(str(written)).params
    change(written, base_model_name_or_path="someone/small one")
    error = refused(["sample", written], capsys)
    assert "'someone/small one', the base of these adapters, is neither a path nor a model of" in error
    assert "loam pull 'someone/small one'" in error
    assert main(["pull", str(root / "base"), "--as=small"]) == 0
    change(written, base_model_name_or_path="small")
    assert_same(open_any(str(written)).params, expected)
    described = tmp_path / "home/models/small/loam_model.json"  # as if from the hub
    described.write_text(described.read_text().replace(str(root / "base"), "someone/base"))
    change(written, base_model_name_or_path="someone/base", revision="main")
    assert main(["pull", str(written), "--as=learned"]) == 0
    assert "adapters F32" in capsys.readouterr().out
    assert_same(open_any("learned").params, expected)
    assert open_any("learned").name == "learned"
    change(written, revision="v2")
    assert "loam pull someone/base@v2" in refused(["sample", written], capsys)
    change(written, base_model_name_or_path=None)
    assert "base_model_name_or_path is empty" in refused(["sample", written], capsys)
    change(written, base_model_name_or_path=str(written))
    assert "has adapters itself" in refused(["sample", written], capsys)
    shutil.copyfile(root / "base/model.safetensors", written / "model.safetensors")
    assert "holds a model and adapter_config.json" in refused(["sample", written], capsys)


def test_the_base_may_be_a_gguf_file_and_brings_its_tokenizer(trained, written, tmp_path):
    base, tokenizer = open_any(str(trained[0] / "base")), {k: v for k, v in byte_bpe_metadata().items() if "tokenizer" in k}
    gguf.save(tmp_path / "base.gguf", base.params, base.config, "F32", tokenizer | {"tokenizer.chat_template": "hello"})
    expected = open_any(str(written)).params
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (written / name).unlink(missing_ok=True)
    change(written, base_model_name_or_path=str(tmp_path / "base.gguf"))
    opened, alone = open_any(str(written)), open_any(str(tmp_path / "base.gguf"))
    assert_same(opened.params, expected)
    assert (opened.stop_ids, opened.chat_template) == (alone.stop_ids, alone.chat_template) == ({0, 2}, "hello")
    assert main(["convert", str(written), str(tmp_path / "whole.gguf"), "--type=F32"]) == 0
    assert_same(open_any(str(tmp_path / "whole.gguf")).params, expected)


def test_what_has_no_adapters_that_peft_knows_is_told(trained, written, tmp_path, capsys):
    root, config = trained
    run = shutil.copytree(config.run_dir, tmp_path / "run")
    there = json.loads((run / "config.json").read_text())

    def with_(**values):
        (run / "config.json").write_text(json.dumps(there | values))
        return refused(["convert", run, tmp_path / "out", "--adapters"], capsys)

    assert "was trained without lora and has no adapters" in with_(lora=None)
    assert "were rounded to 8 bits, for which peft has no word" in with_(lora=there["lora"] | {"base_bits": 8})
    phi = ["convert", run, tmp_path / "out", "--adapters", "--family=phi3"]
    (run / "config.json").write_text(json.dumps(there))
    assert "phi3 keeps blocks/0/attention/query in" in refused(phi, capsys)
    assert "--adapters is for runs" in refused(["convert", root / "base", tmp_path / "out", "--adapters"], capsys)
    assert "is a GGUF file" in refused(["convert", run, tmp_path / "out.gguf", "--adapters"], capsys)
    assert "exists and is not an empty" in refused(["convert", run, written, "--adapters"], capsys)
    assert not (tmp_path / "out").exists()
    # Adapters of what peft does not open are written without the name of their base.
    (run / "config.json").write_text(json.dumps(there | {"initial_weights": str(written)}))
    assert main(["convert", str(run), str(tmp_path / "out"), "--adapters"]) == 0
    assert f"`loam convert {written} DIRECTORY` writes it" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] is None
    # Nor is another network's.
    tensors = load_file(written / "adapter_model.safetensors")
    (written / "adapter_model.safetensors").unlink()
    assert "a pickle, which can run code" in refused(["sample", written], capsys)
    save_file(
        {name.replace("layers.1", "layers.2"): array for name, array in tensors.items()}, written / "adapter_model.safetensors"
    )
    assert "layers.2.mlp.down_proj.lora_A.weight" in refused(["sample", written], capsys)


def test_adapters_are_not_merged_into_other_weights_than_they_were_trained_on(trained, tmp_path, capsys):
    root, config = trained
    moved = shutil.copytree(root / "base", tmp_path / "base")
    run = shutil.copytree(config.run_dir, tmp_path / "run")
    there = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(there | {"initial_weights": str(moved)}))
    abstract = make_trainer(dataclasses.replace(config, lora=None, initial_weights=""), devices=jax.devices()[:1])
    open_any(str(run))  # the same weights elsewhere
    open_initial(str(run), MODEL).load(abstract.abstract_weights)
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][3] += np.float32(1e-6)
    save_file(tensors, moved / "model.safetensors")
    for words in (["sample", run], ["convert", run, tmp_path / "out"], ["convert", run, tmp_path / "out", "--adapters"]):
        assert f"{moved} no longer holds the weights that the adapters of {run} were trained on" in refused(words, capsys)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=f"{moved} no longer holds .* the adapters of {run}"):
        open_initial(str(run), MODEL).load(abstract.abstract_weights)
    (run / "initial_weights.json").unlink()  # of a run before there was such a file
    open_any(str(run))


def test_adapters_of_a_merged_base_are_opened_with_a_warning_where_its_bits_differ(trained, written, tmp_path, capsys):
    """As they do between devices that round products otherwise."""
    run = shutil.copytree(trained[1].run_dir, tmp_path / "run")
    there = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(there | {"initial_weights": str(written)}))
    open_any(str(run))
    assert f"warning: {written} no longer holds the weights that the adapters of {run}" in capsys.readouterr().out
