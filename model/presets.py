"""Named model configurations: published checkpoints that `ModelConfig` can express, and a tiny sibling of each family.

The hyper-parameters are those of the checkpoints' own configuration files; `PUBLISHED_PARAMETERS` proves the shapes.
Where a checkpoint and the conventions of `ModelConfig` differ:
1. `vocab_size` is the number of stored rows, padding included (Llama 3, Qwen 3, Phi, OLMo 2, Gemma 3 from 4B).
2. Phi-3's `sliding_window` of 2047 counts the previous positions only; a window here counts the current one too.
3. Gemma 3 from 4B is multimodal; the preset and its count are the language model, without vision encoder and projector.
4. DeepSeek-V3 is the model without the layer that predicts one token more; the biases of its routers' choice are counted.
5. Weights of the experts' balance losses are those of the checkpoints, whose losses differ (`model/moe.py`).
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from model.config import MlaConfig, ModelConfig, MoeConfig, RopeConfig


def _gpt2(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
    """Radford et al., "Language Models are Unsupervised Multitask Learners" (2019)."""
    return ModelConfig(
        vocab_size=50_257,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=4 * d_model,
        max_seq_len=1024,
        positions="learned",
        norm="layernorm",
        norm_bias=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp="gelu",
        mlp_bias=True,
        tie_embeddings=True,
    )


def _llama(layers: int, d_model: int, heads: int, kv_heads: int, d_ff: int, **rest: Any) -> ModelConfig:
    """The block of Llama 2, which is the default of ModelConfig; `rest` holds what a family sets or changes."""
    return ModelConfig(num_layers=layers, d_model=d_model, num_heads=heads, num_kv_heads=kv_heads, d_ff=d_ff, **rest)


def _gemma(layers: int, d_model: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, **rest: Any) -> ModelConfig:
    """What Gemma 2 and 3 share; their GeGLU takes the tanh approximation of GELU."""
    return ModelConfig(
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        norm_placement="sandwich",
        norm_eps=1e-6,
        norm_zero_centered=True,
        mlp="geglu",
        tie_embeddings=True,
        scale_embeddings=True,
        **rest,
    )


def _llama3_rope(factor: float) -> RopeConfig:
    return RopeConfig(theta=500_000.0, scaling="llama3", factor=factor, original_max_len=8192)


# What each family fixes, by paper.
_LLAMA2 = {"vocab_size": 32_000, "max_seq_len": 4096}  # arXiv:2307.09288
# arXiv:2407.21783; 3.1 and 3.2 scale rope
_LLAMA3 = {"vocab_size": 128_256, "max_seq_len": 8192, "rope": RopeConfig(theta=500_000.0)}
_LLAMA3_1 = {"vocab_size": 128_256, "max_seq_len": 131_072}
_MISTRAL = {"vocab_size": 32_000, "max_seq_len": 32_768, "window_pattern": (4096,)}  # v0.1, arXiv:2310.06825
_PHI3 = {"vocab_size": 32_064, "max_seq_len": 4096, "window_pattern": (2048,)}  # 4k variant, arXiv:2404.14219
_PHI4 = {"vocab_size": 100_352, "max_seq_len": 16_384, "rope": RopeConfig(theta=250_000.0)}  # arXiv:2412.08905
_SMOLLM2 = {"vocab_size": 49_152, "max_seq_len": 8192, "tie_embeddings": True}  # arXiv:2502.02737
# Every fourth layer is without rotation (arXiv:2501.18795)
_SMOLLM3 = {
    "vocab_size": 128_256,
    "max_seq_len": 65_536,
    "rope": RopeConfig(theta=5_000_000.0),
    "rope_pattern": (True, True, True, False),
    "norm_eps": 1e-6,
    "tie_embeddings": True,
}
# arXiv:2505.09388; the context is that of the post-trained checkpoints, the base ones say 32,768
_QWEN3 = {
    "vocab_size": 151_936,
    "max_seq_len": 40_960,
    "head_dim": 128,
    "rope": RopeConfig(theta=1_000_000.0),
    "norm_eps": 1e-6,
    "qk_norm": "head",
}
# arXiv:2501.00656
_OLMO2 = {
    "vocab_size": 100_352,
    "max_seq_len": 4096,
    "rope": RopeConfig(theta=500_000.0),
    "norm_eps": 1e-6,
    "norm_placement": "post",
    "qk_norm": "full",
}
# arXiv:2408.00118: local and global layers alternate, the first is local
_GEMMA2 = {
    "vocab_size": 256_000,
    "max_seq_len": 8192,
    "window_pattern": (4096, 0),
    "attention_soft_cap": 50.0,
    "logit_soft_cap": 30.0,
}
# arXiv:2503.19786: five local layers, then a global one; query and key norms instead of the caps
_GEMMA3_1B = {
    "vocab_size": 262_144,
    "max_seq_len": 32_768,
    "window_pattern": (512, 512, 512, 512, 512, 0),
    "rope": RopeConfig(theta=1_000_000.0, local_theta=10_000.0),
    "qk_norm": "head",
}
_GEMMA3 = _GEMMA3_1B | {
    "vocab_size": 262_208,
    "max_seq_len": 131_072,
    "window_pattern": (1024, 1024, 1024, 1024, 1024, 0),
    "rope": RopeConfig(theta=1_000_000.0, local_theta=10_000.0, scaling="linear", factor=8.0),
}

# arXiv:2401.04088; no sliding window, unlike Mistral 7B
_MIXTRAL = {
    "vocab_size": 32_000,
    "max_seq_len": 32_768,
    "rope": RopeConfig(theta=1_000_000.0),
    "moe": MoeConfig(num_experts=8, experts_per_token=2, d_ff=14_336, balance_loss=0.02),
}
# arXiv:2412.19437: three dense layers, then 256 experts and a shared one
_DEEPSEEK_V3 = {
    "vocab_size": 129_280,
    "max_seq_len": 163_840,
    "rope": RopeConfig(scaling="yarn", factor=40.0, original_max_len=4096),
    "norm_eps": 1e-6,
    "moe": MoeConfig(
        num_experts=256,
        experts_per_token=8,
        d_ff=2048,
        num_shared_experts=1,
        num_dense_layers=3,
        router="sigmoid",
        routed_scale=2.5,
        num_groups=8,
        groups_per_token=4,
        selection_bias=True,
        bias_update_rate=0.001,
        balance_loss=0.0001,
    ),
    "mla": MlaConfig(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
}

PRESETS: dict[str, ModelConfig] = {
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    # layers, width, heads, key-value heads, width of the MLP
    "llama2-7b": _llama(32, 4096, 32, 32, 11_008, **_LLAMA2),
    "llama2-13b": _llama(40, 5120, 40, 40, 13_824, **_LLAMA2),
    "llama2-70b": _llama(80, 8192, 64, 8, 28_672, **_LLAMA2),
    "llama3-8b": _llama(32, 4096, 32, 8, 14_336, **_LLAMA3),
    "llama3-70b": _llama(80, 8192, 64, 8, 28_672, **_LLAMA3),
    "llama3.1-8b": _llama(32, 4096, 32, 8, 14_336, rope=_llama3_rope(8.0), **_LLAMA3_1),
    "llama3.2-1b": _llama(16, 2048, 32, 8, 8192, rope=_llama3_rope(32.0), tie_embeddings=True, **_LLAMA3_1),
    "llama3.2-3b": _llama(28, 3072, 24, 8, 8192, rope=_llama3_rope(32.0), tie_embeddings=True, **_LLAMA3_1),
    "mistral-7b": _llama(32, 4096, 32, 8, 14_336, **_MISTRAL),
    "phi-3-mini": _llama(32, 3072, 32, 32, 8192, **_PHI3),
    "phi-4": _llama(40, 5120, 40, 10, 17_920, **_PHI4),
    "smollm2-135m": _llama(30, 576, 9, 3, 1536, rope=RopeConfig(theta=100_000.0), init_std=1 / 24, **_SMOLLM2),
    "smollm2-360m": _llama(32, 960, 15, 5, 2560, rope=RopeConfig(theta=100_000.0), **_SMOLLM2),
    "smollm2-1.7b": _llama(24, 2048, 32, 32, 8192, rope=RopeConfig(theta=130_000.0), **_SMOLLM2),
    "smollm3-3b": _llama(36, 2048, 16, 4, 11_008, **_SMOLLM3),
    "qwen3-0.6b": _llama(28, 1024, 16, 8, 3072, tie_embeddings=True, **_QWEN3),
    "qwen3-1.7b": _llama(28, 2048, 16, 8, 6144, tie_embeddings=True, **_QWEN3),
    "qwen3-4b": _llama(36, 2560, 32, 8, 9728, tie_embeddings=True, **_QWEN3),
    "qwen3-8b": _llama(36, 4096, 32, 8, 12_288, **_QWEN3),
    "qwen3-30b-a3b": _llama(
        48, 2048, 32, 4, 6144, moe=MoeConfig(num_experts=128, experts_per_token=8, d_ff=768, balance_loss=0.001), **_QWEN3
    ),
    "mixtral-8x7b": _llama(32, 4096, 32, 8, 14_336, **_MIXTRAL),
    "deepseek-v3": _llama(61, 7168, 128, 128, 18_432, **_DEEPSEEK_V3),
    "olmo2-1b": _llama(16, 2048, 16, 16, 8192, **_OLMO2),
    "olmo2-7b": _llama(32, 4096, 32, 32, 11_008, **_OLMO2),
    "olmo2-13b": _llama(40, 5120, 40, 40, 13_824, **_OLMO2),
    # layers, width, heads, key-value heads, head_dim, width of the MLP; the 27B models scale by d_model / num_heads
    "gemma2-2b": _gemma(26, 2304, 8, 4, 256, 9216, **_GEMMA2),
    "gemma2-9b": _gemma(42, 3584, 16, 8, 256, 14_336, **_GEMMA2),
    "gemma2-27b": _gemma(46, 4608, 32, 16, 128, 36_864, attention_scale=144**-0.5, **_GEMMA2),
    "gemma3-1b": _gemma(26, 1152, 4, 1, 256, 6912, **_GEMMA3_1B),
    "gemma3-4b": _gemma(34, 2560, 8, 4, 256, 10_240, **_GEMMA3),
    "gemma3-12b": _gemma(48, 3840, 16, 8, 256, 15_360, **_GEMMA3),
    "gemma3-27b": _gemma(62, 5376, 32, 16, 128, 21_504, attention_scale=168**-0.5, **_GEMMA3),
    # arXiv:2311.16867: parallel block, one key-value head, biases in the norms only
    "falcon-7b": ModelConfig(
        vocab_size=65_024,
        num_layers=32,
        d_model=4544,
        num_heads=71,
        num_kv_heads=1,
        d_ff=4 * 4544,
        max_seq_len=2048,
        norm="layernorm",
        norm_bias=True,
        mlp="gelu_exact",
        parallel_block=True,
        tie_embeddings=True,
    ),
    # parallel block, biases everywhere; 32 of 80 head dimensions rotate
    "phi-2": ModelConfig(
        vocab_size=51_200,
        num_layers=32,
        d_model=2560,
        num_heads=32,
        d_ff=10_240,
        max_seq_len=2048,
        rope=RopeConfig(fraction=0.4),
        norm="layernorm",
        norm_bias=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp="gelu",
        mlp_bias=True,
        parallel_block=True,
        head_bias=True,
    ),
}

# Tiny siblings: every mechanism of the family, at sizes that let mistakes show.  Windows and original contexts are
# shorter than max_seq_len, layers are left over after whole window patterns, head_dim is free where the family's is.
_TINY = {
    "vocab_size": 512,
    "num_layers": 2,
    "d_model": 64,
    "num_heads": 4,
    "head_dim": 16,
    "d_ff": 96,
    "max_seq_len": 128,
}
_TINY_GQA = _TINY | {"num_kv_heads": 2}
_TINY_GEMMA = _TINY_GQA | {"d_model": 48, "attention_scale": 24**-0.5}
_TINY_LLAMA_ROPE = replace(_llama3_rope(4.0), original_max_len=32)

PRESETS |= {
    "tiny-gpt2": replace(PRESETS["gpt2-124m"], **_TINY, num_kv_heads=4),
    "tiny-llama": replace(PRESETS["llama3.1-8b"], **_TINY_GQA, rope=_TINY_LLAMA_ROPE),
    "tiny-qwen3": replace(PRESETS["qwen3-0.6b"], **_TINY_GQA | {"d_model": 48}),
    "tiny-smollm3": replace(PRESETS["smollm3-3b"], **_TINY_GQA | {"num_layers": 5}),
    "tiny-gemma2": replace(PRESETS["gemma2-27b"], **_TINY_GEMMA | {"num_layers": 3, "window_pattern": (8, 0)}),
    "tiny-gemma3": replace(PRESETS["gemma3-27b"], **_TINY_GEMMA | {"num_layers": 4, "window_pattern": (8, 8, 0)}),
    "tiny-falcon": replace(PRESETS["falcon-7b"], **_TINY),
    "tiny-phi": replace(PRESETS["phi-2"], **_TINY, num_kv_heads=4, rope=RopeConfig(fraction=0.5)),
    "tiny-olmo2": replace(PRESETS["olmo2-1b"], **_TINY, num_kv_heads=4),
    "tiny-mixtral": replace(PRESETS["mixtral-8x7b"], **_TINY_GQA, moe=replace(_MIXTRAL["moe"], num_experts=4, d_ff=96)),
    "tiny-qwen3-moe": replace(
        PRESETS["qwen3-30b-a3b"],
        **_TINY_GQA | {"d_model": 48},
        moe=MoeConfig(num_experts=8, experts_per_token=4, d_ff=32, balance_loss=0.001),
    ),
    "tiny-deepseek": replace(
        PRESETS["deepseek-v3"],
        **_TINY | {"num_layers": 3, "head_dim": 24, "num_kv_heads": 4},
        rope=replace(_DEEPSEEK_V3["rope"], factor=4.0, original_max_len=32),
        moe=replace(
            _DEEPSEEK_V3["moe"],
            num_experts=8,
            experts_per_token=3,
            d_ff=32,
            num_dense_layers=1,
            num_groups=4,
            groups_per_token=2,
        ),
        mla=MlaConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12),
    ),
}

# Parameters of the published checkpoints: trained arrays only (no rotary tables), a tied embedding once even where the
# file stores it twice, Gemma 3 from 4B without its vision encoder and projector.
PUBLISHED_PARAMETERS: dict[str, int] = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "falcon-7b": 6_921_720_704,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The named configuration with some fields replaced.

    A preset's `num_kv_heads` and `head_dim` do not follow `num_heads` and `d_model`: override them together, or set
    them to 0 to derive them again.

    Raises:
      ValueError: no preset of that name, or the result is not a valid configuration.
      TypeError: an override that is not a field of ModelConfig.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no model preset named {name!r}; the nearest is {near!r} (model.presets.PRESETS lists all)")
    return replace(PRESETS[name], **overrides)
