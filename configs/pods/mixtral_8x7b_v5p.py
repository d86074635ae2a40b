"""Mixtral 8x7B (arXiv:2401.04088) on 128 chips of v5p.

Command:   loam compile --config=configs/pods/mixtral_8x7b_v5p.py --topology=v5p:4x4x8
Hardware:  v5p:4x4x8; compiling takes a laptop
Expected:  41.2 of 95.73 GiB a device; by the compiler's estimate 5.62 s a step, 52.7 % MFU; docs/pods.md
"""

from ml_collections import ConfigDict

from configs.pods import pretraining


def get_config() -> ConfigDict:
    return pretraining("mixtral-8x7b", seq_len=8192, batch_size=256, mesh={"fsdp": 16, "expert": 8}, remat="attention")
