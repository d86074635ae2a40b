"""How a ring deals out the tokens of a row, against counts of every pair; what it computes is in tests/train/test_mesh.py."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import attention, make_pattern
from model.ring_attention import zigzag
from model.sharding import MESH_AXES, TRAIN_RULES, Layout, make_mesh

RINGS = [(16, 1), (16, 2), (24, 3), (64, 4), (64, 8)]


@pytest.mark.parametrize(("length", "devices"), RINGS)
def test_each_device_holds_a_part_from_the_front_and_its_counterpart_from_the_back(length, devices):
    order = zigzag(length, devices)
    assert sorted(order) == list(range(length))
    width = length // (2 * devices)
    for i, held in enumerate(np.split(order, devices)):
        np.testing.assert_array_equal(held[:width], np.arange(i * width, (i + 1) * width))
        np.testing.assert_array_equal(held[width:], np.arange(length - (i + 1) * width, length - i * width))


@pytest.mark.parametrize(("length", "devices"), RINGS)
def test_at_every_step_of_the_ring_all_devices_meet_as_many_pairs_of_a_causal_document(length, devices):
    dealt = np.split(zigzag(length, devices), devices)
    steps = [
        [np.sum(queries[:, None] >= dealt[(here - step) % devices]) for here, queries in enumerate(dealt)]
        for step in range(devices)
    ]
    assert all(len(set(pairs)) == 1 for pairs in steps), steps
    assert np.sum(steps) == length * (length + 1) // 2


def count_permutes(jaxpr):
    """Arrays that are sent on, those of a loop as often as it runs."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "ppermute"
        inner = sum(map(count_permutes, jax.extend.core.jaxprs_in_params(equation.params)))
        count += inner * equation.params.get("length", 1)
    return count


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_nothing_travels_that_nobody_needs(devices):
    """Keys and values, in either pass, to all but the device that they come from; their gradients all the way round."""
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1) | {"context": devices}, jax.devices()[:devices])
    layout = Layout.of(mesh, TRAIN_RULES)
    ids = jnp.ones((1, 32), jnp.int32)

    def loss(q, k, v):
        pattern = make_pattern(ids, ids, ids, ids, window=0, backend="reference", layout=layout)
        return jnp.sum(attention(q, k, v, pattern, scale=1.0, layout=layout))

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*[jnp.ones((1, 32, 2, 4))] * 3)
    assert count_permutes(jaxpr.jaxpr) == 2 * (2 * (devices - 1) + devices)
