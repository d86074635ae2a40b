"""A job small enough to run many times: two sources of made-up text, best-fit packing, a mixture that changes, two layers."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = "the of and a to in is you that it he was for on are as with his they at be this from have or by one had not".split()


def write_corpus(directory: Path, name: str, seed: int, num_documents: int = 60) -> Path:
    """A folder of documents of 5 to 200 words."""
    rng = random.Random(seed)
    folder = directory / name
    folder.mkdir(parents=True)
    for number in range(num_documents):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 200)))
        (folder / f"{number}.txt").write_text(f"{text}.\n")
    return folder


CONFIG = """
from ml_collections import ConfigDict
from data.config import DataConfig, MixtureConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig

def get_config():
    config = ConfigDict()
    config.model = ModelConfig(
        vocab_size=300, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, max_seq_len=128, window_pattern=(8, 0)
    )
    config.data = DataConfig(
        sources=(
            SourceConfig(name="a", kind="files", path="{directory}/a", held_out_fraction=0.1),
            SourceConfig(name="b", kind="files", path="{directory}/b", held_out_fraction=0.1),
        ),
        tokenizer=TokenizerConfig(kind="byte_bpe", vocab_size=300),
        mixtures=(MixtureConfig(0, (("a", 3), ("b", 1))), MixtureConfig(7, (("a", 1), ("b", 2)))),
        seq_len=64,
        cache_dir="{directory}/cache",
    )
    config.steps = 20
    config.batch_size = 8
    config.run_dir = "{directory}/run"
    config.optimizer = {{"learning_rate": 3e-3, "ema_decay": 0.9}}
    config.checkpoint = {{"every": 5, "keep": 3}}
    config.eval = {{"every": 8, "max_batches": 1, "sample_prompts": ("the",), "sample_tokens": 5}}
    return config
"""


def write_tiny_job(directory: Path) -> Path:
    """Corpora and a config file below `directory`; returns the config file."""
    write_corpus(directory, "a", seed=1)
    write_corpus(directory, "b", seed=2)
    path = directory / "tiny.py"
    path.write_text(CONFIG.format(directory=directory))
    return path
