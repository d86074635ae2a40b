"""A tiny model that has been shown solutions of countdown, a target out of three digits: the warm start of
`configs/grpo_countdown.py`.

Command:   loam run --config=configs/pretrain_countdown.py
Hardware:  1 CPU core, 2 minutes beside other work
Expected:  pass@1 of 0.34, as the first evaluation of `configs/grpo_countdown.py` says
"""

from ml_collections import ConfigDict

from configs import pretrain_reverse
from data.config import DataConfig, SourceConfig, TaskConfig, TokenizerConfig

OPTIONS = (("num_numbers", 3), ("max_number", 9), ("max_target", 50))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_reverse.get_config().model
    config.data = DataConfig(
        sources=(
            SourceConfig(
                name="countdown",
                kind="task",
                task=TaskConfig("countdown", OPTIONS),
                num_examples=20_000,
                held_out_fraction=0.02,
            ),
        ),
        tokenizer=TokenizerConfig(kind="chars"),
        seq_len=64,
    )
    config.steps = 600
    config.batch_size = 32
    config.optimizer = {"learning_rate": 3e-3, "schedule": {"name": "cosine", "warmup": "5 %"}}
    config.checkpoint = {"every": 300}
    config.eval = {"every": 200, "max_batches": 4}
    return config
