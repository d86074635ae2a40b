"""A tiny model that has been shown how to reverse strings: the warm start of `configs/grpo_reverse.py`.

Command:   loam run --config=configs/pretrain_reverse.py
Hardware:  2 CPU cores, about a minute
Expected:  val_loss 0.64; pass@1 of 0.31 on strings of 5 to 8 letters, as the first evaluation of `configs/grpo_reverse.py`
           says (0.53 with another number of threads, whose rounding differs)
"""

from ml_collections import ConfigDict

from data.config import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from model.config import ModelConfig

LENGTHS = (("min_length", 3), ("max_length", 8), ("alphabet", "abcdefgh"))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ModelConfig(vocab_size=64, num_layers=2, d_model=96, num_heads=4, d_ff=256, max_seq_len=64, qk_norm="head")
    config.data = DataConfig(
        sources=(
            SourceConfig(
                name="reverse",
                kind="task",
                task=TaskConfig("reverse", LENGTHS),
                num_examples=20_000,
                held_out_fraction=0.02,
            ),
        ),
        tokenizer=TokenizerConfig(kind="chars"),
        seq_len=64,
    )
    config.steps = 300
    config.batch_size = 32
    config.optimizer = {"learning_rate": 3e-3, "schedule": {"name": "cosine", "warmup": "5 %"}}
    config.checkpoint = {"every": 100}
    config.eval = {"every": 90, "max_batches": 4}
    return config
