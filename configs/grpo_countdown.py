"""GRPO teaches a tiny model countdown, where many answers are right and the verifier works out the expression.

Command:   loam run --config=configs/grpo_countdown.py
Hardware:  1 CPU core, 11 minutes beside other work
Expected:  eval/pass@1 from 0.32 to 0.62, eval/pass@4 from 0.67 to 0.73 (seed 0)

Needs a finished run of `configs/pretrain_countdown.py` (runs/pretrain_countdown).
"""

from ml_collections import ConfigDict

from configs import grpo_reverse, pretrain_countdown
from data.config import TaskConfig


def get_config() -> ConfigDict:
    config = grpo_reverse.get_config()
    config.initial_weights = "runs/pretrain_countdown"
    config.task = TaskConfig("countdown", pretrain_countdown.OPTIONS)
    config.steps = 800
    # More than this penalty holds back what is learned, too (experiments/LOG.md); the bonus keeps answers apart (pass@4).
    config.policy.kl = {"loss_coefficient": 0.02}
    config.policy.entropy_coefficient = 0.01
    config.rollouts = {"prompts": 32, "max_prompt_tokens": 14, "max_tokens": 12}
    config.optimizer.learning_rate = 3e-4  # With that of `reverse` pass@4 falls from 0.67 to 0.5 on the way.
    config.eval.every = 80
    return config
