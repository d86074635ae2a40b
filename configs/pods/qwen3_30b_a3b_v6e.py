"""Qwen3 30B-A3B (arXiv:2505.09388) on a v6e pod of 256 chips.

Command:   loam compile --config=configs/pods/qwen3_30b_a3b_v6e.py --topology=v6e:16x16
Hardware:  v6e:16x16; compiling takes a laptop
Expected:  to be said by the compiler: `make pods` has not been run to its end yet
"""

from ml_collections import ConfigDict

from configs.pods import pretraining


def get_config() -> ConfigDict:
    return pretraining("qwen3-30b-a3b", seq_len=8192, batch_size=256, mesh={"fsdp": 32, "expert": 8}, remat="full")
