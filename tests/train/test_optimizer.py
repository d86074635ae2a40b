"""Optimizers against float64 numpy, schedules against their formulas, rules against what they must cover."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.params import is_spec, param_specs, path_name
from train.config import DEFAULT_RULES, OptimizerConfig, ParamRule, ScheduleConfig
from train.optimizer import MUON_UPDATE_RMS, make_optimizer, make_schedule, match_rules

MODEL = ModelConfig(
    vocab_size=24,
    num_layers=2,
    d_model=16,
    num_heads=2,
    d_ff=32,
    max_seq_len=8,
    norm="layernorm",
    norm_bias=True,
    qkv_bias=True,
)
SPECS = param_specs(MODEL)
STEPS = 5
RATES = [0.01, 0.02, 0.03, 0.02, 0.01]


def schedule(step):
    return jnp.asarray(RATES)[step]


def draw(seed: int, scale: float = 1.0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(scale * generator.standard_normal(s.shape), jnp.float32), SPECS, is_leaf=is_spec)


def gradient(step: int):
    """Norms above and below 1, so that clipping acts in some steps only."""
    return draw(100 + step, scale=(0.001, 1.0, 0.002, 0.1, 0.001)[step])


def by_name(tree) -> dict[str, np.ndarray]:
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def run(config: OptimizerConfig, steps: int = STEPS) -> list[dict[str, np.ndarray]]:
    """Parameters before every update and after the last one."""
    optimizer = make_optimizer(config, SPECS, schedule)
    params = draw(0)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    history = [by_name(params)]
    for step in range(steps):
        params, state = update(params, state, gradient(step))
        history.append(by_name(params))
    return history


def clipped(step: int, clip_norm: float) -> dict[str, np.ndarray]:
    grads = {name: g.astype(np.float64) for name, g in by_name(gradient(step)).items()}
    total = math.sqrt(sum(float(np.sum(g * g)) for g in grads.values()))
    return {name: g * min(1.0, clip_norm / total) if clip_norm else g for name, g in grads.items()}


def is_decayed(name: str) -> bool:
    return not any(word in name for word in ("norm", "bias"))


def reference(config: OptimizerConfig, direction) -> list[dict[str, np.ndarray]]:
    """`direction(memory, gradient, step)` of one parameter; decay and rate as the config documents them."""
    params = {name: p.astype(np.float64) for name, p in by_name(draw(0)).items()}
    memory = {name: {} for name in params}
    history = [params]
    for step in range(STEPS):
        grads = clipped(step, config.clip_norm)
        params = {
            name: p
            - RATES[step]
            * (direction(memory[name], grads[name], step) + (config.weight_decay * p if is_decayed(name) else 0.0))
            for name, p in params.items()
        }
        history.append(params)
    return history


def adam(config: OptimizerConfig):
    def direction(memory, g, step):
        memory["m"] = config.b1 * memory.get("m", 0.0) + (1 - config.b1) * g
        memory["v"] = config.b2 * memory.get("v", 0.0) + (1 - config.b2) * g * g
        m, v = memory["m"] / (1 - config.b1 ** (step + 1)), memory["v"] / (1 - config.b2 ** (step + 1))
        return m / (np.sqrt(v) + config.eps)

    return direction


def lion(config: OptimizerConfig):
    def direction(memory, g, _):
        m = memory.get("m", 0.0)
        memory["m"] = config.b2 * m + (1 - config.b2) * g
        return np.sign(config.b1 * m + (1 - config.b1) * g)

    return direction


def sgd(config: OptimizerConfig):
    def direction(memory, g, _):
        memory["m"] = config.momentum * memory.get("m", 0.0) + g
        return memory["m"]

    return direction


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "direction", "fields"),
    [
        ("adamw", adam, {"b1": 0.8, "b2": 0.9, "eps": 1e-4}),
        ("lion", lion, {"b1": 0.9, "b2": 0.99}),
        ("sgd", sgd, {"momentum": 0.7}),
    ],
)
def test_five_updates_equal_float64_numpy(name, direction, fields, clip_norm):
    config = OptimizerConfig(name=name, weight_decay=0.3, clip_norm=clip_norm, **fields)
    norms = [math.sqrt(sum(float(np.sum(g * g)) for g in clipped(step, 0.0).values())) for step in range(STEPS)]
    assert min(norms) < 1 < max(norms)
    for step, (actual, expected) in enumerate(zip(run(config), reference(config, direction(config)), strict=True)):
        for parameter, value in expected.items():
            np.testing.assert_allclose(actual[parameter], value, rtol=1e-5, atol=2e-6, err_msg=f"{parameter}, update {step}")


def test_adafactor_descends_and_decays():
    config = OptimizerConfig(name="adafactor", weight_decay=0.0)
    history = run(config)
    for name, before in history[0].items():
        update = history[1][name] - before
        assert (np.sign(update) == -np.sign(by_name(gradient(0))[name])).all()
        assert np.sqrt(np.mean(update**2)) <= RATES[0] * 1.001, name  # each block's root-mean-square is clipped to 1
    decayed = run(dataclasses.replace(config, weight_decay=0.5))
    for name, before in history[0].items():
        expected = -RATES[0] * 0.5 * before if is_decayed(name) else np.zeros_like(before)
        np.testing.assert_allclose(decayed[1][name] - history[1][name], expected, atol=2e-6)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_muon_takes_orthogonal_steps_for_matrices_and_adam_for_the_rest(scan_layers):
    config = OptimizerConfig(name="muon", learning_rate=0.02, adam_learning_rate=0.005, weight_decay=0.0, clip_norm=0.0)
    specs = param_specs(dataclasses.replace(MODEL, num_layers=2 if scan_layers else 1, scan_layers=scan_layers))
    generator = np.random.default_rng(3)
    params, grads = (
        jax.tree.map(lambda s: jnp.asarray(generator.standard_normal(s.shape), jnp.float32), specs, is_leaf=is_spec)
        for _ in range(2)
    )
    optimizer = make_optimizer(config, specs, lambda _: 0.02)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    grads, matrices = by_name(grads), 0
    for name, update in by_name(updates).items():
        leaf = name.split("/")[-1]
        if leaf not in ("query", "key", "value", "out", "up", "gate", "down"):
            g = grads[name]
            np.testing.assert_allclose(update, -0.005 * g / (np.abs(g) + config.eps), rtol=1e-4, err_msg=name)
            continue
        # one matrix per layer: width on one side, heads x head_dim or the MLP on the other
        for layer in range(2 if scan_layers else 1):
            u, g = (x[layer] if scan_layers else x for x in (update, grads[name]))
            u, g = (x.reshape(-1, 16) if leaf in ("out", "down") else x.reshape(16, -1) for x in (u, g))
            rms = np.sqrt(np.mean(u**2)) / 0.02
            assert rms == pytest.approx(MUON_UPDATE_RMS, rel=0.2), name
            singular = np.linalg.svd(u / 0.02, compute_uv=False) / (MUON_UPDATE_RMS * math.sqrt(max(u.shape)))
            # Newton-Schulz with these coefficients ends near 1, not at it; the gradient itself spreads much wider
            assert singular.min() > 0.3, name
            assert singular.max() < 1.3, name
            left, _, right = np.linalg.svd(g, full_matrices=False)
            cosine = -np.sum(u * (left @ right)) / np.linalg.norm(u) / np.linalg.norm(left @ right)
            assert cosine > 0.97, name
            matrices += 1
    assert matrices == (14 if scan_layers else 7)


def test_muon_decays_matrices_and_others_at_their_own_rate():
    fields = {"name": "muon", "learning_rate": 0.03, "adam_learning_rate": 0.006}
    plain, decayed = (run(OptimizerConfig(**fields, weight_decay=decay), steps=1) for decay in (0.0, 0.5))
    for name, before in plain[0].items():
        rate = RATES[0] * (1.0 if "blocks" in name else 0.2)  # the schedule, times 0.006 / 0.03
        expected = -rate * 0.5 * before if is_decayed(name) else np.zeros_like(before)
        np.testing.assert_allclose(decayed[1][name] - plain[1][name], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd", "adafactor"])
def test_rules_freeze_and_scale(name):
    rules = (
        ParamRule("embedding", learning_rate_scale=0.0),
        ParamRule(r"blocks/0/mlp/.*", learning_rate_scale=0.5),
        *DEFAULT_RULES,
    )
    config = OptimizerConfig(name=name, adam_learning_rate=1e-3, weight_decay=0.0)
    plain, ruled = run(config, steps=2), run(dataclasses.replace(config, rules=rules), steps=2)
    assert ruled[2]["embedding"].tobytes() == ruled[0]["embedding"].tobytes()
    assert plain[2]["embedding"].tobytes() != plain[0]["embedding"].tobytes()
    for parameter, before in plain[0].items():
        scale = 0.0 if parameter == "embedding" else 0.5 if parameter.startswith("blocks/0/mlp/") else 1.0
        expected = scale * (plain[2][parameter] - before)
        np.testing.assert_allclose(ruled[2][parameter] - before, expected, atol=1e-6, err_msg=parameter)


def test_default_rules_decay_matrices_only():
    model = dataclasses.replace(
        MODEL, qk_norm="head", head_bias=True, mlp_bias=True, attention_out_bias=True, positions="learned"
    )
    for scan_layers in (False, True):
        specs = param_specs(dataclasses.replace(model, scan_layers=scan_layers))
        rules = match_rules(specs, DEFAULT_RULES)
        for path, rule in jax.tree_util.tree_leaves_with_path(rules):
            name = path_name(path)
            matrix = name.split("/")[-1] in (
                *("embedding", "position_embedding", "head", "query", "key", "value", "out", "up", "gate", "down"),
            )
            assert rule.weight_decay == matrix, name


def test_first_matching_rule_wins():
    rules = (ParamRule("head", learning_rate_scale=3.0), ParamRule("head|embedding", learning_rate_scale=2.0), ParamRule(".*"))
    matched = match_rules(SPECS, rules)
    assert (matched["head"], matched["embedding"], matched["final_norm"]["scale"]) == rules


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((ParamRule(r"blocks/.*"),), r"cover no parameter 'embedding'.*pattern is '\.\*'"),
        ((ParamRule(r"block/.*"), ParamRule(".*")), r"'block/\.\*' applies to no parameter"),
        ((ParamRule(".*"), ParamRule("head")), r"'head' applies to no parameter"),
        ((ParamRule("head"), ParamRule("head", learning_rate_scale=0.0), ParamRule(".*")), r"'head' applies to no parameter"),
        ((ParamRule("blocks"), ParamRule(".*")), r"'blocks' applies to no parameter"),
    ],
)
def test_rules_cover_every_parameter_and_all_are_used(rules, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(rules=rules), SPECS, schedule)


# --- schedules ---


def rates(config: ScheduleConfig, steps: int, tokens_per_step: int = 100) -> np.ndarray:
    rate = make_schedule(config, 2.0, steps, tokens_per_step)
    return np.array([float(rate(step)) for step in range(steps)])


@pytest.mark.parametrize("warmup", ["20 steps", "2_000 tokens", "20 %"])
@pytest.mark.parametrize(
    ("name", "middle", "last"),
    # middle: update 60 of 0..99, warm-up over at 20
    [
        ("cosine", 0.2 + 0.9 * (1 + math.cos(math.pi * 40 / 79)), 0.2),
        ("linear", 2.0 - 1.8 * 40 / 79, 0.2),
        ("constant", 2.0, 2.0),
        ("wsd", 2.0, 0.2),
    ],
)
def test_schedule_values(name, middle, last, warmup):
    values = rates(ScheduleConfig(name=name, warmup=warmup, decay="30 steps", end_fraction=0.1), 100)
    np.testing.assert_allclose(values[:20], 2.0 * np.arange(1, 21) / 21, rtol=1e-5)
    assert values[20] == pytest.approx(2.0, rel=1e-6)
    assert values[60] == pytest.approx(middle, rel=1e-5)
    assert values[99] == pytest.approx(last, rel=1e-5)
    assert (np.diff(values[20:]) <= 1e-6).all()


@pytest.mark.parametrize("decay", ["30 steps", "3_000 tokens", "30 %"])
def test_wsd_is_flat_and_then_falls_linearly(decay):
    values = rates(ScheduleConfig(name="wsd", warmup="0 steps", decay=decay, end_fraction=0.0), 100)
    np.testing.assert_allclose(values[:70], 2.0)
    np.testing.assert_allclose(values[70:], 2.0 * (29 - np.arange(30)) / 30, atol=1e-5)


def test_wsd_without_a_stable_part():
    values = rates(ScheduleConfig(name="wsd", warmup="40 %", decay="60 %", end_fraction=0.5), 10)
    assert values.max() == pytest.approx(2.0)
    assert values[-1] == pytest.approx(1.0)
    assert (np.diff(values[:4]) > 0).all()
    assert (np.diff(values[4:]) < 0).all()


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_finite_positive_first_rate(name, steps):
    values = rates(ScheduleConfig(name=name), steps)
    assert np.isfinite(values).all()
    assert 0 < values[0] <= 2.0


def test_no_warmup_starts_at_the_peak():
    for name in ("cosine", "linear", "constant"):
        assert rates(ScheduleConfig(name=name, warmup="0 steps"), 10)[0] == 2.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "cosine", "warmup": "101 steps"}, r"warmup='101 steps' is 101 steps, more than the 100"),
        ({"name": "linear", "warmup": "10_100 tokens"}, r"warmup='10_100 tokens' is 101 steps"),
        ({"name": "wsd", "warmup": "60 %", "decay": "50 %"}, r"warmup='60 %' and decay='50 %' are 60 \+ 50 steps"),
    ],
)
def test_warmup_and_decay_have_to_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(ScheduleConfig(**fields), 1.0, 100, 100)


@pytest.mark.parametrize("text", ["", "10", "ten steps", "-5 steps", "5 epochs", "1e3 steps"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"optimizer\.schedule\.warmup=.* is not a duration"):
        ScheduleConfig(warmup=text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be positive"),
        ({"clip_norm": -1.0}, r"clip_norm must be >= 0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\)"),
        ({"name": "muon"}, r"needs optimizer\.adam_learning_rate"),
    ],
)
def test_bad_optimizer_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        ParamRule("(")
    with pytest.raises(ValueError, match="negative learning_rate_scale"):
        ParamRule(".*", learning_rate_scale=-1.0)
