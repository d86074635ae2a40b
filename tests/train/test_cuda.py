"""The sharded training step lowers for NVIDIA GPUs here; nothing runs on one."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import train.step
from model.presets import preset
from model.sharding import MESH_AXES
from tests.train.test_step import CONFIG
from train.config import MeshConfig
from train.step import abstract_batch, make_trainer

# jax.export refuses what XLA may change from version to version: the experts' all-to-all, and `jax.lax.empty`.
MAY_CHANGE = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("ragged_all_to_all", "AllocateBuffer")]


@pytest.fixture
def make(monkeypatch):
    """(trainer, the arguments of its step) of a model for a mesh. CPU devices stand in for GPUs."""

    def make(model, **mesh):
        monkeypatch.setattr(train.step, "check_backend", lambda *_: None)
        config = dataclasses.replace(CONFIG, model=model, mesh=MeshConfig(**mesh))
        trainer = make_trainer(config, jax.devices()[: math.prod(mesh.values())])
        return trainer, (trainer.abstract_state, abstract_batch(config))

    return make


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("tiny-llama", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("tiny-mixtral", {"data": 2, "fsdp": 2, "expert": 2}),
        ("tiny-deepseek", {"data": 1, "expert": 2, "context": 2, "tensor": 2}),
    ],
    ids=["dense", "experts", "latent-attention"],
)
def test_a_sharded_step_is_exported_for_cuda(make, name, mesh):
    trainer, arguments = make(preset(name, scan_layers=True, dtype="bfloat16"), **mesh)
    exported = jax.export.export(trainer.step, platforms=["cuda"], disabled_checks=MAY_CHANGE)(*arguments)
    assert exported.platforms == ("cuda",)
    assert exported.nr_devices == 8
    program = exported.mlir_module()
    # To the experts and back, forward and backward, between the devices along `expert` and no others.
    groups = re.findall(r"custom_call @ragged_all_to_all.*?replica_groups = dense<(\[\[.*?\]\])>", program)
    along = np.moveaxis(trainer.mesh.device_ids, MESH_AXES.index("expert"), -1).reshape(-1, 2).tolist()
    assert groups == [str(along)] * (4 if "expert" in mesh else 0)
    assert ("chlo.ragged_dot" in program) == ("expert" in mesh)
    assert ("stablehlo.collective_permute" in program) == ("context" in mesh)


def test_attention_lowers_to_the_kernels_of_cudnn(make, monkeypatch):
    """jax asks cuDNN for its version when it lowers: it is said to be there. jax.export cannot keep this call's partitioner."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    model = dataclasses.replace(CONFIG.model, attention_backend="cudnn", dtype="bfloat16", head_dim=64)
    trainer, arguments = make(model, data=1)
    text = trainer.step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"} <= set(re.findall(r"__cudnn\$\w+", text))
    trainer, arguments = make(model, data=2, fsdp=2, tensor=2)
    lowered = trainer.step.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("CustomSPMDPartitioning")
