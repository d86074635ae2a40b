"""A reward model that tells reversed strings from ones with a slip: the tiny model that has seen such strings, with a head.

Command:   loam run --config=configs/reward_model_reverse.py
Hardware:  1 CPU core, 1 minute beside other work
Expected:  val_accuracy 0.774, val_loss 0.347 (0.5 and 0.693 before)

Needs a finished run of `configs/pretrain_reverse.py` (runs/pretrain_reverse). The pairs are those of `configs/dpo_reverse.py`.
Reinforcement learning takes the run as a reward: --config.reward_model=runs/reward_model_reverse of `configs/grpo_reverse.py`.
An outcome model learns of single answers: --config.objective='{"outcome_model": {}}' --config.data.content=labels.
"""

from ml_collections import ConfigDict

from configs import dpo_reverse


def get_config() -> ConfigDict:
    config = dpo_reverse.get_config()
    config.objective = {"reward_model": {"centring": 0.01}}
    config.optimizer = {
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "schedule": {"name": "linear", "warmup": "5 %"},
    }
    config.steps = 100
    return config
