"""Named model configurations: the published checkpoints that Loam can express, and a tiny sibling of each family for tests.

The hyper-parameters are those of the checkpoints' own configuration files; `PUBLISHED_PARAMETERS` proves the shapes.
Where a checkpoint and the convention of `ModelConfig` differ:
1. `vocab_size` is the number of stored rows, so it includes the padding of the published table (Llama 3, Qwen 3, Phi, OLMo 2,
   Gemma 3 from 4B).
2. Phi-3's `sliding_window` of 2047 counts the previous positions only; a `ModelConfig` window counts the current one too.
3. Gemma 3 from 4B is multimodal; the preset and its count are the language model, without the vision encoder and projector.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from model.config import ModelConfig, RopeConfig


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


def _llama(
    num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, d_ff: int, theta: float = 10_000.0, **rest: Any
) -> ModelConfig:
    """The Llama 2 block (arXiv:2307.09288), which Mistral, Phi-3, Qwen 3, SmolLM2 and OLMo 2 vary."""
    return ModelConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_ff=d_ff,
        **{"vocab_size": 32_000, "max_seq_len": 4096, "rope": RopeConfig(theta=theta), **rest},
    )


def _llama3(num_layers: int, d_model: int, num_heads: int, d_ff: int, **rest: Any) -> ModelConfig:
    """arXiv:2407.21783."""
    shared = {"theta": 500_000.0, "vocab_size": 128_256, "max_seq_len": 8192}
    return _llama(num_layers, d_model, num_heads, 8, d_ff, **(shared | rest))


def _llama3_long(factor: float, tie_embeddings: bool) -> dict[str, Any]:
    """The 128k context of Llama 3.1 and 3.2."""
    rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=factor, original_max_len=8192)
    return {"rope": rope, "max_seq_len": 131_072, "tie_embeddings": tie_embeddings}


def _qwen3(num_layers: int, d_model: int, num_heads: int, d_ff: int, tie_embeddings: bool) -> ModelConfig:
    """arXiv:2505.09388.  The context is that of the post-trained checkpoints; the base ones say 32,768."""
    return _llama(
        num_layers,
        d_model,
        num_heads,
        8,
        d_ff,
        theta=1_000_000.0,
        vocab_size=151_936,
        max_seq_len=40_960,
        head_dim=128,
        norm_eps=1e-6,
        qk_norm="head",
        tie_embeddings=tie_embeddings,
    )


def _smollm2(num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, d_ff: int, **rest: Any) -> ModelConfig:
    """arXiv:2502.02737."""
    shared = {"theta": 100_000.0, "vocab_size": 49_152, "max_seq_len": 8192, "tie_embeddings": True}
    return _llama(num_layers, d_model, num_heads, num_kv_heads, d_ff, **(shared | rest))


def _olmo2(num_layers: int, d_model: int, num_heads: int, d_ff: int) -> ModelConfig:
    """arXiv:2501.00656."""
    return _llama(
        num_layers,
        d_model,
        num_heads,
        num_heads,
        d_ff,
        theta=500_000.0,
        vocab_size=100_352,
        norm_eps=1e-6,
        norm_placement="post",
        qk_norm="full",
    )


def _gemma(
    num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int, d_ff: int, **rest: Any
) -> ModelConfig:
    """What Gemma 2 and 3 share: sandwich norms, scales stored as w - 1, GeGLU, scaled and tied embeddings."""
    return ModelConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
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


# Gemma 2 (arXiv:2408.00118): local and global layers alternate, the first is local; soft caps.
_GEMMA2 = {
    "vocab_size": 256_000,
    "max_seq_len": 8192,
    "window_pattern": (4096, 0),
    "attention_soft_cap": 50.0,
    "logit_soft_cap": 30.0,
}
# Gemma 3 (arXiv:2503.19786): five local layers, then a global one; query and key norms instead of the caps.
_GEMMA3_1B = {
    "vocab_size": 262_144,
    "max_seq_len": 32_768,
    "window_pattern": (512, 512, 512, 512, 512, 0),
    "rope": RopeConfig(theta=1_000_000.0, local_theta=10_000.0),
    "qk_norm": "head",
}
_GEMMA3 = {
    "vocab_size": 262_208,
    "max_seq_len": 131_072,
    "window_pattern": (1024, 1024, 1024, 1024, 1024, 0),
    "rope": RopeConfig(theta=1_000_000.0, local_theta=10_000.0, scaling="linear", factor=8.0),
    "qk_norm": "head",
}

PRESETS: dict[str, ModelConfig] = {
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    # layers, width, heads, key-value heads, width of the MLP
    "llama2-7b": _llama(32, 4096, 32, 32, 11_008),
    "llama2-13b": _llama(40, 5120, 40, 40, 13_824),
    "llama2-70b": _llama(80, 8192, 64, 8, 28_672),
    # layers, width, heads, width of the MLP
    "llama3-8b": _llama3(32, 4096, 32, 14_336),
    "llama3-70b": _llama3(80, 8192, 64, 28_672),
    "llama3.1-8b": _llama3(32, 4096, 32, 14_336, **_llama3_long(8.0, tie_embeddings=False)),
    "llama3.2-1b": _llama3(16, 2048, 32, 8192, **_llama3_long(32.0, tie_embeddings=True)),
    "llama3.2-3b": _llama3(28, 3072, 24, 8192, **_llama3_long(32.0, tie_embeddings=True)),
    # v0.1 (arXiv:2310.06825); later versions drop the window and change theta
    "mistral-7b": _llama(32, 4096, 32, 8, 14_336, max_seq_len=32_768, window_pattern=(4096,)),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tie_embeddings=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tie_embeddings=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tie_embeddings=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12_288, tie_embeddings=False),
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
    # the 4k variant (arXiv:2404.14219)
    "phi-3-mini": _llama(32, 3072, 32, 32, 8192, vocab_size=32_064, window_pattern=(2048,)),
    # arXiv:2412.08905
    "phi-4": _llama(40, 5120, 40, 10, 17_920, theta=250_000.0, vocab_size=100_352, max_seq_len=16_384),
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536, init_std=1 / 24),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560),
    "smollm2-1.7b": _smollm2(24, 2048, 32, 32, 8192, theta=130_000.0),
    "olmo2-1b": _olmo2(16, 2048, 16, 8192),
    "olmo2-7b": _olmo2(32, 4096, 32, 11_008),
    "olmo2-13b": _olmo2(40, 5120, 40, 13_824),
}

# Tiny siblings: every mechanism of the family, with sizes that make a wrong axis fail (d_model != num_heads * head_dim,
# windows and original contexts shorter than a test's sequence, layers that the window pattern does not divide).
_TINY = {
    "vocab_size": 512,
    "num_layers": 2,
    "d_model": 64,
    "num_heads": 4,
    "head_dim": 16,
    "d_ff": 96,
    "max_seq_len": 128,
}
_TINY_ROPE = RopeConfig(theta=500_000.0, scaling="llama3", factor=4.0, original_max_len=32)
_TINY_LOCAL_ROPE = RopeConfig(theta=1_000_000.0, local_theta=10_000.0, scaling="linear", factor=8.0)
_TINY_GEMMA = {**_TINY, "num_kv_heads": 2, "d_model": 48, "attention_scale": 24**-0.5}

PRESETS |= {
    "tiny-gpt2": replace(PRESETS["gpt2-124m"], **{**_TINY, "num_kv_heads": 4}),
    "tiny-llama": replace(PRESETS["llama3.1-8b"], **{**_TINY, "num_kv_heads": 2, "rope": _TINY_ROPE}),
    "tiny-qwen3": replace(PRESETS["qwen3-0.6b"], **{**_TINY, "num_kv_heads": 2, "d_model": 48}),
    "tiny-gemma2": replace(PRESETS["gemma2-27b"], **{**_TINY_GEMMA, "num_layers": 3, "window_pattern": (8, 0)}),
    "tiny-gemma3": replace(
        PRESETS["gemma3-27b"],
        **{**_TINY_GEMMA, "num_layers": 4, "window_pattern": (8, 8, 0), "rope": _TINY_LOCAL_ROPE},
    ),
    "tiny-falcon": replace(PRESETS["falcon-7b"], **_TINY),
    "tiny-phi": replace(PRESETS["phi-2"], **{**_TINY, "num_kv_heads": 4, "rope": RopeConfig(fraction=0.5)}),
    "tiny-olmo2": replace(PRESETS["olmo2-1b"], **{**_TINY, "num_kv_heads": 2}),
}

# Parameters of the published checkpoints: trained arrays only (no rotary tables), a tied embedding once even where the file
# stores it twice, Gemma 3 from 4B without its vision encoder and projector.
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
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The named configuration with some fields replaced.

    A preset's `num_kv_heads` and `head_dim` are numbers, not derived from the other fields: override them with `num_heads`,
    or set them to 0 to derive them again.

    Raises:
      ValueError: no preset of that name, or the result is not a valid configuration.
      TypeError: an override that is not a field of ModelConfig.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no model preset named {name!r}; the nearest is {near!r} (model.presets.PRESETS lists all)")
    return replace(PRESETS[name], **overrides)
