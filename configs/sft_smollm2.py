"""Fine-tunes SmolLM2-135M-Instruct further, in its own chat template.

Command:   loam run --config=configs/sft_smollm2.py --config.data.sources.0.path=chats.jsonl
Hardware:  2 CPU cores; about 7 GB and some seconds per step of 4 x 256 tokens (estimates, not measured)
Expected:  val_loss, per token of held-out answers, falls from that of the model it begins with

Needs `loam pull smollm2-135m-instruct`, and conversations in any layout of `data/chat.py`.
"""

from ml_collections import ConfigDict

from data.config import DataConfig, SourceConfig
from model.presets import PRESETS


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = PRESETS["smollm2-135m"]
    config.initial_weights = "smollm2-135m-instruct"
    config.data = DataConfig(
        sources=(SourceConfig(name="chats", kind="files", path="chats.jsonl", held_out_fraction=0.05),),
        content="conversations",
        seq_len=256,
    )
    config.steps = 200
    config.batch_size = 4
    config.loss = {"chunk_tokens": 256}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-5,
        "weight_decay": 0.0,
        "schedule": {"name": "cosine", "warmup": "5 %", "end_fraction": 0.0},
    }
    config.checkpoint = {"every": 100}
    config.eval = {"every": 50, "max_batches": 4}
    return config
