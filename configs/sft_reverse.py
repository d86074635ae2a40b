"""Fine-tuning on conversations about longer strings to reverse: the second stage of `experiments/whole_path.py`.

Command:   loam run --config=configs/sft_reverse.py
Hardware:  1 CPU core
Expected:  not measured yet

Needs a finished run of `configs/pretrain_reverse.py` (runs/pretrain_reverse).
"""

import dataclasses

from ml_collections import ConfigDict

from configs import dpo_reverse
from data.config import DataConfig


def get_config() -> ConfigDict:
    config = dpo_reverse.get_config()
    config.objective = None
    data: DataConfig = config["data"]  # pyright: ignore[reportAssignmentType]
    config.data = dataclasses.replace(data, content="conversations")
    config.steps = 100
    config.checkpoint = {"every": 100}
    config.optimizer = {"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": {"name": "linear", "warmup": "5 %"}}
    config.eval = {"every": 50, "max_batches": 4}
    return config
