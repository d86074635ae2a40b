"""A tiny model that has been shown Euclid's algorithm step by step: the warm start of `configs/process_model_gcd.py`.

Command:   loam run --config=configs/pretrain_gcd.py
Hardware:  1 CPU core
Expected:  not measured yet
"""

from ml_collections import ConfigDict

from data.config import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from model.config import ModelConfig

TASK = TaskConfig("gcd", (("template", "gcd({a},{b}): "), ("answer_format", "hashes"), ("max_number", 60)))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ModelConfig(vocab_size=64, num_layers=2, d_model=96, num_heads=4, d_ff=256, max_seq_len=192, qk_norm="head")
    config.data = DataConfig(
        sources=(SourceConfig(name="gcd", kind="task", task=TASK, num_examples=20_000, held_out_fraction=0.02),),
        tokenizer=TokenizerConfig(kind="chars"),
        seq_len=192,
    )
    config.steps = 300
    config.batch_size = 16
    config.optimizer = {"learning_rate": 3e-3, "schedule": {"name": "cosine", "warmup": "5 %"}}
    config.checkpoint = {"every": 100}
    config.eval = {"every": 100, "max_batches": 4}
    return config
