"""The forward function against plain numpy, decoding against the forward function, and the configurations that are refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import MlaConfig, ModelConfig, MoeConfig, RopeConfig
from model.presets import PRESETS, preset
from model.rope import inverse_frequencies
from model.transformer import KVCache, empty_pages, forward, unembed
from tests.networks import SMALL, packed_rows, random_params

TINY = sorted(name for name in PRESETS if name.startswith("tiny-"))
# --- the network again, in float64, one token and one head at a time ---


def ref_norm(x, p, c: ModelConfig):
    scale = np.asarray(p["scale"], np.float64) + (1.0 if c.norm_zero_centered else 0.0)
    if c.norm == "layernorm":
        x = x - x.mean()
    out = x / np.sqrt((x * x).mean() + c.norm_eps) * scale
    return out + p["bias"] if "bias" in p else out


def ref_frequency(pair: int, c: ModelConfig, window: int) -> float:
    rope, dims = c.rope, c.rotary_dim
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
    if rope.scaling == "yarn":  # compared with transformers below
        return float(inverse_frequencies(rope, dims)[0][pair])
    return frequency


def ref_rotate(x, position: int, c: ModelConfig, window: int):
    if c.positions != "rope":
        return x
    out, half = x.copy(), c.rotary_dim // 2
    length = 0.1 * math.log(c.rope.factor) + 1 if c.rope.scaling == "yarn" else 1.0
    for i in range(half):
        angle = position * ref_frequency(i, c, window)
        out[i] = length * (x[i] * math.cos(angle) - x[half + i] * math.sin(angle))
        out[half + i] = length * (x[half + i] * math.cos(angle) + x[i] * math.sin(angle))
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


def ref_moe(x, p, c: ModelConfig):
    logits, m = p["router"]["kernel"].T @ x, c.moe
    scores = np.exp(logits) / np.exp(logits).sum() if m.router == "softmax" else 1 / (1 + np.exp(-logits))
    choice = scores + p["router"].get("bias", 0)
    if m.num_groups > 1:
        rank = np.argsort([-np.sort(group)[-2:].sum() for group in choice.reshape(m.num_groups, -1)])
        choice.reshape(m.num_groups, -1)[rank[m.groups_per_token :]] = -np.inf
    chosen = np.argsort(-choice)[: m.experts_per_token]
    weights = scores[chosen] / (scores[chosen].sum() if m.normalize_weights else 1) * m.routed_scale
    out = ref_mlp(x, p["shared_experts"], c) if m.num_shared_experts else 0
    for expert, weight in zip(chosen, weights, strict=True):
        out = out + weight * ref_mlp(x, {name: w[expert] for name, w in p["experts"].items()}, c)
    return out


def ref_latent_projections(x, p, c: ModelConfig):
    """Queries, keys and values of all heads before rotation; what rotates comes first, as `ref_rotate` has it."""
    m = c.mla
    narrow = ref_norm(p["query_down"].T @ x, {"scale": p["query_norm"]}, c) if m.q_lora_rank else x
    query = np.einsum("r,rhk->hk", narrow, p["query"])
    down = p["kv_down"].T @ x
    latent = ref_norm(down[: m.kv_lora_rank], {"scale": p["kv_norm"]}, c)
    shared = np.tile(down[m.kv_lora_rank :], (c.num_heads, 1))
    key = np.concatenate([shared, np.einsum("c,chk->hk", latent, p["key"])], axis=1)
    query = np.concatenate([query[:, m.qk_nope_head_dim :], query[:, : m.qk_nope_head_dim]], axis=1)
    return query, key, np.einsum("c,chk->hk", latent, p["value"])


def ref_latent_scale(c: ModelConfig) -> float:
    """DeepSeek-V3: (0.1 ln(factor) + 1)^2 / sqrt(head dimensions); its rotation has no factor, so `ref_rotate`'s is undone."""
    return (0.1 * math.log(c.rope.factor) + 1) ** 2 / math.sqrt(c.mla.qk_nope_head_dim + c.mla.qk_rope_head_dim)


def project(x, p, c: ModelConfig, name: str):
    out = np.einsum("d,dhk->hk", x, p[name]) + p.get(name + "_bias", 0)
    if c.qk_norm != "none" and name != "value":
        scale = p[name + "_norm"] + (1.0 if c.norm_zero_centered else 0.0)
        axis = -1 if c.qk_norm == "head" else None
        out = out / np.sqrt((out * out).mean(axis=axis, keepdims=True) + c.norm_eps) * scale
    return out


def ref_attention(xs, p, c: ModelConfig, positions, segments, window: int):
    if c.mla:
        temperature, scale = 0.1 * math.log(c.rope.factor) + 1, ref_latent_scale(c)
        of_tokens = [ref_latent_projections(x, p, c) for x in xs]
        queries, keys, values = zip(*of_tokens, strict=True)

        def rotate(x, position):
            rotated = ref_rotate(x[: c.mla.qk_rope_head_dim], position, c, window) / temperature
            return np.concatenate([rotated, x[c.mla.qk_rope_head_dim :]])

    else:
        scale = c.attention_scale or c.head_dim**-0.5
        queries, keys, values = ([project(x, p, c, name) for x in xs] for name in ("query", "key", "value"))

        def rotate(x, position):
            return ref_rotate(x, position, c, window)

    outs = []
    for t in range(len(xs)):
        out = np.asarray(p.get("out_bias", np.zeros(c.d_model)), np.float64).copy()
        for head in range(c.num_heads):
            kv_head = head // (c.num_heads // c.num_kv_heads)
            q = rotate(queries[t][head], positions[t])
            seen, scores = [], []
            if segments[t] == 0:  # padding sees nothing
                continue
            for s in range(len(xs)):
                back = positions[t] - positions[s]
                if segments[s] == segments[t] and back >= 0 and (window == 0 or back < window):
                    score = q @ rotate(keys[s][kv_head], positions[s]) * scale
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
        rotates = c.rope_pattern[layer % len(c.rope_pattern)]
        kind = c if rotates else dataclasses.replace(c, positions="none", rope_pattern=(True,))
        attend = functools.partial(
            ref_attention, p=p["attention"], c=kind, positions=positions, segments=segments, window=window
        )
        if c.parallel_block:
            normed = [ref_norm(x, p["attention_norm"], c) for x in xs]
            mlp = [ref_moe(n, p, c) if "experts" in p else ref_mlp(n, p["mlp"], c) for n in normed]
            xs = [x + a + m for x, a, m in zip(xs, attend(normed), mlp, strict=True)]
            continue
        before, after = c.norm_placement in ("pre", "sandwich"), c.norm_placement in ("post", "sandwich")
        out = attend([ref_norm(x, p["attention_norm"], c) if before else x for x in xs])
        xs = [x + (ref_norm(o, p["attention_out_norm"], c) if after else o) for x, o in zip(xs, out, strict=True)]
        normed = [ref_norm(x, p["mlp_norm"], c) if before else x for x in xs]
        out = [ref_moe(x, p, c) if "experts" in p else ref_mlp(x, p["mlp"], c) for x in normed]
        xs = [x + (ref_norm(o, p["mlp_out_norm"], c) if after else o) for x, o in zip(xs, out, strict=True)]
    head = params["embedding"].T if c.tie_embeddings else params["head"]
    logits = np.array([ref_norm(x, params["final_norm"], c) @ head + params.get("head_bias", 0) for x in xs])
    return c.logit_soft_cap * np.tanh(logits / c.logit_soft_cap) if c.logit_soft_cap else logits


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, config, tokens, positions, segments=None):
    return unembed(params, config, forward(params, config, tokens, positions, segments)[0])


OTHERS = {
    "relu2, no positions": dataclasses.replace(SMALL, positions="none", mlp="relu2", mlp_bias=True),
    "swiglu with every bias, yarn": dataclasses.replace(
        SMALL,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        head_bias=True,
        head_dim=16,
        rope=RopeConfig(scaling="yarn", factor=4.0, original_max_len=64, fraction=0.5),
    ),
    "full norm of queries and keys, zero-centred, grouped": dataclasses.replace(SMALL, qk_norm="full", norm_zero_centered=True),
    "experts beside attention": dataclasses.replace(
        SMALL, parallel_block=True, moe=MoeConfig(num_experts=4, experts_per_token=2, d_ff=16, num_shared_experts=2)
    ),
    "latent attention with queries of full rank, windowed": dataclasses.replace(
        SMALL,
        num_kv_heads=4,
        window_pattern=(4, 0),
        rope=RopeConfig(local_theta=50.0),
        head_dim=0,
        mla=MlaConfig(q_lora_rank=0, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=6, v_head_dim=5),
    ),
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
        real = segments[row] > 0  # what becomes of padding is nobody's business
        np.testing.assert_allclose(logits[row][real], expected[real], rtol=1e-4, atol=1e-4)


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
    "yarn, of fewer positions than turns": (
        RopeConfig(theta=10.0, scaling="yarn", factor=4.0, original_max_len=4), 16, 1.138629436,
        [1.0, 0.7498942, 0.5623413, 0.4216965, 0.3162278, 0.2371374, 0.1778279, 0.1333521]),
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


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2"])
def test_bfloat16_is_close_to_float32_and_keeps_its_types(name):
    config = preset(name, vocab_size=48)
    low = dataclasses.replace(config, dtype="bfloat16")
    params, (tokens, positions, segments) = random_params(config), packed_rows(48)
    hidden = jax.eval_shape(lambda: forward(params, low, tokens, positions, segments)[0])
    assert hidden.dtype == jnp.bfloat16
    expected = np.asarray(logits_of(params, config, tokens, positions, segments))
    actual = logits_of(params, low, tokens, positions, segments)
    assert actual.dtype == jnp.float32
    error = np.abs(np.asarray(actual) - expected)
    # bfloat16 has 8 bits: far from float32's 1e-6, yet errors stay a few of its roundings
    assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.03 * expected.std()


# --- decoding ---


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-gemma3", "tiny-smollm3", "tiny-phi", "tiny-mixtral", "tiny-deepseek"])
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
        hidden, cache, _ = forward(params, config, tokens, positions, cache=cache)
        return unembed(params, config, hidden), cache

    prompt = tokens[:, :prompt_len].copy()
    padding = np.arange(prompt_len) >= lengths[:, None]
    prompt[padding] = 0
    # Padding is written nowhere: its position is negative. Pages lie in the pool in no order, one of them is nobody's.
    prompt_positions = np.where(padding, -1, positions[:, :prompt_len])
    table = np.random.default_rng(3).permutation(rows * 5 + 1).astype(np.int32)
    spare, table = table[-1], table[:-1].reshape(rows, 5)
    logits, cache = step(prompt, prompt_positions, KVCache(empty_pages(config, rows * 5 + 1, 4), table))
    for row in range(rows):
        np.testing.assert_allclose(logits[row, : lengths[row]], expected[row, : lengths[row]], atol=2e-4)
        slots = np.asarray(cache.pages[0][0])[table[row]].swapaxes(1, 2).reshape(max_len, -1)
        assert slots[: lengths[row]].any(axis=1).all()
        assert not slots[lengths[row] :].any()
    assert not np.asarray(cache.pages[0][0])[spare].any()
    for i in range(max_len - prompt_len):
        at = lengths + i
        logits, cache = step(tokens[np.arange(rows), at][:, None], at[:, None].astype(np.int32), cache)
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(rows), at], atol=2e-4)


def a_cache(config):
    return KVCache(empty_pages(config, 1, 4), np.zeros((1, 1), np.int32))


def test_cache_refuses_scan_and_segments():
    config = dataclasses.replace(SMALL, scan_layers=True)
    tokens = positions = np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="unstack_layers"):
        forward(random_params(config), config, tokens, positions, cache=a_cache(config))
    with pytest.raises(ValueError, match="no segment_ids"):
        forward(random_params(SMALL), SMALL, tokens, positions, tokens, cache=a_cache(SMALL))


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
        ({"head_dim": 5}, r"rotates pairs, but head_dim=5 x rope\.fraction=1\.0 is 5"),
        ({"head_dim": 12, "rope": RopeConfig(fraction=0.25)}, r"head_dim=12 x rope\.fraction=0\.25"),
        ({"head_dim": 4, "rope": RopeConfig(fraction=0.1)}, r"head_dim=4 x rope\.fraction=0\.1"),
        ({"window_pattern": ()}, r"window_pattern=\(\)"),
        ({"window_pattern": (4, -1)}, r"window_pattern=\(4, -1\) must hold window sizes >= 0"),
        ({"parallel_block": True, "norm_placement": "sandwich"}, r"parallel_block needs model\.norm_placement='pre'"),
        ({"norm_bias": True}, r"norm_bias needs model\.norm='layernorm'"),
        ({"attention_soft_cap": -1.0}, r"attention_soft_cap=-1\.0"),
        ({"logit_soft_cap": -1.0}, r"logit_soft_cap=-1\.0"),
        ({"norm": "batchnorm"}, r"model\.norm='batchnorm'.*layernorm, rmsnorm"),
        ({"rope_pattern": (False, False)}, r"model\.rope_pattern=\(False, False\).*needs one that does"),
        ({"rope_pattern": ()}, r"model\.rope_pattern=\(\)"),
        ({"rope_pattern": (True, False), "positions": "none"}, r"model\.positions='none' to be 'rope'"),
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
