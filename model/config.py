"""What a transformer is: one frozen, validated description.  No jax import, so a config is checked before anything expensive.

The same `ModelConfig` describes GPT-2, Llama, Mistral, Mixtral, Qwen, Gemma, Falcon, Phi, OLMo, SmolLM and DeepSeek;
`model/presets.py` names them.
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
Router = Literal["softmax", "sigmoid"]
Remat = Literal["none", "full", "attention", "dots"]
AttentionBackend = Literal["reference", "xla", "flash", "cudnn"]
DType = Literal["float32", "bfloat16"]
CacheDType = Literal["model", "int8"]
# Of the flash kernel: in tiles of 1,024 x 1,024, with a cap, 512 dimensions of bfloat16 need 33 MiB of VMEM, and a v4 has 16.
FLASH_MAX_HEAD_DIM = 256


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
class MoeConfig:
    """A mixture of experts in place of the MLP: each token goes to a few of many. None is ever dropped.

    Attributes:
      experts_per_token: how many experts a router chooses for a token (top-k).
      d_ff: width of one expert; its form is `model.mlp`.
      num_shared_experts: experts that every token passes through (arXiv:2401.06066), together one MLP of so many times `d_ff`.
      num_dense_layers: the first layers have an MLP of `model.d_ff` instead.
      router: scores are a `softmax` over all experts, or a `sigmoid` of each (DeepSeek-V3).
      normalize_weights: a token's weights sum to 1 before `routed_scale` multiplies them.
      num_groups, groups_per_token: experts are chosen within the best groups only, by the sum of each group's two highest
        scores (arXiv:2412.19437).
      selection_bias: a bias per expert that takes part in the choice and in nothing else (arXiv:2408.15664).
      bias_update_rate: how far a step of training moves it, up for experts with less than their share of tokens, down for the
        others; no gradient does.
      balance_loss: weight of the auxiliary loss (arXiv:2101.03961, equation 4), see `model.moe.Routing`; summed over layers.
      z_loss: weight of the mean squared log-sum-exp of a router's logits (arXiv:2202.08906); summed over layers.
    """

    num_experts: int
    experts_per_token: int
    d_ff: int
    num_shared_experts: int = 0
    num_dense_layers: int = 0
    router: Router = "softmax"
    normalize_weights: bool = True
    routed_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    selection_bias: bool = False
    bias_update_rate: float = 0.0
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_choices("moe", self)
        for name in ("num_experts", "experts_per_token", "d_ff", "num_groups", "groups_per_token"):
            check(getattr(self, name) > 0, f"moe.{name}={getattr(self, name)} must be positive")
        for name in ("num_shared_experts", "num_dense_layers", "bias_update_rate", "balance_loss", "z_loss"):
            check(getattr(self, name) >= 0, f"moe.{name}={getattr(self, name)} must not be negative")
        check(self.routed_scale > 0, f"moe.routed_scale={self.routed_scale} must be positive")
        check(
            self.experts_per_token <= self.num_experts,
            f"moe.experts_per_token={self.experts_per_token} is more than moe.num_experts={self.num_experts}: a token goes to "
            "as many experts as there are at most; lower the one or raise the other",
        )
        check(
            self.num_experts % self.num_groups == 0 and (self.num_groups == 1 or self.num_experts >= 2 * self.num_groups),
            f"moe.num_groups={self.num_groups} must part moe.num_experts={self.num_experts} into equal groups of two or more",
        )
        check(
            self.groups_per_token <= self.num_groups,
            f"moe.groups_per_token={self.groups_per_token} is more than moe.num_groups={self.num_groups}: lower it",
        )
        reachable = self.groups_per_token * self.num_experts // self.num_groups
        check(
            self.experts_per_token <= reachable,
            f"moe.experts_per_token={self.experts_per_token} is more than the {reachable} experts of "
            f"moe.groups_per_token={self.groups_per_token} groups: raise moe.groups_per_token",
        )
        check(
            self.selection_bias or not self.bias_update_rate,
            f"moe.bias_update_rate={self.bias_update_rate} does nothing without a bias: set moe.selection_bias to True",
        )


@dataclasses.dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (arXiv:2405.04434): keys and values of all heads are made from one narrow vector per token.

    Attributes:
      q_lora_rank: queries too are made from a vector so narrow; 0 makes them from the hidden state.
      kv_lora_rank: width of the vector that keys and values are made from.
      qk_nope_head_dim, qk_rope_head_dim: dimensions of a query and key head without and with rotation; all heads share the
        rotated part of the key.
      v_head_dim: dimensions of a value head.
    """

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        check(self.q_lora_rank >= 0, f"mla.q_lora_rank={self.q_lora_rank} must not be negative (0: no low rank)")
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            check(getattr(self, name) > 0, f"mla.{name}={getattr(self, name)} must be positive")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters that are trained in place of the model (arXiv:2106.09685).

    Attributes:
      alpha: the product of the two matrices is multiplied by alpha / rank.
      targets: names of the projections, of attention and MLP, that have adapters.
      base_bits: 8 or 4 rounds the frozen weights; 0 keeps them as they are.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "key", "value", "out", "up", "gate", "down")
    base_bits: int = 0

    def __post_init__(self) -> None:
        check(self.rank > 0, f"lora.rank={self.rank} must be positive")
        check(self.alpha > 0, f"lora.alpha={self.alpha} must be positive")
        check(
            bool(self.targets) and len(set(self.targets)) == len(self.targets), f"lora.targets={self.targets}: name some, once"
        )
        check(self.base_bits in (0, 4, 8), f"lora.base_bits={self.base_bits} is not implemented: 0 (as they are), 8 or 4")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      window_pattern: sliding-window size per layer, repeated over the layers; 0 is full causal attention.
        A window of w lets position i see positions i-w+1..i.
      rope_pattern: whether a layer rotates queries and keys, repeated over the layers (SmolLM3, arXiv:2501.18795).
      norm_placement: `pre` x+f(n(x)); `post` x+n(f(x)) (OLMo 2); `sandwich` x+n(f(n(x))) (Gemma 2).
      norm_zero_centered: the scale is stored as w and applied as 1+w (Gemma).
      qk_norm: RMSNorm of queries and keys over each head (`head`: Qwen3, Gemma 3) or over all heads (`full`: OLMo 2).
      attention_scale: multiplies q·k; 0 means head_dim**-0.5.
      attention_soft_cap, logit_soft_cap: c*tanh(x/c); 0 is off.
      attention_sinks: one more logit per head, learned, that takes part in the softmax without a value (arXiv:2309.17453).
      attention_backend: who computes it, see model/attention.py.
      parallel_block: attention and MLP read the same normalised input and are added together (Falcon, Phi).
      moe: experts in place of the MLP; None is a dense network.
      mla: latent attention in place of queries, keys and values of their own; head_dim is then that of its queries and keys.
      remat: what the backward pass recomputes: `none`, `full` (everything but layer inputs), `attention` (that but for
        attention with its inputs, and what experts return), `dots` (all but matmuls; those of experts again too).
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
    rope_pattern: tuple[bool, ...] = (True,)
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
    moe: MoeConfig | None = None
    mla: MlaConfig | None = None
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
        if self.mla:
            self._check_mla(self.mla)
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
            any(self.rope_pattern) and (all(self.rope_pattern) or self.positions == "rope"),
            f"model.rope_pattern={self.rope_pattern} says which layers rotate: it needs one that does, and "
            f"model.positions={self.positions!r} to be 'rope'",
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
        check(
            self.attention_backend not in ("flash", "cudnn") or self.v_head_dim <= self.head_dim,
            f"model.mla.v_head_dim={self.v_head_dim} is more than the keys' {self.head_dim}, and model.attention_backend="
            f"{self.attention_backend!r} wants values that are no wider: take 'xla', or narrower values",
        )
        check(
            self.attention_backend != "flash" or self.head_dim <= FLASH_MAX_HEAD_DIM,
            f"model.head_dim={self.head_dim} is too large for VMEM with model.attention_backend='flash': take 'xla', or "
            f"at most {FLASH_MAX_HEAD_DIM} dimensions",
        )
        if self.moe:
            check(
                self.moe.num_dense_layers < self.num_layers,
                f"moe.num_dense_layers={self.moe.num_dense_layers} leaves none of model.num_layers={self.num_layers} to the "
                "experts: lower it, or set model.moe to None",
            )
            check(not self.mlp_bias, "model.mlp_bias is not implemented for experts: set it to False, or model.moe to None")

    def _check_mla(self, mla: MlaConfig) -> None:
        head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        cannot = {
            f"num_kv_heads={self.num_kv_heads} (every head has its own keys: 0)": self.num_kv_heads != self.num_heads,
            f"head_dim={self.head_dim} (model.mla says it: 0)": self.head_dim not in (0, head_dim),
            f"qk_norm={self.qk_norm!r} (the narrow vectors have norms: 'none')": self.qk_norm != "none",
            "qkv_bias (False)": self.qkv_bias,
            f"positions={self.positions!r} ('rope')": self.positions != "rope",
            f"rope.fraction={self.rope.fraction} (1.0)": self.rope.fraction != 1,
            f"rope_pattern={self.rope_pattern} ((True,))": not all(self.rope_pattern),
            "norm_zero_centered (False)": self.norm_zero_centered,
        }
        found = [f"model.{name}" for name, asked in cannot.items() if asked]
        check(not found, f"model.mla does not go with {', '.join(found)}: set what stands in parentheses")
        object.__setattr__(self, "head_dim", head_dim)

    @property
    def rotary_dim(self) -> int:
        return self.mla.qk_rope_head_dim if self.mla else int(self.head_dim * self.rope.fraction)

    @property
    def v_head_dim(self) -> int:
        return self.mla.v_head_dim if self.mla else self.head_dim

    @property
    def num_dense_layers(self) -> int:
        """How many of the first layers have an MLP and no experts."""
        return self.moe.num_dense_layers if self.moe else self.num_layers

    @property
    def gated_mlp(self) -> bool:
        return self.mlp in ("swiglu", "geglu")

    def window(self, layer: int) -> int:
        """Sliding-window size of a layer; 0 is full causal attention."""
        return self.window_pattern[layer % len(self.window_pattern)]

    def rotates(self, layer: int) -> bool:
        """Whether a layer rotates queries and keys."""
        return self.positions == "rope" and self.rope_pattern[layer % len(self.rope_pattern)]
