"""DPO teaches to decline strings with a forbidden word, and to go on helping with the others: a toy of training for safety.

Command:   loam run --config=configs/dpo_guarded_reverse.py
Hardware:  1 CPU core
Expected:  not measured yet

Needs a finished run of `configs/pretrain_reverse.py` (runs/pretrain_reverse). Of half of the pairs the prompt is forbidden: the
refusal is preferred to the string backwards; of the others the right answer is preferred to one with a slip. The model has
never declined before, and DPO alone raises too little what is never written: the likelihood of chosen answers is in the loss.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import dpo_reverse
from data.config import DataConfig, TaskConfig

TASK = TaskConfig("guarded_reverse", dpo_reverse.TASK.options)


def get_config() -> ConfigDict:
    config = dpo_reverse.get_config()
    config.objective = {"dpo": {"beta": 0.1, "nll_coefficient": 1.0}}
    data: DataConfig = config["data"]  # pyright: ignore[reportAssignmentType]
    config.data = dataclasses.replace(data, sources=(dataclasses.replace(data.sources[0], task=TASK),))
    config.optimizer = {"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": {"name": "linear", "warmup": "5 %"}}
    return config
