"""Small networks with random parameters, and packed rows for them."""

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.params import is_spec, param_specs

SMALL = ModelConfig(vocab_size=48, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=32)


def random_params(config: ModelConfig, seed: int = 0):
    """Every parameter random, biases and norms too, and large enough that attention is far from uniform."""
    generator = np.random.default_rng(seed)

    def draw(spec):
        mean = 1.0 if spec.init == "ones" else 0.0
        return jnp.asarray(mean + 0.2 * generator.standard_normal(spec.shape), spec.dtype)

    return jax.tree.map(draw, param_specs(config), is_leaf=is_spec)


def packed_rows(vocab_size: int):
    """Two rows of 16: documents of 9 and 5 tokens and padding; documents of 3 and 13 tokens."""
    tokens = np.random.default_rng(1).integers(0, vocab_size, (2, 16)).astype(np.int32)
    segments = np.array([[1] * 9 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 13], np.int32)
    positions = np.array([[*range(9), *range(5), 0, 0], [*range(3), *range(13)]], np.int32)
    return tokens, positions, segments
