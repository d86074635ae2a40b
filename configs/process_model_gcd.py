"""A process reward model: judges each step of Euclid's algorithm where it ends.

Command:   loam run --config=configs/process_model_gcd.py
Hardware:  1 CPU core
Expected:  not measured yet

Needs a finished run of `configs/pretrain_gcd.py` (runs/pretrain_gcd). The solutions are made here: half of them are right, the
others end with a step that has a slip. Reinforcement learning takes the run as a reward, which is the lowest chance of any step
of an answer to be right: --config.reward_model=runs/process_model_gcd, and --config.reward_model_steps=product, or last.
"""

from ml_collections import ConfigDict

from configs import dpo_reverse, pretrain_gcd
from data.config import DataConfig, SourceConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_gcd.get_config().model
    config.initial_weights = "runs/pretrain_gcd"
    config.objective = {"process_model": {}}
    config.data = DataConfig(
        sources=(SourceConfig(name="steps", kind="task", task=pretrain_gcd.TASK, num_examples=8_000, held_out_fraction=0.05),),
        content="steps",
        chat_template=dpo_reverse.BARE_TEMPLATE,
        seq_len=192,
    )
    config.steps = 200
    config.batch_size = 16
    config.optimizer = {
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "schedule": {"name": "linear", "warmup": "5 %"},
    }
    config.checkpoint = {"every": 100}
    config.eval = {"every": 50}
    return config
