"""KTO teaches the tiny model that has seen strings reversed with single answers, each marked right or wrong.

Command:   loam run --config=configs/kto_reverse.py
Hardware:  1 CPU core, 2 minutes beside other work
Expected:  val_accuracy 0.88, val_loss 0.361 (0.5 and 0.5 before); an answer is told right if its reward lies on the right side
           of the reference point

Needs a finished run of `configs/pretrain_reverse.py` (runs/pretrain_reverse). Half of the answers, which are made here, have a
slip: one letter left out, doubled, exchanged or moved.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import dpo_reverse
from data.config import DataConfig


def get_config() -> ConfigDict:
    config = dpo_reverse.get_config()
    config.objective = {"kto": {"beta": 0.1}}
    data: DataConfig = config["data"]  # pyright: ignore[reportAssignmentType]
    config.data = dataclasses.replace(data, content="labels")
    return config
