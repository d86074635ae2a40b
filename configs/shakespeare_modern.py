"""The tokens and about the size of `shakespeare_gpt2`, with what the field has learned since.

RoPE, RMSNorm, QK-norm, SwiGLU, and Muon for the matrices.

Command:   loam run --config=configs/shakespeare_modern.py --config.data.sources.0.path=tinyshakespeare.txt
Hardware:  2 CPU cores, about 3 minutes
Expected:  val_loss 1.550, 1.548, 1.545 for seeds 0, 1, 2 (`shakespeare_gpt2`: 1.904, 1.906, 1.926)
"""

from ml_collections import ConfigDict

from configs import shakespeare_gpt2
from model.config import ModelConfig


def get_config() -> ConfigDict:
    config = shakespeare_gpt2.get_config()
    config.model = ModelConfig(
        vocab_size=65,
        num_layers=4,
        d_model=128,
        num_heads=4,
        d_ff=344,  # three matrices of this width are as large as two of 512
        max_seq_len=64,
        positions="rope",
        norm="rmsnorm",
        qk_norm="head",
        mlp="swiglu",
        tie_embeddings=False,
    )
    config.optimizer = {
        "name": "muon",
        "learning_rate": 5e-3,
        "adam_learning_rate": 5e-3,
        "b1": 0.9,
        "b2": 0.99,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "linear", "warmup": "100 steps", "end_fraction": 0.0},
    }
    return config
