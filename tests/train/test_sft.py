"""Supervised fine-tuning from end to end: from another run or model, losses on answers alone, to the same bits after a stop."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.loader import Batches
from data.prepare import prepare
from experiments.sampling import open_any
from model.config import LoraConfig, ModelConfig
from model.convert import huggingface
from model.lora import adapter_specs, frozen_base
from model.params import init_params, is_spec, param_specs
from model.transformer import forward, unembed
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig, EvalConfig, MeshConfig, OptimizerConfig, TrainConfig
from train.initial import open_initial
from train.loop import train
from train.step import make_trainer

MODEL = ModelConfig(vocab_size=258, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, max_seq_len=96)


def write_chats(path, number=40):
    rows = [{"prompt": f"say {i % 7}", "completion": f"it is {i % 7}, {i}"} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft_config(tmp_path, **options):
    path = tmp_path / "chats.jsonl"
    data = DataConfig(
        sources=(
            SourceConfig("chats", "files", path=str(path if path.exists() else write_chats(path)), held_out_fraction=0.2),
        ),
        content="conversations",
        tokenizer=TokenizerConfig("bytes"),
        seq_len=96,
        cache_dir=str(tmp_path / "cache"),
        loader_threads=0,
    )
    return TrainConfig(
        **{
            "name": "sft",
            "run_dir": str(tmp_path / "sft"),
            "model": MODEL,
            "data": data,
            "steps": 6,
            "batch_size": 8,
            "optimizer": OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
            "checkpoint": CheckpointConfig(every=3),
            "eval": EvalConfig(every=6),
            "writers": (),
            **options,
        }
    )


def params_of(run_dir, config, step):
    abstract = {
        "params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_trainer(config).abstract_state.params)
    }
    return Checkpoints(f"{run_dir}/checkpoints", keep=None).restore(step, abstract, partial=True)[0]["params"]


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A first run, and one that begins with it."""
    tmp_path = tmp_path_factory.mktemp("sft")
    first = sft_config(tmp_path, run_dir=str(tmp_path / "first"), steps=3)
    assert train(first, log=lambda _: None) == 0
    lines = []
    second = sft_config(tmp_path, initial_weights=first.run_dir, seed=5)
    assert train(second, log=lines.append) == 0
    return tmp_path, first, second, lines


def test_a_run_begins_with_the_weights_of_another_and_learns(runs):
    tmp_path, first, second, lines = runs
    assert any("beginning with the weights of" in line for line in lines)
    begun = params_of(first.run_dir, first, 3)
    prepared = prepare(second.data, log=lambda _: None)
    batch = Batches(prepared, second.data, batch_size=8, seed=5)[0]
    # The loss of the first step by hand: the mean over the answers' tokens of all rows together.

    @jax.jit
    def logprobs_of(params, batch):
        hidden, _, _ = forward(params, MODEL, batch["tokens"], batch["positions"], batch["segment_ids"])
        return jax.nn.log_softmax(unembed(params, MODEL, hidden))

    logprobs = logprobs_of(begun, batch)
    nll = -np.take_along_axis(np.asarray(logprobs, np.float64), batch["targets"][..., None], -1)[..., 0]
    expected = (nll * batch["weights"]).sum() / batch["weights"].sum()
    records = [record for record in metrics_of(tmp_path / "sft") if "loss" in record]
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert records[-1]["loss"] < records[0]["loss"]
    assert 0 < batch["weights"].mean() < 0.6


def test_a_run_that_is_stopped_continues_to_the_same_bits(runs, monkeypatch):
    tmp_path, _, second, _ = runs
    stopped = dataclasses.replace(second, run_dir=str(tmp_path / "stopped"))
    import train.loop

    class Kill(Exception):
        pass

    save = train.loop.Loop._save

    def save_and_die(self, complete):
        save(self, complete=True)
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Loop, "_save", save_and_die)
        with pytest.raises(Kill):
            train.loop.train(stopped, log=lambda _: None)
    assert train.loop.train(stopped, log=lambda _: None) == 0
    straight, resumed = (params_of(run, second, 6) for run in (second.run_dir, stopped.run_dir))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "sft")


def test_a_finished_run_brings_its_template_and_stop_token(runs):
    _, _, second, _ = runs
    loaded = open_any(second.run_dir)
    assert loaded.stop_ids == {257}
    assert "generation" in loaded.chat_template
    assert open_initial(second.run_dir, MODEL).chat_template == loaded.chat_template


def test_a_model_of_others_is_loaded_with_its_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    params = init_params(param_specs(MODEL), jax.random.key(3))
    vocabulary = {token: i for i, token in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens(["<s>", "</s>"])
    huggingface.save(tmp_path / "model", params, MODEL)
    theirs.save(str(tmp_path / "model" / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(named))
    initial = open_initial(str(tmp_path / "model"), MODEL)
    loaded = initial.load(make_trainer(sft_config(tmp_path)).abstract_state.params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    prepared = prepare(sft_config(tmp_path).data, tokenizer=initial.tokenizer, log=lambda _: None)
    assert prepared.tokenizer is initial.tokenizer
    assert prepared.stop_ids == {257}


def test_another_network_is_refused_by_its_fields(runs):
    _, first, _, _ = runs
    with pytest.raises(ValueError, match=r"model\.d_ff=48 \(there 64\)"):
        open_initial(first.run_dir, dataclasses.replace(MODEL, d_ff=48))
    with pytest.raises(ValueError, match="neither a path nor a model"):
        open_initial("nowhere", MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 8])
def test_adapters_alone_are_trained_and_saved_and_resume_to_the_same_bits(runs, bits):
    tmp_path, first, second, _ = runs
    lora = LoraConfig(rank=2, base_bits=bits)
    run_dir = tmp_path / f"lora{bits}"
    config = dataclasses.replace(second, lora=lora, run_dir=str(run_dir), steps=4, checkpoint=CheckpointConfig(every=2))
    assert train(config, log=lambda _: None) == 0
    saved = params_of(run_dir, config, 4)
    shapes = jax.tree.map(lambda leaf: leaf.shape, saved)
    assert shapes == jax.tree.map(lambda spec: spec.shape, adapter_specs(MODEL, lora), is_leaf=is_spec)
    losses = [record["loss"] for record in metrics_of(run_dir) if "loss" in record]
    full = [record["loss"] for record in metrics_of(tmp_path / "sft") if "loss" in record]
    assert losses[0] == pytest.approx(full[0], rel=1e-5 if not bits else 1e-2)  # B is zero
    assert losses[-1] < losses[0]
    # The last checkpoint is taken away, and the run continues.
    before = metrics_of(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "4")
    assert train(config, log=lambda _: None) == 0
    jax.tree.map(np.testing.assert_array_equal, params_of(run_dir, config, 4), saved)
    assert metrics_of(run_dir) == before
    merged = open_any(str(run_dir)).params
    begun = params_of(first.run_dir, first, 3)
    base = frozen_base(begun, MODEL, lora)[0]["blocks"][0]["mlp"]["up"]
    pair = saved["blocks"][0]["mlp"]["up"]
    expected = np.asarray(base.dequantized() if bits else base) + 16.0 / 2 * np.asarray(pair["a"]) @ np.asarray(pair["b"])
    np.testing.assert_allclose(merged["blocks"][0]["mlp"]["up"], expected, atol=1e-6)
    np.testing.assert_array_equal(merged["embedding"], begun["embedding"])
    # Another run begins with both together.
    abstract = make_trainer(second).abstract_weights
    jax.tree.map(np.testing.assert_array_equal, open_initial(str(run_dir), MODEL).load(abstract), merged)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"initial_weights": ""}, "set initial_weights"),
        ({"optimizer": OptimizerConfig(name="muon", adam_learning_rate=1e-3)}, "muon"),
        ({"lora": LoraConfig(base_bits=8), "mesh": MeshConfig(fsdp=2)}, "mesh of `data` alone"),
    ],
)
def test_what_adapters_do_not_go_with_is_refused(tmp_path, options, complaint):
    config = sft_config(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(config, **{"initial_weights": "x", "lora": LoraConfig(), **options})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"content": "pairs"}, "not something to write"), ({"content": "prompts"}, "not something to write")],
)
def test_contents_that_are_not_to_be_written_are_refused(tmp_path, options, complaint):
    config = sft_config(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(config, data=dataclasses.replace(config.data, **options))
    with pytest.raises(ValueError, match="xz_baseline"):
        dataclasses.replace(config, xz_baseline=True)
