"""Adapters against merged weights, `peft`'s files against products made by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.config import LoraConfig
from model.convert.huggingface import save
from model.convert.peft import load_adapters, save_adapters
from model.lora import Adapted, adapt, adapter_specs, frozen_base, merge
from model.params import init_params, is_spec, num_parameters, param_specs
from model.transformer import forward, unembed
from tests.networks import SMALL, packed_rows, random_params

CONFIG = dataclasses.replace(SMALL, num_layers=2)
LORA = LoraConfig(rank=3, alpha=6.0)


def random_adapters(config, lora, seed=1):
    generator = np.random.default_rng(seed)
    specs = adapter_specs(config, lora)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * generator.standard_normal(s.shape), s.dtype), specs, is_leaf=is_spec)


def logits(params, config):
    @jax.jit
    def run(params):
        tokens, positions, segments = packed_rows(config.vocab_size)
        return unembed(params, config, forward(params, config, tokens, positions, segments)[0])

    return np.asarray(run(params))


def by_hand(w, a, b, inputs, scale):
    """w + scale A B in float64."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    product = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
    assert w.shape[:inputs] == a.shape[:-1]
    return np.asarray(w, np.float64) + scale * product.reshape(w.shape)


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_compute_what_merged_weights_do(scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    base, adapters = random_params(config), random_adapters(config, LORA)
    adapted = adapt(base, adapters, LORA)
    merged = merge(adapted, param_specs(config))
    np.testing.assert_allclose(logits(adapted, config), logits(merged, config), atol=2e-4)
    assert np.abs(logits(merged, config) - logits(base, config)).max() > 0.1
    if not scan:
        for name, inputs in (("query", 1), ("out", 2)):
            attention, pair = base["blocks"][1]["attention"], adapters["blocks"][1]["attention"][name]
            expected = by_hand(attention[name], pair["a"], pair["b"], inputs, 2.0)
            np.testing.assert_allclose(merged["blocks"][1]["attention"][name], expected, atol=1e-6)


def test_new_adapters_change_nothing_and_have_the_axes_of_their_projections():
    lora = LoraConfig(rank=2, targets=("query", "out", "down"))
    specs = adapter_specs(CONFIG, lora)
    base = random_params(CONFIG)
    adapters = init_params(specs, jax.random.key(0))
    np.testing.assert_array_equal(logits(adapt(base, adapters, lora), CONFIG), logits(base, CONFIG))
    block = specs["blocks"][0]
    assert block.keys() == {"attention", "mlp"}
    assert block["attention"].keys() == {"query", "out"}
    assert block["attention"]["out"]["a"].axes == ("heads", "head_dim", None)
    assert block["attention"]["query"]["b"].axes == (None, "heads", "head_dim")
    d_model, d_ff = CONFIG.d_model, CONFIG.d_ff
    assert num_parameters(specs) == CONFIG.num_layers * 2 * (2 * (d_model + d_model) + d_ff + d_model)
    a = adapters["blocks"][0]["mlp"]["down"]["a"]
    assert float(jnp.std(a)) == pytest.approx((3 * d_ff) ** -0.5, rel=0.4)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_base_is_adapted_like_its_rounded_weights(bits):
    config = dataclasses.replace(CONFIG, d_model=32, d_ff=64, head_dim=8)
    lora = dataclasses.replace(LORA, base_bits=bits)
    base, of_base = frozen_base(random_params(config), config, lora)
    adapters = random_adapters(config, lora)
    adapted = adapt(base, adapters, lora)
    assert isinstance(adapted["blocks"][0]["mlp"]["up"], Adapted)
    merged = merge(adapted, param_specs(of_base))
    np.testing.assert_allclose(logits(adapted, of_base), logits(merged, of_base), atol=1e-3)


def test_files_of_peft_hold_the_products_and_come_back(tmp_path):
    lora = dataclasses.replace(LORA, targets=("query", "out", "gate"))
    base, adapters = random_params(CONFIG), random_adapters(CONFIG, lora)
    save_adapters(tmp_path / "adapter", adapters, CONFIG, lora)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["target_modules"]) == (3, 6.0, ["gate_proj", "o_proj", "q_proj"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save(tmp_path / "base", base, CONFIG)
    save(tmp_path / "merged", merge(adapt(base, adapters, lora), param_specs(CONFIG)), CONFIG)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = 0
    for name, weight in before.items():
        module = "base_model.model." + name.removesuffix(".weight")
        expected = weight.astype(np.float64)
        if f"{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
            assert a.shape[0] == b.shape[1] == 3
            expected = expected + 2.0 * b @ a
            changed += 1
        np.testing.assert_allclose(after[name], expected, atol=1e-5)
    assert changed == 6
    back, found = load_adapters(tmp_path / "adapter", CONFIG)
    assert (found.rank, found.alpha, set(found.targets)) == (3, 6.0, set(lora.targets))
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


# Keys of peft 0.21's LoraConfig, and one of a version to come, with values that change what is computed, and others.
REFUSED = [
    ("peft_type", "IA3"),
    ("use_dora", True),
    ("modules_to_save", ["lm_head"]),
    ("bias", "lora_only"),
    ("lora_bias", True),
    ("rank_pattern", {"q_proj": 4}),
    ("alpha_pattern", {"q_proj": 4}),
    ("layer_replication", [[0, 1], [0, 2]]),
    ("trainable_token_indices", [3]),
    ("target_parameters", ["mlp.experts.down_proj"]),
    ("alora_invocation_tokens", [5]),
    ("use_qalora", True),
    *((f"{name}_config", {"of": "it"}) for name in ("monteclora", "velora", "arrow", "kasa", "megatron")),
    ("use_bdlora", {"nblocks": 2}),
    ("use_what_comes_next", True),
    *(("init_lora_weights", name) for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "next")),
    ("r", 0),
    ("r", "3"),
    ("lora_alpha", None),
    ("base_model_name_or_path", 3),
]
HARMLESS = [
    *(("init_lora_weights", name) for name in (True, False, "gaussian", "eva", "orthogonal", "mica")),
    ("fan_in_fan_out", True),
    ("exclude_modules", ["lm_head"]),
    ("target_modules", "all-linear"),
    ("layers_to_transform", [0, 1]),
    ("layers_pattern", "layers"),
    ("lora_dropout", 0.1),
    ("auto_mapping", {"base_model_class": "It"}),
    ("eva_config", {"rho": 1.0}),
    ("megatron_core", "megatron.core"),
    ("qalora_group_size", 16),
    ("rank_pattern", {}),
    ("layer_replication", None),
]
LORA_OF_FILE = dataclasses.replace(LORA, targets=tuple(sorted(LORA.targets)))


def test_adapters_that_are_not_ours_are_refused(tmp_path):
    adapters = random_adapters(CONFIG, LORA)
    save_adapters(tmp_path, adapters, CONFIG, LORA)
    path = tmp_path / "adapter_config.json"
    described = json.loads(path.read_text())
    for key, value in REFUSED:
        path.write_text(json.dumps(described | {key: value}))
        with pytest.raises(ValueError, match=f"{key}=.* (is not implemented|changes the base|must be)"):
            load_adapters(tmp_path, CONFIG)
    for key, value in HARMLESS:
        path.write_text(json.dumps(described | {key: value}))
        assert load_adapters(tmp_path, CONFIG)[1] == LORA_OF_FILE
    path.write_text(json.dumps(described | {"use_rslora": True}))
    assert load_adapters(tmp_path, CONFIG)[1].alpha == pytest.approx(6.0 * 3**0.5)
    path.write_text(json.dumps(described))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    a = tensors[f"{module}.lora_A.weight"]
    for changed, complaint in (
        ({f"{module}.lora_A.weight": np.ascontiguousarray(a.T)}, "the network wants"),
        ({f"{module}.lora_B.bias": a[0]}, "q_proj.lora_B.bias, for which"),
        ({f"{module}.lora_magnitude_vector": a[0]}, "q_proj.lora_magnitude_vector, for which"),
        ({"base_model.model.lm_head.lora_A.weight": a}, "lm_head.lora_A.weight, for which"),
    ):
        save_file(tensors | changed, weights)
        with pytest.raises(ValueError, match=complaint):
            load_adapters(tmp_path, CONFIG)
    save_file({name: array for name, array in tensors.items() if name != f"{module}.lora_A.weight"}, weights)
    with pytest.raises(ValueError, match=f"has not both lora_A and lora_B of {module.removeprefix('base_model.model.')}"):
        load_adapters(tmp_path, CONFIG)
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="the network wants"):
        load_adapters(tmp_path, dataclasses.replace(CONFIG, d_ff=32))
    with pytest.raises(ValueError, match="no adapter_config.json"):
        load_adapters(tmp_path / "nothing", CONFIG)
    with pytest.raises(ValueError, match="no projection quarry; it has down, gate, key"):
        adapter_specs(CONFIG, LoraConfig(targets=("quarry",)))


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0.0}, {"targets": ()}, {"base_bits": 3}])
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LoraConfig(**options)
