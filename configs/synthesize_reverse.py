"""Rejection sampling: the tiny model reverses strings, and what is right becomes a data set.

Command:   loam run --config=configs/synthesize_reverse.py
Hardware:  1 CPU core
Expected:  not measured yet

Needs a finished run of `configs/pretrain_reverse.py` (runs/pretrain_reverse). `configs/sft_synthesized_reverse.py` learns from
runs/synthesize_reverse/dataset.jsonl. The best of n, judged by a reward model: --config.best_of.keep=best
--config.best_of.min_score=None --config.reward_model=runs/reward_model_reverse; pairs of right and wrong answers, for DPO:
--config.best_of.keep=pairs; whatever the model writes, to teach another one: --config.best_of.keep=all
--config.best_of.min_score=None.
"""

from ml_collections import ConfigDict

from configs import dpo_reverse, pretrain_reverse


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_reverse.get_config().model
    config.initial_weights = "runs/pretrain_reverse"
    config.prompts = {"task": dpo_reverse.TASK, "number": 1024}
    config.best_of = {"samples": 8, "keep": "right", "min_score": 1.0, "max_kept": 1}
    config.batch = 128
    config.max_prompt_tokens = 20
    config.max_tokens = 10
    config.max_batch = 256
    return config
