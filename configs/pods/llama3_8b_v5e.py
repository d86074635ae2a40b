"""Llama 3 8B (arXiv:2407.21783) on a v5e pod of 256 chips.

Command:   loam compile --config=configs/pods/llama3_8b_v5e.py --topology=v5e:16x16
Hardware:  v5e:16x16; compiling takes a laptop
Expected:  15.3 of 15.75 GiB a device; by the compiler's estimate 3.57 s a step, 60.0 % MFU; docs/pods.md
"""

from ml_collections import ConfigDict

from configs.pods import pretraining


def get_config() -> ConfigDict:
    return pretraining("llama3-8b", seq_len=8192, batch_size=256, mesh={"fsdp": 256}, remat="attention")
