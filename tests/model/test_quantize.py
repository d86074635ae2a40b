"""Rounded weights: how far they are off, that the network computes with just them, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from inference.engine import Engine
from inference.request import Request
from inference.score import score
from model.params import path_name
from model.presets import preset
from model.quantize import INT4_GROUP, Quantized, quantize, quantized
from model.transformer import forward, unembed
from tests.inference.engine_reference import ROOMY
from tests.networks import SMALL, random_params


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "inputs"), [((64, 3, 5), 1), ((4, 16, 7), 2)])
def test_every_weight_is_within_half_a_step_and_products_are_those_of_the_rounded(bits, shape, inputs):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w.reshape(64, -1)[:, 2] = 0.0
    q = quantized(jax.numpy.asarray(w), inputs, bits)
    back = np.asarray(q.dequantized()).reshape(shape)
    assert q.values.dtype == ("int8" if bits == 8 else "int4")
    group = 64 if bits == 8 else INT4_GROUP
    steps = np.abs(w.reshape(64 // group, group, -1)).max(axis=1, keepdims=True) / (127 if bits == 8 else 7)
    off = np.abs(back - w).reshape(64 // group, group, -1)
    assert np.all(off <= steps * 0.5001)
    assert off.max() > 0.4 * steps.max()
    x = np.random.default_rng(1).normal(size=(2, 3, 64)).astype(np.float32)
    expected = np.tensordot(x.astype(np.float64), back.reshape(64, -1).astype(np.float64), 1)
    np.testing.assert_allclose(np.asarray(q.dot(x)).reshape(2, 3, -1), expected, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_products_with_bfloat16_are_those_of_the_rounded_weights_for_any_number_of_rows(bits, rows):
    rng = np.random.default_rng(3)
    q = quantized(jax.numpy.asarray(rng.normal(size=(256, 96)), np.float32), 1, bits)
    x = jax.numpy.asarray(rng.normal(size=(rows, 256)), "bfloat16")
    expected = np.asarray(x, np.float64) @ np.asarray(q.dequantized(), np.float64)
    np.testing.assert_allclose(jax.jit(lambda q, x: q.dot(x))(q, x), expected, atol=1e-4)


NETWORK = dataclasses.replace(SMALL, d_model=32, num_heads=4, d_ff=64, head_dim=8, tie_embeddings=True)


def dequantized(params, heads):
    """The same weights as plain arrays."""
    blocks = []
    for layer in params["blocks"]:
        parts = {name: dict(layer[name]) for name in ("attention", "mlp", "shared_experts") if name in layer}
        for part in parts.values():
            for name, leaf in part.items():
                part[name] = leaf.dequantized() if hasattr(leaf, "dequantized") else leaf
        out = parts["attention"]["out"]
        parts["attention"]["out"] = out.reshape(heads, -1, out.shape[-1])
        blocks.append(layer | parts)
    return params | {"blocks": tuple(blocks), "head": params["head"].dequantized()}


def names_of_rounded(params):
    """Of the matrices of the last layer."""
    paths = jax.tree_util.tree_leaves_with_path(params["blocks"][-1], is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return {path_name(path) for path, leaf in paths if isinstance(leaf, Quantized)}


DENSE = {f"attention/{name}" for name in ("query", "key", "value", "out")} | {f"mlp/{name}" for name in ("up", "gate", "down")}
DEEPSEEK = {"attention/query", "attention/out"} | {f"shared_experts/{name}" for name in ("up", "gate", "down")}


@pytest.mark.parametrize(
    ("network", "bits", "rounded"),
    [
        pytest.param(NETWORK, 8, DENSE, id="int8"),
        pytest.param(NETWORK, 4, DENSE, id="int4"),
        pytest.param(preset("tiny-deepseek"), 8, DEEPSEEK, id="latent-attention-and-experts", marks=pytest.mark.slow),
    ],
)
def test_a_network_computes_with_just_its_rounded_weights(network, bits, rounded):
    network = dataclasses.replace(network, vocab_size=48)
    params, config = quantize(random_params(network), network, bits)
    assert not config.tie_embeddings
    assert names_of_rounded(params) == rounded
    tokens = np.random.default_rng(2).integers(0, 48, (2, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)

    def logits(params):
        return unembed(params, config, forward(params, config, tokens, positions)[0])

    plain = dequantized(params, network.num_heads)
    np.testing.assert_allclose(logits(params), logits(plain), atol=1e-4)
    rows = tokens.tolist()
    for (i, found), (j, expected) in zip(score(params, config, rows), score(plain, config, rows), strict=True):
        assert i == j
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    request = Request(rows[0], max_tokens=6, seed=1)
    tokens = [[t.token for t in Engine(p, config, ROOMY).generate([request])[0][0]] for p in (params, plain)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("model", "bits", "message"),
    [
        (dataclasses.replace(NETWORK, scan_layers=True), 8, "model.scan_layers"),
        (NETWORK, 3, "weights of 3 bits"),
        (SMALL, 4, "16 inputs do not part into groups of 32"),
    ],
)
def test_what_cannot_be_rounded_is_refused(model, bits, message):
    with pytest.raises(ValueError, match=message):
        quantize(random_params(model), model, bits)
