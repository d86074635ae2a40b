"""Improves the answers of `configs/sft_quickstart.py` by their rewards alone: GRPO (arXiv:2402.03300) on digits to sort.

Command:   make quickstart  (or: loam run --config=configs/grpo_quickstart.py)
Hardware:  2 CPU cores, about 3 minutes
Expected:  TODO

Needs a finished run of `configs/sft_quickstart.py` (runs/sft_quickstart). Prompts are drawn from the same task; those of the
evaluation occur in no step of either run.
"""

from ml_collections import ConfigDict

from configs import quickstart, sft_quickstart


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = quickstart.get_config().model
    config.initial_weights = "runs/sft_quickstart"
    config.chat = True
    config.task = sft_quickstart.TASK
    config.steps = 100
    config.policy = {"scale": "none", "aggregation": "token_mean", "group_size": 8}
    config.rollouts = {"prompts": 16, "max_prompt_tokens": 24, "max_tokens": 12}
    config.optimizer = {
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "schedule": {"name": "constant", "warmup": "5 %"},
    }
    config.checkpoint = {"every": 50}
    config.eval = {"every": 20, "prompts": 64, "samples": 4}
    return config
