"""Pretraining jobs for TPU pods, one file each, and what they share.

`loam compile` compiles each of them here, without a pod; `make pods` writes what it says about all of them into docs/pods.md.
"""

from typing import Any

from ml_collections import ConfigDict

from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.presets import preset


def pretraining(name: str, *, seq_len: int, batch_size: int, mesh: dict[str, int], remat: str, **model: Any) -> ConfigDict:
    """A preset trained on FineWeb-Edu (arXiv:2406.17557) with a tokenizer of its own.

    Args:
      name: of the preset.
      mesh: sizes of its axes; those left out are 1.
      model: further fields of ModelConfig to replace.
    """
    config = ConfigDict()
    config.model = preset(
        name,
        max_seq_len=seq_len,
        dtype="bfloat16",
        scan_layers=True,
        remat=remat,
        attention_backend="flash",
        **model,
    )
    config.data = DataConfig(
        sources=(
            SourceConfig(
                name="fineweb-edu",
                kind="huggingface",
                path="HuggingFaceFW/fineweb-edu",
                hub_config="sample-100BT",
                hub_revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
                licence="ODC-By 1.0",
                held_out_fraction=0.0005,
            ),
        ),
        tokenizer=TokenizerConfig(kind="byte_bpe", vocab_size=config.model.vocab_size, train_bytes=2_000_000_000),
        seq_len=seq_len,
        loader_threads=16,
        prefetch_batches=8,
    )
    config.steps = 20_000
    config.batch_size = batch_size
    config.mesh = {"data": 1} | mesh
    config.loss = {"z_loss": 1e-4, "chunk_tokens": 1024}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "schedule": {"name": "cosine", "warmup": "2000 steps", "end_fraction": 0.1},
    }
    config.rollback = {"spike_factor": 2.0}
    config.checkpoint = {"every": 250}
    config.eval = {"every": 1000, "max_batches": 16}
    return config
