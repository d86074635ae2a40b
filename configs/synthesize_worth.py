"""Pairs of strings that the reference wrote, the one of more worth preferred: what `configs/reward_model_worth.py` learns from.

Command:   loam run --config=configs/synthesize_worth.py
Hardware:  1 CPU core, a quarter of a minute
Expected:  a pair of nearly every prompt

Needs a finished run of `configs/pretrain_worth.py` (runs/pretrain_worth).
"""

from ml_collections import ConfigDict

from configs import pretrain_worth
from data.config import TaskConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_worth.get_config().model
    config.initial_weights = "runs/pretrain_worth"
    config.prompts = {"task": TaskConfig("worth", pretrain_worth.OPTIONS), "number": 256}
    config.best_of = {"samples": 2, "keep": "pairs", "min_score": None}
    config.batch = 128
    config.max_prompt_tokens = 8
    config.max_tokens = 12
    config.max_batch = 64
    config.verifiers = 1
    return config
