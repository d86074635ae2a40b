"""The sharded training step lowers for NVIDIA GPUs here; nothing runs on one."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import train.step
from tests.train.test_step import CONFIG
from train.config import MeshConfig
from train.step import make_trainer


@pytest.fixture
def training_step(monkeypatch):
    """(step, its arguments) for an attention backend and a mesh. CPU devices stand in for GPUs."""

    def make(backend, **mesh):
        monkeypatch.setattr(train.step, "check_backend", lambda *_: None)
        model = dataclasses.replace(CONFIG.model, attention_backend=backend, dtype="bfloat16", head_dim=64)
        config = dataclasses.replace(CONFIG, model=model, mesh=MeshConfig(**mesh))
        trainer = make_trainer(config, jax.devices()[: math.prod(mesh.values())])
        dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"weights": jnp.float32}
        shape = (config.batch_size, config.data.seq_len)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=trainer.batch_sharding) for name, dtype in dtypes.items()}
        return trainer.step, (trainer.abstract_state, batch)

    return make


def test_a_sharded_step_is_exported_for_cuda(training_step):
    step, arguments = training_step("xla", data=2, fsdp=2, tensor=2)
    exported = jax.export.export(step, platforms=["cuda"])(*arguments)
    assert exported.platforms == ("cuda",)
    assert exported.nr_devices == 8


def test_attention_lowers_to_the_kernels_of_cudnn(training_step, monkeypatch):
    """jax asks cuDNN for its version when it lowers: it is said to be there. jax.export cannot keep this call's partitioner."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    step, arguments = training_step("cudnn", data=1)
    text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"} <= set(re.findall(r"__cudnn\$\w+", text))
    sharded, arguments = training_step("cudnn", data=2, fsdp=2, tensor=2)
    assert sharded.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text().count("CustomSPMDPartitioning")
