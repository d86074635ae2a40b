"""Checkpoints in and out, against what transformers made of the same weights (tests/hugging_face.py)."""

import contextlib
import dataclasses
import functools
import json
import shutil
import tracemalloc

import jax
import numpy as np
import pytest

from model.config import ModelConfig, RopeConfig
from model.convert.config_json import differences
from model.convert.families import FAMILIES, family_of, parse_config, read_config, write_config
from model.convert.huggingface import file_tensors, load, save
from model.convert.safetensors import read_headers
from model.params import num_parameters, param_shardings, param_specs, unstack_layers
from model.presets import PRESETS, PUBLISHED_PARAMETERS, preset
from model.sharding import MESH_AXES, TRAIN_RULES, Layout, make_mesh
from model.transformer import forward, unembed
from tests.hugging_face import (
    CASES,
    FIXTURE,
    NEW_TOKENS,
    PROMPT,
    draw,
    greedy_with_transformers,
    logits_with_transformers,
    make_with_transformers,
    write_checkpoint,
)
from tests.networks import random_params

KNOWN = json.loads(FIXTURE.read_text())


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, config: ModelConfig, tokens):
    positions = np.arange(tokens.shape[0], dtype=np.int32)[None]
    hidden = forward(params, config, tokens[None], positions)[0]
    return unembed(params, config, hidden)[0]


def checkpoint(directory, name):
    """The checkpoint of a case, written without transformers."""
    known = KNOWN[name]
    write_checkpoint(directory, known["config"], known["tensors"])
    return directory


def assert_same_trees(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


# --- against transformers -----------------------------------------------------------------------------------------------------


def test_every_family_has_a_case_and_every_case_its_record():
    assert {name.split()[0] for name in CASES} == set(FAMILIES)
    assert set(KNOWN) == set(CASES)


@pytest.mark.optimised
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_those_that_transformers_gave(name, tmp_path):
    """Greedy by one pass over its tokens: if each is the most likely after those before it, ours are the same."""
    params, config = load(checkpoint(tmp_path, name))
    tokens = np.array(PROMPT + KNOWN[name]["greedy"], np.int32)
    logits = np.asarray(logits_of(params, config, tokens))
    for at, expected in KNOWN[name]["logits"].items():
        assert np.std(expected) > 0.1
        np.testing.assert_allclose(logits[int(at)], expected, atol=1e-4, rtol=0)
    assert logits[len(PROMPT) - 1 : -1].argmax(axis=-1).tolist() == KNOWN[name]["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_names_shapes_and_bits(name, tmp_path):
    """Of the tensors and of the parameters, in one file and in shards; and the config says the same network."""
    source = checkpoint(tmp_path / "in", name)
    params, config = load(source)
    save(tmp_path / "out", params, config, name.split()[0], max_shard_bytes=20_000)
    before, after = read_headers(source), read_headers(tmp_path / "out")
    assert len({tensor.file for tensor in after.values()}) > 1
    assert set(before) == set(after)
    for tensor in before:
        np.testing.assert_array_equal(before[tensor].read(), after[tensor].read(), err_msg=tensor, strict=True)
    again, same = load(tmp_path / "out")
    assert not differences(config, same)
    assert_same_trees(params, again)


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="the extra `bench` has it")
    return pytest.importorskip("transformers", reason="the extra `bench` has it")


@pytest.mark.parametrize("name", CASES)
def test_transformers_agrees_today(name, tmp_path, transformers):
    """The same against the installed transformers, and it loads what we write with equal logits."""
    theirs = make_with_transformers(name, tmp_path / "in")
    params, config = load(tmp_path / "in")
    greedy = greedy_with_transformers(theirs)
    assert len(greedy) == NEW_TOKENS
    tokens = PROMPT + greedy
    expected = logits_with_transformers(theirs, tokens)
    logits = np.asarray(logits_of(params, config, np.array(tokens, np.int32)))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert logits[len(PROMPT) - 1 : -1].argmax(axis=-1).tolist() == greedy
    save(tmp_path / "out", params, config, name.split()[0], source=tmp_path / "in")
    import torch

    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    np.testing.assert_array_equal(logits_with_transformers(again.eval(), tokens), expected)


@pytest.mark.parametrize("name", sorted(PUBLISHED_PARAMETERS))
def test_transformers_counts_the_published_parameters_of_what_we_write(name, transformers):
    import torch

    values = write_config(PRESETS[name], family_of(PRESETS[name]))
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    buffers = [x for buffer, x in model.named_buffers() if buffer.endswith("e_score_correction_bias")]
    assert sum(x.numel() for x in [*model.parameters(), *buffers]) == PUBLISHED_PARAMETERS[name]


# --- config.json --------------------------------------------------------------------------------------------------------------

# Keys as published files of transformers 4 have them, without those that are of no consequence everywhere.
# fmt: off
PUBLISHED_CONFIGS = {
    "gpt2-124m": {
        "model_type": "gpt2", "activation_function": "gelu_new", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_ctx": 1024,
        "n_positions": 1024, "layer_norm_epsilon": 1e-05, "vocab_size": 50257, "attn_pdrop": 0.1, "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "llama3.1-8b": {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "attention_bias": False, "max_position_embeddings": 131072, "vocab_size": 128256, "tie_word_embeddings": False,
        "rope_theta": 500000.0, "torch_dtype": "bfloat16", "pretraining_tp": 1, "transformers_version": "4.42.3",
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192},
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    },
    "gemma2-9b": {
        "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256,
        "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "hidden_size": 3584,
        "final_logit_softcapping": 30.0, "intermediate_size": 14336, "max_position_embeddings": 8192, "vocab_size": 256000,
        "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
    },
    "gemma3-4b": {
        "model_type": "gemma3", "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152},
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936, "router_aux_loss_coef": 0.001,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu",
        "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "n_group": 8,
        "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "topk_group": 4,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280, "pretraining_tp": 1,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn",
            "original_max_position_embeddings": 4096},
    },
    "falcon-7b": {
        "model_type": "falcon", "alibi": False, "apply_residual_connection_post_layernorm": False, "bias": False,
        "hidden_size": 4544, "layer_norm_epsilon": 1e-05, "multi_query": True, "new_decoder_architecture": False,
        "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True, "vocab_size": 65024,
    },
    "phi-2": {
        "model_type": "phi", "hidden_act": "gelu_new", "hidden_size": 2560, "intermediate_size": 10240,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "vocab_size": 51200, "rope_scaling": None,
    },
    "phi-4": {
        "model_type": "phi3", "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 17920, "vocab_size": 100352,
        "max_position_embeddings": 16384, "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 250000,
        "sliding_window": None, "tie_word_embeddings": False, "attention_bias": False, "resid_pdrop": 0.0,
    },
    "smollm2-360m": {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 960, "intermediate_size": 2560, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 15, "num_hidden_layers": 32, "num_key_value_heads": 5,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True,
        "vocab_size": 49152, "attention_bias": False,
    },
    "smollm3-3b": {
        "model_type": "smollm3", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008, "mlp_bias": False,
        "max_position_embeddings": 65536, "max_window_layers": 28, "no_rope_layer_interval": 4, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 5000000.0,
        "attention_bias": False, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
    },
}
# fmt: on


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_configs_are_the_presets(name):
    assert not differences(parse_config(PUBLISHED_CONFIGS[name])[1], PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_with_every_parameter_and_read_as_itself(name):
    config = PRESETS[name]
    family = family_of(config)
    tensors = file_tensors(config, family)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert sum(np.prod(tensor.shape, dtype=int) for tensor in tensors) == num_parameters(param_specs(config))
    again = parse_config(json.loads(json.dumps(write_config(config, family))))[1]
    assert not differences(config, again)


LLAMA = KNOWN["llama"]["config"]
DEEPSEEK = KNOWN["deepseek_v3"]["config"]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "lama"}, r"model_type='lama'.*nearest is 'llama'.*deepseek_v3, falcon"),
        ("llama", {"model_type": None}, r"model_type=None"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config.*bfloat16"),
        ("llama", {"hidden_size": "32"}, r"hidden_size='32' should be a number"),
        ("llama", {"hidden_size": 32.5}, r"d_model=32\.5 should be of type int"),
        ("llama", {"rms_norm_eps": float("nan")}, r"norm_eps=nan should be of type float"),
        ("llama", {"rope_parameters": 7}, r"a value of another kind than it should"),
        ("llama", {"num_attention_heads": 5}, r"not implemented: model\.(d_model|num_heads)"),
        ("llama", {"hidden_act": "relu"}, r"hidden_act='relu' is not implemented; silu"),
        ("llama", {"use_mup": True}, r"does not know use_mup=True.*remove it"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"'dynamic' is not implemented",
        ),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.0}}, r"another temperature than 0\.1 ln"),
        ("llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, r"another temperature"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, r"another temperature"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not implemented for this family"),
        ("llama", {"rope_parameters": YARN | {"factor": None}}, r"lack 'factor'"),
        ("llama", {"rope_parameters": YARN | {"short_factor": [1.0]}}, r"short_factor.*not implemented for yarn"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, r"'longrope' is not implemented"),
        ("mistral windowed", {"layer_types": ["full_attention"] * 2}, r"does not know layer_types"),
        ("qwen2 biases", {"layer_types": ["chunked_attention"] * 2}, r"layer_types=\['chunked"),
        ("qwen2 biases", {"layer_types": ["sliding_attention"] * 2}, r"layer_types=.*with a sliding_window"),
        ("qwen2 biases", {"use_mrope": True}, r"use_mrope=True is not implemented; False is"),
        ("gemma", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": YARN}}, r"sliding_attention have no scaling"),
        ("falcon", {"alibi": True}, r"alibi=True is not implemented"),
        ("falcon", {"new_decoder_architecture": True}, r"num_ln_in_parallel_attn=None is not implemented"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step=2"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\].*come first"),
        ("deepseek_v3", {"attention_bias": True}, r"attention_bias=True is not implemented"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, r"rms_norm_eps=1e-05 is not implemented; 1e-06"),
        ("deepseek_v3", {"rope_interleave": False}, r"rope_interleave=False"),
        ("deepseek_v3", {"scoring_func": "softmax"}, r"scoring_func='softmax'"),
        ("deepseek_v3", {"rope_parameters": YARN}, r"another temperature"),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}, r"another temperature"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_a_network_that_is_not_implemented_is_refused(name, changes, message):
    parse_config(KNOWN[name]["config"])
    with pytest.raises(ValueError, match=message):
        parse_config(KNOWN[name]["config"] | changes)


@pytest.mark.parametrize("name", CASES)
def test_whatever_a_key_says_the_answer_is_a_network_or_one_clear_error(name):
    config = KNOWN[name]["config"]
    for key in config:
        for value in ("x", [], ["x"], {}, {"x": 1}, {"rope_type": "yarn"}, -1, 0, 1.5, None, True, float("nan")):
            with contextlib.suppress(ValueError):
                _, parsed = parse_config(config | {key: value})
                param_specs(parsed)


def test_a_key_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"the file has no 'hidden_size'"):
        parse_config({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "the file")


@pytest.mark.parametrize(
    ("name", "family", "changes", "message"),
    [
        ("tiny-llama", "llama", {"qk_norm": "head"}, r"llama family cannot express model\.qk_norm='head'"),
        ("tiny-llama", "llama", {"window_pattern": (8, 0)}, r"model\.window_pattern=\(8, 0\)"),
        ("tiny-llama", "llama", {"rope": RopeConfig(fraction=0.5)}, r"model\.rope="),
        ("tiny-qwen3", "qwen3", {"window_pattern": (8, 4)}, r"model\.window_pattern=\(8, 4\)"),
        ("tiny-qwen3", "qwen3", {"attention_out_bias": True}, r"model\.attention_out_bias=True"),
        ("tiny-mixtral", "llama", {}, r"cannot express model\.moe="),
        ("tiny-llama", "deepseek_v3", {}, r"cannot express model\.moe=None"),
        ("tiny-deepseek", "deepseek_v3", {"norm_eps": 1e-5}, r"model\.norm_eps=1e-05"),
        ("tiny-gpt2", "gpt2", {"positions": "none"}, r"model\.positions='none'"),
        ("tiny-gemma2", "gemma2", {"attention_scale": 0.3}, r"model\.attention_scale=0\.3"),
        ("tiny-llama", None, {"attention_sinks": True}, r"no family of Hugging Face expresses.*model\.attention_sinks=True"),
        ("tiny-llama", "lamma", {}, r"no family 'lamma'"),
    ],
)
def test_a_network_that_a_family_has_no_words_for_is_not_written(name, family, changes, message):
    with pytest.raises(ValueError, match=message):
        family_of(preset(name, **changes), family)


# --- where parameters go ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm3", "gemma3_text", "deepseek_v3", "qwen2 some layers windowed"])
def test_stacked_layers_are_the_same_layers(name, tmp_path):
    source = checkpoint(tmp_path / "in", name)
    params, _ = load(source)
    stacked, config = load(source, dataclasses.replace(read_config(source), scan_layers=True))
    assert stacked["scanned_blocks"]
    assert_same_trees(unstack_layers(stacked, config)[0], params)
    save(tmp_path / "out", stacked, config, name.split()[0])
    assert_same_trees(load(tmp_path / "out")[0], params)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", {"fsdp": 2, "tensor": 4}),
        ("falcon grouped", {"fsdp": 4, "tensor": 2}),
        ("phi3", {"tensor": 4, "data": 2}),
        ("deepseek_v3", {"expert": 4, "data": 2}),
        ("gpt2", {"tensor": 2, "context": 4}),
    ],
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_sharded_parameters_are_those_of_one_device(name, mesh, scan_layers, tmp_path):
    source = checkpoint(tmp_path, name)
    config = dataclasses.replace(read_config(source), scan_layers=scan_layers)
    specs = param_specs(config)
    layout = Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | mesh, jax.devices()), TRAIN_RULES)
    shardings = param_shardings(specs, layout)
    sharded, _ = load(source, config, shardings)
    assert jax.tree.map(lambda x: x.sharding, sharded) == shardings
    assert_same_trees(sharded, load(source, config)[0])


@pytest.mark.parametrize("stored", ["F16", "BF16", "F64"])
def test_parameters_have_the_type_that_was_asked_for(stored, tmp_path):
    import ml_dtypes

    dtype = np.dtype({"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}[stored])
    params, config = load(checkpoint(tmp_path / "in", "llama"))
    narrow = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
    save(tmp_path / "out", narrow, config)
    assert {tensor.dtype for tensor in read_headers(tmp_path / "out").values()} == {stored}
    for wanted in ("float32", "bfloat16"):
        loaded, _ = load(tmp_path / "out", dataclasses.replace(config, param_dtype=wanted))
        assert_same_trees(loaded, jax.tree.map(lambda x, wanted=wanted: x.astype(wanted), narrow))


def test_the_library_of_the_format_reads_what_we_write(tmp_path):
    from safetensors.numpy import load_file

    known = KNOWN["gpt2"]
    params, config = load(checkpoint(tmp_path / "in", "gpt2"))
    save(tmp_path / "out", params, config, "gpt2", max_shard_bytes=30_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    theirs = {name: x for file in files for name, x in load_file(file).items()}
    assert {name: list(x.shape) for name, x in theirs.items()} == known["tensors"]
    for name, x in theirs.items():
        np.testing.assert_array_equal(x, draw(name, x.shape), err_msg=name)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in theirs.values())
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())


class Elsewhere:
    """A parameter in a memory of its own: to read it is to copy it to the host."""

    def __init__(self, array):
        self.array, self.dtype = np.asarray(array), array.dtype

    def __getitem__(self, index):
        return self.array[index].copy()


def test_memory_stays_near_one_tensor(tmp_path):
    """Of twelve large tensors no more than two are on the host at a time, in or out."""
    config = preset("tiny-llama", num_layers=4, d_model=256, d_ff=2048, head_dim=0, num_heads=4)
    params, largest = random_params(config), 4 * 256 * 2048
    elsewhere = jax.tree.map(Elsewhere, params)
    peaks = {}
    for name, work in (("out", lambda: save(tmp_path / "out", elsewhere, config)), ("in", lambda: load(tmp_path / "out")[0])):
        tracemalloc.start()
        result = work()
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(peaks.values()) < 2.6 * largest, peaks
    assert_same_trees(params, result)


# --- what files may hold beside ----------------------------------------------------------------------------------------------


def test_tensors_that_are_no_parameters_are_passed_over(tmp_path):
    """Buffers of old versions, layers of which there is only a prediction, and the names of a base model."""
    for name, prefix, more in (
        ("gpt2", "transformer.", {"transformer.h.0.attn.bias": [8, 8], "transformer.h.1.attn.masked_bias": [1]}),
        ("qwen2 biases", "", {"model.layers.0.self_attn.rotary_emb.inv_freq": [4]}),
        ("deepseek_v3", "", {"model.layers.3.eh_proj.weight": [32, 64], "model.layers.3.embed_tokens.weight": [64, 32]}),
    ):
        known = KNOWN[name]
        directory = tmp_path / name
        write_checkpoint(directory, known["config"], known["tensors"])
        plain, _ = load(directory)
        write_checkpoint(directory, known["config"], known["tensors"] | more)
        assert_same_trees(load(directory)[0], plain)
        if prefix:
            rename_tensors(directory, lambda tensor, prefix=prefix: tensor.removeprefix(prefix))
            assert_same_trees(load(directory)[0], plain)


def add_head(directory, head):
    """Stores a head of its own, float32 or bfloat16, beside the tensors that are there."""
    path = directory / "model.safetensors"
    header, body = header_of(path)
    kind = {4: "F32", 2: "BF16"}[head.dtype.itemsize]
    entry = {"dtype": kind, "shape": list(head.shape), "data_offsets": [len(body), len(body) + head.nbytes]}
    rewrite(path, header | {"lm_head.weight": entry}, body + head.tobytes())


@pytest.mark.parametrize("name", ["gpt2", "qwen2 biases", "gemma3_text"])
def test_a_head_of_its_own_in_a_tied_checkpoint_must_be_a_copy_of_the_embedding(name, tmp_path):
    """transformers compares the two as well, and does not tie them where they differ."""
    plain, config = load(checkpoint(tmp_path, name))
    assert config.tie_embeddings
    embedding = np.asarray(plain["embedding"])
    add_head(tmp_path, embedding)
    assert_same_trees(load(tmp_path)[0], plain)

    head = embedding.copy()
    head[-1, -1] += 1e-3
    for other in (head, head[:-1]):
        add_head(checkpoint(tmp_path, name), other)
        with pytest.raises(
            ValueError, match=r"'lm_head\.weight', which is not a copy .*tie_word_embeddings=false in config\.json"
        ):
            load(tmp_path)

    add_head(checkpoint(tmp_path, name), head)
    (tmp_path / "config.json").write_text(json.dumps(KNOWN[name]["config"] | {"tie_word_embeddings": False}))
    params, config = load(tmp_path)
    np.testing.assert_array_equal(params["head"], head.T)
    assert_same_trees({key: leaf for key, leaf in params.items() if key != "head"}, plain)
    assert not config.tie_embeddings


def test_a_copy_of_the_embedding_is_one_in_the_type_that_is_read(tmp_path):
    plain, config = load(checkpoint(tmp_path, "gpt2"))
    add_head(tmp_path, np.asarray(plain["embedding"]).astype("bfloat16"))
    with pytest.raises(ValueError, match="not a copy"):
        load(tmp_path)
    load(tmp_path, dataclasses.replace(config, param_dtype="bfloat16"))


def test_a_head_of_its_own_is_compared_to_the_last_row_in_little_memory(tmp_path):
    config = preset("tiny-llama", num_layers=1, vocab_size=5000, d_model=64, tie_embeddings=True)
    params = random_params(config)
    save(tmp_path / "copy", params, config)
    shutil.copytree(tmp_path / "copy", tmp_path / "differing")
    head = np.array(params["embedding"])
    add_head(tmp_path / "copy", head)
    head[-1, -1] += 1
    add_head(tmp_path / "differing", head)
    tracemalloc.start()
    load(tmp_path / "copy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * head.nbytes
    with pytest.raises(ValueError, match="not a copy"):
        load(tmp_path / "differing")


def test_the_language_model_within_gemma_3(tmp_path):
    known = KNOWN["gemma3_text"]
    plain, config = load(checkpoint(tmp_path, "gemma3_text"))
    whole = {"model_type": "gemma3", "text_config": known["config"], "vision_config": {}}
    seeing = ("vision_tower.patch.weight", "multi_modal_projector.mm_soft_emb_norm.weight")
    write_checkpoint(tmp_path, whole, known["tensors"] | {name: [4] for name in seeing})
    for prefix, of_seeing in (("language_model.model.", ""), ("model.language_model.", "model.")):
        there = {name: name.replace("model.", prefix, 1) for name in known["tensors"]}
        there |= {name: of_seeing + name for name in seeing}
        rename_tensors(tmp_path, there.__getitem__)
        params, same = load(tmp_path)
        assert_same_trees(params, plain)
        assert same == config
        rename_tensors(tmp_path, {new: name for name, new in there.items()}.__getitem__)
    rename_tensors(tmp_path, ({name: name for name in there} | {seeing[0]: "language_model.model.norm.weight"}).__getitem__)
    with pytest.raises(ValueError, match=r"both 'model\.norm\.weight' and 'language_model\.model\.norm\.weight'"):
        load(tmp_path)


def test_what_stands_within_another_network_is_looked_for_in_its_family_alone(tmp_path):
    write_checkpoint(tmp_path, KNOWN["llama"]["config"], KNOWN["llama"]["tensors"] | {"language_model.model.norm.weight": [32]})
    with pytest.raises(ValueError, match=r"1 unexpected: language_model\.model\.norm\.weight"):
        load(tmp_path)


def test_what_chooses_experts_is_read_exactly(tmp_path):
    """Eight biases near 10 would be two in bfloat16."""
    source = checkpoint(tmp_path / "in", "deepseek_v3")
    exact, config = load(source)
    router = exact["blocks"][-1]["router"]
    bias = 10 + 0.01 * np.arange(len(router["bias"]), dtype=np.float32)
    router["bias"] = jax.numpy.asarray(bias)
    save(tmp_path / "out", exact, config)
    rounded, _ = load(tmp_path / "out", dataclasses.replace(config, param_dtype="bfloat16"))
    found = rounded["blocks"][-1]["router"]
    assert found["kernel"].dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(found["bias"], bias)
    assert found["bias"].dtype == np.float32


def test_one_file_counts_whatever_shards_lie_beside_it(tmp_path):
    """As in transformers."""
    source = checkpoint(tmp_path / "in", "llama")
    params, config = load(source)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    save(tmp_path / "out", other, config, max_shard_bytes=10_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    shutil.copyfile(source / "model.safetensors", tmp_path / "out" / "model.safetensors")
    assert_same_trees(load(tmp_path / "out")[0], params)


def test_tokenizer_and_special_tokens_are_taken_over(tmp_path):
    source = checkpoint(tmp_path / "in", "llama")
    config_file = source / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"eos_token_id": [7, 9], "bos_token_id": 1}))
    (source / "tokenizer.json").write_bytes(b"\x00not parsed")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "training_args.bin").write_text("not ours")
    params, config = load(source)
    save(tmp_path / "out", params, config, source=source, settings={"bos_token_id": 2})
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"\x00not parsed"
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (2, [7, 9], None)


# --- bad input ----------------------------------------------------------------------------------------------------------------


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def rename_tensors(directory, rename):
    header, body = header_of(directory / "model.safetensors")
    rewrite(directory / "model.safetensors", {rename(name): entry for name, entry in header.items()}, body)


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def change(name, **changes):
    return lambda header, body: (header | {name: header[name] | changes}, body)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda header, body: (header, body[:-1]), r"damaged or was cut off: its tensors end at byte \d+, the file at \d+"),
        (lambda header, body: (header, body + b"\0"), r"its tensors end at byte"),
        (lambda header, body: (b"{" * 10, body), r"its header cannot be read"),
        (lambda header, body: (b"[" * 100_000, body), r"its header cannot be read"),
        (lambda header, body: ([1], body), r"its header cannot be read"),
        (lambda header, body: (header | {NORM: {"dtype": "F32"}}, body), r"its header cannot be read.*data_offsets"),
        (change(NORM, data_offsets=[0, 128]), r"damaged.*begins at byte \d+, the one before it ends at"),
        (change(NORM, data_offsets=[-4, 124]), r"its header cannot be read"),
        (change(NORM, data_offsets=[128, 0]), r"its header cannot be read"),
        (change(NORM, data_offsets=[0, 1 << 60]), r"damaged"),
        (change(NORM, shape=[31]), r"'model\.norm\.weight' F32\[31\] takes 124 bytes and has 128"),
        (change(NORM, shape=[-32]), r"its header cannot be read"),
        (change(NORM, shape=[True, 32]), r"its header cannot be read"),
        (change(NORM, shape=[4, 8]), r"1 of another shape: model\.norm\.weight \[4, 8\], expected \[32\]"),
        (change(QUERY, shape=[16, 64]), r"q_proj\.weight \[16, 64\], expected \[32, 32\]"),
        (change(QUERY, dtype="F8_E4M3"), r"q_proj\.weight' is of type F8_E4M3; F64, F32, F16, BF16 can be converted"),
        (change(QUERY, dtype="I32"), r"is of type I32"),
    ],
)
def test_a_damaged_file_is_refused(damage, message, tmp_path):
    path = checkpoint(tmp_path, "llama") / "model.safetensors"
    rewrite(path, *damage(*header_of(path)))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_header_larger_than_the_file_is_refused(content, tmp_path):
    (checkpoint(tmp_path, "llama") / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"its header is said to have \d+ bytes, the file has"):
        load(tmp_path)


def test_a_flipped_bit_of_the_header_is_noticed_or_harmless(tmp_path):
    path = checkpoint(tmp_path, "llama") / "model.safetensors"
    params, whole = load(tmp_path)[0], path.read_bytes()
    generator = np.random.default_rng(0)
    noticed = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[generator.integers(0, 8 + int.from_bytes(whole[:8], "little"))] ^= 1 << int(generator.integers(0, 8))
        path.write_bytes(damaged)
        try:
            loaded, _ = load(tmp_path)
        except ValueError as error:
            noticed += str(tmp_path) in str(error)
        else:
            assert_same_trees(loaded, params)
    assert noticed > 190


def test_every_cut_of_a_file_is_noticed(tmp_path):
    path = checkpoint(tmp_path, "llama") / "model.safetensors"
    whole = path.read_bytes()
    for length in (*range(12), 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            load(tmp_path)


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    known = KNOWN["llama"]
    kept = {name: shape for name, shape in known["tensors"].items() if "layers.1" not in name}
    write_checkpoint(tmp_path, known["config"], kept | {"model.extra": [2], "score.weight": [3, 32]})
    with pytest.raises(ValueError, match="the tensors in") as error:
        load(tmp_path)
    message = str(error.value)
    assert "9 missing: model.layers.1." in message
    assert message.count("model.layers.1.") == 5
    assert "…" in message
    assert "2 unexpected: model.extra [2]; score.weight [3, 32]" in message


def test_pickles_are_refused(tmp_path):
    checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle, which can run code.*refused"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    params, config = load(checkpoint(tmp_path / "in", "llama"))
    save(tmp_path / "out", params, config, max_shard_bytes=30_000)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model-99999.safetensors", r"names model-99999\.safetensors, which is not there"),
        ("../in/model.safetensors", r"names a file outside its directory, '\.\./in/model\.safetensors'"),
        ("/etc/passwd", r"outside its directory"),
        ("..", r"outside its directory"),
        ("a\\b", r"outside its directory"),
        (7, r"has no weight_map"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(file, message, sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load(sharded)


def test_shards_that_do_not_agree_with_their_index_are_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = {name: file for name, file in index["weight_map"].items() if name != NORM}
    path.write_text(json.dumps({"weight_map": other}))
    with pytest.raises(ValueError, match=r"holds tensor 'model\.norm\.weight', which .* looks for in None"):
        load(sharded)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"lost": index["weight_map"][NORM]}}))
    with pytest.raises(ValueError, match=r"looks for 'lost' in"):
        load(sharded)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"has no weight_map"):
        load(sharded)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "holds no object"), (None, "has no config.json")])
def test_a_broken_config_is_refused(text, message, tmp_path):
    path = checkpoint(tmp_path, "llama") / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_config_of_another_network_is_refused(tmp_path):
    config = read_config(checkpoint(tmp_path, "llama"))
    with pytest.raises(ValueError, match=r"another network than the config: model\.norm_eps=0\.1"):
        load(tmp_path, dataclasses.replace(config, norm_eps=0.1))


class Lost:
    """A parameter that cannot be fetched from its device."""

    dtype = np.float32

    def __getitem__(self, index):
        raise RuntimeError("lost")


def test_an_export_is_there_whole_or_not_at_all(tmp_path):
    params, config = load(checkpoint(tmp_path / "in", "llama"))
    with pytest.raises(ValueError, match="not an empty directory"):
        save(tmp_path / "in", params, config)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", params, config)
    params["head"] = Lost()
    with pytest.raises(RuntimeError, match="lost"):
        save(tmp_path / "out", params, config)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "empty"}
