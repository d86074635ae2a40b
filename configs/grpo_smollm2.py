"""LoRA GRPO (arXiv:2402.03300) on SmolLM2-135M-Instruct: sums of two numbers, asked for in its own chat template.

Command:   loam run --config=configs/grpo_smollm2.py
Hardware:  2 CPU cores, 8 s a step (`python benchmarks/grpo_step.py`; TRL takes 18)
Expected:  the share of right answers rises from eval/pass@1 0.08; no whole run has been kept yet

Needs `loam pull smollm2-135m-instruct`.
"""

from ml_collections import ConfigDict

from data.config import TaskConfig
from model.config import LoraConfig
from model.presets import preset


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = preset("smollm2-135m")
    config.initial_weights = "smollm2-135m-instruct"
    config.chat = True
    # It was told no format: what counts is the last number that it names.
    config.task = TaskConfig(
        "addition",
        (("template", "What is {a} + {b}? Answer with the number alone."), ("max_digits", 2), ("answer_format", "last_number")),
    )
    config.steps = 60
    config.policy = {"scale": "none", "aggregation": "token_mean", "group_size": 8}
    # One update on policy, by which sampler and trainer agree: scoring the answers once more would take a third of the step.
    config.rollouts = {"prompts": 4, "max_prompt_tokens": 48, "max_tokens": 16, "score": False}
    config.share_prompts = True  # 46 tokens that eight answers of at most 16 have in common
    config.lora = LoraConfig(rank=16, alpha=32.0)
    config.optimizer = {
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "schedule": {"name": "constant", "warmup": "5 %"},
    }
    config.checkpoint = {"every": 20}
    config.eval = {"every": 20, "prompts": 32, "samples": 2}
    return config
