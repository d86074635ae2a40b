"""Floating-point operations of the model, counted from its shapes: what MFU (arXiv:2204.02311) is measured against."""

from __future__ import annotations

from model.config import LoraConfig, ModelConfig
from model.lora import adapter_specs
from model.params import active_parameters, num_parameters


def mean_keys_per_query(seq_len: int, window: int) -> float:
    """How many keys a query sees on average, causally, in a row of `seq_len` tokens; window 0 is no limit."""
    reach = min(window, seq_len) if window else seq_len
    return (reach * (reach + 1) / 2 + (seq_len - reach) * reach) / seq_len


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """2 per weight of every matrix a token meets, and per head 2 for each dimension of each key that it may attend to, and of
    its value.

    Only allowed pairs count, so that skipping the others shows as speed, and of the experts those that a token goes to.
    Embedding look-ups, norms and activations do not.
    """
    matrices = sum(matrix_flops_per_token(config).values())
    keys = sum(mean_keys_per_query(seq_len, config.window(layer)) for layer in range(config.num_layers))
    return matrices + 2 * config.num_heads * (config.head_dim + config.v_head_dim) * keys


def matrix_flops_per_token(config: ModelConfig) -> dict[str, int]:
    """2 per weight of every matrix a token meets in the forward pass, by kind: all but the products of attention."""
    groups = active_parameters(config)
    kinds = ("attention", "mlp", "router", "experts", "shared_experts")
    return {kind: 2 * groups.get(f"blocks/{kind}", 0) for kind in kinds} | {"head": 2 * config.vocab_size * config.d_model}


def train_matrix_flops_per_token(config: ModelConfig, lora: LoraConfig | None = None) -> dict[str, int]:
    """The same forward and backward: three products for each of the forward pass, and for a frozen matrix two, since it has no
    gradient; adapters are a kind of their own. What remat recomputes does not count."""
    forward = matrix_flops_per_token(config)
    if lora is None:
        return {kind: 3 * flops for kind, flops in forward.items()}
    adapters = {"adapters": 3 * 2 * num_parameters(adapter_specs(config, lora))}
    return {kind: 2 * flops for kind, flops in forward.items()} | adapters


def train_flops_per_token(config: ModelConfig, seq_len: int, lora: LoraConfig | None = None) -> float:
    """Forward and backward: the products of matrices as above, and three times those of attention."""
    attention = forward_flops_per_token(config, seq_len) - sum(matrix_flops_per_token(config).values())
    return 3 * attention + sum(train_matrix_flops_per_token(config, lora).values())
