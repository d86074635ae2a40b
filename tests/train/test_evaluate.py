"""The numbers that a run reports: recomputed from its weights, its texts and its clock."""

import dataclasses
import functools
import json
import lzma
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.loader import held_out_batches
from data.prepare import prepare
from experiments.cli import load_train_config
from model.flops import train_flops_per_token
from model.sharding import MESH_AXES, make_mesh
from model.transformer import forward, unembed
from tests.tiny import WORDS, write_corpus, write_tiny_job
from train import loop, peak
from train.baseline import xz_bits_per_byte
from train.checkpoint import Checkpoints
from train.loop import evaluate, train
from train.metrics import read_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of six steps with greedy samples, its data, its trainer and its last state."""
    directory = tmp_path_factory.mktemp("evaluate")
    path = write_tiny_job(directory)
    write_corpus(directory / "b", "more", seed=3, num_documents=300)  # the second source holds out several times as much
    overrides = ["steps=6", "eval.every=2", "eval.sample_temperature=0", "eval.sample_prompts=('the','as')", "xz_baseline=True"]
    config = load_train_config(str(path), [f"--config.{word}" for word in overrides])
    assert train(config, log=lambda _: None) == 0
    trainer = loop.make_trainer(config)
    state, _ = Checkpoints(f"{config.run_dir}/checkpoints", keep=None).restore(6, trainer.abstract_state)
    return config, prepare(config.data, config.seed, log=lambda _: None), trainer, state


def of_run(config, name):
    return read_jsonl(f"{config.run_dir}/{name}.jsonl")


@functools.partial(jax.jit, static_argnames="model")
def logits_of(params, model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return unembed(params, model, forward(params, model, tokens, positions)[0])


def full_scores(config, data, params) -> dict[str, tuple[float, int, int]]:
    """Of each source's held-out texts: loss in nats, predicted tokens and bytes, from the logits of every token.

    Documents by themselves, a row's length at a time: neither packing nor the loss of the training step has a part in it.
    """
    length = config.data.seq_len
    totals = {}
    for source in data.held_out:
        texts = list(data.held_out_texts(source))
        pieces = []
        for text in texts:
            ids = [data.tokenizer.bos_id, *data.tokenizer.encode(text), data.tokenizer.eos_id]
            pieces += [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]
        tokens = np.zeros((len(pieces), length), np.int32)
        for row, piece in zip(tokens, pieces, strict=True):
            row[: len(piece) - 1] = piece[:-1]
        logits = np.asarray(logits_of(params, config.model, tokens), np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        loss = -sum(row[np.arange(len(piece) - 1), piece[1:]].sum() for row, piece in zip(logprobs, pieces, strict=True))
        totals[source] = (loss, sum(len(piece) - 1 for piece in pieces), sum(len(text.encode()) for text in texts))
    return totals


def test_the_result_is_that_of_the_averaged_weights_on_every_held_out_text(run):
    config, data, _, state = run
    assert any(len(packed) % config.batch_size for packed in data.held_out.values())  # a last batch with padding
    totals = full_scores(config, data, state.ema)
    expected = {}
    for suffix, sources in (("", ["a", "b"]), ("/a", ["a"]), ("/b", ["b"])):
        loss, tokens, num_bytes = np.sum([totals[source] for source in sources], axis=0)
        expected |= {f"val_loss{suffix}": loss / tokens, f"bits_per_byte{suffix}": loss / np.log(2) / num_bytes}
    result = json.loads(pathlib.Path(config.run_dir, "result.json").read_text())
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    final = {name: value for name, value in of_run(config, "metrics")[-1].items() if name.startswith("final_")}
    assert final == {f"final_{name}": result[name] for name in expected}
    raw = full_scores(config, data, state.params)
    assert raw["a"][0] / raw["a"][1] != pytest.approx(expected["val_loss/a"], rel=1e-3)


def test_every_point_of_the_curve_is_of_the_same_rows(run):
    """The last one too, beside the complete evaluation; sources weigh as they do in that."""
    config, data, trainer, state = run
    assert config.eval.max_batches == 1
    *_, before, last = [record for record in of_run(config, "metrics") if "val_loss" in record]
    assert (before["step"], last["step"]) == (4, 6)
    assert before.keys() == {name for name in last if not name.startswith("final_")}
    curve = evaluate(trainer, state.ema, data, max_batches=1)
    assert {name: last[name] for name in curve} == curve
    assert curve["val_loss"] != last["final_val_loss"]

    totals = full_scores(config, data, state.ema)
    tokens = {source: totals[source][1] for source in totals}
    rows = {source: next(held_out_batches(data, config.data, source, config.batch_size))["weights"].sum() for source in totals}
    assert rows["a"] / rows["b"] != pytest.approx(tokens["a"] / tokens["b"], rel=0.5)
    loss = sum(tokens[source] * curve[f"val_loss/{source}"] for source in totals)
    bits = loss / np.log(2)
    bytes_per_token = {s: curve[f"val_loss/{s}"] / np.log(2) / curve[f"bits_per_byte/{s}"] for s in totals}
    assert curve["val_loss"] == pytest.approx(loss / sum(tokens.values()), rel=1e-6)
    assert curve["bits_per_byte"] == pytest.approx(bits / sum(tokens[s] * bytes_per_token[s] for s in totals), rel=1e-6)


@pytest.mark.parametrize(("max_batches", "evaluations"), [(0, [0]), (10_000, [10_000])])
def test_where_the_curve_is_complete_nothing_is_evaluated_twice(run, tmp_path, monkeypatch, max_batches, evaluations):
    config, *_ = run
    settings = dataclasses.replace(config.eval, max_batches=max_batches, sample_prompts=())
    config = dataclasses.replace(config, steps=1, writers=(), eval=settings, run_dir=str(tmp_path / "run"))
    limits = []

    def counted(trainer, params, data, max_batches=0, *more):
        limits.append(max_batches)
        return {"val_loss": 2.0 + len(limits)}

    monkeypatch.setattr(loop, "evaluate", counted)
    assert train(config, log=lambda _: None) == 0
    assert limits == evaluations
    last = of_run(config, "metrics")[-1]
    assert (last["val_loss"], last["final_val_loss"]) == (3.0, 2.0 + len(limits))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["val_loss"] == last["final_val_loss"]


@pytest.mark.parametrize("name", ["metrics", "timing"])
def test_a_result_is_not_overwritten_by_less(run, tmp_path, name):
    """As where someone cleaned up a finished run's directory and typed its command again."""
    run_dir = shutil.copytree(run[0].run_dir, tmp_path / "run")
    result = (run_dir / "result.json").read_bytes()
    (run_dir / f"{name}.jsonl").unlink()
    with pytest.raises(RuntimeError, match=rf"{name}.jsonl lacks .*bring the file back, or move .*checkpoints/6 away"):
        train(dataclasses.replace(run[0], run_dir=str(run_dir)), log=lambda _: None)
    assert (run_dir / "result.json").read_bytes() == result


def test_samples_at_temperature_0_are_the_most_likely_tokens_of_the_averaged_weights(run):
    config, data, _, state = run
    for sample in [sample for sample in of_run(config, "samples") if sample["step"] == 6]:
        ids = data.tokenizer.encode_prompt(sample["prompt"])
        start = len(ids)
        while len(ids) < start + config.eval.sample_tokens and ids[-1] != data.tokenizer.eos_id:
            tokens = np.zeros((1, 32), np.int32)
            tokens[0, : len(ids)] = ids
            ids.append(int(np.argmax(logits_of(state.ema, config.model, tokens)[0, len(ids) - 1])))
        assert sample["text"] == data.tokenizer.decode(ids[start:])


def test_mfu_is_the_share_of_the_peak_that_the_steps_took(run):
    config, *_ = run
    peak_flops = json.loads(pathlib.Path(config.run_dir, "provenance.json").read_text())["devices"]["peak_flops"]
    steps = [record for record in of_run(config, "timing") if "step" in record]
    assert len(steps) == config.steps
    for record in steps:
        tokens_per_second = config.batch_size * config.data.seq_len / record["step_seconds"]
        assert record["tokens_per_second"] == pytest.approx(tokens_per_second)
        flops = tokens_per_second * train_flops_per_token(config.model, config.data.seq_len)
        assert record["mfu"] == pytest.approx(flops / peak_flops)


def test_the_peak_is_the_fastest_trial_s_operations_by_its_seconds(monkeypatch):
    """On two devices, 4 matmuls of 8 x 8 in a row on each; the first trial of one is too short to count."""
    took = iter([0.001, 0.02, 0.02, *[0.5] * 6, 0.25, 0.4])
    now, readings = 0.0, 0

    def clock():
        nonlocal now, readings
        readings += 1
        now += 0.0 if readings % 2 else next(took)
        return now

    monkeypatch.setattr(peak.time, "perf_counter", clock)
    mesh = make_mesh({**dict.fromkeys(MESH_AXES, 1), "data": 2}, jax.devices()[:2])
    multiplications_and_additions = 2 * 4 * (8 * 8 * 8 + 8 * 8 * 8)
    assert peak.matmul_peak(mesh, "float32", size=8) == pytest.approx(multiplications_and_additions / 0.25)
    assert not list(took)


def test_the_baseline_is_what_xz_9e_makes_of_each_document():
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(20_000)) + "é", "short"]
    sizes = [len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) for text in texts]
    assert xz_bits_per_byte(texts) == 8 * sum(sizes) / sum(len(text.encode()) for text in texts)
    assert len(lzma.compress(texts[0].encode(), preset=0)) > 1.05 * sizes[0]


def test_the_baseline_of_a_run_is_of_all_its_held_out_texts(run):
    config, data, *_ = run
    texts = [text for source in data.held_out for text in data.held_out_texts(source)]
    result = json.loads(pathlib.Path(config.run_dir, "result.json").read_text())
    assert result["baseline_xz_bits_per_byte"] == xz_bits_per_byte(texts)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
def test_whatever_is_not_finite_is_an_incident(run, name, value):
    of_one_step = object.__new__(loop.Loop)
    of_one_step.config, of_one_step.losses = run[0], loop.collections.deque()
    with pytest.raises(loop.Incident, match=f"step 3: {name} is {value}"):
        of_one_step._check_loss(3, {"loss": 1.0, "grad_norm": 1.0, "param_norm": 1.0, name: value})


def test_a_transfer_that_a_step_makes_unasked_is_an_error(run, tmp_path, monkeypatch):
    """A step that needs an array of the host waits for it, and the devices for the step."""
    config = dataclasses.replace(run[0], run_dir=str(tmp_path / "run"))
    compiled = loop.Loop._compile

    def leaky(self):
        step = compiled(self)
        return lambda state, batch: step(state, {**batch, "weights": batch["weights"] * np.ones((1, 1), np.float32)})

    monkeypatch.setattr(loop.Loop, "_compile", leaky)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(config, log=lambda _: None)


def test_a_few_held_out_batches_are_spread_from_the_first_to_the_last(run):
    config, data, *_ = run
    whole = list(held_out_batches(data, config.data, "b", 2))
    assert len(whole) > 8
    first, last = held_out_batches(data, config.data, "b", 2, max_batches=2)
    np.testing.assert_array_equal(first["tokens"], whole[0]["tokens"])
    np.testing.assert_array_equal(last["tokens"], whole[-1]["tokens"])
    middle = list(held_out_batches(data, config.data, "b", 2, max_batches=3))[1]
    np.testing.assert_array_equal(middle["tokens"], whole[round((len(whole) - 1) / 2)]["tokens"])
