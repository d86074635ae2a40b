"""REINFORCE with the other answers to a prompt as the baseline (RLOO), on the task of `configs/grpo_reverse.py`.

Command:   loam run --config=configs/reinforce_reverse.py
Hardware:  1 CPU core, about five minutes
Expected:  not measured yet

The baseline may be the greedy answer's reward as well (ReMax): --config.policy.advantage=greedy, with which a single sample of
each prompt will do: --config.policy.group_size=1 --config.rollouts.prompts=256.

Needs a finished run of `configs/pretrain_reverse.py` (runs/pretrain_reverse).
"""

from ml_collections import ConfigDict

from configs import grpo_reverse


def get_config() -> ConfigDict:
    config = grpo_reverse.get_config()
    config.policy = {
        "surrogate": "reinforce",
        "advantage": "rloo",
        "aggregation": "seq_sum",
        "clip_low": 0.0,
        "clip_high": 0.0,
        "group_size": 8,
    }
    return config
