"""A reward model that learns of pairs which strings are worth much: what `experiments/over_optimisation.py` optimises.

Command:   loam run --config=configs/reward_model_worth.py
Hardware:  1 CPU core, half a minute
Expected:  see experiments/results/over_optimisation

Needs finished runs of `configs/pretrain_worth.py` and `configs/synthesize_worth.py`, and of the latter a second one, for the
pairs that it is told right by:

    loam run --config=configs/synthesize_worth.py --config.seed=1000 --config.run_dir=runs/synthesize_worth_fixed
"""

from ml_collections import ConfigDict

from configs import dpo_reverse, pretrain_worth
from data.config import DataConfig, MixtureConfig, SourceConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = pretrain_worth.get_config().model
    config.initial_weights = "runs/pretrain_worth"
    config.objective = {"reward_model": {"centring": 0.01}}
    config.data = DataConfig(
        sources=(
            SourceConfig(name="pairs", kind="files", path="runs/synthesize_worth/dataset.jsonl", held_out_fraction=0.0),
            # The rest of it is not learned from either: no mixture names it.
            SourceConfig(name="fixed", kind="files", path="runs/synthesize_worth_fixed/dataset.jsonl", held_out_fraction=0.9),
        ),
        mixtures=(MixtureConfig(0, (("pairs", 1),)),),
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
