"""Tiny checkpoints of every family that `model/convert/` knows, in the variations in which their networks differ.

Weights are drawn from the tensors' names by a generator whose numbers never change, so that a checkpoint can be made with and
without transformers. What transformers makes of them is kept in fixtures/hugging_face.json; to make it again (needs the extra
`bench`):

    python -m tests.hugging_face
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FIXTURE = Path(__file__).parent / "model/fixtures/hugging_face.json"
PROMPT = [3, 17, 42, 5, 61, 8, 29, 11]
NEW_TOKENS = 64

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_GEMMA = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 24}
_DEEPSEEK = {
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
}
_LOCAL = {"rope_type": "default", "rope_theta": 100.0}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_FALCON = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

# name: model_type and what its config says; the first word is the family
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, **_NONE},
    "gpt2 untied, exact gelu, narrow": {
        **_GPT2,
        **_NONE,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
        "n_inner": 48,
    },
    "llama": {**_SIZES, "num_key_value_heads": 4},
    "llama 3, grouped, tied": {**_SIZES, "rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    "llama biases, own head_dim, linear rope": {
        **_SIZES,
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
    "mistral windowed": {**_SIZES, "sliding_window": 7},
    "mistral yarn": {**_SIZES, "sliding_window": None, "rope_parameters": _YARN},
    "qwen2 biases": {**_SIZES, "tie_word_embeddings": True},
    "qwen2 some layers windowed": {
        **_SIZES,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {**_SIZES, "head_dim": 12},
    "qwen3 yarn, biases": {**_SIZES, "head_dim": 8, "attention_bias": True, "rope_parameters": _YARN | {"beta_fast": 16.0}},
    "smollm3": {**_SIZES, "num_hidden_layers": 5},
    "smollm3 some rotate": {**_SIZES, "num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "tie_word_embeddings": False},
    "gemma": {**_SIZES, "head_dim": 12, "num_key_value_heads": 1},
    "gemma2": {
        **_SIZES,
        **_GEMMA,
        "num_hidden_layers": 3,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_SIZES,
        **_GEMMA,
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": _LOCAL,
        },
    },
    "phi3": {**_SIZES, "num_key_value_heads": 4},
    "phi3 grouped, windowed, partial": {
        **_SIZES,
        "sliding_window": 7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "phi": {**_SIZES, "num_key_value_heads": 4},
    "falcon": {**_FALCON, **_NONE},
    "falcon grouped": {
        **_FALCON,
        **_NONE,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "bias": True,
    },
    "falcon many heads, in sequence, untied": {
        **_FALCON,
        **_NONE,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
        "tie_word_embeddings": False,
    },
    "olmo2": {**_SIZES},
    "mixtral": {**_SIZES, "num_local_experts": 4},
    "qwen3_moe": {**_SIZES, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_moe dense first, normalized": {
        **_SIZES,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": {**_SIZES, **_DEEPSEEK},
    "deepseek_v3 yarn, full queries": {
        **_SIZES,
        **_DEEPSEEK,
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
}


def draw(name: str, shape: tuple[int, ...], norm: float = 1.0) -> np.ndarray:
    """float32 weights of the tensor of that name: norms near `norm`, matrices so large that attention is far from uniform."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))  # its numbers are the same in every version of numpy
    mean = norm if "norm" in name or ".ln_" in name else 0.0
    scale = 0.3 if len(shape) > 1 else 0.1
    return (mean * (not name.endswith("bias")) + scale * generator.standard_normal(shape)).astype(np.float32)


def write_checkpoint(directory: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """A checkpoint of weights that are drawn from their names, in one file and by nothing of ours."""
    header, chunks, start = {}, [], 0
    # Gemma's norms add 1 to their weights. Twice the activations would make attention so sharp that rounding grows to 1e-4.
    norm = 0.0 if config["model_type"].startswith("gemma") else 1.0
    for name, shape in shapes.items():
        chunks.append(draw(name, tuple(shape), norm).tobytes())
        end = start + len(chunks[-1])
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))
    (directory / "config.json").write_text(json.dumps(config))


def make_with_transformers(name: str, directory: Path) -> Any:
    """Writes the case's checkpoint with transformers, its weights drawn from their names; returns the model it loads."""
    import torch
    import transformers
    from safetensors.numpy import load_file

    config = transformers.AutoConfig.for_model(name.split()[0], **CASES[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)  # for the names in the file, which are not those in memory
    shapes = {tensor: list(x.shape) for tensor, x in load_file(directory / "model.safetensors").items()}
    write_checkpoint(directory, json.loads((directory / "config.json").read_text()), shapes)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def logits_with_transformers(model: Any, tokens: list[int]) -> np.ndarray:
    """float32 [len(tokens), vocab_size]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def greedy_with_transformers(model: Any) -> list[int]:
    """The tokens that follow PROMPT."""
    import torch

    out = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NEW_TOKENS, attention_mask=torch.ones(1, len(PROMPT), dtype=int)
    )
    return out[0, len(PROMPT) :].tolist()


def _describe(name: str, directory: Path) -> dict[str, Any]:
    model = make_with_transformers(name, directory)
    header = (directory / "model.safetensors").read_bytes()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    greedy = greedy_with_transformers(model)
    logits = logits_with_transformers(model, PROMPT + greedy)
    return {
        "config": json.loads((directory / "config.json").read_text()),
        "tensors": {tensor: entry["shape"] for tensor, entry in entries.items()},
        "greedy": greedy,
        # After the prompt's first and last token and at the end.
        "logits": {str(at): [round(float(x), 6) for x in logits[at]] for at in (0, len(PROMPT) - 1, len(logits) - 1)},
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        made = {name: _describe(name, Path(scratch) / str(i)) for i, name in enumerate(CASES)}
    FIXTURE.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in made.items())
    FIXTURE.write_text(f"{{\n{lines}\n}}\n")
