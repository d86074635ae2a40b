"""PPO on the task of `configs/grpo_reverse.py`: a value head, advantages by GAE, two updates of each batch.

Command:   loam run --config=configs/ppo_reverse.py
Hardware:  1 CPU core, about five minutes
Expected:  not measured yet

Needs a finished run of `configs/pretrain_reverse.py` (runs/pretrain_reverse).
"""

from ml_collections import ConfigDict

from configs import grpo_reverse


def get_config() -> ConfigDict:
    config = grpo_reverse.get_config()
    config.policy = {
        "advantage": "gae",
        "value": {"coefficient": 0.5},
        "whiten": True,
        "kl": {"reward_coefficient": 0.01},
        "group_size": 1,
    }
    config.rollouts = {"prompts": 256, "max_prompt_tokens": 20, "max_tokens": 10}
    config.minibatches = 2
    return config
