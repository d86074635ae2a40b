"""nanoGPT's setting for a CPU: GPT-2 with 4 layers, 4 heads, width 128 on the characters of tiny Shakespeare.

Command:   loam run --config=configs/shakespeare_gpt2.py --config.data.sources.0.path=tinyshakespeare.txt
Hardware:  2 CPU cores, about 3 minutes
Expected:  val_loss 1.904, 1.906, 1.926 for seeds 0, 1, 2 over the whole validation set
           (nanoGPT's own code: mean 1.905 of six seeds, from 1.891 to 1.919)

The text is char-rnn's `data/tinyshakespeare/input.txt` (1,115,394 bytes); `origin` below says where to get it.
"""

from ml_collections import ConfigDict

from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ModelConfig(
        vocab_size=65,
        num_layers=4,
        d_model=128,
        num_heads=4,
        d_ff=512,
        max_seq_len=64,
        positions="learned",
        norm="layernorm",
        mlp="gelu",
        tie_embeddings=True,
    )
    config.data = DataConfig(
        sources=(
            SourceConfig(
                name="shakespeare",
                kind="files",
                path="tinyshakespeare.txt",
                licence="public domain",
                origin="data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn",
                held_out_split="position",
                held_out_fraction=0.1,
            ),
        ),
        tokenizer=TokenizerConfig(kind="chars", document_boundaries=False),
        seq_len=64,
        packing="sequential",
    )
    config.steps = 2000
    config.batch_size = 12
    config.cpu_devices = 0  # one per core: the model is too small to fill them otherwise
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "b1": 0.9,
        "b2": 0.99,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": "100 steps", "end_fraction": 0.1},
    }
    config.eval = {"every": 500, "sample_prompts": ("\nROMEO:\n",), "sample_tokens": 50}
    return config
