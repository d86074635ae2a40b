"""Llama 3 70B (arXiv:2407.21783) on 512 chips of v5p.

Command:   loam compile --config=configs/pods/llama3_70b_v5p.py --topology=v5p:8x8x8
Hardware:  v5p:8x8x8; compiling takes a laptop
Expected:  65.3 of 95.73 GiB a device; by the compiler's estimate 12.6 s a step, 63.6 % MFU; docs/pods.md
"""

from ml_collections import ConfigDict

from configs.pods import pretraining


def get_config() -> ConfigDict:
    # Over a part of the slice gradients are scattered; over all of it they would be summed up whole (experiments/LOG.md).
    return pretraining("llama3-70b", seq_len=8192, batch_size=512, mesh={"data": 8, "fsdp": 64}, remat="attention")
