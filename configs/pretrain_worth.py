"""A tiny model that writes eight letters at random: the reference policy of `configs/grpo_worth.py`.

Command:   loam run --config=configs/pretrain_worth.py
Hardware:  1 CPU core, half a minute
Expected:  val_loss 1.663, what random letters have: 12 x ln 8 in a text of 15 tokens
"""

from ml_collections import ConfigDict

from data.config import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from model.config import ModelConfig

OPTIONS = (("length", 8), ("topic_length", 4), ("alphabet", "abcdefgh"))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ModelConfig(vocab_size=32, num_layers=1, d_model=48, num_heads=2, d_ff=128, max_seq_len=32, qk_norm="head")
    config.data = DataConfig(
        sources=(
            SourceConfig(
                name="worth",
                kind="task",
                task=TaskConfig("worth", (*OPTIONS, ("informed", False))),
                num_examples=10_000,
                held_out_fraction=0.02,
            ),
        ),
        tokenizer=TokenizerConfig(kind="chars"),
        seq_len=32,
    )
    config.steps = 300
    config.batch_size = 32
    config.optimizer = {"learning_rate": 3e-3, "schedule": {"name": "cosine", "warmup": "5 %"}}
    config.checkpoint = {"every": 300}
    config.eval = {"every": 300, "max_batches": 4}
    return config
