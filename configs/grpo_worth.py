"""GRPO raises a dense reward while a penalty holds the policy near its reference: a point of `experiments/reward_frontier.py`.

Command:   loam run --config=configs/grpo_worth.py
Hardware:  1 CPU core, half a minute beside other work
Expected:  not measured yet

Needs a finished run of `configs/pretrain_worth.py` (runs/pretrain_worth).
"""

from ml_collections import ConfigDict

from configs import pretrain_worth
from data.config import TaskConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_worth.get_config().model
    config.initial_weights = "runs/pretrain_worth"
    config.task = TaskConfig("worth", pretrain_worth.OPTIONS)
    config.steps = 40
    config.policy = {"kl": {"loss_coefficient": 0.03}}
    config.rollouts = {"prompts": 8, "max_prompt_tokens": 8, "max_tokens": 12, "max_batch": 64, "verifiers": 1}
    config.optimizer = {
        "learning_rate": 2e-3,
        "weight_decay": 0.0,
        "schedule": {"name": "linear", "warmup": "5 %"},
    }
    config.checkpoint = {"every": 40}
    config.eval = {"every": 40, "prompts": 64, "samples": 4}
    return config
