"""Presets against the published parameter counts, counted in two ways, and against facts of the papers."""

import dataclasses
import subprocess
import sys

import pytest

from model.config import ModelConfig
from model.presets import PRESETS, PUBLISHED_PARAMETERS, preset

# What may differ between a tiny preset and its family; everything else is a mechanism and has to be the same.
SIZES = {
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "max_seq_len",
    "rope",
    "window_pattern",
    "attention_scale",
}
FAMILY = {
    "tiny-gpt2": "gpt2-124m",
    "tiny-llama": "llama3.1-8b",
    "tiny-qwen3": "qwen3-0.6b",
    "tiny-smollm3": "smollm3-3b",
    "tiny-gemma2": "gemma2-27b",
    "tiny-gemma3": "gemma3-27b",
    "tiny-falcon": "falcon-7b",
    "tiny-phi": "phi-2",
    "tiny-olmo2": "olmo2-1b",
    "tiny-mixtral": "mixtral-8x7b",
    "tiny-qwen3-moe": "qwen3-30b-a3b",
    "tiny-deepseek": "deepseek-v3",
}


def closed_form_parameters(c: ModelConfig) -> int:
    """Counts from the arithmetic of the architecture, without a parameter tree."""
    q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = c.d_model * (2 * q_width + 2 * kv_width)
    attention += c.qkv_bias * (q_width + 2 * kv_width) + c.attention_out_bias * c.d_model
    attention += {"none": 0, "head": 2 * c.head_dim, "full": q_width + kv_width}[c.qk_norm]
    if c.mla:
        m, H = c.mla, c.num_heads
        q_in = m.q_lora_rank or c.d_model
        attention = (c.d_model * m.q_lora_rank + m.q_lora_rank) if m.q_lora_rank else 0
        attention += q_in * H * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        attention += c.d_model * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank
        attention += m.kv_lora_rank * H * (m.qk_nope_head_dim + m.v_head_dim) + H * m.v_head_dim * c.d_model
    up_projections = 2 if c.mlp in ("swiglu", "geglu") else 1
    mlp = (up_projections + 1) * c.d_model * c.d_ff + c.mlp_bias * (up_projections * c.d_ff + c.d_model)
    norm = c.d_model * (1 + c.norm_bias)
    norms_per_layer = 1 if c.parallel_block else {"pre": 2, "post": 2, "sandwich": 4}[c.norm_placement]
    tables = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2) + c.head_bias * c.vocab_size
    tables += c.max_seq_len * c.d_model if c.positions == "learned" else 0
    sparse = 0
    if c.moe:
        expert = (up_projections + 1) * c.d_model * c.moe.d_ff
        router = c.d_model * c.moe.num_experts + c.moe.selection_bias * c.moe.num_experts
        of_layer = (c.moe.num_experts + c.moe.num_shared_experts) * expert + router
        sparse = (c.num_layers - c.moe.num_dense_layers) * (of_layer - mlp)
    return tables + c.num_layers * (attention + mlp + norms_per_layer * norm) + sparse + norm


def mechanisms(c: ModelConfig) -> dict[str, object]:
    """What the sizes, the windows and rope switch on."""
    return {
        "grouped": c.num_kv_heads < c.num_heads,
        "rope_pattern": c.rope_pattern,
        "windowed": any(c.window_pattern),
        "scaling": c.rope.scaling,
        "partial": c.rope.fraction < 1,
        "local_theta": c.rope.local_theta > 0,
        "attention_scale": c.attention_scale > 0,
    }


def tree_parameters(config: ModelConfig) -> int:
    from model.params import num_parameters, param_specs

    return num_parameters(param_specs(config))


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_counts_the_published_parameters(name):
    assert closed_form_parameters(PRESETS[name]) == PUBLISHED_PARAMETERS[name]
    assert tree_parameters(PRESETS[name]) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(FAMILY))
@pytest.mark.parametrize("scan_layers", [False, True])
def test_tree_of_a_tiny_preset_agrees_with_the_closed_form(name, scan_layers):
    config = preset(name, scan_layers=scan_layers)
    assert tree_parameters(config) == closed_form_parameters(config)


def test_every_preset_is_published_or_tiny():
    assert set(PRESETS) == set(PUBLISHED_PARAMETERS) | set(FAMILY)


@pytest.mark.parametrize(
    ("name", "multimodal"),
    [("gemma3-4b", 4_300_079_472), ("gemma3-12b", 12_187_325_040), ("gemma3-27b", 27_432_406_640)],
)
def test_gemma3_text_model_is_the_multimodal_checkpoint_without_vision(name, multimodal):
    """SigLIP So400m at 896 pixels, patches of 14, with biases; then a norm and a projection to the language model."""
    width, d_ff, layers, patches = 1152, 4304, 27, (896 // 14) ** 2
    layer = 4 * (width**2 + width) + 2 * width * d_ff + d_ff + width + 2 * (2 * width)
    encoder = 14 * 14 * 3 * width + width + patches * width + layers * layer + 2 * width
    projector = width + width * PRESETS[name].d_model
    assert PUBLISHED_PARAMETERS[name] + encoder + projector == multimodal


@pytest.mark.parametrize(("tiny", "family"), sorted(FAMILY.items()))
def test_tiny_presets_differ_from_their_family_in_size_only(tiny, family):
    small, large = dataclasses.asdict(PRESETS[tiny]), dataclasses.asdict(PRESETS[family])
    assert {field for field in small if small[field] != large[field]} <= SIZES | {"moe", "mla"}
    for part in ("moe", "mla"):
        assert bool(small[part]) == bool(large[part])
    assert mechanisms(PRESETS[tiny]) == mechanisms(PRESETS[family])


def test_order_of_local_and_global_layers():
    gemma2, gemma3 = PRESETS["gemma2-2b"], PRESETS["gemma3-1b"]
    assert [layer for layer in range(26) if gemma2.window(layer) == 0] == list(range(1, 26, 2))
    assert [layer for layer in range(26) if gemma3.window(layer) == 0] == [5, 11, 17, 23]
    assert {PRESETS["mistral-7b"].window(layer) for layer in range(32)} == {4096}


@pytest.mark.parametrize(
    ("name", "head_dim", "rotary_dim"),
    [("falcon-7b", 64, 64), ("phi-2", 80, 32), ("phi-3-mini", 96, 96), ("phi-4", 128, 128), ("qwen3-0.6b", 128, 128)],
)
def test_head_dimensions(name, head_dim, rotary_dim):
    assert (PRESETS[name].head_dim, PRESETS[name].rotary_dim) == (head_dim, rotary_dim)


@pytest.mark.parametrize("name", ["gemma2-27b", "gemma3-27b"])
def test_gemma_27b_scales_queries_by_width_per_head(name):
    config = PRESETS[name]
    assert config.attention_scale == (config.d_model // config.num_heads) ** -0.5 != config.head_dim**-0.5


def test_overrides_leave_the_preset_alone():
    config = preset("tiny-llama", num_layers=7, num_heads=8, head_dim=0)
    assert (config.num_layers, config.head_dim, config.num_kv_heads) == (7, 8, 2)
    assert PRESETS["tiny-llama"].num_layers == 2
    with pytest.raises(TypeError, match="num_layer"):
        preset("tiny-llama", num_layer=7)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"llama3-8B.*llama3-8b"):
        preset("llama3-8B")


def test_does_not_import_jax():
    code = "import sys, model.presets; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
