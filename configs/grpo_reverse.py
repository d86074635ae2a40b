"""GRPO teaches a tiny model to reverse longer strings than it was shown.

Command:   loam run --config=configs/grpo_reverse.py
Hardware:  1 CPU core, 5 to 8 minutes beside other work
Expected:  eval/pass@1 from 0.31 to 0.97, 0.97 and 0.97 (seeds 0, 1, 2), above 0.9 from step 320 on

Needs a finished run of `configs/pretrain_reverse.py` (runs/pretrain_reverse).
"""

from ml_collections import ConfigDict

from configs import pretrain_reverse
from data.config import TaskConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_reverse.get_config().model
    config.initial_weights = "runs/pretrain_reverse"
    config.task = TaskConfig("reverse", (("min_length", 5), ("max_length", 8), ("alphabet", "abcdefgh")))
    config.steps = 400
    # Without the penalty rewards that say nothing take the policy apart (experiments/LOG.md).
    config.policy = {"scale": "none", "aggregation": "token_mean", "group_size": 8, "kl": {"loss_coefficient": 0.1}}
    config.rollouts = {"prompts": 32, "max_prompt_tokens": 20, "max_tokens": 10}
    config.optimizer = {
        "learning_rate": 6e-4,
        "weight_decay": 0.0,
        "schedule": {"name": "linear", "warmup": "10 %"},
    }
    config.eval = {"every": 40, "prompts": 512, "samples": 4}
    return config
