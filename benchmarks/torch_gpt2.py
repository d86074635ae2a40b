"""GPT-2 in eager PyTorch, of nanoGPT's structure: what `benchmarks/train_step.py` measures Loam against.

One linear layer for queries, keys and values, fused attention, AdamW in one fused kernel: what PyTorch does best on a CPU
without compiling. Dropout, which both settings have at 0, is left out.
"""

from __future__ import annotations

import math
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

    @torch.no_grad()
    def load(self, params: Mapping[str, np.ndarray]) -> None:
        """Takes the parameters of Loam's model, by path; PyTorch's linear layers store [out, in]."""

        def copy(to: torch.Tensor, *sources: str) -> None:
            matrices = [params[source].reshape(-1, to.shape[1] // len(sources)) for source in sources]
            to.copy_(torch.from_numpy(np.concatenate(matrices, axis=1)))

        self.embedding.weight.copy_(torch.from_numpy(params["embedding"]))
        self.position_embedding.weight.copy_(torch.from_numpy(params["position_embedding"]))
        self.final_norm.weight.copy_(torch.from_numpy(params["final_norm/scale"]))
        for i, block in enumerate(self.blocks):
            path, width = f"blocks/{i}", self.embedding.weight.shape[1]
            copy(block.qkv.weight.T, *(f"{path}/attention/{name}" for name in ("query", "key", "value")))
            block.out.weight.copy_(torch.from_numpy(params[f"{path}/attention/out"].reshape(width, width).T))
            copy(block.up.weight.T, f"{path}/mlp/up")
            copy(block.down.weight.T, f"{path}/mlp/down")
            block.attention_norm.weight.copy_(torch.from_numpy(params[f"{path}/attention_norm/scale"]))
            block.mlp_norm.weight.copy_(torch.from_numpy(params[f"{path}/mlp_norm/scale"]))
