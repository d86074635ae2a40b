"""What a transformer is: one frozen, validated description.  No jax import, so a config is checked before anything expensive.

The same `ModelConfig` describes GPT-2, Llama, Mistral, Qwen, Gemma, Falcon, Phi and OLMo; `model/presets.py` names them.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

Positions = Literal["learned", "rope", "none"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]
Norm = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post", "sandwich"]
QkNorm = Literal["none", "head", "full"]
Mlp = Literal["swiglu", "geglu", "gelu", "gelu_exact", "relu2"]
Remat = Literal["none", "full", "attention", "dots"]
AttentionBackend = Literal["reference", "xla", "flash", "cudnn"]
DType = Literal["float32", "bfloat16"]


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless `condition`: every config error names the fields and the fix."""
    if not condition:
        raise ValueError(message)


def check_choices(section: str, config: Any) -> None:
    """Raises ValueError where a field annotated as a Literal holds something else."""
    for name, annotation in typing.get_type_hints(type(config)).items():
        choices, value = typing.get_args(annotation), getattr(config, name)
        if typing.get_origin(annotation) is Literal:
            check(value in choices, f"{section}.{name}={value!r} is not one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) and its context extensions.

    Attributes:
      theta: base of the geometric progression of wavelengths.
      local_theta: base for sliding-window layers (Gemma 3); 0 means `theta`. Scaling never applies to these layers then.
      fraction: share of each head's dimensions that rotates (Phi, GPT-NeoX); the rest passes through.
      scaling: `linear` (arXiv:2306.15595), `llama3`, or `yarn` (arXiv:2309.00071), by `factor`.
      original_max_len: context length the unscaled model was trained at (llama3, yarn).
    """

    theta: float = 10_000.0
    local_theta: float = 0.0
    fraction: float = 1.0
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        check_choices("rope", self)
        check(self.theta > 0 and self.local_theta >= 0, "rope.theta must be positive")
        check(0 < self.fraction <= 1, f"rope.fraction={self.fraction} must lie in (0, 1]")
        check(self.factor >= 1, f"rope.factor={self.factor} must be at least 1")
        check(
            self.factor == 1 or self.scaling != "none",
            f"rope.factor={self.factor} does nothing without rope.scaling: set it to linear, llama3 or yarn",
        )
        check(
            self.high_freq_factor > self.low_freq_factor,
            f"rope.high_freq_factor={self.high_freq_factor} must exceed rope.low_freq_factor={self.low_freq_factor}",
        )
        check(
            self.scaling not in ("llama3", "yarn") or self.original_max_len > 0,
            f"rope.scaling={self.scaling!r} needs rope.original_max_len, the context length before extension",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      window_pattern: sliding-window size per layer, repeated over the layers; 0 is full causal attention.
        A window of w lets position i see positions i-w+1..i.
      norm_placement: `pre` x+f(n(x)); `post` x+n(f(x)) (OLMo 2); `sandwich` x+n(f(n(x))) (Gemma 2).
      norm_zero_centered: the scale is stored as w and applied as 1+w (Gemma).
      qk_norm: RMSNorm of queries and keys over each head (`head`: Qwen3, Gemma 3) or over all heads (`full`: OLMo 2).
      attention_scale: multiplies q·k; 0 means head_dim**-0.5.
      attention_soft_cap, logit_soft_cap: c*tanh(x/c); 0 is off.
      attention_sinks: one more logit per head, learned, that takes part in the softmax without a value (arXiv:2309.17453).
      attention_backend: who computes it, see model/attention.py; decoding with a cache always takes `reference`.
      parallel_block: attention and MLP read the same normalised input and are added together (Falcon, Phi).
      remat: what the backward pass recomputes: `none`, `full` (everything but layer inputs), `attention` (that but for
        attention with its inputs), `dots` (all but matmuls).
      dtype: of activations and matmuls; parameters are stored in `param_dtype`.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    max_seq_len: int
    num_kv_heads: int = 0  # 0: as many as num_heads
    head_dim: int = 0  # 0: d_model // num_heads
    positions: Positions = "rope"
    rope: RopeConfig = RopeConfig()
    norm: Norm = "rmsnorm"
    norm_placement: NormPlacement = "pre"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_zero_centered: bool = False
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    window_pattern: tuple[int, ...] = (0,)
    attention_scale: float = 0.0
    attention_soft_cap: float = 0.0
    attention_sinks: bool = False
    attention_backend: AttentionBackend = "xla"
    mlp: Mlp = "swiglu"
    mlp_bias: bool = False
    parallel_block: bool = False
    tie_embeddings: bool = False
    head_bias: bool = False
    scale_embeddings: bool = False  # multiply embeddings by sqrt(d_model) (Gemma)
    logit_soft_cap: float = 0.0
    init_std: float = 0.02
    scan_layers: bool = False
    remat: Remat = "none"
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self) -> None:
        check_choices("model", self)
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff", "max_seq_len"):
            check(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if not self.head_dim:
            check(
                self.d_model % self.num_heads == 0,
                f"model.d_model={self.d_model} is not divisible by model.num_heads={self.num_heads}: "
                "change one of them, or set model.head_dim",
            )
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        for name in ("init_std", "norm_eps"):
            check(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        for name in ("num_kv_heads", "head_dim", "attention_scale", "attention_soft_cap", "logit_soft_cap"):
            check(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} must not be negative")
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}: "
            "each key-value head serves an equal group of query heads",
        )
        check(
            self.positions != "rope" or (self.rotary_dim > 0 and self.rotary_dim % 2 == 0),
            f"rope rotates pairs, but head_dim={self.head_dim} x rope.fraction={self.rope.fraction} is {self.rotary_dim}",
        )
        check(
            len(self.window_pattern) > 0 and all(w >= 0 for w in self.window_pattern),
            f"model.window_pattern={self.window_pattern} must hold window sizes >= 0, where 0 is full attention",
        )
        check(
            not self.parallel_block or self.norm_placement == "pre",
            "model.parallel_block needs model.norm_placement='pre'",
        )
        check(not (self.norm_bias and self.norm == "rmsnorm"), "model.norm_bias needs model.norm='layernorm'")
        if self.attention_backend == "cudnn":
            cannot = {
                "attention_soft_cap": self.attention_soft_cap > 0,
                "attention_sinks": self.attention_sinks,
                "dtype='float32'": self.dtype == "float32",
                f"head_dim={self.head_dim} (a multiple of 8 up to 128 it can)": self.head_dim > 128 or self.head_dim % 8 > 0,
            }
            found = [f"model.{name}" for name, asked in cannot.items() if asked]
            check(not found, f"model.attention_backend='cudnn' cannot do {', '.join(found)}: take 'xla', or change these")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope.fraction)

    @property
    def gated_mlp(self) -> bool:
        return self.mlp in ("swiglu", "geglu")

    def window(self, layer: int) -> int:
        """Sliding-window size of a layer; 0 is full causal attention."""
        return self.window_pattern[layer % len(self.window_pattern)]
