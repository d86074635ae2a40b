"""A model of half the width learns to reverse strings from the distributions of the tiny model that has learned it by rewards.

Command:   loam run --config=configs/sft_distilled_reverse.py
Hardware:  1 CPU core
Expected:  not measured yet

Needs a finished run of `configs/grpo_reverse.py` (runs/grpo_reverse), whose tokenizer and texts it takes. What the teacher
itself writes, in place of right answers: `configs/synthesize_reverse.py` with --config.best_of.keep=all.
"""

from ml_collections import ConfigDict

from configs import dpo_reverse, pretrain_reverse
from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ModelConfig(vocab_size=64, num_layers=2, d_model=48, num_heads=4, d_ff=128, max_seq_len=64, qk_norm="head")
    config.distillation = {"teacher": "runs/grpo_reverse", "model": pretrain_reverse.get_config().model, "share": 0.5}
    config.data = DataConfig(
        sources=(
            SourceConfig(name="reverse", kind="task", task=dpo_reverse.TASK, num_examples=20_000, held_out_fraction=0.02),
        ),
        tokenizer=TokenizerConfig(kind="chars", path="runs/grpo_reverse/tokenizer"),
        content="conversations",
        chat_template=dpo_reverse.BARE_TEMPLATE,
        seq_len=64,
    )
    config.steps = 300
    config.batch_size = 32
    config.optimizer = {"learning_rate": 3e-3, "schedule": {"name": "cosine", "warmup": "5 %"}}
    config.checkpoint = {"every": 100}
    config.eval = {"every": 100, "max_batches": 4}
    return config
