"""Qwen3 30B-A3B (arXiv:2505.09388) on a v6e pod of 256 chips.

Command:   loam compile --config=configs/pods/qwen3_30b_a3b_v6e.py --topology=v6e:16x16
Hardware:  v6e:16x16; compiling takes a laptop
Expected:  15.9 of 31.24 GiB a device; by the compiler's estimate 3.56 s a step, 14.0 % MFU; docs/pods.md
"""

from ml_collections import ConfigDict

from configs.pods import pretraining


def get_config() -> ConfigDict:
    # Experts are narrow: to gather them costs less than to send each token to 8 of them (experiments/LOG.md).
    return pretraining("qwen3-30b-a3b", seq_len=8192, batch_size=512, mesh={"data": 2, "fsdp": 128}, remat="full")
