"""A whole run of reinforcement learning, tiny: that it learns, that it goes on to the same bits, and what it refuses."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data.config import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from data.tasks.reverse import Reverse
from data.tasks.task import Example
from data.tokenizer import load_tokenizer, train_tokenizer
from experiments.cli import parse
from experiments.goodput import goodput
from experiments.report import write_report
from experiments.sampling import convert, open_any
from model.config import LoraConfig
from model.convert.peft import load_adapters
from model.lora import adapt, merge
from model.params import init_params, param_specs, unstack_layers
from tests.train.rl_runs import EXPERTS, MODEL, ONE_DEVICE, TASK, StopAfter, job, records, run
from train import collector, rl
from train.config import DeadlineConfig, DistillationConfig, MeshConfig, OptimizerConfig, TrainConfig
from train.initial import compare_task, open_initial
from train.loop import train
from train.metrics import read_jsonl
from train.objectives.config import CISPO, GRPO, GSPO, MAXRL, PPO, REINFORCE, ImportanceConfig, KLConfig, PolicyConfig
from train.rl_config import FormRewardConfig, RLConfig, RolloutConfig

pytestmark = pytest.mark.usefixtures("one_device")


# What shows whether a run is honest and healthy, beside the reasons that its verifiers give.
WATCHED = {
    "reward_mean", "reward_std", "reward/right", "reward/right/failed", "bad_reward_fraction",
    "zero_variance_fraction", "effective_batch_fraction", "effective_sample_fraction", "prompts_left_out", "truncated_fraction",
    "length_mean", "length_correct", "length_wrong", "mismatch_kl", "mismatch_max", "reference_kl", "update_kl", "updates",
    "clip_low_fraction", "clip_high_fraction", "entropy", "grad_norm", "param_norm", "loss",
}  # fmt: skip


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
def test_the_first_update_is_on_policy_and_the_run_ends_with_a_result(warm_start, tmp_path, policy, monkeypatch):
    """The sampler's log-probabilities are the trainer's, so the ratio is 1; that of a second update no longer is. And
    each step has to end in time, the first with what it compiles."""
    real, watched = rl.RLLoop.advance, []

    def advance(self):
        watched.append((self.group.watchdog.doing, self.group.watchdog._allowed))
        return real(self)

    monkeypatch.setattr(rl.RLLoop, "advance", advance)
    deadlines = DeadlineConfig(phase_seconds=3000.0, step_seconds=500.0)
    metrics = run(job(warm_start, tmp_path / "run", policy=policy, seed=1, deadlines=deadlines))
    assert watched == [("step 1", 3000.0), ("step 2", 500.0), ("step 3", 500.0)]
    assert [record["step"] for record in metrics] == [1, 2, 3]
    for record in metrics:
        assert record["mismatch_max"] < 1e-5
        assert abs(record["update_kl"]) < 1e-9
        assert record["reward/right/failed"] == 0
        if policy.kl.loss_coefficient:
            told = {"length_correct": record["reward/right"] > 0, "length_wrong": record["reward/right"] < 1}
            assert WATCHED - record.keys() == {name for name, there in told.items() if not there}
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
    "changes",
    [
        {
            "rollouts": RolloutConfig(4, 6, 6, temperature=0.7, max_batch=8, verifiers=1),
            "policy": dataclasses.replace(GRPO, group_size=4),
        },
        {"lora": LoraConfig(rank=2), "seed": 1, "policy": dataclasses.replace(GRPO, group_size=4)},
        {"lora": LoraConfig(rank=2, base_bits=8)},
    ],
    ids=["temperature", "lora", "rounded base"],
)
def test_sampler_and_trainer_agree_for_what_else_may_be_set(warm_start, tmp_path, changes):
    """And the reference, which is scored at the temperature of the policy: at first there is no distance between them."""
    metrics = run(job(warm_start, tmp_path / "run", **changes))
    assert all(record["mismatch_max"] < 1e-5 and abs(record["update_kl"]) < 1e-9 for record in metrics)
    if "reference_kl" in metrics[0]:
        assert abs(metrics[0]["reference_kl"]) < 1e-6
        assert metrics[-1]["reference_kl"] != 0
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
    timing = read_jsonl(tmp_path / "stopped/timing.jsonl")
    of_event = {
        name: [record for record in timing if record.get("event") == name] for name in ("restore", "checkpoint", "eval")
    }
    assert [record["restored_step"] for record in of_event["restore"]] == [0, stop_after]
    assert [record["at_step"] for record in of_event["checkpoint"]] == [stop_after, *((2,) if stop_after < 2 else ()), 3]
    assert [record["at_step"] for record in of_event["eval"]] == [0, 3]
    parts = goodput(timing)
    # The first step of a start too, with all that is compiled in it; nothing was lost.
    assert parts["step"] >= sum(record["step_seconds"] for record in timing if "step" in record)
    assert parts["lost steps"] == 0
    assert all(record["reward/total"] == pytest.approx(record["reward_mean"], abs=1e-6) for record in straight)
    assert read_jsonl(tmp_path / "stopped/samples.jsonl") == read_jsonl(tmp_path / "straight/samples.jsonl")


@pytest.mark.slow
def test_other_initial_weights_are_refused_when_a_run_goes_on(warm_start, tmp_path):
    config = job(warm_start, tmp_path / "run", steps=2)
    run(config)
    path = tmp_path / "run/initial_weights.json"
    path.write_text(json.dumps({"source": str(warm_start), "digest": "0" * 64}))
    with pytest.raises(ValueError, match="no longer holds the weights"):
        rl.train_with_rewards(config, log=lambda _: None)


def write_problems(path, questions):
    rows = [{"question": question, "answer": f"#### {number}"} for number, question in enumerate(questions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def problems(tmp_path):
    """In letters that the warm start knows."""
    paths = {"train_path": tmp_path / "train.jsonl", "eval_path": tmp_path / "eval.jsonl"}
    for path, questions in zip(paths.values(), (["a", "ab", "aba", "bb"], ["ba", "b"]), strict=True):
        write_problems(path, questions)
    return TaskConfig("gsm8k", (("template", "{question}="), *((name, str(path)) for name, path in paths.items())))


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_task_whose_files_changed_is_not_gone_on_with(tmp_path, name):
    task, path = problems(tmp_path).make(), tmp_path / f"{name}.jsonl"
    before = path.read_bytes()
    compare_task(tmp_path, task, begun=False)
    compare_task(tmp_path, task, begun=True)
    write_problems(path, ["aaa", "bbb"])
    with pytest.raises(ValueError, match=rf"{name}\.jsonl.* no longer holds the problems that .* began with: bring them back"):
        compare_task(tmp_path, task, begun=True)
    path.write_bytes(before)
    compare_task(tmp_path, task, begun=True)
    write_problems(path, ["aaa", "bbb"])
    compare_task(tmp_path, task, begun=False)  # nothing was learned from the others
    compare_task(tmp_path, task, begun=True)


@pytest.mark.slow
def test_a_run_whose_task_changed_is_refused_when_it_goes_on(warm_start, tmp_path):
    config = job(warm_start, tmp_path / "run", task=problems(tmp_path), steps=1)
    run(config)
    before = (tmp_path / "train.jsonl").read_bytes()
    write_problems(tmp_path / "train.jsonl", ["aaa", "bbb"])
    with pytest.raises(ValueError, match="no longer holds the problems"):
        rl.train_with_rewards(config, log=lambda _: None)
    (tmp_path / "train.jsonl").write_bytes(before)
    run(config)


SHORT = FormRewardConfig("short", "length", (("max_characters", 1),))


@pytest.mark.parametrize("name", ["right", "total", "a/failed", "half_failed", ""])
def test_names_of_rewards_are_not_those_of_other_metrics(name):
    with pytest.raises(ValueError, match=f"name='{name}' must be a word"):
        dataclasses.replace(SHORT, name=name)


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
        ({"lora": LoraConfig(base_bits=8), "mesh": MeshConfig(fsdp=2)}, r"lora\.base_bits goes with .* a mesh of `data` alone"),
        ({"policy": dataclasses.replace(PPO, group_size=4), "lora": LoraConfig()}, r"policy\.value needs a head"),
        (
            {"policy": PolicyConfig(group_size=4, kl=KLConfig(0.1, target=1.0, horizon=3.2))},
            r"kl\.horizon=3\.2 is at most a fifth of rollouts\.prompts=4 x policy\.group_size=4 .*policy\.kl\.target=1\.0 0 or",
        ),
        (
            {"policy": PolicyConfig(kl=KLConfig(loss_coefficient=0.1)), "minibatches": 2},
            r"policy\.kl\.ratio='none'.*'detached'",
        ),
        ({"policy": PolicyConfig(kl=KLConfig(loss_coefficient=0.1), updates_per_batch=2)}, r"policy\.kl\.ratio='none'"),
        ({"policy": PolicyConfig(group_size=4, max_update_kl=0.1)}, "leaves out later updates of a batch, and there is one"),
        ({"task_weight": 0.0}, "task_weight=0.0 must be >= 0, and above 0 unless a reward_model judges"),
        ({"reward_model": "x", "policy": dataclasses.replace(MAXRL, group_size=4)}, "leave reward_model out"),
        ({"reward_model": "x", "reward_model_weight": 0.0}, "reward_model_weight=0.0 must be positive"),
        ({"rewards": (SHORT,)}, "reward 'short' pays for form whatever the answer; make it a gate"),
        (
            {"rewards": (dataclasses.replace(SHORT, only_if="learned"),)},
            r"only_if='learned' is not one of \['right', 'short'\]",
        ),
        ({"rewards": (dataclasses.replace(SHORT, gate=True),) * 2}, "parts with different names"),
        (
            {
                "rewards": (dataclasses.replace(SHORT, only_if="right", weight=-0.1),),
                "policy": dataclasses.replace(MAXRL, group_size=4),
            },
            "maxrl.*rewards of negative weight",
        ),
        (
            {
                "rewards": (dataclasses.replace(SHORT, gate=True),),
                "reward_model": "x",
                "policy": PolicyConfig(scale="group", normalise_parts=True),
            },
            r"policy\.normalise_parts weighs parts apart, and rewards are gates",
        ),
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
    real, seen = collector.draw, []

    def draw(engine, prompts, **options):
        samples = real(engine, prompts, **options)
        seen.append((prompts, options["stop_ids"], samples))
        return samples

    monkeypatch.setattr(collector, "draw", draw)
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


@pytest.mark.parametrize("score", [True, False])
def test_a_sampler_that_disagrees_ends_the_run(warm_start, tmp_path, monkeypatch, score):
    """Told by the pass over what was drawn, or by the first update."""
    real = collector.draw

    def wrong(*args, **kwargs):
        samples = real(*args, **kwargs)
        return dataclasses.replace(samples, behavior_logprobs=samples.behavior_logprobs - 0.5 * samples.mask)

    monkeypatch.setattr(collector, "draw", wrong)
    rollouts = RolloutConfig(4, 6, 6, max_batch=8, verifiers=1, score=score)
    with pytest.raises(RuntimeError, match=r"KL\(sampler, trainer\) is .* more than rollouts\.max_mismatch=0\.01"):
        rl.train_with_rewards(job(warm_start, tmp_path / "run", rollouts=rollouts), log=lambda _: None)


def test_tokens_that_are_no_text_spoil_an_answer(warm_start, tmp_path):
    """Those beyond the tokenizer, and special ones, wherever they stand: the task's answer must not be read around them."""
    config = job(warm_start, tmp_path / "run", steps=1)
    texts, rewards = [], []

    class Stop(Exception):
        pass

    def see(self, samples, examples):
        (a, b), bos, eos = self.tokenizer.encode("ab"), self.tokenizer.bos_id, self.tokenizer.eos_id
        beyond = MODEL.vocab_size - 1
        answers = [[a, b], [a, b, beyond], [a, beyond, b], [bos, a, bos, b], [a, b, bos], [a, eos, b]]
        texts.extend(map(self.text, answers))
        asked = Example("ba=", "ab", "ba")
        rewards.extend(self.task.score(text, asked).reward for text in texts)
        raise Stop

    original, collector.Collector.judge = collector.Collector.judge, see
    try:
        with pytest.raises(Stop):
            rl.train_with_rewards(config, log=lambda _: None)
    finally:
        collector.Collector.judge = original
    assert texts == ["ab", "ab\ufffd", "a\ufffdb", "\ufffda\ufffdb", "ab\ufffd", "a\ufffdb"]
    assert rewards == [1, 0, 0, 0, 0, 0]


def test_without_scoring_the_sampler_speaks_for_the_trainer(warm_start, tmp_path):
    """On policy they agree, so the updates are the same; how far they are apart is what the first update says."""
    spared = RolloutConfig(4, 6, 6, max_batch=8, verifiers=1, score=False)
    with_scores, without = run(job(warm_start, tmp_path / "a")), run(job(warm_start, tmp_path / "b", rollouts=spared))
    for one, other in zip(with_scores, without, strict=True):
        for name in ("reward_mean", "grad_norm", "param_norm", "entropy", "update_kl"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-8), name
    assert any(record["grad_norm"] > 0 for record in without)
    assert all(abs(record["mismatch_kl"]) < 1e-9 and "mismatch_max" not in record for record in without)


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
    if lora is not None:
        convert(parse(["convert", str(tmp_path / "first"), str(tmp_path / "adapters"), "--adapters"]))
        adapted = adapt(open_any(str(warm_start)).params, *load_adapters(tmp_path / "adapters", MODEL))
        merged = merge(adapted, param_specs(MODEL))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), jax.device_get(merged), last[0])
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
