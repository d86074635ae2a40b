"""Runs of reinforcement learning, tiny, that tests make and look into."""

import dataclasses
from pathlib import Path

import jax

from data.config import TaskConfig
from data.tasks.task import Score
from inference.request import Token
from model.config import ModelConfig, MoeConfig
from train import collector, rl
from train.config import CheckpointConfig, OptimizerConfig, ScheduleConfig
from train.metrics import read_jsonl
from train.objectives.config import ObjectiveConfig, PolicyConfig, RewardModelConfig
from train.rewards import Part, Verifiers
from train.rl_config import RLConfig, RLEvalConfig, RolloutConfig

MODEL = ModelConfig(vocab_size=32, num_layers=1, d_model=32, num_heads=2, d_ff=64, max_seq_len=32)
EXPERTS = dataclasses.replace(MODEL, moe=MoeConfig(num_experts=4, experts_per_token=2, d_ff=32, balance_loss=0.5, z_loss=0.1))
TASK = TaskConfig("reverse", (("min_length", 1), ("max_length", 2), ("alphabet", "ab"), ("template", "{text}=")))
ONE_DEVICE = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, schedule=ScheduleConfig("constant", warmup="0 %"))


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


def records(run_dir):
    return [record for record in read_jsonl(Path(run_dir) / "metrics.jsonl") if "loss" in record]


def run(config):
    assert rl.train_with_rewards(config, log=lambda _: None) == 0
    return records(config.run_dir)


def drawn(tokens, finish="stop"):
    last = len(tokens) - 1
    return [Token(0, 0, token, -0.5 - i, -0.5 - i, None, None, finish if i == last else None) for i, token in enumerate(tokens)]


class StopAfter:
    def __init__(self, steps, calls):
        self.steps, self.calls = steps, calls

    def __enter__(self):
        return lambda: next(self.calls) + 1 >= self.steps

    def __exit__(self, *_):
        return None


BARE = (
    "{%- for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{- m.content + eos_token }}{% endgeneration %}"
    "{%- else %}{{- bos_token + m.content }}{% endif %}{% endfor %}"
)
PAIRWISE = ObjectiveConfig(reward_model=RewardModelConfig())


def watch_constants(monkeypatch):
    """What each step's rewards and constants were."""
    seen, real = [], rl.RLLoop._constants

    def constants(self, judged):
        found = real(self, judged)
        seen.append((judged, jax.device_get(found[0]), self))
        return found

    monkeypatch.setattr(rl.RLLoop, "_constants", constants)
    return seen


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

    monkeypatch.setattr(collector, "Verifiers", Others)
