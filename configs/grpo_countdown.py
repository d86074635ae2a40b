"""GRPO teaches a tiny model countdown, where many answers are right and the verifier works out the expression.

Command:   loam run --config=configs/grpo_countdown.py
Hardware:  1 CPU core, 7 minutes beside other work
Expected:  eval/pass@1 from 0.34 to 0.64, eval/pass@4 from 0.67 to 0.71 (seed 0)

Needs a finished run of `configs/pretrain_countdown.py` (runs/pretrain_countdown).
"""

from ml_collections import ConfigDict

from configs import grpo_reverse, pretrain_countdown
from data.config import TaskConfig


def get_config() -> ConfigDict:
    config = grpo_reverse.get_config()
    config.initial_weights = "runs/pretrain_countdown"
    config.task = TaskConfig("countdown", pretrain_countdown.OPTIONS)
    config.policy.kl = {"loss_coefficient": 0.0}  # What a penalty does here has not been measured.
    config.rollouts = {"prompts": 32, "max_prompt_tokens": 14, "max_tokens": 12}
    config.optimizer.learning_rate = 3e-4  # With that of `reverse` pass@4 falls from 0.67 to 0.5 on the way.
    return config
