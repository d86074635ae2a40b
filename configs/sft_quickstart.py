"""Teaches the model of `configs/quickstart.py` to answer: supervised fine-tuning on conversations, losses on the answers alone.

Command:   loam run --config=configs/sft_quickstart.py --config.data.sources.0.path=chats.jsonl
Hardware:  2 CPU cores
Expected:  val_loss, per token of held-out answers, falls from that of the model it begins with

Needs a finished run of the quickstart (runs/quickstart), and conversations in any layout of `data/chat.py`, such as lines of
{"prompt": "…", "completion": "…"}. Its tokenizer has no marks for turns: every message is a document of its own, <bos> role,
newline, content <eos> (`data.chat_encoder.DEFAULT_TEMPLATE`).
"""

from ml_collections import ConfigDict

from configs import quickstart
from data.config import DataConfig, SourceConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = quickstart.get_config().model
    config.initial_weights = "runs/quickstart"
    config.data = DataConfig(
        sources=(SourceConfig(name="chats", kind="files", path="chats.jsonl", held_out_fraction=0.05),),
        content="conversations",
        seq_len=256,
    )
    config.steps = 200
    config.batch_size = 8
    config.cpu_devices = 0
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "schedule": {"name": "cosine", "warmup": "5 %", "end_fraction": 0.0},
    }
    config.checkpoint = {"every": 100}
    config.eval = {"every": 50, "max_batches": 4}
    return config
