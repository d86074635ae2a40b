"""What gradients show: the other forms of the network (scan, remat) agree with it, and no token sees what it must not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import attention
from model.config import ModelConfig, RopeConfig
from model.params import unstack_layers
from model.presets import preset
from model.transformer import forward, unembed
from tests.networks import SMALL, packed_rows, random_params


def weighted_sum(params, config, tokens, positions, segments):
    """A scalar whose gradient reaches every parameter."""
    logits = unembed(params, config, forward(params, config, tokens, positions, segments)[0])
    return jnp.mean(logits * jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape))


hidden_of = jax.jit(lambda params, config, *batch: forward(params, config, *batch)[0], static_argnums=1)
value_and_grad = functools.partial(jax.jit, static_argnums=1)(jax.value_and_grad(weighted_sum))


def assert_trees_close(actual, expected, rtol, atol):
    def close(path, a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, actual, expected)


def test_gradients_in_bfloat16_are_sums_in_float32():
    """A parameter that every token reads gets thousands of terms; a sum in bfloat16 stands still after some 256 like ones."""
    config = dataclasses.replace(
        SMALL,
        positions="learned",
        max_seq_len=256,
        window_pattern=(0,),
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(64, 256), dtype=np.int32)
    tokens[:, ::2] = 7
    positions = np.broadcast_to(np.arange(256, dtype=np.int32), tokens.shape)
    segments = np.ones_like(tokens)
    narrow = dataclasses.replace(config, dtype="bfloat16")

    def mean_square(params, config):
        return jnp.mean(jnp.square(forward(params, config, tokens, positions, segments)[0].astype(jnp.float32) - 0.5))

    gradient = jax.jit(jax.grad(mean_square), static_argnums=1)
    expected, actual = gradient(params, config), gradient(params, narrow)
    errors = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), actual, expected)
    for path, error in jax.tree_util.tree_leaves_with_path(errors):
        name = jax.tree_util.keystr(path)
        # Softmax does not feel the one, the objective does not read the other.
        without_gradient = "key_bias" in name or name == "['head']"
        assert without_gradient or error < 0.03, (name, error)


SCANNED = dataclasses.replace(SMALL, scan_layers=True, rope=RopeConfig(local_theta=50.0))


def test_scan_equals_loop():
    """Two repetitions of a local and a global layer, and a local one that is left over."""
    config = dataclasses.replace(SCANNED, num_layers=5, window_pattern=(4, 0))
    batch = packed_rows(48)
    params = random_params(config)
    loop_params, loop_config = unstack_layers(params, config)
    assert not loop_config.scan_layers
    value, gradient = value_and_grad(params, config, *batch)
    loop_value, loop_gradient = value_and_grad(loop_params, loop_config, *batch)
    np.testing.assert_allclose(value, loop_value, rtol=1e-6)
    assert_trees_close(unstack_layers(gradient, config)[0], loop_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("num_layers", "windows", "rotations"),
    [(2, (4, 4, 0), (True,)), (4, (4, 4, 0), (True,)), (8, (4, 0), (False, True, True))],
    ids=["no whole period", "local layer left", "two patterns"],
)
def test_scan_takes_the_window_and_the_rotation_of_every_layer(num_layers, windows, rotations):
    config = dataclasses.replace(SCANNED, num_layers=num_layers, window_pattern=windows, rope_pattern=rotations)
    params = random_params(config)
    loop_params, loop_config = unstack_layers(params, config)
    loss = jax.jit(weighted_sum, static_argnums=1)
    np.testing.assert_allclose(
        loss(params, config, *packed_rows(48)), loss(loop_params, loop_config, *packed_rows(48)), rtol=1e-6
    )


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


REMAT = ("none", "dots", "attention", "full")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_computes_again_what_its_policy_says(scan_layers):
    """`dots` keeps the products with weights and takes attention again; `full` takes both again."""
    params = random_params(dataclasses.replace(SMALL, scan_layers=scan_layers))
    matmuls, attention_dots = {}, {}
    for policy in REMAT:
        config = dataclasses.replace(SMALL, scan_layers=scan_layers, remat=policy)
        jaxpr = jax.make_jaxpr(jax.grad(weighted_sum), static_argnums=1)(params, config, *packed_rows(48)).jaxpr
        matmuls[policy], attention_dots[policy] = count_dots(jaxpr, batched=False), count_dots(jaxpr, batched=True)
    assert matmuls["none"] == matmuls["dots"] < matmuls["attention"] < matmuls["full"]
    assert attention_dots["none"] < attention_dots["dots"] == attention_dots["full"]


def test_remat_saves_memory_and_changes_no_value():
    params = random_params(dataclasses.replace(SMALL, scan_layers=True))
    # tokens enough that activations, not parameters, are what memory holds
    batch = [np.tile(x, (1, 16)) for x in packed_rows(48)]
    values, gradients, temporary_bytes = {}, {}, {}
    for policy in REMAT:
        config = dataclasses.replace(SMALL, scan_layers=True, remat=policy)
        compiled = value_and_grad.lower(params, config, *batch).compile()
        temporary_bytes[policy] = compiled.memory_analysis().temp_size_in_bytes
        values[policy], gradients[policy] = compiled(params, *batch)
    for policy in REMAT[1:]:
        np.testing.assert_allclose(values[policy], values["none"], rtol=1e-6)
        assert_trees_close(gradients[policy], gradients["none"], rtol=1e-5, atol=2e-6)
    assert temporary_bytes["none"] > 1.5 * temporary_bytes["dots"]
    assert temporary_bytes["dots"] > temporary_bytes["full"]


# --- what a token can see ---


def influence(config: ModelConfig, positions, segments) -> np.ndarray:
    """[T, T]: absolute derivative of the hidden state at t by the embedding of token s; each token of the row is unlike."""
    T = len(positions)
    config = dataclasses.replace(config, vocab_size=T)
    params = random_params(config)

    def hidden(embedding):
        out, _, _ = forward({**params, "embedding": embedding}, config, jnp.arange(T)[None], positions[None], segments[None])
        return jnp.sum(jnp.sin(out[0]), axis=-1)

    return np.abs(jax.jit(jax.jacrev(hidden))(params["embedding"])).sum(axis=-1)


def reachable(config: ModelConfig, positions, segments) -> np.ndarray:
    """The same, from the rules alone: token s reaches t through a chain of layers that each may look back."""
    T = len(positions)
    reach = np.eye(T, dtype=bool)
    for layer in range(config.num_layers):
        window = config.window_pattern[layer % len(config.window_pattern)] or T
        sees = np.array(
            [[segments[s] == segments[t] > 0 and 0 <= positions[t] - positions[s] < window for s in range(T)] for t in range(T)]
        )
        reach = sees @ reach | reach  # past attention, every token keeps itself
    return reach


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny-gpt2", {}),
        ("tiny-olmo2", {"scan_layers": True, "remat": "dots"}),
        ("tiny-gemma3", {"window_pattern": (3, 3, 2)}),
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
    ones = np.ones((2, 16), np.int32)
    np.testing.assert_array_equal(
        hidden_of(params, config, tokens, positions, None), hidden_of(params, config, tokens, positions, ones)
    )


def test_padding_is_finite_and_changes_nothing():
    """A row of nothing but padding makes no NaN forward or backward, and what padding holds reaches no document."""
    config = preset("tiny-gemma2", vocab_size=48, num_layers=2)
    params, batch = random_params(config), packed_rows(48)
    tokens, positions, segments = (np.concatenate([x, np.zeros((1, 16), np.int32)]) for x in batch)
    padded = hidden_of(params, config, tokens, positions, segments)
    np.testing.assert_allclose(padded[:2], hidden_of(params, config, *batch), atol=1e-5)
    value, gradient = value_and_grad(params, config, tokens, positions, segments)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((padded, value, gradient)))
    tokens[0, 14:] = (tokens[0, 14:] + 1) % 48
    changed = np.asarray(hidden_of(params, config, tokens, positions, segments))
    assert (changed[0, 14:] != padded[0, 14:]).any()
    np.testing.assert_array_equal(changed[segments > 0], np.asarray(padded)[segments > 0])


def test_a_query_with_no_allowed_key_gets_zero_and_finite_gradients():
    shape = (1, 2, 1, 4)
    allowed = jnp.array([[[False, False], [True, True]]])

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, allowed, scale=1.0) ** 2)

    q, k, v = jax.random.normal(jax.random.key(0), (3, *shape))
    out = attention(q, k, v, allowed, scale=1.0)
    np.testing.assert_array_equal(out[0, 0], 0.0)
    assert all(np.isfinite(g).all() for g in jax.grad(total, argnums=(0, 1, 2))(q, k, v))
