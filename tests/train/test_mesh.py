"""Every mesh of a table gives the loss and the gradients of one device, and takes over the training state of any other."""

import contextlib
import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest

from model.config import MoeConfig
from model.params import dimensions, param_shardings, param_specs
from model.presets import preset
from model.sharding import MESH_AXES, TRAIN_RULES, Layout, check_mesh, make_mesh
from model.transformer import activations
from tests.networks import random_params
from tests.train.test_step import CONFIG
from train.checkpoint import Checkpoints
from train.config import LossConfig, MeshConfig, OptimizerConfig
from train.step import gradient_sums, make_trainer, next_token_objective

ROWS, TOKENS = 16, 64
LOSS = LossConfig(z_loss=1e-2, chunk_tokens=16)
# Windows and sinks, a layer left over from the scan; everything that 8 devices may split is a multiple of 8.
DENSE = preset(
    "tiny-gemma3",
    num_layers=3,
    window_pattern=(8, 0),
    d_model=32,
    num_heads=8,
    num_kv_heads=8,
    d_ff=32,
    attention_sinks=True,
    attention_soft_cap=3.0,
    scan_layers=True,
)
# Router losses that weigh something; eight experts, as many as an axis may have devices.
EXPERTS = preset(
    "tiny-mixtral",
    moe=MoeConfig(num_experts=8, experts_per_token=2, d_ff=32, balance_loss=0.1, z_loss=0.05),
    scan_layers=True,
    remat="dots",
)
LATENT = preset("tiny-deepseek", scan_layers=True)
assert LATENT.moe is not None
MODELS = {
    "dense": DENSE,
    "grouped": preset("tiny-llama", num_kv_heads=2, scan_layers=True, remat="full"),
    "experts": EXPERTS,
    "latent": dataclasses.replace(LATENT, moe=dataclasses.replace(LATENT.moe, balance_loss=0.1)),
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context": {"context": 8},
    "data-fsdp": {"data": 2, "fsdp": 4},
    "fsdp-tensor": {"fsdp": 4, "tensor": 2},
    "context-tensor": {"context": 4, "tensor": 2},
    "fsdp-context-tensor": {"fsdp": 2, "context": 2, "tensor": 2},
    "data-fsdp-tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
EXPERT_MESHES = {
    "expert": {"expert": 8},
    "expert-tensor": {"expert": 4, "tensor": 2},
    "fsdp-expert-context": {"fsdp": 2, "expert": 2, "context": 2},
    "expert-context-tensor": {"expert": 2, "context": 2, "tensor": 2},
}
# Eight-fold `tensor` splits neither the two key heads of "experts" nor the four heads of "latent".
OF_EXPERTS = [mesh for mesh in MESHES | EXPERT_MESHES if mesh != "tensor"]
QUICK = [
    ("dense", "fsdp-context-tensor", 2),
    ("experts", "expert-tensor", 2),
    ("latent", "fsdp-expert-context", 1),
]
TABLE = [
    *(("dense", mesh, 1) for mesh in MESHES),
    ("dense", "data", 2),
    ("grouped", "fsdp-context-tensor", 1),
    *((name, mesh, 1) for name in ("experts", "latent") for mesh in OF_EXPERTS),
    ("latent", "expert-context-tensor", 2),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in TABLE if case not in QUICK)]


def packed_batch(vocab_size):
    """Documents that end anywhere, padding, and uneven weights."""
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((2, ROWS, TOKENS), np.int32)
    for row in range(ROWS):
        start, number = 0, 0
        while start < TOKENS - 3:
            length, number = int(rng.integers(1, 20)), number + 1
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)[: TOKENS - start]
            start += length
    tokens, targets = rng.integers(0, vocab_size, (2, ROWS, TOKENS)).astype(np.int32)
    weights = (rng.random((ROWS, TOKENS)) * (segments > 0)).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "segment_ids": segments, "positions": positions, "weights": weights}


def sums(model, layout, accumulation):
    return functools.partial(
        gradient_sums, model=model, objective=next_token_objective(LOSS), accumulation=accumulation, layout=layout
    )


def layout_of(mesh):
    return Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | mesh, jax.devices()[:8]), TRAIN_RULES)


@functools.cache
def on_one_device(name, accumulation):
    model = MODELS[name]
    return jax.device_get(jax.jit(sums(model, None, accumulation))(random_params(model), packed_batch(model.vocab_size)))


def compiled(name, mesh, accumulation):
    model, layout = MODELS[name], layout_of((MESHES | EXPERT_MESHES)[mesh])
    specs = param_specs(model)
    check_mesh(dimensions(specs) + activations(ROWS // accumulation, TOKENS), TRAIN_RULES, dict(layout.mesh.shape))
    shardings = param_shardings(specs, layout), layout.sharding("batch")
    function = jax.jit(sums(model, layout, accumulation), in_shardings=shardings, out_shardings=(shardings[0], None))
    params, batch = random_params(model), packed_batch(model.vocab_size)
    return function.lower(params, batch).compile(), jax.device_put((params, batch), shardings)


@pytest.mark.parametrize(("name", "mesh", "accumulation"), CASES)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(name, mesh, accumulation):
    step, (params, batch) = compiled(name, mesh, accumulation)
    result = step(params, batch)
    assert jax.tree.map(lambda x: x.sharding, result[0]) == jax.tree.map(lambda x: x.sharding, params)
    # The routers' losses are those of micro-batches; all else is the same in one.
    expected = on_one_device(name, accumulation if MODELS[name].moe else 1)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(expected), strict=True):
        scale = np.max(np.abs(theirs)) or 1.0
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5, err_msg=jax.tree_util.keystr(path))


COLLECTIVE = re.compile(r"= (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@pytest.mark.parametrize("mesh", ["data", "fsdp", "data-fsdp"])
def test_rows_stay_where_they_are(mesh):
    """Parameters and their gradients travel, activations do not: nothing that is as large as a batch times the width."""
    step, _ = compiled("dense", mesh, 1)
    sizes = []
    for shapes, _ in COLLECTIVE.findall(step.as_text()):
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes):
            sizes.append(int(np.prod([int(n) for n in shape.split(",") if n])))
    assert sizes
    assert max(sizes) <= max(int(np.prod(array.shape)) for array in dimensions(param_specs(DENSE)))
    assert max(sizes) < ROWS * TOKENS * DENSE.d_model


OPTIMIZERS = {"dense": OptimizerConfig(name="muon", adam_learning_rate=1e-3, ema_decay=0.9)}


def abstract_state(name, mesh):
    """All that changes from step to step, with the moving average; as a run lays it out."""
    config = dataclasses.replace(
        CONFIG,
        model=MODELS[name],
        data=dataclasses.replace(CONFIG.data, seq_len=TOKENS),
        batch_size=ROWS,
        optimizer=OPTIMIZERS.get(name, OptimizerConfig(ema_decay=0.9)),
        mesh=MeshConfig(**{"data": 1} | (MESHES | EXPERT_MESHES)[mesh]),
    )
    return make_trainer(config, jax.devices()[:8]).abstract_state


def random_state(abstract):
    rng = np.random.default_rng(0)

    def draw(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(1, 1000, leaf.shape, leaf.dtype)
        return rng.standard_normal(leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, abstract)


def check_moves(directory, name, pairs):
    """A training state, saved on the first mesh of each pair and read on the second, bit by bit."""
    abstract = {mesh: abstract_state(name, mesh) for pair in pairs for mesh in pair}
    expected = random_state(next(iter(abstract.values())))
    shardings = {mesh: jax.tree.map(lambda leaf: leaf.sharding, state) for mesh, state in abstract.items()}
    for mesh, of_mesh in shardings.items():
        for part in (of_mesh.params, of_mesh.opt_state, of_mesh.ema):
            assert mesh == "data" or not all(sharding.is_fully_replicated for sharding in jax.tree.leaves(part))
        with contextlib.closing(Checkpoints(str(directory / mesh), keep=3)) as checkpoints:
            checkpoints.save(1, jax.device_put(expected, of_mesh), {})
    for source, target in pairs:
        with contextlib.closing(Checkpoints(str(directory / source), keep=None)) as checkpoints:
            restored, _ = checkpoints.restore(1, abstract[target])
        assert jax.tree.map(lambda x: x.sharding, restored) == shardings[target]
        jax.tree.map(np.testing.assert_array_equal, restored, expected)


@pytest.mark.parametrize(
    ("name", "meshes"),
    [("grouped", ("data", "fsdp-context-tensor", "fsdp")), ("experts", ("expert-context-tensor", "fsdp-expert-context"))],
)
def test_a_training_state_moves_between_meshes(name, meshes, tmp_path):
    check_moves(tmp_path, name, list(zip(meshes, (*meshes[1:], meshes[0]), strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "experts", "latent"])
def test_a_training_state_moves_between_any_two_meshes(name, tmp_path):
    check_moves(tmp_path, name, list(itertools.product(MESHES if name == "dense" else OF_EXPERTS, repeat=2)))
