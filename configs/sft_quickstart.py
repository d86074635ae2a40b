"""Teaches the model of `configs/quickstart.py` to answer: supervised fine-tuning on conversations, losses on the answers alone.

Command:   make quickstart  (or: loam run --config=configs/sft_quickstart.py)
Hardware:  2 CPU cores, about a minute
Expected:  val_loss 0.12 a token of held-out answers; `configs/grpo_quickstart.py` begins with pass@1 0.45 (one core, one seed)

Needs a finished run of `configs/quickstart.py` (runs/quickstart). A user asks to sort some digits, and the answer is right; the
data are made, so no file is needed. Its tokenizer has no marks for turns: every message is a document of its own, <bos> role,
newline, content <eos> (`data.chat_encoder.DEFAULT_TEMPLATE`).
"""

from ml_collections import ConfigDict

from configs import quickstart
from data.config import DataConfig, SourceConfig, TaskConfig

TASK = TaskConfig("sort", (("template", "Sort {numbers}"), ("min_length", 3), ("max_length", 6)))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = quickstart.get_config().model
    config.initial_weights = "runs/quickstart"
    config.data = DataConfig(
        sources=(SourceConfig(name="sort", kind="task", task=TASK, num_examples=10_000, held_out_fraction=0.05),),
        content="conversations",
        seq_len=256,
    )
    config.steps = 75  # Half-way: after 50 a twentieth of the answers is right, after 100 four fifths.
    config.batch_size = 8
    config.cpu_devices = 0
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "schedule": {"name": "cosine", "warmup": "5 %", "end_fraction": 0.0},
    }
    config.checkpoint = {"every": 75}
    config.eval = {"every": 25, "max_batches": 4}
    return config
