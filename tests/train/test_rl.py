"""A whole run of reinforcement learning, tiny: that it learns, that it goes on to the same bits, and what it refuses."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from data.config import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from data.tasks.reverse import Reverse
from data.tasks.task import Score
from data.tokenizer import load_tokenizer, train_tokenizer
from experiments.report import write_report
from experiments.sampling import open_any
from inference.engine import Token
from model.config import LoraConfig, ModelConfig, MoeConfig
from model.params import init_params, param_specs, unstack_layers
from model.transformer import forward, unembed
from tests.networks import random_params
from train import rl
from train.config import CheckpointConfig, DistillationConfig, MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from train.initial import open_initial
from train.loop import train
from train.metrics import read_jsonl
from train.objectives.config import (
    CISPO,
    GRPO,
    GSPO,
    MAXRL,
    PPO,
    REINFORCE,
    REINFORCE_PLUS_PLUS,
    REMAX,
    RLOO,
    ImportanceConfig,
    KLConfig,
    ObjectiveConfig,
    PolicyConfig,
    ProcessModelConfig,
    RewardModelConfig,
    ValueConfig,
    dapo,
    dr_grpo,
)
from train.preferences import answer_scores
from train.rewards import Part, Verifiers
from train.rl_config import RLConfig, RLEvalConfig, RolloutConfig
from train.rl_step import score
from train.rollouts import prompt_seed, to_rows

MODEL = ModelConfig(vocab_size=32, num_layers=1, d_model=32, num_heads=2, d_ff=64, max_seq_len=32)
EXPERTS = dataclasses.replace(MODEL, moe=MoeConfig(num_experts=4, experts_per_token=2, d_ff=32, balance_loss=0.5, z_loss=0.1))
TASK = TaskConfig("reverse", (("min_length", 1), ("max_length", 2), ("alphabet", "ab"), ("template", "{text}=")))
ONE_DEVICE = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, schedule=ScheduleConfig("constant", warmup="0 %"))


@pytest.fixture(autouse=True)
def _one_device(request, monkeypatch):
    if "eight" not in request.node.name:
        monkeypatch.setattr(rl, "Policy", functools.partial(rl.Policy, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory):
    """A run that has seen a few answers."""
    directory = tmp_path_factory.mktemp("warm")
    source = SourceConfig("reverse", "task", task=TASK, num_examples=200, held_out_fraction=0.1)
    data = DataConfig((source,), tokenizer=TokenizerConfig("chars"), seq_len=16, cache_dir=str(directory / "cache"))
    config = TrainConfig(
        "warm",
        MODEL,
        data,
        steps=8,
        batch_size=8,
        run_dir=str(directory / "run"),
        writers=(),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    assert train(config, log=lambda _: None) == 0
    return directory / "run"


def job(warm_start, run_dir, **changes):
    settings = {
        "policy": PolicyConfig(group_size=4),
        "rollouts": RolloutConfig(prompts=4, max_prompt_tokens=6, max_tokens=6, max_batch=8, verifiers=1),
        "eval": RLEvalConfig(every=100, prompts=2, samples=2),
        "steps": 3,
        "optimizer": ONE_DEVICE,
        "checkpoint": CheckpointConfig(every=2),
    }
    base = {"name": "tiny", "model": MODEL, "initial_weights": str(warm_start), "task": TASK, "run_dir": str(run_dir)}
    return RLConfig(**(base | settings | changes))


# What shows whether a run is honest and healthy, beside the reasons that its verifiers give.
WATCHED = {
    "reward_mean", "reward_std", "reward/right", "reward/right/failed", "bad_reward_fraction",
    "zero_variance_fraction", "effective_batch_fraction", "effective_sample_fraction", "prompts_left_out", "truncated_fraction",
    "length_mean", "length_correct", "length_wrong", "mismatch_kl", "mismatch_max", "reference_kl", "update_kl", "updates",
    "clip_low_fraction", "clip_high_fraction", "entropy", "grad_norm", "param_norm", "loss",
}  # fmt: skip


def records(run_dir):
    return [record for record in read_jsonl(Path(run_dir) / "metrics.jsonl") if "loss" in record]


def run(config):
    assert rl.train_with_rewards(config, log=lambda _: None) == 0
    return records(config.run_dir)


def drawn(tokens, finish="stop"):
    last = len(tokens) - 1
    return [Token(0, 0, token, -0.5 - i, -0.5 - i, None, None, finish if i == last else None) for i, token in enumerate(tokens)]


def test_the_stop_token_is_an_action_and_the_prompt_and_padding_are_not():
    rows = to_rows([[5, 6, 7], [8]], [[drawn([1, 2])], [drawn([3, 3, 3], "length")]], row_tokens=6)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 1, 0, 0], [8, 3, 3, 0, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[6, 7, 1, 2, 0, 0], [3, 3, 3, 0, 0, 0]])
    np.testing.assert_array_equal(rows.mask, [[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.behavior_logprobs, [[0, 0, -0.5, -1.5, 0, 0], [-0.5, -1.5, -2.5, 0, 0, 0]])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0]])
    assert rows.truncated.tolist() == [False, True]
    assert rows.answers() == [[1], [3, 3, 3]]


def test_every_prompt_of_every_step_has_random_numbers_of_its_own():
    seeds = {prompt_seed(seed, step, i) for seed in range(3) for step in range(20) for i in range(20)}
    assert len(seeds) == 3 * 20 * 20
    assert max(seeds) >= 2**31


@pytest.mark.parametrize(
    "policy",
    [
        dataclasses.replace(GRPO, group_size=4),
        pytest.param(dataclasses.replace(REINFORCE, group_size=4, advantage="ema"), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(GSPO, group_size=4), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(CISPO, group_size=4), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(PPO, group_size=4, kl=KLConfig(0.05, target=1.0)), marks=pytest.mark.slow),
        pytest.param(PolicyConfig(group_size=4, zero_variance="resample"), marks=pytest.mark.slow),
    ],
    ids=["grpo", "reinforce-ema", "gspo", "cispo", "ppo", "resample"],
)
def test_the_first_update_is_on_policy_and_the_run_ends_with_a_result(warm_start, tmp_path, policy):
    """The sampler's log-probabilities are the trainer's, so the ratio is 1; that of a second update no longer is."""
    metrics = run(job(warm_start, tmp_path / "run", policy=policy, seed=1))
    assert [record["step"] for record in metrics] == [1, 2, 3]
    for record in metrics:
        assert record["mismatch_max"] < 1e-5
        assert abs(record["update_kl"]) < 1e-9
        assert record["reward/right/failed"] == 0
        if policy.kl.loss_coefficient:
            assert record.keys() >= WATCHED
            assert any(name.startswith("reward/right/reason/") for name in record)
    assert any(record["grad_norm"] > 0 for record in metrics[:-1]), "nothing earned a reward in time: take another seed"
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 3
    assert 0 <= result["eval/pass@1"] <= result["eval/pass@2"] <= 1
    assert result["drawn_tokens"] == sum(round(16 * record["length_mean"]) for record in metrics)
    page = write_report(tmp_path / "run").read_text()
    assert all(title in page for title in ("Held-out prompts", "Length of answers", "KL of sampler and trainer"))
    if policy.kl.needs_reference:
        assert "KL from the reference" in page
        assert metrics[0]["reference_kl"] == pytest.approx(0, abs=1e-6)
        assert metrics[-1]["reference_kl"] != 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "changes"),
    [
        ("truncated_sampling", {"rollouts": RolloutConfig(4, 6, 6, max_batch=8, verifiers=1, max_mismatch=0, top_k=2)}),
        ("micro_batch_normaliser", {"accumulation": 8}),
        ("stop_token_untrained", {}),
    ],
)
def test_a_bug_on_purpose_changes_the_update(warm_start, tmp_path, bug, changes):
    clean = run(job(warm_start, tmp_path / "clean", **({} if bug == "truncated_sampling" else changes)))
    buggy = run(job(warm_start, tmp_path / "buggy", policy=PolicyConfig(group_size=4, bugs=(bug,)), **changes))
    assert buggy[0]["grad_norm"] != pytest.approx(clean[0]["grad_norm"], rel=1e-3)
    # What is drawn, and how far the trainer's distribution is from the drawn one.
    same = bug != "truncated_sampling"
    assert (buggy[0]["length_mean"] == clean[0]["length_mean"]) or not same
    assert (buggy[0]["mismatch_kl"] < 1e-5) == same


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "rollouts": RolloutConfig(4, 6, 6, temperature=0.7, max_batch=8, verifiers=1),
            "policy": dataclasses.replace(GRPO, group_size=4),
        },
        {"lora": LoraConfig(rank=2), "policy": dataclasses.replace(GRPO, group_size=4)},
        {"lora": LoraConfig(rank=2, base_bits=8)},
    ],
    ids=["temperature", "lora", "rounded base"],
)
def test_sampler_and_trainer_agree_for_what_else_may_be_set(warm_start, tmp_path, changes):
    """And the reference, which is scored at the temperature of the policy: at first there is no distance between them."""
    metrics = run(job(warm_start, tmp_path / "run", **changes))
    assert all(record["mismatch_max"] < 1e-5 and abs(record["update_kl"]) < 1e-9 for record in metrics)
    assert abs(metrics[0].get("reference_kl", 0)) < 1e-6
    assert any(record["grad_norm"] > 0 for record in metrics)


@pytest.mark.parametrize("stop_after", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_bits(warm_start, tmp_path, stop_after, monkeypatch):
    """With the samples of the next step in flight, minibatches in random order and an adaptive baseline."""
    changes = {
        "policy": PolicyConfig(
            group_size=4, updates_per_batch=2, importance=ImportanceConfig("token"), kl=KLConfig(0.1, target=0.5)
        ),
        "rollouts": RolloutConfig(4, 6, 6, ahead=True, max_batch=8, verifiers=1),
        "minibatches": 2,
    }
    straight = run(job(warm_start, tmp_path / "straight", **changes))
    stopped = job(warm_start, tmp_path / "stopped", **changes)
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(rl, "stop_on_signal", lambda: StopAfter(stop_after, calls))
        assert rl.train_with_rewards(stopped, log=lambda _: None) == 42
    assert run(stopped) == straight
    assert all(record["reward/total"] == pytest.approx(record["reward_mean"], abs=1e-6) for record in straight)
    assert read_jsonl(tmp_path / "stopped/samples.jsonl") == read_jsonl(tmp_path / "straight/samples.jsonl")


@pytest.fixture(scope="module")
def updates(warm_start, tmp_path_factory):
    """Of one batch in two minibatches, passed over twice, with a value function: the open loop; what is known before; rows and
    metrics of each update; and the metrics with a limit between the KL of the first update and that of the second."""
    policy = PolicyConfig(advantage="gae", value=ValueConfig(), group_size=4, updates_per_batch=2, entropy_coefficient=0.1)
    config = job(warm_start, tmp_path_factory.mktemp("updates") / "run", policy=policy, minibatches=2)
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "Policy", functools.partial(rl.Policy, devices=jax.devices()[:1]))
        with rl.open_loop(config, lambda _: None, None, 0.0) as loop:
            step, begun = loop.policy.trainer.step, jax.tree.map(jax.numpy.copy, loop.state.train)

            def watched(state, batch):
                rows.append(jax.device_get(batch))
                return step(state, batch)

            loop.policy.trainer = dataclasses.replace(loop.policy.trainer, step=watched)
            loop._load_engine()
            judged, _ = loop._samples_of(0)
            # Whatever was drawn, there is something to learn.
            judged = dataclasses.replace(judged, rewards=np.arange(16, dtype=np.float32) % 4 / 3)
            constants, before = jax.device_get(loop._constants(judged))
            metrics = jax.device_get(loop._update(judged.samples, constants, 0))
            found = {"loop": loop, "before": before, "rows": list(rows), "metrics": metrics}
            limit = float(metrics[0]["update_kl"] + metrics[1]["update_kl"]) / 2
            loop.config = dataclasses.replace(config, policy=dataclasses.replace(policy, max_update_kl=limit))
            loop.state = dataclasses.replace(loop.state, train=begun)
            limited = jax.device_get(loop._update(judged.samples, constants, 0))
            yield types.SimpleNamespace(**found, limited=limited)


def test_the_first_minibatch_has_ratio_1_and_later_ones_do_not(updates):
    first, *others = updates.metrics
    assert abs(first["update_kl"]) < 1e-9
    assert first["clip_low_fraction"] == first["clip_high_fraction"] == 0
    assert all(update["update_kl"] > 1e-7 for update in others)


def test_each_pass_goes_over_all_rows_in_an_order_of_its_own(updates):
    assert len(updates.rows) == updates.loop.config.num_updates / 3 == 4  # of three steps
    first, second = (np.concatenate([part["targets"] for part in updates.rows[i : i + 2]]) for i in (0, 2))
    assert len(first) == 16
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert (first != second).any()


def test_a_large_kl_ends_the_updates_of_a_batch(updates):
    """The update that meets it is made, and is the last."""
    assert len(updates.metrics) == 4
    assert len(updates.limited) == updates.loop.state.train.step == 2
    for name in ("loss", "update_kl", "grad_norm"):
        assert [update[name] for update in updates.limited] == [update[name] for update in updates.metrics[:2]]


def test_a_new_value_head_explains_nothing_rather_than_less(updates):
    assert updates.before["explained_variance"] == updates.metrics[0]["value_mean"] == 0
    assert updates.metrics[1]["value_mean"] != 0


def test_without_a_penalty_no_reference_is_kept(updates):
    assert updates.loop.reference is None
    assert "kl_loss" not in updates.metrics[0]


class StopAfter:
    def __init__(self, steps, calls):
        self.steps, self.calls = steps, calls

    def __enter__(self):
        return lambda: next(self.calls) + 1 >= self.steps

    def __exit__(self, *_):
        return None


# Each surrogate, advantage and way of weighing tokens. None is silent where all rewards of a group are equal.
ALGORITHMS = {
    "grpo": dataclasses.replace(GRPO, entropy_coefficient=0.1),
    "dapo": dataclasses.replace(dapo(6, 3), zero_variance="drop"),
    "dr_grpo": dr_grpo(6),
    "gspo": GSPO,
    "cispo": CISPO,
    "maxrl": MAXRL,
    "reinforce": REINFORCE,
    "reinforce_plus_plus": REINFORCE_PLUS_PLUS,
    "rloo": RLOO,
    "remax": REMAX,
    "ppo": PPO,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_change_nothing_but_memory(warm_start, tmp_path, name, monkeypatch):
    verifiers_instead(monkeypatch, odd_is_right, 16)
    policy = dataclasses.replace(ALGORITHMS[name], group_size=4)
    whole, parts = (run(job(warm_start, tmp_path / str(n), accumulation=n, steps=1, policy=policy))[0] for n in (1, 4))
    assert whole["grad_norm"] > 0
    for name in ("loss", "grad_norm", "entropy", "param_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_eight_devices_do_what_one_does(warm_start, tmp_path, name, monkeypatch):
    verifiers_instead(monkeypatch, odd_is_right, 16)
    policy = dataclasses.replace(ALGORITHMS[name], group_size=4)
    many = run(job(warm_start, tmp_path / "many", steps=1, policy=policy))[0]
    monkeypatch.setattr(rl, "Policy", functools.partial(rl.Policy, devices=jax.devices()[:1]))
    one = run(job(warm_start, tmp_path / "one", steps=1, policy=policy))[0]
    assert one["grad_norm"] > 0
    for name in ("reward_mean", "length_mean", "loss", "grad_norm", "entropy", "param_norm"):
        assert many[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7)


BARE = (
    "{%- for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{- m.content + eos_token }}{% endgeneration %}"
    "{%- else %}{{- bos_token + m.content }}{% endif %}{% endfor %}"
)


PAIRWISE = ObjectiveConfig(reward_model=RewardModelConfig())


@pytest.fixture(scope="module")
def scorer(warm_start):
    """Makes a reward model that begins with the warm start and was shown a chat template."""

    def make(name, template, objective=PAIRWISE):
        source = SourceConfig("reverse", "task", task=TASK, num_examples=200, held_out_fraction=0.4)
        cache = str(warm_start.parent / "cache")
        data = DataConfig((source,), seq_len=16, cache_dir=cache, content=objective.content, chat_template=template)
        config = TrainConfig(
            name,
            MODEL,
            data,
            steps=8,
            batch_size=8,
            initial_weights=str(warm_start),
            objective=objective,
            run_dir=str(warm_start.parent / name),
            writers=(),
            optimizer=OptimizerConfig(learning_rate=1e-2),
        )
        assert train(config, log=lambda _: None) == 0
        return config.run_dir

    return make


@pytest.mark.slow
def test_a_reward_model_judges_with_the_task_and_without(warm_start, scorer, tmp_path):
    model = scorer("scorer", BARE)
    metrics = run(job(warm_start, tmp_path / "alone", reward_model=model, task_weight=0.0, steps=2))
    for record in metrics:
        assert record["reward/total"] == pytest.approx(record["reward/learned"], abs=1e-6)
        assert 0 <= record["reward/right"] <= 1
    assert any(abs(record["reward/learned"] - record["reward/right"]) > 0.01 for record in metrics)
    assert 0 <= json.loads((tmp_path / "alone/result.json").read_text())["eval/pass@1"] <= 1
    together = run(job(warm_start, tmp_path / "together", reward_model=model, reward_model_weight=0.5, steps=1))
    assert together[0]["reward/right"] == metrics[0]["reward/right"]  # the same samples
    assert together[0]["reward/total"] == pytest.approx(
        together[0]["reward/right"] + 0.5 * together[0]["reward/learned"], abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["min", "product"])
def test_a_process_model_judges_by_the_chance_that_steps_are_right(warm_start, scorer, tmp_path, steps, monkeypatch):
    seen = watch_constants(monkeypatch)
    model = scorer(f"process_{steps}", BARE, ObjectiveConfig(process_model=ProcessModelConfig()))
    options = {"reward_model": model, "reward_model_steps": steps, "task_weight": 0.0}
    (record,) = run(job(warm_start, tmp_path / "run", steps=1, **options))
    ((judged, _, loop),) = seen
    assert np.all((judged.rewards > 0) & (judged.rewards < 1))
    assert np.ptp(judged.rewards) > 0
    assert record["reward/total"] == pytest.approx(float(judged.rewards.mean()), rel=1e-5)
    # Of an answer in one line there is one step, whatever is made of several.
    last = answer_scores(loop.learned.params, MODEL, *whole_rows(judged.samples))
    places = judged.samples.segment_ids.sum(1)
    chances = 1 / (1 + np.exp(-np.asarray(last, np.float64)[np.arange(len(places)), places]))
    np.testing.assert_allclose(judged.rewards, chances, rtol=1e-5)


def whole_rows(samples):
    """Prompts and answers with their last tokens, which rows of an update only predict."""
    tokens = np.concatenate([samples.tokens[:, :1], samples.targets], axis=1)
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return (
        {"tokens": tokens, "positions": places, "segment_ids": (places <= samples.segment_ids.sum(1)[:, None]).astype(int)},
    )


@pytest.mark.slow
def test_a_reward_model_that_read_other_prompts_is_refused(warm_start, scorer, tmp_path):
    other = scorer("other", BARE.replace("bos_token + m", "bos_token + 'a' + m"))
    with pytest.raises(ValueError, match="was trained with another tokenizer or chat template"):
        run(job(warm_start, tmp_path / "run", reward_model=other))
    with pytest.raises(ValueError, match="is not the directory of a run"):
        run(job(warm_start, tmp_path / "run", reward_model=str(tmp_path)))


@pytest.mark.slow
def test_shuffled_rewards_are_the_same_rewards(warm_start, tmp_path):
    plain, shuffled = (
        run(job(warm_start, tmp_path / str(shuffle), shuffle_rewards=shuffle, steps=1))[0] for shuffle in (False, True)
    )
    assert shuffled["reward_mean"] == plain["reward_mean"]
    assert shuffled["length_mean"] == plain["length_mean"]


@pytest.mark.slow
def test_other_initial_weights_are_refused_when_a_run_goes_on(warm_start, tmp_path):
    config = job(warm_start, tmp_path / "run", steps=2)
    run(config)
    path = tmp_path / "run/initial_weights.json"
    path.write_text(json.dumps({"source": str(warm_start), "digest": "0" * 64}))
    with pytest.raises(ValueError, match="no longer holds the weights"):
        rl.train_with_rewards(config, log=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minibatches": 3}, "not divisible by minibatches=3"),
        ({"rollouts": RolloutConfig(max_tokens=60)}, r"exceed model\.max_seq_len=32"),
        ({"policy": PolicyConfig(aggregation="dr_grpo", max_length=7)}, r"policy\.max_length=7 is not rollouts\.max_tokens=6"),
        ({"lora": LoraConfig(), "model": EXPERTS}, r"lora does not go with model\.moe"),
        (
            {"policy": PolicyConfig(scale="group", normalise_parts=True)},
            r"policy\.normalise_parts is for rewards of several parts: set reward_model",
        ),
        ({"rollouts": RolloutConfig(4, 6, 6, ahead=True)}, r"set policy\.importance\.level"),
        ({"policy": dataclasses.replace(PPO, group_size=4), "lora": LoraConfig()}, r"policy\.value needs a head"),
        (
            {"policy": PolicyConfig(group_size=4, kl=KLConfig(0.1, target=1.0, horizon=3.2))},
            r"kl\.horizon=3\.2 is at most a fifth of rollouts\.prompts=4 x policy\.group_size=4 .*policy\.kl\.target=1\.0 0 or",
        ),
        ({"policy": PolicyConfig(group_size=4, max_update_kl=0.1)}, "leaves out later updates of a batch, and there is one"),
        ({"task_weight": 0.0}, "task_weight=0.0 must be >= 0, and above 0 unless a reward_model judges"),
        ({"reward_model": "x", "policy": dataclasses.replace(MAXRL, group_size=4)}, "leave reward_model out"),
        ({"reward_model": "x", "reward_model_weight": 0.0}, "reward_model_weight=0.0 must be positive"),
        (
            {"rollouts": RolloutConfig(4, 6, 6, score=False, max_mismatch=0), "policy": PolicyConfig(kl=KLConfig(0.1))},
            r"rollouts\.score=False leaves out what policy\.kl needs",
        ),
        (
            {"share_prompts": True, "policy": PolicyConfig(group_size=4), "minibatches": 8},
            "share_prompts keeps groups together",
        ),
        ({"share_prompts": True, "policy": PolicyConfig(group_size=3), "accumulation": 2}, "group_size=3 by accumulation"),
        (
            {"share_prompts": True, "model": dataclasses.replace(MODEL, attention_backend="flash")},
            "share_prompts is a mask that model.attention_backend='flash' does not read",
        ),
        (
            {"share_prompts": True, "policy": dataclasses.replace(REINFORCE, group_size=1)},
            "share_prompts is for several answers",
        ),
        ({"task": None}, None),
    ],
)
def test_bad_combinations_are_refused_when_the_config_is_read(warm_start, tmp_path, changes, message):
    if message is None:
        with pytest.raises(ValueError, match="no task is called 'revers'; did you mean 'reverse'"):
            TaskConfig("revers")
        return
    with pytest.raises(ValueError, match=message):
        job(warm_start, tmp_path / "run", **changes)


def test_prompts_that_are_too_long_are_refused_before_the_run(warm_start, tmp_path):
    with pytest.raises(ValueError, match=r"rollouts\.max_prompt_tokens=3: raise it"):
        rl.train_with_rewards(job(warm_start, tmp_path / "run", rollouts=RolloutConfig(4, 3, 6)), log=lambda _: None)


def test_a_tokenizer_without_a_stop_token_is_refused_before_the_run(warm_start, tmp_path):
    shutil.copytree(warm_start, tmp_path / "endless")
    shutil.rmtree(tmp_path / "endless/tokenizer")
    train_tokenizer(TokenizerConfig("chars", document_boundaries=False), ["ab="]).save(tmp_path / "endless/tokenizer")
    with pytest.raises(ValueError, match="endless has no token that ends an answer: train one with document_boundaries"):
        rl.train_with_rewards(job(tmp_path / "endless", tmp_path / "run"), log=lambda _: None)


@pytest.mark.slow
def test_a_later_prompt_that_is_too_long_does_not_end_a_run(warm_start, tmp_path, monkeypatch):
    """From the third step on each second one is, and another one, from beyond the run's own, is answered."""
    real, asked, told = Reverse.example, [], []

    def example(self, index, seed, split="train"):
        asked.append(index)
        found = real(self, index, seed, split)
        return dataclasses.replace(found, prompt="a" * 9) if split == "train" and 8 <= index < 12 and index % 2 else found

    monkeypatch.setattr(Reverse, "example", example)
    config = job(warm_start, tmp_path / "run")
    assert rl.train_with_rewards(config, log=told.append) == 0
    assert [record["prompts_left_out"] for record in records(config.run_dir)] == [0, 0, 2]
    assert {8, 10, 9 + 12, 11 + 12} <= set(asked)
    assert sum("exceeds rollouts.max_prompt_tokens: the prompt 'aaaaaaaaa'" in line for line in told) == 2


def killed_job(warm_start, run_dir, ahead):
    rollouts = RolloutConfig(4, 6, 6, ahead=ahead, max_batch=8, verifiers=1)
    policy = PolicyConfig(group_size=4, importance=ImportanceConfig("token" if ahead else "none"))
    return job(warm_start, run_dir, steps=60, rollouts=rollouts, policy=policy)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_that_is_killed_ten_times_ends_with_the_same_bits(warm_start, tmp_path, ahead):
    """SIGKILL once in each of ten equal parts of the run but its end, at a random step of it and up to two steps later, in the
    midst of whatever is done then; parameters and rewards are as if nothing had been."""
    code = (
        "import sys; from model.xla import configure; configure(cpu_devices=1)\n"
        "from tests.train.test_rl import killed_job; from train.rl import train_with_rewards\n"
        "sys.exit(train_with_rewards(killed_job(sys.argv[1], sys.argv[2], sys.argv[3] == 'True'), log=print))"
    )
    root, killed = Path(__file__).parents[2], tmp_path / "killed"

    def start(run_dir):
        environment = os.environ | {"PYTHONPATH": str(root)}
        arguments = [str(warm_start), str(run_dir), str(ahead)]
        return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=root, env=environment)

    def runs_on(process, seconds):
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    assert start(tmp_path / "straight").wait() == 0
    step_seconds = np.median([record["step_seconds"] for record in read_jsonl(tmp_path / "straight/timing.jsonl")[1:]
                              if "step" in record])  # fmt: skip
    rng = np.random.default_rng(0)
    for kill in range(10):
        before, wanted = len(read_jsonl(killed / "timing.jsonl")), 5 * kill + int(rng.integers(1, 6))
        process = start(killed)
        while not any(record.get("step", 0) >= wanted for record in read_jsonl(killed / "timing.jsonl")[before:]):
            assert runs_on(process, 0.01)
        assert runs_on(process, rng.uniform(0, 2 * step_seconds))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(killed).wait() == 0
    assert records(killed) == records(tmp_path / "straight")
    digests = []
    for name in ("straight", "killed"):
        last = max((tmp_path / name / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        digests.append((last / "manifest/metadata").read_bytes())
    assert digests[0] == digests[1]


# Of the characters of the task alone, which are all that the tokenizer has.
TEMPLATE = (
    "{% for message in messages %}{{ bos_token + ('a' if message.role == 'user' else 'b') + '=' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'b=' }}{% endif %}"
)


def test_with_chat_a_prompt_is_the_users_message_and_the_end_of_the_turn_ends_an_answer(warm_start, tmp_path, monkeypatch):
    chatty = tmp_path / "chatty"
    shutil.copytree(warm_start, chatty)
    (chatty / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    config = job(chatty, tmp_path / "run", steps=1, chat=True, rollouts=RolloutConfig(4, 12, 6, max_batch=8, verifiers=1))
    real, seen = rl.draw, []

    def draw(engine, prompts, **options):
        samples = real(engine, prompts, **options)
        seen.append((prompts, options["stop_ids"], samples))
        return samples

    monkeypatch.setattr(rl, "draw", draw)
    run(config)
    tokenizer, task = load_tokenizer(warm_start / "tokenizer"), TASK.make()
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    for (prompts, stop_ids, samples), split, seed in zip(seen[:2], ("eval", "train"), (0, config.seed), strict=True):
        for i, prompt in enumerate(prompts):
            asked = tokenizer.encode("a=" + task.example(i, seed, split).prompt)
            assert prompt == [bos, *asked, eos, bos, *tokenizer.encode("b=")]
        assert stop_ids == {eos}
        ends = [row[mask > 0][-1] for row, mask in zip(samples.targets, samples.mask, strict=True)]
        np.testing.assert_array_equal(np.array(ends) == eos, ~samples.truncated)
    # The next stage takes the template over with the tokenizer; a model without one is refused.
    assert (tmp_path / "run/tokenizer/chat_template.jinja").read_text() == TEMPLATE
    with pytest.raises(ValueError, match="chat=True needs a chat template, and .* has none: set it to False"):
        rl.train_with_rewards(job(warm_start, tmp_path / "without", chat=True), log=lambda _: None)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_weights_are_handed_over_layer_by_layer(lora):
    model = dataclasses.replace(MODEL, num_layers=2, scan_layers=True)
    config = RLConfig("tiny", model, "nothing", TASK, steps=1, lora=lora, rollouts=RolloutConfig(4, 6, 6))
    policy = rl.Policy(config)
    weights = init_params(param_specs(model), jax.random.key(0))
    state = policy.trainer.begin(weights, jax.random.key(1))
    handed = policy.hand_over(policy.whole(state))
    expected = unstack_layers(weights, model)[0]
    jax.tree.map(np.testing.assert_array_equal, handed, expected)  # fresh adapters change nothing
    assert policy.sampler == unstack_layers(weights, model)[1]
    # They outlive the trainer's, whose memory the next update takes.
    for leaf in jax.tree.leaves((state.params, state.frozen)):
        leaf.delete()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(handed))


def test_a_sampler_that_disagrees_ends_the_run(warm_start, tmp_path, monkeypatch):
    real = rl.draw

    def wrong(*args, **kwargs):
        samples = real(*args, **kwargs)
        return dataclasses.replace(samples, behavior_logprobs=samples.behavior_logprobs - 0.5 * samples.mask)

    monkeypatch.setattr(rl, "draw", wrong)
    with pytest.raises(RuntimeError, match=r"KL\(sampler, trainer\) is .* more than rollouts\.max_mismatch=0\.01"):
        rl.train_with_rewards(job(warm_start, tmp_path / "run"), log=lambda _: None)


def test_tokens_beyond_the_tokenizer_spoil_an_answer(warm_start, tmp_path):
    config = job(warm_start, tmp_path / "run", steps=1)
    texts = []

    class Stop(Exception):
        pass

    def see(self, samples, examples):
        known = self.tokenizer.encode("ab")
        texts.extend([self._text(known), self._text([*known, MODEL.vocab_size - 1])])
        raise Stop

    original, rl.RLLoop._judge = rl.RLLoop._judge, see
    try:
        with pytest.raises(Stop):
            rl.train_with_rewards(config, log=lambda _: None)
    finally:
        rl.RLLoop._judge = original
    assert texts == ["ab", "ab\ufffd"]


def test_answers_that_share_their_prompt_are_scored_and_trained_as_if_each_had_its_own():
    """Groups of three: of different prompts and answers, with a window, and with a row whose reward is missing."""
    model = dataclasses.replace(MODEL, window_pattern=(0, 3), num_layers=2)
    params = random_params(model) | {"value_head": jax.random.normal(jax.random.key(1), (model.d_model, 1))}
    answers = [[drawn([1, 2, 9]), drawn([2]), drawn([3] * 4, "length")], [drawn([4, 4]), drawn([9]), drawn([7, 5, 1])]]
    rows = to_rows([[5, 6, 7], [8]], answers, row_tokens=6)
    names = ("tokens", "targets", "positions", "segment_ids", "mask")
    batch = {name: jax.numpy.asarray(getattr(rows, name)) for name in names}
    batch["mask"] = batch["mask"].at[1].set(0)
    weights = batch["mask"] * jax.random.normal(jax.random.key(2), batch["mask"].shape)

    def of_answers(params, shared):
        found = score(params, model, batch, temperature=0.7, max_tokens=4, shared=shared)
        every = (found.logprobs, found.entropies, found.values)
        return sum(jax.numpy.sum(weights * x) for x in every), tuple(batch["mask"] * x for x in every)

    gradients = jax.jit(jax.value_and_grad(of_answers, has_aux=True), static_argnums=1)
    (total, found), of_found = gradients(params, 3)
    (expected_total, expected), of_expected = gradients(params, 1)
    assert abs(float(expected_total)) > 0.1
    for x, y in zip(
        jax.tree.leaves((total, found, of_found)), jax.tree.leaves((expected_total, expected, of_expected)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1.0, np.abs(y).max()))


@pytest.mark.slow
def test_a_run_with_shared_prompts_is_that_without(warm_start, tmp_path):
    """With minibatches, micro-batches and two passes; rows that stand side by side are summed in another order."""
    policy = PolicyConfig(group_size=4, updates_per_batch=2)
    apart = run(job(warm_start, tmp_path / "a", policy=policy, accumulation=2))
    shared = run(job(warm_start, tmp_path / "b", policy=policy, accumulation=2, share_prompts=True))
    for one, other in zip(apart, shared, strict=True):
        for name in ("loss", "grad_norm", "param_norm", "entropy", "reward/right"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert all(record["mismatch_max"] < 1e-4 for record in shared)
    parts = run(job(warm_start, tmp_path / "c", policy=policy, minibatches=2, accumulation=2, share_prompts=True))
    assert all(np.isfinite(record["loss"]) for record in parts)


def test_scores_of_answers_are_those_of_whole_rows():
    """Wherever an answer begins, and for rows that hold none."""
    params = random_params(MODEL)
    rows = to_rows([[5, 6, 7], [8], [1, 2]], [[drawn([1, 2, 9])], [drawn([3] * 4, "length")], [drawn([4])]], row_tokens=6)
    names = ("tokens", "targets", "positions", "segment_ids", "mask")
    batch = {name: jax.numpy.asarray(getattr(rows, name)) for name in names}
    batch["mask"] = batch["mask"].at[2].set(0)
    found = score(params, MODEL, batch, temperature=0.7, max_tokens=4)
    hidden = forward(params, MODEL, batch["tokens"], batch["positions"], batch["segment_ids"])[0]
    logits = np.asarray(unembed(params, MODEL, hidden), np.float64) / 0.7
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logprobs, rows.targets[..., None], 2)[..., 0]
    entropies = -(np.exp(logprobs) * logprobs).sum(-1)
    mask = np.asarray(batch["mask"])
    np.testing.assert_allclose(found.logprobs * mask, expected * mask, atol=1e-5)
    np.testing.assert_allclose(found.entropies * mask, entropies * mask, atol=1e-5)
    assert found.logprobs.shape == mask.shape
    assert (np.count_nonzero(found.logprobs, axis=1) == 4).all()  # no more than an answer may have


def test_without_scoring_the_sampler_speaks_for_the_trainer(warm_start, tmp_path):
    """On policy they agree, so the updates are the same; and nothing is told of a comparison that was not made."""
    spared = RolloutConfig(4, 6, 6, max_batch=8, verifiers=1, score=False, max_mismatch=0)
    with_scores, without = run(job(warm_start, tmp_path / "a")), run(job(warm_start, tmp_path / "b", rollouts=spared))
    for one, other in zip(with_scores, without, strict=True):
        for name in ("reward_mean", "grad_norm", "param_norm", "entropy", "update_kl"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-8), name
    assert any(record["grad_norm"] > 0 for record in without)
    assert not any(name.startswith("mismatch") for record in without for name in record)


def watch_constants(monkeypatch):
    """What each step's rewards and constants were."""
    seen, real = [], rl.RLLoop._constants

    def constants(self, judged):
        found = real(self, judged)
        seen.append((judged, jax.device_get(found[0]), self))
        return found

    monkeypatch.setattr(rl.RLLoop, "_constants", constants)
    return seen


def most_likely(read, prompt, most, stop_id):
    """The greedy answer, by a forward pass over the whole text for each token; without its stop token."""
    ids, size = list(prompt), MODEL.max_seq_len
    while len(ids) - len(prompt) < most:
        real = (np.arange(size) < len(ids)).astype(np.int32)[None]
        ids.append(int(np.argmax(read(np.pad(ids, (0, size - len(ids)))[None], real)[0, len(ids) - 1])))
        if ids[-1] == stop_id:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def test_the_greedy_baseline_is_the_reward_of_the_most_likely_answer(warm_start, tmp_path, monkeypatch):
    seen = watch_constants(monkeypatch)
    policy = dataclasses.replace(REMAX, group_size=2)
    rollouts = RolloutConfig(prompts=6, max_prompt_tokens=6, max_tokens=6, max_batch=8, verifiers=1)
    (record,) = run(job(warm_start, tmp_path / "run", policy=policy, rollouts=rollouts, steps=1))
    ((judged, constants, loop),) = seen
    weights = open_initial(str(warm_start), MODEL).load(loop.policy.trainer.abstract_weights)
    task = TASK.make()
    places = np.arange(MODEL.max_seq_len)[None]
    read = jax.jit(lambda tokens, real: unembed(weights, MODEL, forward(weights, MODEL, tokens, places, real)[0]))
    for row, baseline in enumerate(judged.baseline):
        example = task.example(row // 2, 0)
        answer = most_likely(read, loop._prompt(example), 6, loop.tokenizer.eos_id)
        assert baseline == task.score(loop._text(answer), example).reward
        expected = (judged.rewards[row] - baseline) * judged.samples.mask[row]
        np.testing.assert_allclose(constants.advantages[row], expected, atol=1e-7)
    assert record["reward/greedy"] == pytest.approx(judged.baseline.mean())
    assert np.ptp(judged.baseline) > 0
    assert np.any(constants.advantages)


def raises(completion, example):
    raise RuntimeError("nothing can be said of this")


def raises_on_some(completion, example):
    if example.problem.startswith("a"):
        raise RuntimeError("nothing can be said of this")
    return Score(0.5, "so-so")


def odd_is_right(completion, example):
    """Which some of any answers are."""
    return Score(float(len(completion) % 2), "odd or even")


def verifiers_instead(monkeypatch, verifier, calls_of):
    """In calls of so many completions, the verifier instead of the task's, in processes like it."""

    class Others(Verifiers):
        def __init__(self, parts, *options):
            super().__init__(parts, *options)
            self.other = Verifiers((Part("right", verifier),), *options)

        def __call__(self, completions, examples):
            return (self.other if len(completions) == calls_of else super()).__call__(completions, examples)

        def close(self):
            self.other.close()
            super().close()

    monkeypatch.setattr(rl, "Verifiers", Others)


def test_prompts_whose_greedy_answer_cannot_be_judged_are_left_out_and_counted(warm_start, tmp_path, monkeypatch):
    seen = watch_constants(monkeypatch)
    verifiers_instead(monkeypatch, raises_on_some, 6)
    policy = dataclasses.replace(REMAX, group_size=2)
    rollouts = RolloutConfig(prompts=6, max_prompt_tokens=6, max_tokens=6, max_batch=8, verifiers=1)
    (record,) = run(job(warm_start, tmp_path / "run", policy=policy, rollouts=rollouts, steps=1))
    ((judged, constants, _),) = seen
    task = TASK.make()
    lost = np.repeat([task.example(i, 0).problem.startswith("a") for i in range(6)], 2)
    assert 0 < lost.sum() < 12
    np.testing.assert_array_equal(judged.valid, ~lost)
    assert record["reward/greedy_failed"] == lost.sum() / 2
    assert record["reward/right/failed"] == 0
    assert record["bad_reward_fraction"] == pytest.approx(lost.mean())
    assert record["reward/greedy"] == 0.5
    assert not np.any(constants.weights[lost] * constants.advantages[lost])
    assert np.all(np.any(constants.weights[~lost] * constants.advantages[~lost], axis=1))
    assert record["effective_batch_fraction"] == pytest.approx(1 - lost.mean())


@pytest.mark.slow
def test_failures_of_all_rounds_of_sampling_are_counted(warm_start, tmp_path, monkeypatch):
    """Of which no group can be compared, so each round draws others; and nothing is learned, and nothing breaks."""
    verifiers_instead(monkeypatch, raises, 16)
    (record,) = run(job(warm_start, tmp_path / "run", policy=PolicyConfig(group_size=4, zero_variance="resample"), steps=1))
    assert record["rounds"] == 3
    assert record["reward/right/failed"] == record["reward/right/raised"] == 48
    assert record["bad_reward_fraction"] == 1
    assert record["effective_batch_fraction"] == 0
    assert record["grad_norm"] == 0


@pytest.mark.slow
def test_a_greedy_baseline_goes_on_to_the_same_bits_with_answers_drawn_ahead(warm_start, tmp_path, monkeypatch):
    changes = {
        "policy": PolicyConfig(advantage="greedy", group_size=2, importance=ImportanceConfig("token")),
        "rollouts": RolloutConfig(6, 6, 6, ahead=True, max_batch=8, verifiers=1),
    }
    straight = run(job(warm_start, tmp_path / "straight", **changes))
    stopped, calls = job(warm_start, tmp_path / "stopped", **changes), iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(rl, "stop_on_signal", lambda: StopAfter(1, calls))
        assert rl.train_with_rewards(stopped, log=lambda _: None) == 42
    assert run(stopped) == straight


@pytest.mark.slow
def test_parts_of_the_reward_are_normalised_apart(warm_start, scorer, tmp_path, monkeypatch):
    seen = watch_constants(monkeypatch)
    policy = PolicyConfig(group_size=4, scale="group", normalise_parts=True)
    options = {"reward_model": scorer("parts", BARE), "task_weight": 2.0, "reward_model_weight": 0.5, "policy": policy}
    run(job(warm_start, tmp_path / "run", steps=1, **options))
    ((judged, constants, _),) = seen
    np.testing.assert_allclose(judged.parts @ [2.0, 0.5], judged.rewards, rtol=1e-5)
    apart = judged.parts.astype(np.float64).reshape(-1, 4, 2)
    normalised = (apart - apart.mean(1, keepdims=True)) / (apart.std(1, ddof=1, keepdims=True) + 1e-4)
    expected = (normalised @ [2.0, 0.5]).reshape(-1)
    np.testing.assert_allclose(constants.advantages, expected[:, None] * judged.samples.mask, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_entropy_bonus_rises_below_its_target_and_continues_with_a_run(warm_start, tmp_path, monkeypatch):
    """By the step's own entropy, whatever the gradients do."""
    policy = PolicyConfig(group_size=4, entropy_coefficient=0.01, entropy_target=100.0, entropy_step=0.25)
    config = job(warm_start, tmp_path / "run", policy=policy)
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(rl, "stop_on_signal", lambda: StopAfter(1, calls))
        assert rl.train_with_rewards(config, log=lambda _: None) == 42
    metrics = run(config)
    assert [record["entropy_coefficient"] for record in metrics] == pytest.approx([0.01, 0.26, 0.51])
    for record in metrics:
        assert record["loss"] == pytest.approx(
            record["policy_loss"] - record["entropy_coefficient"] * record["entropy"], rel=1e-4, abs=1e-6
        )


@pytest.mark.slow
def test_the_penalty_in_the_reward_follows_its_target_and_stays_positive(warm_start, tmp_path):
    """What is reported is the coefficient of the step itself: at first the given one, while the policy is its reference."""
    policy = PolicyConfig(group_size=4, kl=KLConfig(0.1, target=100.0, horizon=3.3))
    metrics = run(job(warm_start, tmp_path / "run", policy=policy))
    factor = 1 - 0.2 * 16 / 3.3
    assert [record["kl_coefficient"] for record in metrics] == pytest.approx([0.1 * factor**i for i in range(3)], rel=1e-5)
    assert factor > 0


@pytest.fixture(scope="module")
def expert_start(tmp_path_factory):
    """The warm start of a network with experts."""
    directory = tmp_path_factory.mktemp("experts")
    source = SourceConfig("reverse", "task", task=TASK, num_examples=200, held_out_fraction=0.1)
    data = DataConfig((source,), tokenizer=TokenizerConfig("chars"), seq_len=16, cache_dir=str(directory / "cache"))
    options = {"run_dir": str(directory / "run"), "writers": (), "optimizer": OptimizerConfig(learning_rate=1e-2)}
    assert train(TrainConfig("experts", EXPERTS, data, steps=8, batch_size=8, **options), log=lambda _: None) == 0
    return directory / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"accumulation": 4}, {"share_prompts": True}], ids=["plain", "parts", "shared prompts"]
)
def test_experts_are_routed_alike_by_sampler_and_trainer_and_are_balanced(expert_start, tmp_path, changes):
    metrics = run(job(expert_start, tmp_path / "run", model=EXPERTS, steps=2, **changes))
    for record in metrics:
        assert record["mismatch_max"] < 1e-5
        assert abs(record["update_kl"]) < 1e-9
        # Of one layer, times 0.5: 1 where all experts have the same share, and little more, whatever the micro-batches.
        assert 0.5 * 0.99 <= record["balance_loss"] < 0.5 * 2
        assert record["loss"] == pytest.approx(
            record["policy_loss"] + record["balance_loss"] + record["router_z_loss"], rel=1e-4, abs=1e-6
        )
        assert record["load_imbalance"] >= 1
    assert metrics[0]["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_what_was_learned_by_rewards_is_gone_on_with_and_sampled_from(warm_start, tmp_path, lora):
    """The weights that the run ends with: what its engine would decode next."""
    run(job(warm_start, tmp_path / "first", steps=1, lora=lora))
    last = []
    with rl.open_loop(job(warm_start, tmp_path / "first", steps=1, lora=lora), lambda _: None, None, 0.0) as loop:
        last.append(jax.device_get(loop.policy.hand_over(loop.policy.whole(loop.state.train))))
    opened = open_initial(str(tmp_path / "first"), MODEL).load(
        rl.Policy(job(warm_start, tmp_path / "x")).trainer.abstract_weights
    )
    for found in (opened, open_any(str(tmp_path / "first")).params):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), jax.device_get(found), last[0])
    assert run(job(tmp_path / "first", tmp_path / "second", steps=1))


@pytest.mark.slow
def test_a_policy_comes_nearer_to_its_teacher_on_its_own_answers_and_goes_on_to_the_same_bits(
    warm_start, tmp_path, monkeypatch
):
    """From the teacher alone, whose answers are right more often: rewards are only told."""
    there = json.loads((warm_start / "config.json").read_text())
    source = SourceConfig("reverse", "task", task=TASK, num_examples=200, held_out_fraction=0.1)
    data = DataConfig((source,), tokenizer=TokenizerConfig("chars"), seq_len=16, cache_dir=there["data"]["cache_dir"])
    wider = dataclasses.replace(MODEL, d_model=48)
    options = {"run_dir": str(tmp_path / "teacher"), "writers": (), "optimizer": OptimizerConfig(learning_rate=1e-2)}
    assert train(TrainConfig("teacher", wider, data, steps=60, batch_size=8, **options), log=lambda _: None) == 0
    taught = {
        "distillation": DistillationConfig(str(tmp_path / "teacher"), wider, "reverse", share=1.0),
        "steps": 30,
        "optimizer": dataclasses.replace(ONE_DEVICE, learning_rate=1e-2),
        "policy": PolicyConfig(group_size=4, updates_per_batch=2),
    }
    straight = run(job(warm_start, tmp_path / "straight", **taught))
    assert straight[-1]["teacher_kl"] < straight[0]["teacher_kl"] / 3
    assert all(record["loss"] == pytest.approx(record["teacher_kl"]) for record in straight)
    assert np.mean([r["reward/right"] for r in straight[-5:]]) > np.mean([r["reward/right"] for r in straight[:5]])
    stopped, calls = job(warm_start, tmp_path / "stopped", **taught), iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(rl, "stop_on_signal", lambda: StopAfter(3, calls))
        assert rl.train_with_rewards(stopped, log=lambda _: None) == 42
    assert run(stopped) == straight
    shutil.rmtree(tmp_path / "teacher/tokenizer")
    train_tokenizer(TokenizerConfig("chars"), ["abc="]).save(tmp_path / "teacher/tokenizer")
    with pytest.raises(ValueError, match="has another tokenizer than"):
        run(job(warm_start, tmp_path / "other", **taught))


@pytest.mark.slow
def test_experts_on_eight_devices_learn_what_they_do_on_one(expert_start, tmp_path, monkeypatch):
    """Half of the experts live on each second device in training, and all on each while it decodes."""
    settings = {"steps": 2, "policy": PolicyConfig(group_size=4, scale="group"), "model": EXPERTS}
    many = run(job(expert_start, tmp_path / "many", mesh=MeshConfig(data=4, expert=2), **settings))
    monkeypatch.setattr(rl, "Policy", functools.partial(rl.Policy, devices=jax.devices()[:1]))
    one = run(job(expert_start, tmp_path / "one", **settings))
    for record, alone in zip(many, one, strict=True):
        assert record["mismatch_max"] < 1e-5
        for name in ("reward_mean", "length_mean", "policy_loss", "balance_loss", "grad_norm", "entropy", "param_norm"):
            assert record[name] == pytest.approx(alone[name], rel=2e-4, abs=1e-6), name
