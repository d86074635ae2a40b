"""A reward model that learns of pairs which strings are worth much: what `experiments/over_optimisation.py` optimises.

Command:   loam run --config=configs/reward_model_worth.py
Hardware:  1 CPU core, half a minute
Expected:  see experiments/results/over_optimisation

Needs finished runs of `configs/pretrain_worth.py` and `configs/synthesize_worth.py`.
"""

from ml_collections import ConfigDict

from configs import dpo_reverse, pretrain_worth
from data.config import DataConfig, SourceConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_worth.get_config().model
    config.initial_weights = "runs/pretrain_worth"
    config.objective = {"reward_model": {"centring": 0.01}}
    config.data = DataConfig(
        sources=(SourceConfig(name="pairs", kind="files", path="runs/synthesize_worth/dataset.jsonl", held_out_fraction=0.25),),
        content="pairs",
        chat_template=dpo_reverse.BARE_TEMPLATE,
        seq_len=32,
    )
    config.steps = 150
    config.batch_size = 16
    config.optimizer = {"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": {"name": "linear", "warmup": "5 %"}}
    config.checkpoint = {"every": 150}
    config.eval = {"every": 50}
    return config
