"""The forward function against plain numpy, against itself in its other forms, and by what gradients can reach."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig, RopeConfig
from model.params import is_spec, param_specs, unstack_layers
from model.presets import PRESETS, preset
from model.rope import inverse_frequencies
from model.transformer import KVCache, forward, unembed

TINY = sorted(name for name in PRESETS if name.startswith("tiny-"))
SMALL = ModelConfig(vocab_size=48, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=32)


def random_params(config: ModelConfig, seed: int = 0):
    """Every parameter random, biases and norms too, and large enough that attention is far from uniform."""
    generator = np.random.default_rng(seed)

    def draw(spec):
        mean = 1.0 if spec.init == "ones" else 0.0
        return jnp.asarray(mean + 0.2 * generator.standard_normal(spec.shape), spec.dtype)

    return jax.tree.map(draw, param_specs(config), is_leaf=is_spec)


def packed_rows(vocab_size: int):
    """Two rows of 16: documents of 9 and 5 tokens and padding; documents of 3 and 13 tokens."""
    tokens = np.random.default_rng(1).integers(0, vocab_size, (2, 16)).astype(np.int32)
    segments = np.array([[1] * 9 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 13], np.int32)
    positions = np.array([[*range(9), *range(5), 0, 0], [*range(3), *range(13)]], np.int32)
    return tokens, positions, segments


# --- the network again, in float64, one token and one head at a time ---


def ref_norm(x, p, c: ModelConfig):
    scale = np.asarray(p["scale"], np.float64) + (1.0 if c.norm_zero_centered else 0.0)
    if c.norm == "layernorm":
        x = x - x.mean()
    out = x / np.sqrt((x * x).mean() + c.norm_eps) * scale
    return out + p["bias"] if "bias" in p else out


def ref_frequency(pair: int, c: ModelConfig, window: int) -> float:
    rope, dims = c.rope, round(c.head_dim * c.rope.fraction)
    if window and rope.local_theta:
        return 1.0 / rope.local_theta ** (2 * pair / dims)
    frequency = 1.0 / rope.theta ** (2 * pair / dims)
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        longest, shortest = rope.original_max_len / rope.low_freq_factor, rope.original_max_len / rope.high_freq_factor
        if wavelength > longest:
            return frequency / rope.factor
        if wavelength > shortest:
            smooth = rope.original_max_len / wavelength - rope.low_freq_factor
            smooth /= rope.high_freq_factor - rope.low_freq_factor
            return (1 - smooth) * frequency / rope.factor + smooth * frequency
    return frequency


def ref_rotate(x, position: int, c: ModelConfig, window: int):
    if c.positions != "rope":
        return x
    out, half = x.copy(), round(c.head_dim * c.rope.fraction) // 2
    for i in range(half):
        angle = position * ref_frequency(i, c, window)
        out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        out[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def ref_gelu(x, exact: bool):
    if exact:
        return x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def ref_mlp(x, p, c: ModelConfig):
    up = p["up"].T @ x + p.get("up_bias", 0)
    if c.mlp in ("swiglu", "geglu"):
        gate = p["gate"].T @ x + p.get("gate_bias", 0)
        up = up * (gate / (1 + np.exp(-gate)) if c.mlp == "swiglu" else ref_gelu(gate, exact=False))
    else:
        up = np.maximum(up, 0) ** 2 if c.mlp == "relu2" else ref_gelu(up, exact=c.mlp == "gelu_exact")
    return p["down"].T @ up + p.get("down_bias", 0)


def ref_attention(xs, p, c: ModelConfig, positions, segments, window: int):
    def project(x, name):
        out = np.einsum("d,dhk->hk", x, p[name]) + p.get(name + "_bias", 0)
        if c.qk_norm != "none" and name != "value":
            scale = p[name + "_norm"] + (1.0 if c.norm_zero_centered else 0.0)
            axis = -1 if c.qk_norm == "head" else None
            out = out / np.sqrt((out * out).mean(axis=axis, keepdims=True) + c.norm_eps) * scale
        return out

    queries, keys, values = ([project(x, name) for x in xs] for name in ("query", "key", "value"))
    outs = []
    for t in range(len(xs)):
        out = np.asarray(p.get("out_bias", np.zeros(c.d_model)), np.float64).copy()
        for head in range(c.num_heads):
            kv_head = head // (c.num_heads // c.num_kv_heads)
            q = ref_rotate(queries[t][head], positions[t], c, window)
            seen, scores = [], []
            for s in range(len(xs)):
                back = positions[t] - positions[s]
                if segments[s] == segments[t] and back >= 0 and (window == 0 or back < window):
                    score = q @ ref_rotate(keys[s][kv_head], positions[s], c, window)
                    score *= c.attention_scale or c.head_dim**-0.5
                    if c.attention_soft_cap:
                        score = c.attention_soft_cap * math.tanh(score / c.attention_soft_cap)
                    seen.append(values[s][kv_head])
                    scores.append(score)
            weights = np.exp(np.array(scores) - max(scores))
            out += (weights / weights.sum()) @ np.array(seen) @ p["out"][head]
        outs.append(out)
    return outs


def ref_logits(params, c: ModelConfig, tokens, positions, segments):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    xs = [params["embedding"][token] * (math.sqrt(c.d_model) if c.scale_embeddings else 1.0) for token in tokens]
    if c.positions == "learned":
        xs = [x + params["position_embedding"][position] for x, position in zip(xs, positions, strict=True)]
    for layer, p in enumerate(params["blocks"]):
        window = c.window_pattern[layer % len(c.window_pattern)]
        attend = functools.partial(ref_attention, p=p["attention"], c=c, positions=positions, segments=segments, window=window)
        if c.parallel_block:
            normed = [ref_norm(x, p["attention_norm"], c) for x in xs]
            xs = [x + a + ref_mlp(n, p["mlp"], c) for x, a, n in zip(xs, attend(normed), normed, strict=True)]
            continue
        before, after = c.norm_placement in ("pre", "sandwich"), c.norm_placement in ("post", "sandwich")
        out = attend([ref_norm(x, p["attention_norm"], c) if before else x for x in xs])
        xs = [x + (ref_norm(o, p["attention_out_norm"], c) if after else o) for x, o in zip(xs, out, strict=True)]
        out = [ref_mlp(ref_norm(x, p["mlp_norm"], c) if before else x, p["mlp"], c) for x in xs]
        xs = [x + (ref_norm(o, p["mlp_out_norm"], c) if after else o) for x, o in zip(xs, out, strict=True)]
    head = params["embedding"].T if c.tie_embeddings else params["head"]
    logits = np.array([ref_norm(x, params["final_norm"], c) @ head + params.get("head_bias", 0) for x in xs])
    return c.logit_soft_cap * np.tanh(logits / c.logit_soft_cap) if c.logit_soft_cap else logits


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, config, tokens, positions, segments=None):
    return unembed(params, config, forward(params, config, tokens, positions, segments)[0])


OTHERS = {
    "relu2, no positions": dataclasses.replace(SMALL, positions="none", mlp="relu2", mlp_bias=True),
    "swiglu with every bias, yarn off": dataclasses.replace(
        SMALL, qkv_bias=True, attention_out_bias=True, mlp_bias=True, head_bias=True
    ),
    "full norm of queries and keys, zero-centred, grouped": dataclasses.replace(SMALL, qk_norm="full", norm_zero_centered=True),
    "layernorm without bias, after the sublayers": dataclasses.replace(SMALL, norm="layernorm", norm_placement="post"),
}


@pytest.mark.parametrize("name", [*TINY, *OTHERS])
def test_forward_equals_numpy_on_packed_rows(name):
    config = OTHERS[name] if name in OTHERS else preset(name, vocab_size=48)
    params, (tokens, positions, segments) = random_params(config), packed_rows(48)
    logits = logits_of(params, config, tokens, positions, segments)
    assert logits.dtype == jnp.float32
    for row in range(2):
        expected = ref_logits(params, config, tokens[row], positions[row], segments[row])
        assert np.abs(expected).max() > 0.5  # the comparison is not between zeros
        np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-4)


# Radians per position of each pair, and YaRN's factor, from `ROPE_INIT_FUNCTIONS` of transformers 5.23.
# fmt: off
ROPE_GOLDEN = {
    "linear": (RopeConfig(scaling="linear", factor=8.0), 16, 1.0,
        [0.125, 0.03952847, 0.0125, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05]),
    "llama3": (RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_len=8192), 16, 1.0,
        [1.0, 0.1939228, 0.03760603, 0.007292665, 0.000524846, 3.428102e-05, 6.64787e-06, 1.289173e-06]),
    "llama3, short context": (RopeConfig(scaling="llama3", factor=4.0, original_max_len=128), 16, 1.0,
        [1.0, 0.3162278, 0.05092958, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05]),
    "yarn": (RopeConfig(theta=1e6, scaling="yarn", factor=4.0, original_max_len=32_768), 32, 1.138629436,
        [1.0, 0.4216965, 0.1778279, 0.07498942, 0.03162278, 0.01333521, 0.004779901, 0.001659962, 0.00055, 0.0001686786,
         4.445699e-05, 1.874736e-05, 7.905694e-06, 3.333804e-06, 1.405853e-06, 5.928434e-07]),
    "yarn, other betas": (
        RopeConfig(scaling="yarn", factor=16.0, beta_fast=16.0, beta_slow=2.0, original_max_len=256), 32, 1.277258872,
        [1.0, 0.5623413, 0.2569351, 0.1111425, 0.04375, 0.01405853, 0.001976424, 0.001111425, 0.000625, 0.0003514633,
         0.0001976424, 0.0001111425, 6.25e-05, 3.514633e-05, 1.976424e-05, 1.111425e-05]),
    "half of the dimensions": (RopeConfig(scaling="linear", factor=2.0, fraction=0.5), 32, 1.0,
        [0.5, 0.1581139, 0.05, 0.01581139, 0.005, 0.001581139, 0.0005, 0.0001581139]),
}
# fmt: on


@pytest.mark.parametrize("name", ROPE_GOLDEN)
def test_rope_frequencies_equal_those_of_transformers(name):
    rope, head_dim, temperature, expected = ROPE_GOLDEN[name]
    frequencies, factor = inverse_frequencies(rope, int(head_dim * rope.fraction))
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
    assert factor == pytest.approx(temperature, rel=1e-9)
    local = dataclasses.replace(rope, local_theta=100.0)
    width = 2 * len(expected)
    frequencies, factor = inverse_frequencies(local, width, local=True)
    np.testing.assert_allclose(frequencies, [100 ** (-i / len(expected)) for i in range(len(expected))], rtol=1e-12)
    assert factor == 1.0
    np.testing.assert_array_equal(inverse_frequencies(local, width)[0], inverse_frequencies(rope, width)[0])
    np.testing.assert_array_equal(inverse_frequencies(rope, width, local=True)[0], inverse_frequencies(rope, width)[0])


def test_yarn_reaches_the_attention():
    plain = SMALL
    yarn = dataclasses.replace(SMALL, rope=RopeConfig(scaling="yarn", factor=4.0, original_max_len=8))
    params, (tokens, positions, segments) = random_params(plain), packed_rows(48)
    # the factor multiplies cos and sin, so scores at equal positions grow by its square
    sharper = dataclasses.replace(yarn, rope=dataclasses.replace(yarn.rope, beta_fast=1e9, beta_slow=1e8, theta=1e9))
    frequencies, factor = inverse_frequencies(sharper.rope, 4)
    same_rotation = dataclasses.replace(
        plain, rope=RopeConfig(theta=1e9, scaling="linear", factor=4.0), attention_scale=factor**2 / math.sqrt(4)
    )
    np.testing.assert_allclose(frequencies, inverse_frequencies(same_rotation.rope, 4)[0])
    np.testing.assert_allclose(
        logits_of(params, sharper, tokens, positions, segments),
        logits_of(params, same_rotation, tokens, positions, segments),
        atol=1e-5,
    )


# --- the same function in other forms ---


def weighted_sum(params, config, tokens, positions, segments):
    """A scalar whose gradient reaches every parameter."""
    logits = unembed(params, config, forward(params, config, tokens, positions, segments)[0])
    return jnp.mean(logits * jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape))


value_and_grad = functools.partial(jax.jit, static_argnums=1)(jax.value_and_grad(weighted_sum))


def assert_trees_close(actual, expected, rtol, atol):
    def close(path, a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, actual, expected)


@pytest.mark.parametrize(
    ("num_layers", "windows"),
    [(3, (0,)), (5, (4, 0)), (4, (4, 4, 0)), (2, (4, 4, 0))],
    ids=["one kind", "one layer left over", "local layer left over", "shorter than a period"],
)
def test_scan_equals_loop(num_layers, windows):
    config = dataclasses.replace(
        SMALL, num_layers=num_layers, window_pattern=windows, scan_layers=True, rope=RopeConfig(local_theta=50.0)
    )
    batch = packed_rows(48)
    params = random_params(config)
    loop_params, loop_config = unstack_layers(params, config)
    assert not loop_config.scan_layers
    value, gradient = value_and_grad(params, config, *batch)
    loop_value, loop_gradient = value_and_grad(loop_params, loop_config, *batch)
    np.testing.assert_allclose(value, loop_value, rtol=1e-6)
    assert_trees_close(unstack_layers(gradient, config)[0], loop_gradient, rtol=1e-5, atol=1e-6)


def count_dots(jaxpr, batched: bool) -> int:
    """Matrix products in a jaxpr and all it calls, with or without batch dimensions."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            batch_dims = equation.params["dimension_numbers"][1][0]
            count += (len(batch_dims) > 0) == batched
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                count += count_dots(getattr(inner, "jaxpr", inner), batched)
    return count


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_changes_memory_but_not_the_result(scan_layers):
    config = dataclasses.replace(SMALL, num_layers=4, scan_layers=scan_layers)
    batch = packed_rows(48)
    params = random_params(config)
    expected = value_and_grad(params, config, *batch)
    matmuls, attention_dots, temporary = {}, {}, {}
    # tokens enough that activations, not parameters, are what memory holds
    many = [jax.ShapeDtypeStruct((2, 512), jnp.int32)] * 3
    for policy in ("none", "dots", "full"):
        other = dataclasses.replace(config, remat=policy)
        jaxpr = jax.make_jaxpr(jax.grad(weighted_sum), static_argnums=1)(params, other, *batch).jaxpr
        matmuls[policy], attention_dots[policy] = count_dots(jaxpr, batched=False), count_dots(jaxpr, batched=True)
        compiled = value_and_grad.lower(params, other, *many).compile()
        temporary[policy] = compiled.memory_analysis().temp_size_in_bytes
        value, gradient = value_and_grad(params, other, *batch)
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        assert_trees_close(gradient, expected[1], rtol=1e-5, atol=1e-6)
    # `dots` keeps the products with weights and takes attention again; `full` takes both again
    assert matmuls["none"] == matmuls["dots"] < matmuls["full"]
    assert attention_dots["none"] < attention_dots["dots"] == attention_dots["full"]
    assert temporary["none"] > 1.5 * temporary["dots"]
    assert temporary["dots"] > temporary["full"]


def test_bfloat16_is_close_to_float32_and_keeps_its_types():
    for name in ("tiny-llama", "tiny-gpt2", "tiny-gemma2"):
        config = preset(name, vocab_size=48)
        low = dataclasses.replace(config, dtype="bfloat16")
        params, (tokens, positions, segments) = random_params(config), packed_rows(48)
        hidden, _ = forward(params, low, tokens, positions, segments)
        assert hidden.dtype == jnp.bfloat16
        expected = np.asarray(logits_of(params, config, tokens, positions, segments))
        actual = logits_of(params, low, tokens, positions, segments)
        assert actual.dtype == jnp.float32
        error = np.abs(np.asarray(actual) - expected)
        assert 0 < error.max() < 0.1 * expected.std() + 0.05 * np.abs(expected).max(), name
        gradient = jax.grad(weighted_sum)(params, low, tokens, positions, segments)
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


# --- what a token can see ---


def influence(config: ModelConfig, positions, segments) -> np.ndarray:
    """[T, T]: absolute derivative of the hidden state at t by the embedding of token s; each token of the row is unlike."""
    T = len(positions)
    config = dataclasses.replace(config, vocab_size=T)
    params = random_params(config)

    def hidden(embedding):
        out, _ = forward({**params, "embedding": embedding}, config, jnp.arange(T)[None], positions[None], segments[None])
        return jnp.sum(jnp.sin(out[0]), axis=-1)

    return np.abs(jax.jit(jax.jacrev(hidden))(params["embedding"])).sum(axis=-1)


def reachable(config: ModelConfig, positions, segments) -> np.ndarray:
    """The same, from the rules alone: token s reaches t through a chain of layers that each may look back."""
    T = len(positions)
    reach = np.eye(T, dtype=bool)
    for layer in range(config.num_layers):
        window = config.window_pattern[layer % len(config.window_pattern)] or T
        sees = np.array(
            [[segments[s] == segments[t] and 0 <= positions[t] - positions[s] < window for s in range(T)] for t in range(T)]
        )
        reach = sees @ reach
    return reach


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny-gpt2", {}),
        ("tiny-falcon", {}),
        ("tiny-olmo2", {"scan_layers": True, "remat": "dots"}),
        ("tiny-gemma3", {"window_pattern": (3, 3, 2)}),
        ("tiny-gemma2", {"window_pattern": (2, 0), "num_layers": 2}),
        ("tiny-llama", {"window_pattern": (1,)}),
    ],
)
def test_gradients_reach_exactly_the_allowed_tokens(name, changes):
    config = preset(name, **changes)
    for segments, positions in (
        (np.ones(12, np.int32), np.arange(12, dtype=np.int32)),
        (np.array([1] * 7 + [2] * 3 + [0] * 2, np.int32), np.array([*range(7), *range(3), 0, 0], np.int32)),
    ):
        derivative, expected = influence(config, positions, segments), reachable(config, positions, segments)
        assert not np.triu(derivative, 1)[segments > 0].any(), "a token sees the future"
        assert not derivative[segments[:, None] != segments[None]].any(), "a token sees another segment"
        np.testing.assert_array_equal(derivative > 0, expected)


def test_without_segments_a_row_is_one_document():
    config = preset("tiny-gemma3", vocab_size=48)
    params, (tokens, _, _) = random_params(config), packed_rows(48)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    np.testing.assert_array_equal(
        logits_of(params, config, tokens, positions), logits_of(params, config, tokens, positions, np.ones((2, 16), np.int32))
    )


def test_padding_is_finite_and_changes_nothing():
    """A row of nothing but padding, and a token that no key is allowed for, make no NaN forward or backward."""
    config = preset("tiny-gemma2", vocab_size=48)
    params, (tokens, positions, segments) = random_params(config), packed_rows(48)
    tokens, positions, segments = (np.concatenate([x, np.zeros((1, 16), np.int32)]) for x in (tokens, positions, segments))
    padded = logits_of(params, config, tokens, positions, segments)
    np.testing.assert_allclose(padded[:2], logits_of(params, config, tokens[:2], positions[:2], segments[:2]), atol=1e-5)
    value, gradient = value_and_grad(params, config, tokens, positions, segments)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((padded, value, gradient)))
    tokens[0, 14:] = 7
    np.testing.assert_array_equal(logits_of(params, config, tokens, positions, segments)[0, :14], padded[0, :14])


def test_a_query_with_no_allowed_key_is_finite():
    from model.attention import attention

    shape = (1, 2, 1, 4)
    allowed = jnp.array([[[False, False], [True, True]]])

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, allowed, scale=1.0) ** 2)

    q, k, v = jax.random.normal(jax.random.key(0), (3, *shape))
    out = attention(q, k, v, allowed, scale=1.0)
    np.testing.assert_allclose(out[0, 0, 0], v[0].mean(axis=(0, 1)), rtol=1e-6)
    assert all(np.isfinite(g).all() for g in jax.grad(total, argnums=(0, 1, 2))(q, k, v))


# --- decoding ---


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama", "tiny-gemma3", "tiny-phi", "tiny-olmo2"])
def test_prefill_and_decode_equal_the_full_forward(name):
    """Prompts of unlike lengths, padded on the right; then one token at a time, each row at its own position."""
    config = preset(name, vocab_size=48)
    params = random_params(config)
    rows, prompt_len, max_len = 3, 7, 20
    tokens = np.random.default_rng(2).integers(0, 48, (rows, max_len)).astype(np.int32)
    lengths = np.array([1, 4, 7])
    positions = np.broadcast_to(np.arange(max_len, dtype=np.int32), (rows, max_len))
    expected = np.asarray(logits_of(params, config, tokens, positions))

    @jax.jit
    def step(tokens, positions, cache):
        hidden, cache = forward(params, config, tokens, positions, cache=cache)
        return unembed(params, config, hidden), cache

    prompt = tokens[:, :prompt_len].copy()
    padding = np.arange(prompt_len) >= lengths[:, None]
    prompt[padding] = 0
    # padding is written nowhere: its position lies behind the last slot
    prompt_positions = np.where(padding, max_len, positions[:, :prompt_len])
    logits, cache = step(prompt, prompt_positions, KVCache.empty(config, rows, max_len))
    for row in range(rows):
        np.testing.assert_allclose(logits[row, : lengths[row]], expected[row, : lengths[row]], atol=2e-4)
        assert not np.asarray(cache.keys[0][row, lengths[row] :]).any()
    for i in range(max_len - prompt_len):
        at = lengths + i
        logits, cache = step(tokens[np.arange(rows), at][:, None], at[:, None].astype(np.int32), cache)
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(rows), at], atol=2e-4)


def test_cache_refuses_scan_and_segments():
    config = dataclasses.replace(SMALL, scan_layers=True)
    tokens = positions = np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="unstack_layers"):
        forward(random_params(config), config, tokens, positions, cache=KVCache.empty(config, 1, 4))
    with pytest.raises(ValueError, match="no segment_ids"):
        forward(random_params(SMALL), SMALL, tokens, positions, tokens, cache=KVCache.empty(SMALL, 1, 4))


# --- configurations that are refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, rf"model\.{name}=0 must be positive") for name in ("vocab_size", "num_layers", "d_model", "d_ff")),
        ({"num_heads": 0}, r"model\.num_heads=0 must be positive"),
        ({"max_seq_len": -1}, r"model\.max_seq_len=-1 must be positive"),
        ({"num_heads": 3, "num_kv_heads": 0, "head_dim": 0}, r"d_model=16 is not divisible by model\.num_heads=3.*head_dim"),
        ({"num_kv_heads": 3}, r"num_heads=4 is not divisible by model\.num_kv_heads=3"),
        ({"num_kv_heads": -2}, r"num_kv_heads=-2"),
        ({"head_dim": -4}, r"head_dim=-4"),
        ({"head_dim": 5}, r"rotates pairs, but head_dim=5"),
        ({"head_dim": 12, "rope": RopeConfig(fraction=0.25)}, r"head_dim=12 x rope\.fraction=0\.25"),
        ({"head_dim": 4, "rope": RopeConfig(fraction=0.1)}, r"head_dim=4 x rope\.fraction=0\.1"),
        ({"window_pattern": ()}, r"window_pattern=\(\)"),
        ({"window_pattern": (4, -1)}, r"window_pattern=\(4, -1\) must hold window sizes >= 0"),
        ({"parallel_block": True, "norm_placement": "sandwich"}, r"parallel_block needs model\.norm_placement='pre'"),
        ({"norm_bias": True}, r"norm_bias needs model\.norm='layernorm'"),
        ({"attention_soft_cap": -1.0}, r"attention_soft_cap=-1\.0"),
        ({"logit_soft_cap": -1.0}, r"logit_soft_cap=-1\.0"),
        ({"norm": "batchnorm"}, r"model\.norm='batchnorm'.*layernorm, rmsnorm"),
        ({"positions": "rotary"}, r"model\.positions='rotary'.*learned, rope, none"),
        ({"dtype": "float16"}, r"model\.dtype='float16'.*float32, bfloat16"),
    ],
)
def test_bad_model_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"theta": 0.0}, r"rope\.theta must be positive"),
        ({"local_theta": -1.0}, r"rope\.theta must be positive"),
        ({"fraction": 0.0}, r"rope\.fraction=0\.0 must lie in \(0, 1\]"),
        ({"fraction": 1.5}, r"rope\.fraction=1\.5"),
        ({"factor": 0.5}, r"rope\.factor=0\.5 must be at least 1"),
        ({"scaling": "llama3", "factor": 8.0}, r"rope\.scaling='llama3' needs rope\.original_max_len"),
        ({"scaling": "yarn", "factor": 8.0}, r"rope\.scaling='yarn' needs rope\.original_max_len"),
        ({"scaling": "llama3", "original_max_len": 64, "low_freq_factor": 4.0}, r"rope\.high_freq_factor=4\.0"),
        ({"scaling": "ntk"}, r"rope\.scaling='ntk'.*linear"),
        ({"factor": 4.0}, r"rope\.factor=4\.0.*rope\.scaling"),
    ],
)
def test_bad_rope_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)
