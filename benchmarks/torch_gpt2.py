"""GPT-2 in eager PyTorch, of nanoGPT's structure: what `benchmarks/train_step.py` measures Loam against.

One linear layer for queries, keys and values, fused attention, AdamW in one fused kernel: what PyTorch does best on a CPU
without compiling. Dropout, which both settings have at 0, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from model.config import ModelConfig
from train.config import OptimizerConfig


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.d_model
        self.num_heads = config.num_heads
        self.gelu = nn.GELU(approximate="none" if config.mlp == "gelu_exact" else "tanh")
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.up = nn.Linear(width, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split(D, dim=2)
        q, k, v = (y.view(B, T, self.num_heads, D // self.num_heads).transpose(1, 2) for y in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).contiguous().view(B, T, D))
        return x + self.down(self.gelu(self.up(self.mlp_norm(x))))


class GPT2(nn.Module):
    """Learned positions, pre-norm, tied head, no biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=False)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of int64 [B, T] tokens and targets."""
        x = self.embedding(tokens) + self.position_embedding(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def state_dict(params: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The parameters of Loam's model, by path, as those of `GPT2`; PyTorch's linear layers store [out, in]."""

    def transposed(*names: str, fan_in: int = config.d_model) -> np.ndarray:
        return np.concatenate([params[name].reshape(fan_in, -1) for name in names], axis=1).T

    arrays = {
        "embedding.weight": params["embedding"],
        "position_embedding.weight": params["position_embedding"],
        "final_norm.weight": params["final_norm/scale"],
        "head.weight": params["embedding"],
    }
    for i in range(config.num_layers):
        ours, theirs = f"blocks/{i}", f"blocks.{i}"
        arrays |= {
            f"{theirs}.attention_norm.weight": params[f"{ours}/attention_norm/scale"],
            f"{theirs}.qkv.weight": transposed(*(f"{ours}/attention/{name}" for name in ("query", "key", "value"))),
            f"{theirs}.out.weight": transposed(f"{ours}/attention/out"),
            f"{theirs}.mlp_norm.weight": params[f"{ours}/mlp_norm/scale"],
            f"{theirs}.up.weight": transposed(f"{ours}/mlp/up"),
            f"{theirs}.down.weight": transposed(f"{ours}/mlp/down", fan_in=config.d_ff),
        }
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


class Trainer:
    """Eager training: gradient clipping and AdamW, decaying matrices and embeddings only."""

    def __init__(self, params: Mapping[str, np.ndarray], model: ModelConfig, optimizer: OptimizerConfig):
        self.model = GPT2(model)
        self.model.load_state_dict(state_dict(params, model))
        weights = list(self.model.parameters())
        groups = [
            {"params": [w for w in weights if w.ndim >= 2], "weight_decay": optimizer.weight_decay},
            {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
        ]
        # Faster on CPU than foreach=True and the plain loop, by some 5 % of a step.
        self.optimizer = torch.optim.AdamW(groups, betas=(optimizer.b1, optimizer.b2), eps=optimizer.eps, fused=True)
        self.clip_norm = optimizer.clip_norm

    def step(self, tokens: np.ndarray, targets: np.ndarray, learning_rate: float) -> float:
        """One update on int64 [B, T] tokens. Returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self.model(torch.from_numpy(tokens), torch.from_numpy(targets))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()
