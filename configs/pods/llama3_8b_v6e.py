"""Llama 3 8B (arXiv:2407.21783) on 64 chips of v6e.

Command:   loam compile --config=configs/pods/llama3_8b_v6e.py --topology=v6e:8x8
Hardware:  v6e:8x8; compiling takes a laptop
Expected:  24.2 of 31.24 GiB a device; by the compiler's estimate 2.38 s a step, 38.5 % MFU; docs/pods.md
"""

from ml_collections import ConfigDict

from configs.pods import pretraining


def get_config() -> ConfigDict:
    return pretraining("llama3-8b", seq_len=8192, batch_size=128, mesh={"fsdp": 64}, remat="attention")
