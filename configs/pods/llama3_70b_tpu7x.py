"""Llama 3 70B (arXiv:2407.21783) on 64 chips of tpu7x, which are 128 devices.

Command:   loam compile --config=configs/pods/llama3_70b_tpu7x.py --topology=tpu7x:4x4x4
Hardware:  tpu7x:4x4x4; compiling takes a laptop
Expected:  49.7 of 94.74 GiB a device; by the compiler's estimate 12.8 s a step, 49.8 % MFU; docs/pods.md
"""

from ml_collections import ConfigDict

from configs.pods import pretraining


def get_config() -> ConfigDict:
    return pretraining("llama3-70b", seq_len=8192, batch_size=256, mesh={"fsdp": 128}, remat="full")
