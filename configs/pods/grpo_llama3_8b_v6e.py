"""GRPO (arXiv:2402.03300) for Llama 3 8B Instruct (arXiv:2407.21783) on countdown, on 64 chips of v6e.

Command:   loam compile --config=configs/pods/grpo_llama3_8b_v6e.py --topology=v6e:8x8
Hardware:  v6e:8x8; compiling takes a laptop
Expected:  23.3 of 31.24 GiB a device at most, in the update; for the layout of decoding 3.27 GiB arrive at each device, 35 ms
           on the links by estimate; docs/pods.md
"""

from ml_collections import ConfigDict

from data.config import TaskConfig
from model.presets import preset


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = preset(
        "llama3-8b", max_seq_len=4096, dtype="bfloat16", scan_layers=True, remat="attention", attention_backend="flash"
    )
    config.initial_weights = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.chat = True
    config.task = TaskConfig("countdown")
    config.steps = 500
    config.policy = {"scale": "none", "aggregation": "token_mean", "group_size": 16}
    # Rows of 2,048 tokens, which the kernel's tiles divide.
    config.rollouts = {"prompts": 64, "max_prompt_tokens": 513, "max_tokens": 1536, "max_batch": 256, "verifiers": 16}
    config.accumulation = 8
    config.chunk_tokens = 1024
    # Decoding splits weights and key-value heads over `tensor` alone: one of the 8 heads on each device.
    config.mesh = {"data": 1, "fsdp": 8, "tensor": 8}
    config.optimizer = {"learning_rate": 1e-6, "weight_decay": 0.0, "schedule": {"name": "constant", "warmup": "2 %"}}
    config.checkpoint = {"every": 50}
    config.eval = {"every": 50, "prompts": 256, "samples": 4}
    return config
