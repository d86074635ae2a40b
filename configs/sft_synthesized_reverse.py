"""Fine-tuning on what the model itself wrote and a verifier found right: the second half of rejection sampling.

Command:   loam run --config=configs/sft_synthesized_reverse.py
Hardware:  1 CPU core
Expected:  not measured yet

Needs finished runs of `configs/pretrain_reverse.py` and `configs/synthesize_reverse.py`.
"""

from ml_collections import ConfigDict

from configs import dpo_reverse, pretrain_reverse
from data.config import DataConfig, SourceConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_reverse.get_config().model
    config.initial_weights = "runs/pretrain_reverse"
    config.data = DataConfig(
        sources=(
            SourceConfig(name="right", kind="files", path="runs/synthesize_reverse/dataset.jsonl", held_out_fraction=0.05),
        ),
        content="conversations",
        chat_template=dpo_reverse.BARE_TEMPLATE,
        seq_len=64,
    )
    config.steps = 100
    config.batch_size = 16
    config.optimizer = {"learning_rate": 3e-4, "weight_decay": 0.0, "schedule": {"name": "linear", "warmup": "5 %"}}
    config.checkpoint = {"every": 100}
    config.eval = {"every": 50}
    return config
