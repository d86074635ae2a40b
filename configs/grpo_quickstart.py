"""Improves the answers of `configs/sft_quickstart.py` by their rewards alone: GRPO (arXiv:2402.03300) on digits to sort.

Command:   make quickstart  (or: loam run --config=configs/grpo_quickstart.py)
Hardware:  2 CPU cores, 3 to 4 minutes (an estimate: 3.5 s of one core's time a step)
Expected:  eval/pass@1 from 0.45 to 0.61 after 30 of the 80 steps (seed 0, one core)

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
    config.steps = 80
    config.policy = {"scale": "none", "aggregation": "token_mean", "group_size": 8}
    config.rollouts = {"prompts": 32, "max_prompt_tokens": 24, "max_tokens": 12}
    config.optimizer = {
        "learning_rate": 2e-4,
        "weight_decay": 0.0,
        "schedule": {"name": "constant", "warmup": "5 %"},
    }
    config.checkpoint = {"every": 40}
    config.eval = {"every": 10, "prompts": 64, "samples": 4}
    return config
