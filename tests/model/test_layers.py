"""The form that the gated MLP takes on TPUs, against the plain one."""

import dataclasses

import jax
import numpy as np
import pytest

from model import layers
from model.config import ModelConfig
from model.sharding import MESH_AXES, TRAIN_RULES, Layout, make_mesh
from tests.networks import SMALL
from tests.train.test_step import assert_close


class OnTpu(Layout):
    """A layout of this CPU's devices that says they are TPUs."""

    def sharding(self, *axes):
        return Layout.of(self.mesh.real, self.rules).sharding(*axes)


class Mesh:
    def __init__(self, real):
        self.real, self.shape = real, real.shape
        self.devices = np.array([type("Device", (), {"platform": "tpu"})])


@pytest.mark.parametrize("mlp", ["swiglu", "geglu"])
def test_the_gated_mlp_of_tpus_is_the_same_function(mlp):
    config: ModelConfig = dataclasses.replace(SMALL, mlp=mlp)
    rng = np.random.default_rng(0)
    D, F = config.d_model, config.d_ff
    params = {"up": rng.standard_normal((D, F)), "gate": rng.standard_normal((D, F)), "down": rng.standard_normal((F, D))}
    x, d_out = rng.standard_normal((2, 3, 8, D))
    real = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])

    def value_and_gradients(layout):
        out, pull = jax.vjp(jax.jit(lambda params, x: layers.mlp_block(x, params, config, layout)), params, x)
        return out, pull(d_out)

    with jax.enable_x64(True):
        layout = OnTpu(Mesh(real), Layout.of(real, TRAIN_RULES).rules)
        text = jax.jit(lambda params, x: layers.mlp_block(x, params, config, layout)).lower(params, x).as_text()
        assert "optimization_barrier" in text
        assert_close(value_and_gradients(layout), value_and_gradients(None), 1e-12)
