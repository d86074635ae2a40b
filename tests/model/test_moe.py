"""Experts against a loop over tokens in float64, under the worst imbalance, over meshes, and balanced by their biases."""

import dataclasses
import functools
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import tpu as pltpu

from inference import programs
from inference.config import EngineConfig
from model import moe
from model.config import ModelConfig, MoeConfig
from model.kernels import grouped_matmul as kernel
from model.moe import balance_experts, moe_block, route
from model.params import param_shardings, param_specs, unstack_layers
from model.presets import preset
from model.sharding import DECODE_RULES, MESH_AXES, TRAIN_RULES, Layout, make_mesh
from tests.libtpu import run_with_libtpu
from tests.networks import random_params
from tests.train.test_step import CONFIG, assert_close, make_batch
from train.config import LossConfig, MeshConfig, OptimizerConfig, ParamRule, ScheduleConfig
from train.optimizer import make_optimizer
from train.step import gradient_sums, make_trainer, mean_gradients, next_token_objective

D, F = 8, 6
MOE = MoeConfig(num_experts=8, experts_per_token=3, d_ff=F)
MODEL = ModelConfig(vocab_size=32, num_layers=1, d_model=D, num_heads=2, d_ff=F, max_seq_len=16)


def make_block(config: MoeConfig, rows: int = 2, length: int = 7):
    """Parameters of a layer, tokens, and which of them are padding; float64."""
    rng = np.random.default_rng(0)
    E = config.num_experts
    shapes = {"up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)}
    params = {
        "router": {"kernel": rng.standard_normal((D, E))},
        "experts": {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()},
    }
    if config.selection_bias:
        params["router"]["bias"] = rng.standard_normal(E)
    real = np.ones((rows, length), bool)
    real[0, length - 2 :] = False
    return params, rng.standard_normal((rows, length, D)), real


# --- The reference: one token at a time ---------------------------------------------------------------------------------------


def scores_of(x, params, config: MoeConfig):
    logits = x @ params["router"]["kernel"]
    if config.router == "sigmoid":
        return 1 / (1 + jnp.exp(-logits)), logits
    return jnp.exp(logits) / jnp.sum(jnp.exp(logits)), logits


def chosen_experts(x: np.ndarray, params, config: MoeConfig) -> list[int]:
    """Sorted by hand: the best groups, in them the best experts."""
    choice = np.asarray(scores_of(x, params, config)[0]) + params["router"].get("bias", 0.0)
    groups = np.arange(config.num_experts).reshape(config.num_groups, -1).tolist()
    rank = sorted(groups, key=lambda group: -sum(sorted(choice[group])[-2:]))
    allowed = [expert for group in rank[: config.groups_per_token] for expert in group]
    return sorted(allowed, key=lambda expert: -choice[expert])[: config.experts_per_token]


def by_token(params, x, real, chosen, config: MoeConfig, activation):
    """Output of each token, tokens per expert, balance loss and z-loss."""
    out, load = {}, np.zeros(config.num_experts)
    probabilities, squares = [], []
    for at in chosen:
        scores, logits = scores_of(x[at], params, config)
        weights = [scores[expert] for expert in chosen[at]]
        total = sum(weights) if config.normalize_weights else 1.0
        out[at] = 0.0
        for expert, weight in zip(chosen[at], weights, strict=True):
            hidden = x[at] @ params["experts"]["up"][expert]
            if "gate" in params["experts"]:
                hidden = activation(x[at] @ params["experts"]["gate"][expert]) * hidden
            else:
                hidden = activation(hidden)
            out[at] += config.routed_scale * weight / total * (hidden @ params["experts"]["down"][expert])
            load[expert] += 1
        probabilities.append(scores / jnp.sum(scores))
        squares.append(jnp.log(jnp.sum(jnp.exp(logits))) ** 2)
    share = load / load.sum()
    balance = config.num_experts * jnp.sum(share * (sum(probabilities) / len(probabilities)))
    return out, load, balance, sum(squares) / len(squares)


OPTIONS = {
    "softmax": {},
    "softmax, weights as they are": {"normalize_weights": False, "routed_scale": 1.5},
    "one expert": {"experts_per_token": 1, "normalize_weights": False},
    "all experts": {"experts_per_token": 8},
    "sigmoid": {"router": "sigmoid", "routed_scale": 2.5},
    "sigmoid, biased choice": {"router": "sigmoid", "selection_bias": True, "normalize_weights": False},
    "softmax, biased choice within groups": {"selection_bias": True, "num_groups": 4, "groups_per_token": 2},
    "deepseek": {"router": "sigmoid", "selection_bias": True, "num_groups": 4, "groups_per_token": 2, "routed_scale": 2.5},
}


@pytest.mark.parametrize("name", [*OPTIONS, "no gate"])
def test_values_and_gradients_equal_a_loop_over_tokens_in_float64(name):
    config = dataclasses.replace(MOE, **OPTIONS.get(name, {}))
    model = dataclasses.replace(MODEL, mlp="gelu" if name == "no gate" else "swiglu")
    params, x, real = make_block(config, length=3)
    if name == "no gate":
        del params["experts"]["gate"]
    activation = functools.partial(jax.nn.gelu, approximate=True) if name == "no gate" else jax.nn.silu
    slope = np.cos(np.arange(x.size)).reshape(x.shape)
    with jax.enable_x64(True):
        chosen = {at: chosen_experts(x[at], params, config) for at in zip(*np.nonzero(real), strict=True)}

        def expected_objective(params, x):
            out, load, balance, z = by_token(params, x, real, chosen, config, activation)
            return sum(out[at] @ slope[at] for at in out) + 3 * balance + 0.7 * z, (out, load, balance, z)

        def objective(params, x):
            out, routing = moe_block(x, params, model, config, real, None)
            total = jnp.sum(out * slope) + 3 * routing.balance_loss + 0.7 * routing.z_loss
            return total, ({at: out[at] for at in chosen}, routing.load, routing.balance_loss, routing.z_loss)

        arrays = jax.tree.map(jnp.asarray, (params, x))
        gradient = functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
        # Without jit: compiling so many tokens takes longer.
        expected, actual = gradient(expected_objective)(*arrays), jax.jit(gradient(objective))(*arrays)
    if config.selection_bias:  # the choice has no gradient
        assert not actual[0][0]["router"]["bias"].any()
    assert_close(actual, expected, 1e-12)


def test_padding_counts_for_nothing():
    config = dataclasses.replace(MOE, **OPTIONS["deepseek"])
    params, x, real = make_block(config)
    other = np.where(real[..., None], x, 7.0)
    results = [moe_block(jnp.float32(tokens), params, MODEL, config, real, None) for tokens in (x, other)]
    assert_close(*results, 0.0)
    out, routing = results[0]
    assert routing.load.sum() == 3 * real.sum()
    assert not out[~real].any()
    nothing = moe_block(jnp.float32(x), params, MODEL, config, np.zeros_like(real), None)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(nothing))


def test_an_even_router_has_a_balance_loss_of_one():
    params, x, real = make_block(MOE)
    params["router"]["kernel"] = np.zeros((D, 8))
    routing = route(jnp.float32(x), params["router"], MOE, real)[2]
    assert float(routing.balance_loss) == pytest.approx(1.0)  # even probabilities, however the ties fall
    assert float(routing.z_loss) == pytest.approx(np.log(8) ** 2)


# --- Grouped matmul -----------------------------------------------------------------------------------------------------------


def by_group(x, w, sizes):
    out, start = np.zeros((len(x), w.shape[2])), 0
    for group, size in enumerate(sizes):
        out[start : start + size] = x[start : start + size] @ w[group]
        start += size
    return out


SIZES = {"uneven, some empty, rows left over": (5, 0, 130, 77, 0), "all in one": (0, 0, 0, 300, 0), "none": (0,) * 5}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", SIZES)
def test_grouped_matmul_equals_a_loop_over_groups(name, platform, monkeypatch):
    """The TPU's kernels in interpret mode. Rows after the last group hold NaN, and reach nothing else."""
    rng = np.random.default_rng(0)
    x, w, d_out = (rng.standard_normal(shape) for shape in ((300, 130), (5, 130, 70), (300, 70)))
    sizes = np.int32(SIZES[name])
    filled = sizes.sum()
    expected = by_group(x, w, sizes)
    expected_d_x = by_group(d_out, w.swapaxes(1, 2), sizes)
    ends = np.cumsum(sizes)
    expected_d_w = np.array([x[end - size : end].T @ d_out[end - size : end] for end, size in zip(ends, sizes, strict=True)])
    monkeypatch.setattr(kernel, "tiling", lambda _: lambda *_: (128, 128, 128))
    if platform == "tpu":
        x[filled:], d_out[filled:] = np.nan, np.nan
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        out, pull = jax.vjp(lambda x, w: kernel.grouped_matmul(x, w, sizes, platform), jnp.float32(x), jnp.float32(w))
        d_x, d_w = pull(jnp.float32(d_out))
    in_a_group = (np.arange(300) < filled)[:, None]
    out, d_x = (np.where(in_a_group, rows, 0) for rows in (out, d_x))
    expected_d_x = np.where(in_a_group, expected_d_x, 0)
    assert_close((out, d_x, d_w), (expected, expected_d_x, expected_d_w), 1e-5)


def test_the_kernels_of_tpus_leave_nothing_unwritten_in_a_layer(monkeypatch):
    """With padding, whose rows no kernel writes; the interpreter fills them with NaN."""
    params, x, real = jax.tree.map(jnp.asarray, make_block(MOE))
    params, x = jax.tree.map(jnp.float32, (params, x))

    def objective(params, x):
        out, routing = moe_block(x, params, MODEL, MOE, real, None)
        return jnp.sum(jnp.sin(out)) + routing.balance_loss

    gradient = jax.value_and_grad(objective, argnums=(0, 1))
    expected = jax.jit(gradient)(params, x)
    monkeypatch.setattr(moe, "grouped_matmul", lambda x, w, sizes, platform: kernel.grouped_matmul(x, w, sizes, "tpu"))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        assert_close(jax.jit(lambda *arguments: gradient(*arguments))(params, x), expected, 1e-5)


# --- Experts on several devices -----------------------------------------------------------------------------------------------


def layout_of(**sizes) -> Layout:
    return Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | sizes), TRAIN_RULES)


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"expert": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("experts_per_token", [1, 3])
def test_nothing_is_dropped_when_all_tokens_choose_the_same_experts(sizes, experts_per_token):
    """All copies go to the device of the first experts; that each is there shows in values and gradients."""
    config = dataclasses.replace(MOE, experts_per_token=experts_per_token)
    params, x, real = make_block(config, rows=8, length=8)
    params["router"]["kernel"] = np.zeros((D, 8))  # ties go to the first experts
    slope = np.cos(np.arange(x.size)).reshape(x.shape)

    def objective(params, x, layout):
        out, routing = moe_block(x, params, MODEL, config, real, layout)
        return jnp.sum(out * slope), (out, routing)

    gradient = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True), static_argnums=2)
    params, x = jax.tree.map(jnp.float32, (params, x))
    d_one, (out, routing) = gradient(params, x, None)
    assert list(routing.load) == [real.sum()] * experts_per_token + [0] * (8 - experts_per_token)
    experts = jax.tree.map(np.float64, params["experts"])
    expected = np.zeros(x.shape)
    for e in range(experts_per_token):
        gate = np.float64(x) @ experts["gate"][e]
        expected += (gate / (1 + np.exp(-gate)) * (np.float64(x) @ experts["up"][e])) @ experts["down"][e]
    assert_close(out, expected * real[..., None] / experts_per_token, 1e-5)
    d_many, (out_of_many, routing_of_many) = gradient(params, x, layout_of(**sizes))
    assert_close((out_of_many, routing_of_many, d_many), (out, routing, d_one), 1e-5)


@pytest.mark.parametrize("garbage", [1e3, pytest.param(-1e3, marks=pytest.mark.slow)])
def test_rows_that_nothing_arrives_at_are_never_read(garbage, monkeypatch):
    """The room for the worst of routers is not cleared on TPUs. (NaN would not do here: CPUs multiply what they mask by 0.)"""
    params, x, real = make_block(MOE, rows=8, length=8)
    assert not real.all()
    slope = np.cos(np.arange(x.size)).reshape(x.shape)
    params, x = jax.tree.map(jnp.float32, (params, x))

    def value_and_gradients():
        objective = lambda params, x: jnp.sum(moe_block(x, params, MODEL, MOE, real, layout_of(expert=8))[0] * slope)  # noqa: E731
        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))(params, x)

    expected = value_and_gradients()
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, garbage, dtype))
    jax.clear_caches()
    try:
        assert_close(value_and_gradients(), expected, 1e-5)
    finally:
        jax.clear_caches()


@pytest.mark.parametrize("sizes", [(0, 0, 0), (5, 0, 6), (16, 0, 0), (3, 17, 28), (0, 1, 0)])
def test_chunks_equal_one_piece(sizes):
    """Groups end within chunks, at their ends, and go over several; what no group fills is not computed."""
    rng = np.random.default_rng(0)
    filled = sum(sizes)
    x, d_out = rng.standard_normal((2, 48, D))
    matrices = {
        "up": rng.standard_normal((3, D, F)),
        "gate": rng.standard_normal((3, D, F)),
        "down": rng.standard_normal((3, F, D)),
    }
    sizes = jnp.asarray(sizes, jnp.int32)

    def in_pieces(x, matrices):
        return moe._in_chunks(x, sizes, matrices, jax.nn.silu, "cpu", 16)

    def whole(x, matrices):
        return moe._experts(x, sizes, matrices, jax.nn.silu, "cpu")

    with jax.enable_x64(True):
        found, pull = jax.vjp(jax.jit(in_pieces), x, matrices)
        expected, expected_pull = jax.vjp(jax.jit(whole), x, matrices)
        d_out[filled:] = 0
        assert found.dtype == jnp.float64
        is_filled = np.arange(48)[:, None] < filled
        assert_close(
            (jnp.where(is_filled, found, 0), pull(d_out)), (jnp.where(is_filled, expected, 0), expected_pull(d_out)), 1e-12
        )


def test_the_plan_is_what_ragged_all_to_all_expects():
    """The operation that TPUs have, emulated from its documentation, moves what the padded one of this CPU moves; and back."""
    devices, experts, rows = 8, 3, 20
    rng = np.random.default_rng(0)
    copies = rng.integers(0, devices * experts, (devices, rows))
    copies[0], copies[1] = 4, np.sort(copies[1] % 3)  # one device sends all to one expert, one all to one device
    sizes = np.array([np.bincount(row, minlength=devices * experts) for row in copies]).astype(np.int32)
    sizes[2, -1] -= sizes[2, -1]  # and one has rows that go nowhere
    x = np.float32(1 + np.arange(devices * rows)).reshape(devices * rows, 1)
    mesh = layout_of(expert=devices).mesh

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert"), check_vma=False)
    def there_and_back(x, sizes):
        there, back, of_experts = moe._plan(sizes[0], devices, rows, 20)
        arrived = moe._exchange(x, there, back)
        returned = moe._exchange(arrived, back, there)
        return jax.tree.map(lambda leaf: leaf[None], (there, back, of_experts, arrived, returned))

    there, back, of_experts, arrived, returned = jax.tree.map(np.asarray, jax.jit(there_and_back)(x, sizes))

    def emulate(x, send):
        out = np.zeros((devices, send.num_rows, 1), np.float32)
        for sender in range(devices):
            for receiver in range(devices):
                for i in range(experts):
                    start, size, target = (f[sender, receiver, i] for f in (send.offsets, send.sizes, send.targets))
                    out[receiver, target : target + size] = x[sender, start : start + size]
                    assert send.arriving[receiver, sender, i] == size
        return out

    expected = emulate(x.reshape(devices, rows, 1), there)
    np.testing.assert_array_equal(arrived, expected)
    np.testing.assert_array_equal(returned, emulate(expected, back))
    for device in range(devices):
        # Sorted by expert, each from all senders.
        of_device = sizes[:, device * experts : (device + 1) * experts]
        assert of_experts[device].tolist() == of_device.sum(axis=0).tolist()
        assert np.count_nonzero(arrived[device]) == of_device.sum()
        kept = sizes[device].sum()
        np.testing.assert_array_equal(returned[device, :kept, 0], x.reshape(devices, rows)[device, :kept])
        assert not returned[device, kept:].any()


# --- Losses, metrics and the bias, in training --------------------------------------------------------------------------------


def losses(name: str, **changes):
    """A small MoE of that family whose router's losses weigh something, and its parameters."""
    model = preset(name, vocab_size=64, max_seq_len=16, num_layers=2, **changes)
    assert model.moe is not None
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, balance_loss=0.1, z_loss=0.05))
    return model, random_params(model)


@pytest.mark.slow
def test_scan_equals_loop():
    """A dense layer first, then two repetitions of a local and a global layer with experts, and a local one left over."""
    model, _ = losses("tiny-deepseek")
    model = dataclasses.replace(model, num_layers=6, window_pattern=(4, 0), scan_layers=True, remat="dots")
    params = random_params(model)
    assert (len(params["dense_blocks"]), len(params["scanned_blocks"]), len(params["blocks"])) == (1, 2, 1)
    loop_params, loop = unstack_layers(params, dataclasses.replace(model, remat="none"))
    assert ["experts" in block for block in loop_params["blocks"]] == [False] + 5 * [True]
    sums = jax.jit(
        functools.partial(gradient_sums, objective=next_token_objective(LossConfig()), accumulation=1), static_argnames="model"
    )
    gradients, metrics = sums(params, make_batch(), model=model)
    expected_gradients, expected_metrics = sums(loop_params, make_batch(), model=loop)
    assert metrics["expert_load"].shape == (5, 8)
    assert_close(metrics, expected_metrics, 2e-6)
    assert_close(unstack_layers(gradients, model)[0], expected_gradients, 1e-5)
    # Every layer's bias moves by its own load.
    load = metrics["expert_load"]
    moved, _ = unstack_layers(balance_experts(params, model, load), model)
    assert_close(moved, balance_experts(loop_params, loop, load), 0.0)
    for layer, (before, after) in enumerate(zip(loop_params["blocks"][1:], moved["blocks"][1:], strict=True)):
        step = np.asarray(after["router"]["bias"] - before["router"]["bias"])
        np.testing.assert_allclose(step, 0.001 * np.sign(load[layer].mean() - load[layer]), atol=1e-7)


def test_router_losses_are_means_that_count_with_each_micro_batch_s_tokens():
    """The objective is nll + sum over micro-batches of their weight x their mean loss, over the whole weight."""
    model, params = losses("tiny-mixtral")
    batch = make_batch()
    mean = jax.jit(
        lambda params, batch, n: mean_gradients(
            functools.partial(gradient_sums, model=model, objective=next_token_objective(LossConfig()), accumulation=n),
            params,
            batch,
        ),
        static_argnums=2,
    )
    micro = [{name: x[i::2] for name, x in batch.items()} for i in range(2)]
    weight = [x["weights"].sum() for x in micro]
    parts = [mean(params, x, 1) for x in micro]
    expected = jax.tree.map(
        lambda *leaves: sum(w * leaf for w, leaf in zip(weight, leaves, strict=True)) / sum(weight),
        *((gradients, {k: v for k, v in m.items() if k != "expert_load"}) for gradients, m in parts),
    )
    gradients, metrics = mean(params, batch, 2)
    load = metrics.pop("expert_load") * sum(weight)
    assert_close((gradients, metrics), expected, 2e-6)
    np.testing.assert_allclose(load.sum(axis=1), 2 * (batch["segment_ids"] > 0).sum(), rtol=1e-6)


def test_each_router_coefficient_changes_the_loss_that_is_minimised():
    model, params = losses("tiny-mixtral")
    gradient = jax.jit(
        functools.partial(gradient_sums, objective=next_token_objective(LossConfig()), accumulation=1), static_argnames="model"
    )
    full = gradient(params, make_batch(), model=model)[0]["blocks"][0]["router"]["kernel"]
    for name in ("balance_loss", "z_loss"):
        without = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **{name: 0.0}))
        gradients, metrics = gradient(params, make_batch(), model=without)
        assert metrics[{"z_loss": "router_z_loss"}.get(name, name)] == 0
        assert np.abs(gradients["blocks"][0]["router"]["kernel"] - full).max() > 1e-2 * np.abs(full).max()


def test_an_uneven_router_is_balanced_by_its_bias_alone():
    """From 2.5 times the mean to 1.2 in 60 steps, though decay and a rule for all would move the bias, were it trained."""
    model = preset("tiny-deepseek", vocab_size=64, max_seq_len=16, num_layers=2)
    moe_config = dataclasses.replace(model.moe, balance_loss=0.0, bias_update_rate=0.004, num_groups=1, groups_per_token=1)
    optimizer = OptimizerConfig(
        learning_rate=1e-6,
        weight_decay=0.5,
        rules=(ParamRule(".*"),),
        schedule=ScheduleConfig(name="constant", warmup="0 steps"),
    )
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(model, moe=moe_config), optimizer=optimizer, steps=60)
    trainer = make_trainer(config, jax.devices()[:1])
    state = trainer.init(jax.random.key(0))
    uneven = np.linspace(-0.15, 0.15, 8).astype(np.float32)
    blocks = state.params["blocks"]
    router = {**blocks[1]["router"], "bias": jnp.asarray(uneven)}
    state = state.replace(params={**state.params, "blocks": (blocks[0], {**blocks[1], "router": router})})
    imbalance, before = [], uneven
    for _ in range(60):
        state, metrics = trainer.step(state, jax.device_put(make_batch(), trainer.batch_sharding))
        imbalance.append(float(metrics["load_imbalance"]))
        after = np.asarray(state.params["blocks"][1]["router"]["bias"])
        steps = np.abs(after - before) / 0.004
        assert np.all(np.isclose(steps, 1, atol=1e-3) | (steps == 0))
        before = after
    assert imbalance[0] > 2.2
    assert np.mean(imbalance[-10:]) < 1.3
    assert {"balance_loss", "router_z_loss", "load_imbalance"} <= set(metrics)


@functools.cache
def one_update(name: str):
    """Of a scanned layer with experts, whose gradients are random everywhere: what is added to it, and its parameters."""
    model = preset("tiny-deepseek", num_layers=2, scan_layers=True)
    specs = param_specs(model)
    params, gradients = random_params(model), random_params(model, seed=1)
    optimizer = OptimizerConfig(name=name, learning_rate=1.0, adam_learning_rate=1.0, rules=(ParamRule(".*"),))
    transformation = make_optimizer(optimizer, specs, optax.constant_schedule(1.0))

    @jax.jit
    def update(params, gradients):
        return transformation.update(gradients, transformation.init(params), params)[0]

    return update(params, gradients)["scanned_blocks"][0], params["scanned_blocks"][0]


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow), "lion", "adafactor", "sgd"])
def test_no_optimizer_moves_the_bias_and_all_move_the_experts(name):
    """Neither by a gradient nor by decay, though the rules decay everything."""
    updates, _ = one_update(name)
    assert not updates["router"]["bias"].any()
    for kind in ("experts", "shared_experts", "router"):
        for leaf in set(updates[kind]) - {"bias"}:
            assert np.all(np.any(np.asarray(updates[kind][leaf]), axis=(-2, -1))), (kind, leaf)


def test_muon_orthogonalises_each_expert_by_itself():
    """Newton-Schulz brings singular values near 1, then they are scaled by 0.2 sqrt(longest side); decay is next to nothing."""
    updates, params = one_update("muon")
    for name in ("up", "down"):
        assert params["experts"][name].shape[:2] == (1, 8)
        singular = np.linalg.svd(updates["experts"][name][0], compute_uv=False)
        longest = max(params["experts"][name].shape[2:])
        assert np.all(np.abs(singular / (0.2 * np.sqrt(longest)) - 0.9) < 0.4)


# --- What is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 9}, r"moe\.experts_per_token=9 is more than moe\.num_experts=8.*lower"),
        ({"num_experts": 0}, r"moe\.num_experts=0 must be positive"),
        ({"num_groups": 3}, r"moe\.num_groups=3 must part moe\.num_experts=8 into equal groups"),
        ({"num_groups": 8}, r"moe\.num_groups=8 must part .* groups of two or more"),
        ({"num_groups": 2, "groups_per_token": 3}, r"moe\.groups_per_token=3 is more than moe\.num_groups=2"),
        ({"num_groups": 4}, r"experts_per_token=3 is more than the 2 experts of moe\.groups_per_token=1"),
        ({"bias_update_rate": 0.1}, r"bias_update_rate=0\.1 does nothing without a bias: set moe\.selection_bias"),
        ({"balance_loss": -1.0}, r"moe\.balance_loss=-1\.0 must not be negative"),
        ({"routed_scale": 0.0}, r"moe\.routed_scale=0\.0 must be positive"),
        ({"router": "tanh"}, r"moe\.router='tanh' is not one of softmax, sigmoid"),
    ],
)
def test_bad_moe_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MOE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": dataclasses.replace(MOE, num_dense_layers=1)}, r"num_dense_layers=1 leaves none of model\.num_layers=1"),
        ({"moe": MOE, "mlp_bias": True}, r"model\.mlp_bias is not implemented for experts"),
    ],
)
def test_what_experts_do_not_go_with_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, **changes)


def test_experts_that_do_not_divide_over_the_mesh_are_refused():
    config = dataclasses.replace(CONFIG, model=losses("tiny-mixtral")[0], mesh=MeshConfig(data=1, expert=8))
    with pytest.raises(ValueError, match=r"experts/.*experts = 4 does not divide over expert=8"):
        make_trainer(config, jax.devices()[:8])


# --- Decoding with weights on a mesh -----------------------------------------------------------------------------------------


def logits_of_prompts(params, model: ModelConfig, rows: tuple[int, ...]):
    """After each token of prompts of these lengths, padded to the longest one, from the engine's own program."""
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (len(rows), max(rows)))
    columns = np.arange(max(rows))
    positions = np.where(columns < np.array(rows)[:, None], columns, -1)
    engine = EngineConfig(max_batch=len(rows), cache_tokens=16 * len(rows), page_size=16)
    placement = programs.Placement.beside(params, model)
    pages, _ = programs.empty_state(model, engine, placement)
    table = np.arange(len(rows), dtype=np.int32)[:, None]
    logits = programs.decode(params, model, placement, pages, table, tokens.astype(np.int32), positions.astype(np.int32))[1]
    return [row[:length] for row, length in zip(np.asarray(logits), rows, strict=True)]


@functools.cache
def decoded_on_one_device(name: str):
    return logits_of_prompts(random_params(preset(name)), preset(name), (7, 3))


MESHES = [
    ({"data": 2, "tensor": 2}, "decode"),
    ({"expert": 4}, "train"),
    ({"fsdp": 4}, "train"),
    ({"expert": 2, "fsdp": 2}, "train"),
]


@pytest.mark.parametrize("mesh", [*MESHES[:2], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[2:])], ids=str)
@pytest.mark.parametrize("name", ["tiny-mixtral", pytest.param("tiny-deepseek", marks=pytest.mark.slow)])
def test_experts_on_a_mesh_decode_as_on_one_device(name, mesh):
    model, (sizes, rules) = preset(name), mesh
    devices = make_mesh(dict.fromkeys(MESH_AXES, 1) | sizes, jax.devices()[:4])
    layout = Layout.of(devices, TRAIN_RULES if rules == "train" else DECODE_RULES)
    placed = jax.device_put(random_params(model), param_shardings(param_specs(model), layout))
    assert_close(logits_of_prompts(placed, model, (7, 3)), decoded_on_one_device(name), 1e-5)


DECODE = textwrap.dedent(
    """
    import json, sys
    import jax
    from jax.experimental import topologies
    from inference.config import EngineConfig
    from inference.programs import lower_decode
    from model.params import abstract_params, param_shardings, param_specs
    from model.presets import preset
    from model.sharding import DECODE_RULES, MESH_AXES, TRAIN_RULES, Layout, make_mesh

    jax.default_backend = None  # not to be asked
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    name, changes, compiles, *cases = map(json.loads, sys.argv[1:])
    for sizes, rules in cases:
        model = preset(name, attention_backend="flash", dtype="bfloat16", param_dtype="bfloat16", max_seq_len=512, **changes)
        mesh = make_mesh(dict.fromkeys(MESH_AXES, 1) | sizes, devices)
        specs = param_specs(model)
        shardings = param_shardings(specs, Layout.of(mesh, {"train": TRAIN_RULES, "decode": DECODE_RULES}[rules]))
        on = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        params = jax.tree.map(on, abstract_params(specs), shardings)
        lowered = lower_decode(params, model, EngineConfig(max_batch=8, cache_tokens=8 * 512))
        print(lowered.compile().memory_analysis().temp_size_in_bytes if compiles else "lowered")
    """
)


def test_decoding_is_lowered_for_a_tpu_whatever_machine_lowers_it():
    """A program that depends on the machine would not be the one that `loam compile` judges."""
    run_with_libtpu(DECODE, *map(json.dumps, ("tiny-mixtral", {"num_layers": 1}, False, *MESHES[:3])))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_decoding_gathers_no_experts(mesh):
    """Of Mixtral's sizes: all temporaries together are smaller than a quarter of one of its matrices."""
    printed = run_with_libtpu(DECODE, *map(json.dumps, ("mixtral-8x7b", {"num_layers": 1}, True, mesh)))
    model = preset("mixtral-8x7b")
    assert model.moe
    assert int(printed.splitlines()[-1]) < 2 * model.d_model * model.moe.d_ff / 4


# --- The real compiler --------------------------------------------------------------------------------------------------------

COMPILE = textwrap.dedent(
    """
    import dataclasses, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from model.kernels.grouped_matmul import grouped_matmul
    from model.presets import preset
    from train.config import MeshConfig
    from train.step import abstract_batch, make_trainer
    from tests.train.test_step import CONFIG

    topology = sys.argv[1]
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    everywhere = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices[:1]), ("one",)), jax.sharding.PartitionSpec())
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype, sharding=everywhere)

    def run(x, w, sizes):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, "tpu"), x, w)
        return pull(out)

    jax.jit(run).lower(shape(1024, 384), shape(8, 384, 256), shape(8, dtype=jnp.int32)).compile()

    model = preset(sys.argv[2], dtype="bfloat16", attention_backend="flash", max_seq_len=512, remat="full", scan_layers=True)
    data = dataclasses.replace(CONFIG.data, seq_len=256)
    config = dataclasses.replace(CONFIG, model=model, data=data, mesh=MeshConfig(data=-1, fsdp=2, expert=2))
    trainer = make_trainer(config, devices)
    text = trainer.step.lower(trainer.abstract_state, abstract_batch(config)).compile().as_text()
    assert "ragged-all-to-all" in text

    # Of one chip alone the kernels are its own too, and not those of the machine that compiles.
    trainer = make_trainer(dataclasses.replace(config, mesh=MeshConfig()), devices[:1])
    text = trainer.step.lower(trainer.abstract_state, abstract_batch(config)).as_text()
    kernels = text.count("tpu_custom_call")
    assert kernels >= 3 * 3 + 2 and "ragged_dot" not in text, kernels  # of three products in three passes, and attention's two
    """
)


def test_grouped_matmul_and_a_sharded_step_compile_for_a_tpu():
    run_with_libtpu(COMPILE, "v5e:2x2", "tiny-mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("model", ["tiny-mixtral", "tiny-deepseek"])
def test_they_compile_for_every_generation(topology, model):
    run_with_libtpu(COMPILE, topology, model)
