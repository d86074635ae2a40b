"""The families of checkpoints on Hugging Face: per family the keys of config.json and the names of the tensors, no more.

No jax: `read_config` refuses a checkpoint before anything expensive. What a family's files leave out is what transformers 5.23
takes then. Refused are, beside families not listed: rope types longrope and dynamic (Phi-3 128k, Phi-4-mini), alibi and two
norms per block (Falcon RW, Falcon 40B), experts in other layers than all after the first few, quantised weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.config import MlaConfig, ModelConfig, MoeConfig
from model.convert.config_json import (
    LATENT_ROPE,
    LOCAL_ROPE,
    PARTIAL_ROPE,
    QUERY_SCALE,
    ROPE,
    ROTATIONS,
    Codec,
    Settings,
    activation,
    differences,
    layered_window,
    nested,
    rotations,
    uniform_window,
)
from model.convert.tensors import Tensor, matrix, table, transposed, vector


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family writes its checkpoints down.

    Attributes:
      model_type, architecture: its names in config.json.
      keys: key of config.json -> field or fields of ModelConfig, `moe.` and `mla.` before theirs.
      network: fields of ModelConfig that are so in the whole family.
      fixed: keys that must have this value, which is also what a missing one means.
      defaults: what transformers takes for a missing key.
      codecs: keys and fields that take more than a name.
      tensors: the table of names, of those that the files of some config may hold.
      prefix: what stands before the names in `tensors` of everything but the head; a base model's file leaves it out.
      inside: what stands instead of `prefix` where the network is part of one that sees pictures too.
      ignored: regular expressions of tensors that are no parameters; `{n}` is the number of layers.
      unused: keys that transformers derives from others, or does not read, or that `codecs` read only in some cases.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str | tuple[str, ...]]
    network: Mapping[str, Any]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    codecs: tuple[Codec, ...]
    tensors: Callable[[ModelConfig], tuple[Tensor, ...]]
    prefix: str = "model."
    inside: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


# --- Keys ---------------------------------------------------------------------------------------------------------------------

_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_HEAD_DIM = {"head_dim": "head_dim"}
_BIAS = {"attention_bias": ("qkv_bias", "attention_out_bias")}
_MLP_BIAS = {"mlp_bias": "mlp_bias"}
_SOFT_CAPS = {"attn_logit_softcapping": "attention_soft_cap", "final_logit_softcapping": "logit_soft_cap"}
_NULL_FOR_ZERO = {*_SOFT_CAPS, "q_lora_rank"}
_DEFAULTS = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": None,
}
_QWEN_DEFAULTS = _DEFAULTS | {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32_768}
_GEMMA_DEFAULTS = _DEFAULTS | {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_SILU = activation("hidden_act")
_GEMMA_NETWORK = {"norm_zero_centered": True, "scale_embeddings": True}
_SANDWICH = _GEMMA_NETWORK | {"norm_placement": "sandwich"}
_GEMMA_FIXED = {"use_bidirectional_attention": False}
_QWEN_FIXED = {"use_mrope": False}
_QWEN_WINDOW = layered_window(lambda settings, layer: layer >= settings.take("max_window_layers"), switch=True)
_MOE_DEFAULTS = {"router_aux_loss_coef": 0.001, "norm_topk_prob": False}


def _read_local_layers(settings: Settings, layer: int) -> bool:
    """Gemma 3: all but every `sliding_window_pattern`-th layer."""
    return (layer + 1) % settings.take("sliding_window_pattern") != 0


def _read_falcon(settings: Settings) -> dict[str, Any]:
    new, heads = settings.take("new_decoder_architecture"), settings.take("num_attention_heads")
    parallel, norms, kv_heads = (settings.take(key) for key in ("parallel_attn", "num_ln_in_parallel_attn", "num_kv_heads"))
    multi_query = settings.take("multi_query")
    if new and norms != 1:
        raise settings.refuse("num_ln_in_parallel_attn", norms, "is not implemented: attention and MLP read the same norm (1)")
    if not new and norms == 2:
        raise settings.refuse("num_ln_in_parallel_attn", norms, "is not implemented without new_decoder_architecture")
    d_ff = settings.take("ffn_hidden_size") or 4 * settings.take("hidden_size")
    kv_heads = (kv_heads or heads) if new else 1 if multi_query else heads
    return {"num_kv_heads": kv_heads, "parallel_block": bool(new or parallel), "d_ff": d_ff}


def _write_falcon(config: ModelConfig) -> dict[str, Any]:
    new = config.num_kv_heads not in (1, config.num_heads)
    return {
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": 1 if new else None,
        "multi_query": config.num_kv_heads == 1,
        "num_kv_heads": config.num_kv_heads,
        "parallel_attn": config.parallel_block,
        "ffn_hidden_size": config.d_ff,
    }


def _read_qwen_moe(settings: Settings) -> dict[str, Any]:
    dense, count = settings.take("mlp_only_layers") or [], settings.take("num_experts")
    if sorted(dense) != list(range(len(dense))):
        raise settings.refuse("mlp_only_layers", dense, "is not implemented: layers without experts come first")
    return {"moe.num_experts": settings.take("num_local_experts") or count, "moe.num_dense_layers": len(dense)}


def _write_qwen_moe(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    # num_experts is the name of transformers 4, num_local_experts that of 5.
    count, dense = config.moe.num_experts, list(range(config.moe.num_dense_layers))
    return {"num_experts": count, "num_local_experts": count, "mlp_only_layers": dense}


# --- Tables of names ----------------------------------------------------------------------------------------------------------

_LAYER = "model.layers.{i}."
_OUTSIDE = (
    table("model.embed_tokens.weight", "embedding"),
    vector("model.norm.weight", "final_norm/scale"),
    matrix("lm_head.weight", "head"),
)
_ATTENTION = (
    matrix(_LAYER + "self_attn.q_proj.weight", "attention/query"),
    matrix(_LAYER + "self_attn.k_proj.weight", "attention/key"),
    matrix(_LAYER + "self_attn.v_proj.weight", "attention/value"),
    matrix(_LAYER + "self_attn.o_proj.weight", "attention/out", contract=2),
    vector(_LAYER + "self_attn.q_proj.bias", "attention/query_bias"),
    vector(_LAYER + "self_attn.k_proj.bias", "attention/key_bias"),
    vector(_LAYER + "self_attn.v_proj.bias", "attention/value_bias"),
    vector(_LAYER + "self_attn.o_proj.bias", "attention/out_bias"),
    vector(_LAYER + "self_attn.q_norm.weight", "attention/query_norm"),
    vector(_LAYER + "self_attn.k_norm.weight", "attention/key_norm"),
)
_MLP = (
    matrix(_LAYER + "mlp.gate_proj.weight", "mlp/gate"),
    matrix(_LAYER + "mlp.up_proj.weight", "mlp/up"),
    matrix(_LAYER + "mlp.down_proj.weight", "mlp/down"),
    vector(_LAYER + "mlp.gate_proj.bias", "mlp/gate_bias"),
    vector(_LAYER + "mlp.up_proj.bias", "mlp/up_bias"),
    vector(_LAYER + "mlp.down_proj.bias", "mlp/down_bias"),
)
_PRE_NORMS = (
    vector(_LAYER + "input_layernorm.weight", "attention_norm/scale"),
    vector(_LAYER + "post_attention_layernorm.weight", "mlp_norm/scale"),
)
_POST_NORMS = (
    vector(_LAYER + "post_attention_layernorm.weight", "attention_out_norm/scale"),
    vector(_LAYER + "post_feedforward_layernorm.weight", "mlp_out_norm/scale"),
)
_SANDWICH_NORMS = (
    vector(_LAYER + "input_layernorm.weight", "attention_norm/scale"),
    vector(_LAYER + "pre_feedforward_layernorm.weight", "mlp_norm/scale"),
    *_POST_NORMS,
)
_EXPERTS = (
    matrix(_LAYER + "mlp.gate.weight", "router/kernel"),
    matrix(_LAYER + "mlp.experts.{e}.gate_proj.weight", "experts/gate"),
    matrix(_LAYER + "mlp.experts.{e}.up_proj.weight", "experts/up"),
    matrix(_LAYER + "mlp.experts.{e}.down_proj.weight", "experts/down"),
)
_LLAMA = (*_OUTSIDE, *_ATTENTION, *_MLP, *_PRE_NORMS)
_GEMMA2 = (*_OUTSIDE, *_ATTENTION, *_MLP, *_SANDWICH_NORMS)
_OLMO2 = (*_OUTSIDE, *_ATTENTION, *_MLP, *_POST_NORMS)
_QWEN3_MOE = (*_LLAMA, *_EXPERTS)
_MIXTRAL = (
    *_OUTSIDE,
    *_ATTENTION,
    *_PRE_NORMS,
    matrix(_LAYER + "block_sparse_moe.gate.weight", "router/kernel"),
    matrix(_LAYER + "block_sparse_moe.experts.{e}.w1.weight", "experts/gate"),
    matrix(_LAYER + "block_sparse_moe.experts.{e}.w3.weight", "experts/up"),
    matrix(_LAYER + "block_sparse_moe.experts.{e}.w2.weight", "experts/down"),
)
_PHI3 = (
    *_OUTSIDE,
    *_PRE_NORMS,
    matrix(_LAYER + "self_attn.qkv_proj.weight", "attention/query", "attention/key", "attention/value"),
    matrix(_LAYER + "self_attn.o_proj.weight", "attention/out", contract=2),
    matrix(_LAYER + "mlp.gate_up_proj.weight", "mlp/gate", "mlp/up"),
    matrix(_LAYER + "mlp.down_proj.weight", "mlp/down"),
)
_PHI = (
    table("model.embed_tokens.weight", "embedding"),
    vector("model.final_layernorm.weight", "final_norm/scale"),
    vector("model.final_layernorm.bias", "final_norm/bias"),
    matrix("lm_head.weight", "head"),
    vector("lm_head.bias", "head_bias"),
    vector(_LAYER + "input_layernorm.weight", "attention_norm/scale"),
    vector(_LAYER + "input_layernorm.bias", "attention_norm/bias"),
    *_ATTENTION[:3],
    *_ATTENTION[4:7],
    matrix(_LAYER + "self_attn.dense.weight", "attention/out", contract=2),
    vector(_LAYER + "self_attn.dense.bias", "attention/out_bias"),
    matrix(_LAYER + "mlp.fc1.weight", "mlp/up"),
    vector(_LAYER + "mlp.fc1.bias", "mlp/up_bias"),
    matrix(_LAYER + "mlp.fc2.weight", "mlp/down"),
    vector(_LAYER + "mlp.fc2.bias", "mlp/down_bias"),
)
_BLOCK = "transformer.h.{i}."
_GPT2 = (
    table("transformer.wte.weight", "embedding"),
    table("transformer.wpe.weight", "position_embedding"),
    vector("transformer.ln_f.weight", "final_norm/scale"),
    vector("transformer.ln_f.bias", "final_norm/bias"),
    matrix("lm_head.weight", "head"),
    vector(_BLOCK + "ln_1.weight", "attention_norm/scale"),
    vector(_BLOCK + "ln_1.bias", "attention_norm/bias"),
    transposed(_BLOCK + "attn.c_attn.weight", "attention/query", "attention/key", "attention/value"),
    vector(_BLOCK + "attn.c_attn.bias", "attention/query_bias", "attention/key_bias", "attention/value_bias"),
    transposed(_BLOCK + "attn.c_proj.weight", "attention/out", contract=2),
    vector(_BLOCK + "attn.c_proj.bias", "attention/out_bias"),
    vector(_BLOCK + "ln_2.weight", "mlp_norm/scale"),
    vector(_BLOCK + "ln_2.bias", "mlp_norm/bias"),
    transposed(_BLOCK + "mlp.c_fc.weight", "mlp/up"),
    vector(_BLOCK + "mlp.c_fc.bias", "mlp/up_bias"),
    transposed(_BLOCK + "mlp.c_proj.weight", "mlp/down"),
    vector(_BLOCK + "mlp.c_proj.bias", "mlp/down_bias"),
)
_QKV = ("attention/query", "attention/key", "attention/value")
_FALCON = (
    table("transformer.word_embeddings.weight", "embedding"),
    vector("transformer.ln_f.weight", "final_norm/scale"),
    vector("transformer.ln_f.bias", "final_norm/bias"),
    matrix("lm_head.weight", "head"),
    vector(_BLOCK + "input_layernorm.weight", "attention_norm/scale"),
    vector(_BLOCK + "input_layernorm.bias", "attention_norm/bias"),
    vector(_BLOCK + "post_attention_layernorm.weight", "mlp_norm/scale"),
    vector(_BLOCK + "post_attention_layernorm.bias", "mlp_norm/bias"),
    matrix(_BLOCK + "self_attention.query_key_value.weight", *_QKV, groups="num_kv_heads"),
    vector(_BLOCK + "self_attention.query_key_value.bias", *(f"{leaf}_bias" for leaf in _QKV), groups="num_kv_heads"),
    matrix(_BLOCK + "self_attention.dense.weight", "attention/out", contract=2),
    vector(_BLOCK + "self_attention.dense.bias", "attention/out_bias"),
    matrix(_BLOCK + "mlp.dense_h_to_4h.weight", "mlp/up"),
    vector(_BLOCK + "mlp.dense_h_to_4h.bias", "mlp/up_bias"),
    matrix(_BLOCK + "mlp.dense_4h_to_h.weight", "mlp/down"),
    vector(_BLOCK + "mlp.dense_4h_to_h.bias", "mlp/down_bias"),
)


def _deepseek(config: ModelConfig) -> tuple[Tensor, ...]:
    low_rank = config.mla is not None and config.mla.q_lora_rank > 0
    query = "q_b_proj" if low_rank else "q_proj"
    return (
        *_OUTSIDE,
        *_MLP[:3],
        *_PRE_NORMS,
        *_EXPERTS,
        vector(_LAYER + "mlp.gate.e_score_correction_bias", "router/bias"),
        matrix(_LAYER + "mlp.shared_experts.gate_proj.weight", "shared_experts/gate"),
        matrix(_LAYER + "mlp.shared_experts.up_proj.weight", "shared_experts/up"),
        matrix(_LAYER + "mlp.shared_experts.down_proj.weight", "shared_experts/down"),
        matrix(_LAYER + "self_attn.q_a_proj.weight", "attention/query_down"),
        vector(_LAYER + "self_attn.q_a_layernorm.weight", "attention/query_norm"),
        matrix(_LAYER + f"self_attn.{query}.weight", "attention/query", interleaved=True),
        matrix(_LAYER + "self_attn.kv_a_proj_with_mqa.weight", "attention/kv_down", interleaved=True),
        vector(_LAYER + "self_attn.kv_a_layernorm.weight", "attention/kv_norm"),
        matrix(_LAYER + "self_attn.kv_b_proj.weight", "attention/key", "attention/value", groups="num_heads"),
        matrix(_LAYER + "self_attn.o_proj.weight", "attention/out", contract=2),
    )


# --- Families -----------------------------------------------------------------------------------------------------------------


def _family(model_type: str, architecture: str, tensors: Any, codecs: tuple[Codec, ...] = (_SILU, ROPE), **rest: Any) -> Family:
    names: Any = tensors if callable(tensors) else lambda _: tensors
    declared = {"keys": _KEYS, "network": {}, "fixed": {}, "defaults": _DEFAULTS} | rest
    return Family(model_type, architecture, codecs=codecs, tensors=names, **declared)


_GEMMA_ACT = activation("hidden_activation")
_GEMMA3_DEFAULTS = _GEMMA_DEFAULTS | {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _family(
            "llama",
            "LlamaForCausalLM",
            _LLAMA,
            keys=_KEYS | _HEAD_DIM | _BIAS | _MLP_BIAS,
            fixed={"rope_interleaved": False},
        ),
        _family(
            "mistral",
            "MistralForCausalLM",
            _LLAMA,
            (_SILU, ROPE, uniform_window(switch=False)),
            keys=_KEYS | _HEAD_DIM,
            defaults=_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
        ),
        _family(
            "qwen2",
            "Qwen2ForCausalLM",
            _LLAMA,
            (_SILU, ROPE, _QWEN_WINDOW),
            network={"qkv_bias": True},
            fixed=_QWEN_FIXED,
            unused=("max_window_layers",),
            defaults=_QWEN_DEFAULTS | {"num_key_value_heads": 32},
        ),
        _family(
            "qwen3",
            "Qwen3ForCausalLM",
            _LLAMA,
            (_SILU, ROPE, _QWEN_WINDOW),
            keys=_KEYS | _HEAD_DIM | _BIAS,
            network={"qk_norm": "head"},
            fixed=_QWEN_FIXED,
            unused=("max_window_layers",),
            defaults=_QWEN_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
        ),
        _family(
            "smollm3",
            "SmolLM3ForCausalLM",
            _LLAMA,
            (
                _SILU,
                ROPE,
                ROTATIONS,
                layered_window(lambda settings, layer: not rotations(settings)[layer], switch=True),
            ),
            keys=_KEYS | _BIAS | _MLP_BIAS,
            unused=("max_window_layers",),
            defaults=_DEFAULTS
            | {
                "num_key_value_heads": 4,
                "max_position_embeddings": 32_768,
                "tie_word_embeddings": True,
                "rope_theta": 2_000_000.0,
                "no_rope_layers": None,
                "no_rope_layer_interval": 4,
            },
        ),
        _family(
            "gemma",
            "GemmaForCausalLM",
            _LLAMA,
            (activation("hidden_act", also={"gelu": "geglu"}), ROPE),
            keys=_KEYS | _HEAD_DIM | _BIAS,
            network=_GEMMA_NETWORK,
            fixed=_GEMMA_FIXED | {"hidden_activation": "gelu_pytorch_tanh"},
            defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
        ),
        _family(
            "gemma2",
            "Gemma2ForCausalLM",
            _GEMMA2,
            (_GEMMA_ACT, ROPE, QUERY_SCALE, layered_window(lambda _, layer: layer % 2 == 0, switch=False)),
            keys=_KEYS | _HEAD_DIM | _BIAS | _SOFT_CAPS,
            network=_SANDWICH,
            fixed=_GEMMA_FIXED | {"hidden_act": "gelu_pytorch_tanh"},
            defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 4},
            unused=("sliding_window_size",),
        ),
        _family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _GEMMA2,
            (_GEMMA_ACT, LOCAL_ROPE, QUERY_SCALE, layered_window(_read_local_layers, switch=False)),
            keys=_KEYS | _HEAD_DIM | _BIAS | _SOFT_CAPS,
            network=_SANDWICH | {"qk_norm": "head"},
            fixed=_GEMMA_FIXED | {"hidden_act": "gelu_pytorch_tanh"},
            defaults=_GEMMA3_DEFAULTS,
            inside=("language_model.model.", "model.language_model."),
            ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
            unused=("sliding_window_pattern", "_sliding_window_pattern"),
        ),
        _family(
            "phi3",
            "Phi3ForCausalLM",
            _PHI3,
            (_SILU, PARTIAL_ROPE, uniform_window(switch=False)),
            fixed={"attention_bias": False},
            defaults=_DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        ),
        _family(
            "phi",
            "PhiForCausalLM",
            _PHI,
            (activation("hidden_act", gated=False), PARTIAL_ROPE),
            keys={key: field for key, field in _KEYS.items() if key != "rms_norm_eps"} | {"layer_norm_eps": "norm_eps"},
            network={
                "norm": "layernorm",
                "norm_bias": True,
                "qkv_bias": True,
                "attention_out_bias": True,
                "mlp_bias": True,
                "head_bias": True,
                "parallel_block": True,
            },
            fixed={"qk_layernorm": False},
            defaults=_DEFAULTS | {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
        ),
        _family(
            "falcon",
            "FalconForCausalLM",
            _FALCON,
            (activation("activation", gated=False), ROPE, Codec(_read_falcon, _write_falcon)),
            keys={
                "vocab_size": "vocab_size",
                "hidden_size": "d_model",
                "num_hidden_layers": "num_layers",
                "num_attention_heads": "num_heads",
                "max_position_embeddings": "max_seq_len",
                "layer_norm_epsilon": "norm_eps",
                "tie_word_embeddings": "tie_embeddings",
                "initializer_range": "init_std",
                "bias": ("qkv_bias", "attention_out_bias", "mlp_bias"),
            },
            network={"norm": "layernorm", "norm_bias": True},
            fixed={"alibi": False, "apply_residual_connection_post_layernorm": False},
            defaults=_DEFAULTS
            | {
                "tie_word_embeddings": True,
                "layer_norm_epsilon": 1e-5,
                "num_kv_heads": None,
                "new_decoder_architecture": False,
                "multi_query": True,
                "parallel_attn": True,
                "num_ln_in_parallel_attn": None,
                "bias": False,
                "ffn_hidden_size": None,
                "activation": "gelu",
            },
            prefix="transformer.",
        ),
        _family(
            "olmo2",
            "Olmo2ForCausalLM",
            _OLMO2,
            keys=_KEYS | _BIAS,
            network={"norm_placement": "post", "qk_norm": "full"},
            defaults=_DEFAULTS | {"rms_norm_eps": 1e-5},
        ),
        _family(
            "mixtral",
            "MixtralForCausalLM",
            _MIXTRAL,
            (_SILU, ROPE, uniform_window(switch=False)),
            keys=_KEYS
            | _HEAD_DIM
            | {
                "intermediate_size": ("d_ff", "moe.d_ff"),
                "num_local_experts": "moe.num_experts",
                "num_experts_per_tok": "moe.experts_per_token",
                "router_aux_loss_coef": "moe.balance_loss",
            },
            network={"moe.router": "softmax", "moe.normalize_weights": True},
            defaults=_DEFAULTS
            | _MOE_DEFAULTS
            | {
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1_000_000.0,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 131_072,
            },
        ),
        _family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _QWEN3_MOE,
            (_SILU, ROPE, uniform_window(switch=True), Codec(_read_qwen_moe, _write_qwen_moe)),
            keys=_KEYS
            | _HEAD_DIM
            | _BIAS
            | {
                "num_experts_per_tok": "moe.experts_per_token",
                "moe_intermediate_size": "moe.d_ff",
                "norm_topk_prob": "moe.normalize_weights",
                "router_aux_loss_coef": "moe.balance_loss",
            },
            network={"qk_norm": "head", "moe.router": "softmax"},
            fixed=_QWEN_FIXED | {"decoder_sparse_step": 1},
            unused=("max_window_layers",),
            defaults=_QWEN_DEFAULTS
            | _MOE_DEFAULTS
            | {
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_local_experts": None,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "mlp_only_layers": None,
            },
        ),
        _family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            _deepseek,
            (_SILU, LATENT_ROPE),
            keys={key: field for key, field in _KEYS.items() if key != "rms_norm_eps"}
            | {
                "kv_lora_rank": "mla.kv_lora_rank",
                "q_lora_rank": "mla.q_lora_rank",
                "qk_nope_head_dim": "mla.qk_nope_head_dim",
                "qk_rope_head_dim": "mla.qk_rope_head_dim",
                "v_head_dim": "mla.v_head_dim",
                "n_routed_experts": "moe.num_experts",
                "num_experts_per_tok": "moe.experts_per_token",
                "moe_intermediate_size": "moe.d_ff",
                "n_shared_experts": "moe.num_shared_experts",
                "first_k_dense_replace": "moe.num_dense_layers",
                "norm_topk_prob": "moe.normalize_weights",
                "routed_scaling_factor": "moe.routed_scale",
                "n_group": "moe.num_groups",
                "topk_group": "moe.groups_per_token",
            },
            # The norms of the narrow vectors have an epsilon of their own in transformers, always this one.
            network={"moe.router": "sigmoid", "moe.selection_bias": True, "norm_eps": 1e-6},
            fixed={
                "rms_norm_eps": 1e-6,
                "attention_bias": False,
                "rope_interleave": True,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "moe_layer_freq": 1,
            },
            defaults=_DEFAULTS
            | {
                "max_position_embeddings": 4096,
                "num_key_value_heads": 128,
                "kv_lora_rank": 512,
                "q_lora_rank": 1536,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "n_routed_experts": 256,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 2048,
                "n_shared_experts": 1,
                "first_k_dense_replace": 3,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "n_group": 8,
                "topk_group": 4,
            },
            # The layer that predicts one token more comes after the others.
            ignored=(r"model\.layers\.{n}\..*",),
            unused=("head_dim", "qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers"),
        ),
        _family(
            "gpt2",
            "GPT2LMHeadModel",
            _GPT2,
            (
                activation("activation_function", gated=False),
                Codec(
                    lambda settings: {"d_ff": settings.take("n_inner") or 4 * settings.take("n_embd")},
                    lambda config: {"n_inner": config.d_ff},
                ),
            ),
            keys={
                "vocab_size": "vocab_size",
                "n_embd": "d_model",
                "n_layer": "num_layers",
                "n_head": "num_heads",
                "n_positions": "max_seq_len",
                "layer_norm_epsilon": "norm_eps",
                "tie_word_embeddings": "tie_embeddings",
                "initializer_range": "init_std",
            },
            network={
                "positions": "learned",
                "norm": "layernorm",
                "norm_bias": True,
                "qkv_bias": True,
                "attention_out_bias": True,
                "mlp_bias": True,
            },
            fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
            defaults={
                "n_positions": 1024,
                "layer_norm_epsilon": 1e-5,
                "tie_word_embeddings": True,
                "initializer_range": 0.02,
                "n_inner": None,
                "activation_function": "gelu_new",
            },
            prefix="transformer.",
            ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
        ),
    )
}


def _as_tuple(fields: str | tuple[str, ...]) -> tuple[str, ...]:
    return (fields,) if isinstance(fields, str) else fields


def parse_config(values: Mapping[str, Any], where: str = "config.json") -> tuple[Family, ModelConfig]:
    """The family of a config.json and the network that it describes, in float32 and unstacked.

    Raises:
      ValueError: not a family, or a network, that is implemented; `where` and the key are named.
    """
    if values.get("quantization_config"):
        raise ValueError(
            f"{where} has a quantization_config: quantised weights are not converted. Take the checkpoint in bfloat16, or "
            "dequantise it first"
        )
    model_type = values.get("model_type")
    if model_type == "gemma3":  # with vision, which is left out
        text = values.get("text_config")
        values = {**(text if isinstance(text, dict) else {}), "model_type": "gemma3_text"}
        model_type = "gemma3_text"
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{where}: model_type={model_type!r} is not a family that this converter knows. The nearest is {near!r}; it knows "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    try:
        return family, _parse(Settings(values, family.defaults, where), family)
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        raise ValueError(f"{where} has a value of another kind than it should ({error}): restore the file") from error


def _parse(settings: Settings, family: Family) -> ModelConfig:
    values, where = settings.values, settings.where
    settings.taken.update(family.unused)
    for key, value in family.fixed.items():
        settings.taken.add(key)
        if values.get(key) is not None and values[key] != value:
            raise settings.refuse(key, values[key], f"is not implemented; {value!r} is")
    fields = dict(family.network)
    for key, names in family.keys.items():
        fields |= dict.fromkeys(_as_tuple(names), settings.number(key))
    for codec in family.codecs:
        fields |= codec.read(settings)
    settings.check_all_taken()
    parts = nested(fields)
    sections: dict[str, Any] = {"moe": MoeConfig, "mla": MlaConfig, "": ModelConfig}
    try:
        for name, section in parts.items():
            parts[name] = _typed(section, sections[name])
        made = {name: sections[name](**section) for name, section in parts.items() if name}
        return ModelConfig(**parts[""], **made)
    except ValueError as error:
        raise ValueError(f"{where} describes a network that is not implemented: {error}") from error


def _typed(values: Mapping[str, Any], section: type) -> dict[str, Any]:
    """Values of the kinds that the fields of a config want. Raises ValueError for one of another kind."""
    typed = dict(values)
    for name, kind in typing.get_type_hints(section).items():
        if name in values and kind in (int, float, bool):
            value = values[name]
            typed[name] = kind(value or 0)
            if typed[name] != (value or 0) or not math.isfinite(typed[name]):
                raise ValueError(f"{name}={value!r} should be of type {kind.__name__}")
    return typed


def read_config(directory: str | Path) -> ModelConfig:
    """The network of a checkpoint's directory. `dtype`, `param_dtype`, `scan_layers` and the like are the caller's to replace.

    Raises:
      ValueError: config.json is missing or broken, or describes what is not implemented.
    """
    return read_family_and_config(directory)[1]


def read_family_and_config(directory: str | Path) -> tuple[Family, ModelConfig]:
    path = Path(directory) / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{directory} has no config.json: give the directory of a Hugging Face checkpoint") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object: download it again")
    return parse_config(values, str(path))


def write_config(config: ModelConfig, family: Family) -> dict[str, Any]:
    """config.json of a network in a family's terms.

    Raises:
      ValueError: the family has no words for it; the fields are named.
    """
    where = f"the {family.model_type} family"
    needs = {name.partition(".")[0] for names in family.keys.values() for name in _as_tuple(names) if "." in name}
    for part in ("moe", "mla"):
        if (getattr(config, part) is not None) != (part in needs):
            raise ValueError(f"{where} cannot express model.{part}={getattr(config, part)}: choose another family")
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    values |= {key: value for key, value in family.fixed.items() if value is not None}
    for key, names in family.keys.items():
        value = functools.reduce(getattr, _as_tuple(names)[0].split("."), config)
        values[key] = None if key in _NULL_FOR_ZERO and not value else value
    for codec in family.codecs:
        values |= codec.write(config)
    different = differences(config, parse_config(values, where)[1])
    if different:
        raise ValueError(f"{where} cannot express {', '.join(different)}: change the model, or choose another family")
    return values


def family_of(config: ModelConfig, name: str | None = None) -> Family:
    """The family of that name, or the first that can express a network.

    Raises:
      ValueError: there is none.
    """
    if name is not None:
        if name not in FAMILIES:
            raise ValueError(f"no family {name!r}; there are {', '.join(sorted(FAMILIES))}")
        write_config(config, FAMILIES[name])
        return FAMILIES[name]
    reasons = []
    for family in FAMILIES.values():
        try:
            write_config(config, family)
            return family
        except ValueError as error:
            reasons.append(str(error))
    nearest = min(reasons, key=lambda reason: ("model.moe=" in reason or "model.mla=" in reason, len(reason)))
    raise ValueError(f"no family of Hugging Face expresses this model. The nearest: {nearest}")
