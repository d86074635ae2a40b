"""A first model on any machine: English and code from the running Python's own documentation and sources.

Command:   make quickstart  (or: loam run --config=configs/quickstart.py)
Hardware:  2 CPU cores, 5 to 7 minutes
Expected:  bits_per_byte 1.70 to 1.71 (`xz -9e` needs 2.25 for the same documents one by one, about 1.84 for all at once)
"""

from ml_collections import ConfigDict

from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ModelConfig(
        vocab_size=2048,
        num_layers=4,
        d_model=160,
        num_heads=4,
        d_ff=432,
        max_seq_len=512,
        qk_norm="head",
        mlp="swiglu",
    )
    config.data = DataConfig(
        sources=(SourceConfig(name="stdlib", kind="stdlib", held_out_fraction=0.03),),
        tokenizer=TokenizerConfig(kind="byte_bpe", vocab_size=2048, train_bytes=4_000_000),
        seq_len=256,
    )
    config.steps = 640
    config.batch_size = 8
    config.cpu_devices = 0
    config.optimizer = {
        "name": "muon",
        "learning_rate": 4e-3,
        "adam_learning_rate": 4e-3,
        "weight_decay": 0.1,
        "schedule": {"name": "wsd", "warmup": "5 %", "decay": "50 %", "end_fraction": 0.0},
    }
    config.checkpoint = {"every": 160}
    config.eval = {
        "every": 160,
        "max_batches": 4,
        "sample_prompts": ("def main(", "The", "class Reader("),
        "sample_tokens": 120,
    }
    config.xz_baseline = True
    return config
