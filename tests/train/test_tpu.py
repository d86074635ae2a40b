"""The sharded training step, compiled for TPUs by their own compiler; nothing runs on one."""

import importlib.util
import json
import textwrap
from pathlib import Path

import pytest

from tests.libtpu import require_libtpu, run_with_libtpu

COMPILE = textwrap.dedent(
    """
    import dataclasses, json, re, sys
    import jax, jax.numpy as jnp
    from jax.experimental import topologies
    from model.presets import preset
    from tests.train.test_step import CONFIG
    from train.config import MeshConfig
    from train.step import make_trainer

    mesh, remat = json.loads(sys.argv[1]), sys.argv[2]
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    model = preset("tiny-llama", attention_backend="flash", dtype="bfloat16", scan_layers=True, remat=remat, max_seq_len=512)
    data = dataclasses.replace(CONFIG.data, seq_len=512)
    config = dataclasses.replace(CONFIG, model=model, data=data, mesh=MeshConfig(**mesh))
    trainer = make_trainer(config, devices)
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"weights": jnp.float32}
    shape = (config.batch_size, 512)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=trainer.batch_sharding) for name, dtype in dtypes.items()}
    text = trainer.step.lower(trainer.abstract_state, batch).compile().as_text()
    count = lambda pattern: len(re.findall(pattern, text))
    print(json.dumps({
        "forward": count(r"= .* custom-call\\(.*flash_forward"),
        "backward": count(r"= .* custom-call\\(.*flash_backward"),
        "permutes": count(r"collective-permute-start\\("),
    }))
    """
)


@pytest.mark.parametrize(
    ("mesh", "remat", "forward", "backward"),
    [
        pytest.param({"data": 1, "fsdp": 2, "tensor": 2}, "attention", 1, 1, marks=pytest.mark.slow),
        # Each kernel three times: for a device's own keys, in the loop over the ring, and for the keys that come last. `full`
        # runs the forward one again.
        ({"data": 1, "context": 4}, "full", 6, 3),
    ],
)
def test_a_sharded_step_compiles_with_as_many_kernels_as_it_needs(mesh, remat, forward, backward):
    """Layers are scanned, so each kernel stands once in the program for all of them."""
    found = json.loads(run_with_libtpu(COMPILE, json.dumps(mesh), remat).splitlines()[-1])
    assert (found["forward"], found["backward"]) == (forward, backward)
    assert (found["permutes"] > 0) == ("context" in mesh)


def test_without_the_compiler_such_tests_are_skipped_but_in_ci_they_fail(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.delenv("LOAM_REQUIRE_LIBTPU", raising=False)
    either = (pytest.skip.Exception, pytest.fail.Exception)  # or a skip of ours, where a failure was due, would skip this test
    with pytest.raises(either, match="not installed") as skipped:
        require_libtpu()
    monkeypatch.setenv("LOAM_REQUIRE_LIBTPU", "1")
    with pytest.raises(either, match="not installed") as failed:
        require_libtpu()
    assert (skipped.type, failed.type) == either
    ci = (Path(__file__).parents[2] / ".ci/run").read_text()
    assert "export EXTRAS=tpu LOAM_REQUIRE_LIBTPU=1\n" in ci
