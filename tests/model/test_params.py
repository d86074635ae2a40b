"""The parameter declaration: what is drawn, what it depends on, where it lives, how it is counted."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.params import (
    ParamSpec,
    abstract_params,
    init_params,
    is_spec,
    num_parameters,
    param_shardings,
    param_specs,
    parameter_groups,
    path_name,
    unstack_layers,
)
from model.presets import PRESETS, preset
from model.sharding import MESH_AXES, TRAIN_RULES, Layout, make_mesh

CONFIG = ModelConfig(vocab_size=512, num_layers=5, d_model=64, num_heads=4, d_ff=96, max_seq_len=64, window_pattern=(8, 0))


def by_name(tree) -> dict:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec)}


def test_init_statistics():
    """Normal with the declared deviation, residual outputs smaller by sqrt(2 x 2 layers), scales one, biases zero."""
    config = dataclasses.replace(
        CONFIG, norm="layernorm", norm_bias=True, qkv_bias=True, mlp_bias=True, init_std=0.05, num_layers=2
    )
    params = by_name(jax.jit(lambda key: init_params(param_specs(config), key))(jax.random.key(0)))
    for name, x in params.items():
        x = np.asarray(x, np.float64)
        if name.endswith("bias"):
            assert not x.any(), name
        elif name.endswith("scale"):
            assert (x == 1).all(), name
        else:
            std = 0.05 / math.sqrt(4) if name.endswith(("/out", "/down")) else 0.05
            # five standard errors of the mean, of the deviation and of the fourth moment (3 for a normal distribution)
            assert abs(x.mean()) < 5 * std / math.sqrt(x.size), name
            assert abs(x.std() / std - 1) < 5 / math.sqrt(2 * x.size), name
            assert abs(np.mean((x / x.std()) ** 4) - 3) < 5 * math.sqrt(24 / x.size), name


def test_no_two_parameters_are_drawn_alike():
    config = dataclasses.replace(CONFIG, num_layers=2)
    params = by_name(init_params(param_specs(config), jax.random.key(0)))
    drawn = [np.asarray(x).ravel()[:8].tobytes() for name, x in params.items() if not name.endswith("scale")]
    assert len(set(drawn)) == len(drawn) == 2 + 2 * 7
    other = by_name(init_params(param_specs(config), jax.random.key(1)))
    assert not np.array_equal(params["embedding"], other["embedding"])


@pytest.mark.parametrize("norm_placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("qk_norm", ["head", "full"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_every_norm_scales_by_one_at_first(norm_placement, qk_norm, zero_centered):
    config = dataclasses.replace(
        CONFIG, norm_placement=norm_placement, qk_norm=qk_norm, norm_zero_centered=zero_centered, num_layers=1
    )
    scales = {name: spec for name, spec in by_name(param_specs(config)).items() if "norm" in name}
    assert len(scales) == {"pre": 2, "post": 2, "sandwich": 4}[norm_placement] + 3
    assert {spec.init for spec in scales.values()} == {"zeros" if zero_centered else "ones"}


def test_adding_a_parameter_changes_no_other():
    more = dataclasses.replace(CONFIG, qk_norm="head", qkv_bias=True, head_bias=True, num_layers=6, positions="learned")
    # residual outputs are drawn narrower in a deeper network
    fewer = by_name(init_params(param_specs(CONFIG), jax.random.key(0)))
    larger = by_name(init_params(param_specs(more), jax.random.key(0)))
    assert len(larger) > len(fewer)
    for name, x in fewer.items():
        if not name.endswith(("/out", "/down")):
            np.testing.assert_array_equal(x, larger[name], err_msg=name)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_abstract_and_drawn_parameters_agree(param_dtype):
    config = dataclasses.replace(CONFIG, scan_layers=True, param_dtype=param_dtype, norm_zero_centered=True)
    specs = param_specs(config)
    drawn = jax.eval_shape(lambda: init_params(specs, jax.random.key(0)))
    abstract = abstract_params(specs)
    assert jax.tree.structure(drawn) == jax.tree.structure(abstract)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(drawn)] == [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)]
    assert {x.dtype for x in jax.tree.leaves(abstract)} == {jnp.dtype(param_dtype)}


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
def test_unstack_layers_puts_every_layer_in_its_place(num_layers):
    """Layer i of the loop is repetition i // period of entry i % period, or one of the layers left over."""
    config = dataclasses.replace(CONFIG, num_layers=num_layers, scan_layers=True)
    params = jax.tree.map(lambda s: np.zeros(s.shape), param_specs(config), is_leaf=is_spec)
    whole = num_layers // 2 * 2
    for layer in range(whole):
        params["scanned_blocks"][layer % 2]["mlp"]["up"][layer // 2] = layer
    for layer in range(whole, num_layers):
        params["blocks"][layer - whole]["mlp"]["up"][:] = layer
    unstacked, loop = unstack_layers(params, config)
    assert [block["mlp"]["up"][0, 0] for block in unstacked["blocks"]] == list(range(num_layers))
    assert loop == dataclasses.replace(config, scan_layers=False)
    shapes = jax.tree.map(lambda s: s.shape, param_specs(loop), is_leaf=is_spec)
    assert jax.tree.map(np.shape, unstacked) == shapes
    assert unstack_layers(unstacked, loop)[0] is unstacked


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_counts_of_every_preset(name, scan_layers):
    specs = param_specs(preset(name, scan_layers=scan_layers))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(specs)))
    groups = parameter_groups(specs)
    assert num_parameters(specs) == total == sum(groups.values())
    assert groups == parameter_groups(param_specs(PRESETS[name]))
    assert set(groups) > {"embedding", "blocks/attention", "final_norm"}
    assert {"blocks/mlp", "blocks/experts"} & set(groups)


def test_groups_of_a_small_model():
    c = dataclasses.replace(CONFIG, scan_layers=True, head_bias=True)
    assert parameter_groups(param_specs(c)) == {
        "embedding": 512 * 64,
        "blocks/attention": 5 * 4 * 64 * 64,
        "blocks/mlp": 5 * 3 * 64 * 96,
        "blocks/attention_norm": 5 * 64,
        "blocks/mlp_norm": 5 * 64,
        "final_norm": 64,
        "head": 64 * 512,
        "head_bias": 512,
    }


def layout(rules=TRAIN_RULES, **sizes):
    sizes = dict.fromkeys(MESH_AXES, 1) | sizes
    return Layout.of(make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]), rules)


def test_partition_follows_the_rules():
    specs = param_specs(dataclasses.replace(CONFIG, scan_layers=True))
    partition = by_name(
        jax.tree.map(lambda sharding: sharding.spec, param_shardings(specs, layout(fsdp=2, context=2, tensor=2)))
    )
    scattered = ("fsdp", "context")
    assert partition["embedding"] == PartitionSpec("tensor", scattered)
    assert partition["scanned_blocks/1/attention/out"] == PartitionSpec(None, "tensor", None, scattered)
    assert partition["blocks/0/mlp/up"] == PartitionSpec(scattered, "tensor")
    assert partition["final_norm/scale"] == PartitionSpec(None)


def test_sharded_parameters_are_drawn_as_on_one_device():
    specs = param_specs(CONFIG)
    specs = {"embedding": specs["embedding"], "query": specs["blocks"][0]["attention"]["query"]}
    shardings = param_shardings(specs, layout(fsdp=2, tensor=2))
    sharded = jax.jit(lambda key: init_params(specs, key), out_shardings=shardings)(jax.random.key(0))
    single = jax.jit(lambda key: init_params(specs, key))(jax.random.key(0))
    assert sharded["embedding"].addressable_shards[0].data.shape == (256, 32)
    jax.tree.map(np.testing.assert_array_equal, sharded, single)


def test_spec_counts_its_elements():
    assert ParamSpec((3, 4, 5), (None, "embed", "heads")).size == 60
