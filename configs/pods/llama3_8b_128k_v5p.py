"""Llama 3.1 8B (arXiv:2407.21783) at a context of 131,072 tokens on 128 chips of v5p: rows are split over a ring of 16.

Command:   loam compile --config=configs/pods/llama3_8b_128k_v5p.py --topology=v5p:4x4x8
Hardware:  v5p:4x4x8; compiling takes a laptop
Expected:  15.6 of 95.73 GiB a device; by the compiler's estimate 4.15 s a step, 63.6 % MFU; docs/pods.md
"""

from ml_collections import ConfigDict

from configs.pods import pretraining


def get_config() -> ConfigDict:
    # Over a part of the slice gradients are scattered; over all of it they would be summed up whole (experiments/LOG.md).
    mesh = {"data": 2, "fsdp": 4, "context": 16}
    return pretraining("llama3.1-8b", seq_len=131_072, batch_size=8, mesh=mesh, remat="attention")
