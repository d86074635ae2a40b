"""Learning from a teacher's distributions: the loss in float64, a run that comes nearer and goes on, and what is refused."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import scipy.special
from jax.extend.core import jaxprs_in_params

from data.config import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from data.loader import Batches
from data.prepare import prepare
from experiments.inspect import describe_plan
from inference.request import Token
from model.chips import topology_of
from model.config import LoraConfig, ModelConfig
from model.transformer import forward, unembed
from tests.networks import random_params
from train import loop
from train.checkpoint import Checkpoints
from train.config import (
    CheckpointConfig,
    DistillationConfig,
    EvalConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from train.distillation import TEACHER, distillation_sums
from train.metrics import read_jsonl
from train.objectives.config import PolicyConfig
from train.objectives.policy_gradient import Rollouts
from train.objectives.policy_gradient import prepare as prepare_update
from train.policy import Policy
from train.rl_config import RLConfig, RolloutConfig
from train.rl_step import policy_objective
from train.rollouts import to_rows
from train.step import abstract_batch, mesh_sizes

TAUGHT_BY = ModelConfig(vocab_size=258, num_layers=2, d_model=24, num_heads=2, d_ff=32, max_seq_len=64)
MODEL = ModelConfig(vocab_size=258, num_layers=1, d_model=16, num_heads=2, d_ff=32, max_seq_len=64)
FAST = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, schedule=ScheduleConfig("constant", warmup="0 %"))


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 258, (3, 21)).astype(np.int32)
    segments = np.where(np.arange(20) < np.array([[20], [13], [0]]), 1, 0).astype(np.int32)
    weights = (segments * (random.random((3, 20)) < 0.6)).astype(np.float32)
    places = np.broadcast_to(np.arange(20, dtype=np.int32), (3, 20)) * segments
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments,
        "positions": places,
        "weights": weights,
    }


@pytest.fixture(scope="module")
def networks():
    student, teacher = random_params(MODEL), random_params(TAUGHT_BY)
    return {**jax.tree.map(np.asarray, student), TEACHER: jax.tree.map(np.asarray, teacher)}


def logits_of(params, model, rows):
    read = jax.jit(lambda params, *row: unembed(params, model, forward(params, model, *row)[0]))
    return np.asarray(read(params, rows["tokens"], rows["positions"], rows["segment_ids"]), np.float64)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_loss_is_that_of_numpy_in_float64_whole_and_in_chunks(rows, networks, direction):
    config = DistillationConfig("x", TAUGHT_BY, direction, temperature=1.7, share=0.3)
    student = logits_of({name: leaf for name, leaf in networks.items() if name != TEACHER}, MODEL, rows)
    teacher = logits_of(networks[TEACHER], TAUGHT_BY, rows)
    log_p, log_q = (scipy.special.log_softmax(x / 1.7, axis=-1) for x in (student, teacher))
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    divergence = 1.7**2 * (np.exp(first) * (first - second)).sum(-1)
    likelihood = np.take_along_axis(scipy.special.log_softmax(student, axis=-1), rows["targets"][..., None], -1)[..., 0]
    nll, kl = (float((rows["weights"] * x).sum()) for x in (-likelihood, divergence))
    assert kl > 1

    def loss(params, chunk):
        return distillation_sums(params, MODEL, rows, None, config=config, loss=LossConfig(chunk_tokens=chunk))

    gradients = []
    for chunk in (0, 18):
        (total, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(networks, chunk)
        assert float(total) == pytest.approx(0.7 * nll + 0.3 * kl, rel=1e-5)
        assert float(sums["loss"]) == pytest.approx(nll, rel=1e-5)
        assert float(sums["teacher_kl"]) == pytest.approx(kl, rel=1e-5)
        assert float(sums["weight"]) == rows["weights"].sum()
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.pop(TEACHER)))
        gradients.append(gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *gradients)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients[0]))


def rl_job(**options):
    rollouts = RolloutConfig(prompts=2, max_prompt_tokens=4, max_tokens=5)
    settings = {"steps": 1, "rollouts": rollouts, "policy": PolicyConfig(group_size=2), "initial_weights": "x"}
    return RLConfig(**({"name": "taught", "model": MODEL, "task": TaskConfig("reverse")} | settings | options))


def policy_batch(config, lengths):
    """Rows and constants of an update, of a pair of answers of these lengths to each prompt."""
    answers = [[[Token(0, 0, 7 * n + t, -1.0, -1.0, None, None, "stop") for t in range(n)] for n in row] for row in lengths]
    samples = to_rows([[9, *range(i)] for i in range(len(lengths))], answers, config.row_tokens)
    flat, rewards = np.full(samples.mask.shape, -2.0, np.float32), np.tile([1.0, 0.25], len(lengths))
    scored = Rollouts(samples.mask, flat, flat, rewards, samples.group, np.ones(len(rewards)), samples.truncated)
    constants, _ = jax.jit(prepare_update, static_argnums=0)(config.policy, scored, 0.0)
    rows = {name: getattr(samples, name) for name in ("tokens", "targets", "positions", "segment_ids")}
    return rows | {name: np.asarray(x) for name, x in vars(constants).items() if x is not None}


@pytest.mark.parametrize("share_prompts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_policy_the_teacher_s_divergence_is_a_mean_over_the_tokens_that_were_drawn(networks, share_prompts):
    """Against numpy in float64; the rest of the loss is the policy's own, and gets the rest of the weight."""
    config = DistillationConfig("x", TAUGHT_BY, "reverse", temperature=1.3, share=0.6)
    taught, alone = rl_job(distillation=config, share_prompts=share_prompts), rl_job()
    batch = policy_batch(taught, [[5, 2], [1, 3]])

    def of(config):
        compute = jax.value_and_grad(lambda params: policy_objective(params, MODEL, batch, None, config=config), has_aux=True)
        return jax.jit(compute)(networks)

    (total, sums), gradient = of(taught)
    (without, _), _ = of(alone)
    student = logits_of({name: leaf for name, leaf in networks.items() if name != TEACHER}, MODEL, batch)
    teacher = logits_of(networks[TEACHER], TAUGHT_BY, batch)
    log_p, log_q = (scipy.special.log_softmax(x / 1.3, axis=-1) for x in (student, teacher))
    expected = (1.3**2 * np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))[batch["mask"] > 0].mean()
    assert expected > 0.5
    assert float(sums["teacher_kl"]) == pytest.approx(expected, rel=1e-5)
    assert abs(float(without)) > 0.01
    assert float(total) == pytest.approx(0.4 * float(without) + 0.6 * expected, rel=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.pop(TEACHER)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": dataclasses.replace(MODEL, vocab_size=300)}, r"distillation\.model\.vocab_size=258 is not"),
        ({"rollouts": RolloutConfig(2, 60, 6), "model": dataclasses.replace(MODEL, max_seq_len=96)}, "less than the 65 tokens"),
        ({"lora": LoraConfig()}, "leave lora out"),
        ({"mesh": MeshConfig(1, tensor=2)}, "mesh axes data and fsdp alone"),
    ],
)
def test_what_a_teacher_of_a_policy_does_not_go_with_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rl_job(distillation=DistillationConfig("x", TAUGHT_BY), **options)


def job(directory, **options):
    path = directory / "chats.jsonl"
    if not path.exists():
        chats = [{"prompt": f"q{i}", "completion": f"{i}{i}"} for i in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in chats))
    data = DataConfig(
        (SourceConfig("made", "files", path=str(path), held_out_fraction=0.2),),
        content="conversations",
        tokenizer=TokenizerConfig("bytes"),
        seq_len=64,
        cache_dir=str(directory / "cache"),
        loader_threads=0,
    )
    settings = {"checkpoint": CheckpointConfig(every=2), "eval": EvalConfig(every=100), "optimizer": FAST, "writers": ()}
    settings |= {"run_dir": str(directory / "run"), "model": MODEL, "data": data, "steps": 4, "batch_size": 8}
    return TrainConfig(**({"name": "taught"} | settings | options))


SGD = OptimizerConfig("sgd", 0.1, weight_decay=0.0, clip_norm=0.0, momentum=0.0, schedule=ScheduleConfig("constant", "0 %"))
CUTS = pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"accumulation": 4}, 1),
        ({"mesh": MeshConfig(8)}, 8),
        ({"mesh": MeshConfig(2, 4)}, 8),
    ],
    ids=["micro-batches", "eight devices", "eight devices, sharded"],
)


def after_a_step(trainer, batch):
    """Parameters after a step of plain gradient descent, and its metrics."""
    state = trainer.begin(random_params(MODEL), jax.random.key(0), random_params(TAUGHT_BY))
    state, metrics = trainer.step(state, jax.device_put(batch, trainer.batch_sharding))
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
@CUTS
def test_the_way_in_which_a_batch_is_cut_changes_nothing(tmp_path, changes, devices):
    """Rows hold different numbers of texts, so that a mean of means would be another number."""
    taught = DistillationConfig("x", TAUGHT_BY, temperature=1.7, share=0.3)
    config = job(tmp_path, distillation=taught, optimizer=SGD)
    batch = Batches(prepare(config.data, log=lambda _: None), config.data, batch_size=8, seed=0)[0]
    batch = {name: np.concatenate([x[:3], 0 * x[:1], x[4:]]) for name, x in batch.items()}  # a row of padding
    assert len(set(batch["weights"].sum(1).tolist())) > 2
    compare(after_a_step(loop.make_trainer(cut, jax.devices()[:n]), batch) for cut, n in both(config, changes, devices))


def products_with(jaxpr, width, by_hand=False):
    """(rows, are they one device's own) of the matrix products whose rows are so wide."""
    for equation in jaxpr.eqns:
        inside = by_hand or equation.primitive.name == "shard_map"
        shape = equation.outvars[0].aval.shape if equation.outvars else ()
        if equation.primitive.name == "dot_general" and shape[-1:] == (width,):
            yield math.prod(shape[:-1]), inside
        for inner in jaxprs_in_params(equation.params):
            yield from products_with(inner, width, inside)


def test_a_chunk_is_of_each_device_s_own_tokens(tmp_path):
    """Not of all devices' together: their heads would be gathered once for each of eight times as many chunks."""
    vocab = 259  # no other width here
    student, teacher = (dataclasses.replace(model, vocab_size=vocab) for model in (MODEL, TAUGHT_BY))
    config = job(tmp_path, model=student, distillation=DistillationConfig("x", teacher), mesh=MeshConfig(1, fsdp=8))
    config = dataclasses.replace(config, batch_size=32, loss=LossConfig(chunk_tokens=64))
    trainer = loop.make_trainer(config)
    traced = jax.make_jaxpr(trainer.step)(trainer.abstract_state, abstract_batch(config))
    # Logits, and the gradient of the student's head.
    assert set(products_with(traced.jaxpr, vocab)) == {(64, True), (student.d_model, True)}


def both(config, changes, devices):
    return (config, 1), (dataclasses.replace(config, **changes), devices)


def compare(results):
    (params, metrics), (found, found_metrics) = results
    assert metrics["grad_norm"] > 0.1
    assert metrics["teacher_kl"] > 0.1
    assert found_metrics == pytest.approx(metrics, rel=2e-5, abs=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), found, params)


@pytest.mark.slow
@CUTS
def test_on_policy_the_way_in_which_a_batch_is_cut_changes_nothing(changes, devices):
    config = DistillationConfig("x", TAUGHT_BY, "reverse", temperature=1.3, share=0.6)
    taught = rl_job(distillation=config, optimizer=SGD, rollouts=RolloutConfig(4, 4, 5), mesh=MeshConfig(1))
    batch = policy_batch(taught, [[5, 2], [1, 3], [4, 4], [1, 1]])
    compare(after_a_step(Policy(cut, jax.devices()[:n]).trainer, batch) for cut, n in both(taught, changes, devices))


@pytest.mark.slow
def test_gradients_through_packed_rows_are_those_of_texts_alone(tmp_path):
    """The student and the teacher read nothing of the text before."""
    config = job(tmp_path)
    batch = Batches(prepare(config.data, log=lambda _: None), config.data, batch_size=2, seed=0)[0]
    segments = batch["segment_ids"]
    assert segments.max() >= 2
    rows = {name: [] for name in batch}
    for row in range(2):
        for segment in range(1, segments[row].max() + 1):
            for name in rows:
                x = batch[name][row][segments[row] == segment]
                rows[name].append(np.pad(np.ones_like(x) if name == "segment_ids" else x, (0, segments.shape[1] - len(x))))
    alone = {name: np.stack(of_name) for name, of_name in rows.items()}
    taught = DistillationConfig("x", TAUGHT_BY, temperature=1.7, share=0.3)
    params = {**random_params(MODEL), TEACHER: random_params(TAUGHT_BY)}

    def loss(params, rows):
        return distillation_sums(params, MODEL, rows, None, config=taught, loss=LossConfig())[0]

    (found, gradient), (expected, of_alone) = (jax.jit(jax.value_and_grad(loss))(params, rows) for rows in (batch, alone))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(of_alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), gradient, of_alone)


def params_of(config):
    state = Checkpoints(f"{config.run_dir}/checkpoints", keep=None).restore_newest
    trainer = loop.make_trainer(config)
    return state({"params": trainer.abstract_state.params}, print, partial=True)[0]["params"]


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_and_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    quiet = {"log": lambda _: None}
    assert loop.train(job(tmp_path, model=TAUGHT_BY, run_dir=str(tmp_path / "teacher"), steps=20), **quiet) == 0
    taught = DistillationConfig(str(tmp_path / "teacher"), TAUGHT_BY, share=1.0)
    eval_config = EvalConfig(every=100, sample_prompts=("q1",), sample_tokens=4)
    straight = job(tmp_path, distillation=taught, run_dir=str(tmp_path / "straight"), steps=20, eval=eval_config)
    assert loop.train(straight, **quiet) == 0
    records = [record for record in read_jsonl(tmp_path / "straight/metrics.jsonl") if "loss" in record]
    assert records[-1]["teacher_kl"] < records[0]["teacher_kl"] / 4
    assert records[-1]["loss"] < records[0]["loss"]  # the texts', of which it only knows what the teacher does
    stopped = dataclasses.replace(straight, run_dir=str(tmp_path / "stopped"))
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_check_loss", lambda self, step, metrics: next(calls) < 5 or exit_now())
        with pytest.raises(KeyboardInterrupt):
            loop.train(stopped, **quiet)
    assert loop.train(stopped, **quiet) == 0
    jax.tree.map(np.testing.assert_array_equal, params_of(stopped), params_of(straight))
    path = tmp_path / "stopped/teacher.json"
    path.write_text(json.dumps({"source": "x", "digest": "0" * 64}))
    with pytest.raises(ValueError, match=r"teacher no longer holds the weights"):
        loop.train(stopped, **quiet)


def exit_now():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": dataclasses.replace(MODEL, vocab_size=300)}, r"distillation\.model\.vocab_size=258 is not"),
        ({"lora": LoraConfig(), "initial_weights": "x"}, "leave lora out"),
        ({"loss": LossConfig(z_loss=1e-4)}, r"loss\.z_loss"),
        ({"mesh": MeshConfig(1, tensor=2)}, "mesh axes data and fsdp alone"),
    ],
)
def test_what_a_teacher_does_not_go_with_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        job(tmp_path, distillation=DistillationConfig("x", TAUGHT_BY), **options)
    with pytest.raises(ValueError, match=r"distillation\.share=0"):
        DistillationConfig("x", TAUGHT_BY, share=0)


def test_a_teacher_that_does_not_divide_over_the_mesh_is_refused(tmp_path):
    uneven = dataclasses.replace(TAUGHT_BY, d_model=36)
    wide = job(tmp_path, distillation=DistillationConfig("x", uneven), mesh=MeshConfig(1, fsdp=8), batch_size=8)
    with pytest.raises(ValueError, match=r"teacher.*d_model|teacher.*36"):
        mesh_sizes(wide, 8)


def test_a_teacher_that_attends_by_a_backend_for_other_devices_is_refused(tmp_path):
    """Before data is prepared, and before a job is sent to a slice."""
    flash, cudnn = (
        job(tmp_path, distillation=DistillationConfig("x", dataclasses.replace(TAUGHT_BY, head_dim=8, **changes)))
        for changes in ({"attention_backend": "flash"}, {"attention_backend": "cudnn", "dtype": "bfloat16"})
    )
    with pytest.raises(ValueError, match=r"distillation\.model\.attention_backend='flash' is not for 'cpu'"):
        loop.make_trainer(flash, jax.devices()[:1])
    with pytest.raises(ValueError, match=r"distillation\.model\.attention_backend='cudnn' is not for 'tpu'"):
        describe_plan(cudnn, topology_of("v5e:2x2"))


def test_rows_of_odd_length_are_refused_with_cudnn_of_policy_or_teacher():
    cudnn = {"attention_backend": "cudnn", "dtype": "bfloat16"}
    assert rl_job().row_tokens % 2 == 0
    odd = RolloutConfig(prompts=2, max_prompt_tokens=4, max_tokens=6)
    for options in (
        {"model": dataclasses.replace(MODEL, **cudnn)},
        {"distillation": DistillationConfig("x", dataclasses.replace(TAUGHT_BY, head_dim=8, **cudnn))},
    ):
        rl_job(**options)
        with pytest.raises(ValueError, match=r"rollouts\.max_prompt_tokens \+ rollouts\.max_tokens - 1=9 is odd"):
            rl_job(**options, rollouts=odd)
