"""Generations, slices and links; and that libtpu agrees."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from model.chips import CHIPS, Topology, shapes, topology_of


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v4:2x2x1", 4), ("v5e:16x16", 256), ("v5p:8x8x8", 512), ("v5p:4x4x8", 128), ("v6e:8x8", 64), ("tpu7x:4x4x4", 128)],
)
def test_a_slice_has_its_devices(name, devices):
    topology = topology_of(name)
    assert topology.name == name
    assert topology.num_devices == devices
    assert topology.chip is CHIPS[name.split(":")[0]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p:8x4x4", "does not exist.*The nearest is v5p:4x4x8$"),
        ("v5p:4x4x6", "The nearest is v5p:4x4x8$"),
        ("v5e:16x32", "1x1, 2x2, 2x4, .*up to 256 chips. The nearest is v5e:16x16$"),
        ("v6e:4x4x4", "The nearest is v6e:8x8$"),
        ("v5p:2x2", "The nearest is v5p:2x2x1$"),
        ("tpu7:4x4x4", "'tpu7' is no TPU generation.*Did you mean tpu7x:4x4x4"),
        ("v5p-256", "no TPU generation"),
        ("v5p:", "not of the form GENERATION:SIZES"),
        ("v5e", "not of the form"),
        ("v5litepod:4x4", "there are v4, v5e, v5p, v6e, tpu7x"),
        ("v5p:4x0x4", "not of the form"),
    ],
)
def test_a_slice_that_does_not_exist_is_answered_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        topology_of(name)


def test_shapes_of_cubes_are_all_that_fit():
    for generation, cubes in (("v4", 64), ("v5p", 96), ("tpu7x", 144)):
        every = range(1, cubes + 1)
        fit = {(4 * x, 4 * y, 4 * z) for x in every for y in every[x - 1 :] for z in every[y - 1 : cubes // (x * y)]}
        assert {shape for shape in shapes(CHIPS[generation]) if shape[2] % 4 == 0 and shape[0] > 2} == fit
        assert len(shapes(CHIPS[generation])) == len(set(shapes(CHIPS[generation])))


def test_the_clock_is_the_one_that_is_quoted():
    """1.05, 1.5 and 1.75 GHz; that of tpu7x only follows from its peak."""
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


@pytest.mark.parametrize(
    ("name", "two_way"), [("v4", 600e9), ("v5e", 400e9), ("v5p", 1200e9), ("v6e", 800e9), ("tpu7x", 1200e9)]
)
def test_links_add_up_to_the_documented_bandwidth_of_a_chip(name, two_way):
    chip = CHIPS[name]
    assert 2 * 2 * chip.torus * chip.link_bandwidth * chip.devices_per_chip == two_way


def test_rings_close_where_the_torus_does():
    assert topology_of("v5e:16x16").wraps == (True, True)
    assert topology_of("v5e:8x16").wraps == (False, True)
    assert topology_of("v5p:4x4x8").wraps == (True, True, True)
    assert topology_of("v5p:2x4x4").wraps == (False, False, False)
    pod = topology_of("v5p:4x4x8")
    assert pod.rings([(0, 0, k) for k in range(8)]) == [(8, 2)]
    assert pod.rings([(0, 0, k) for k in range(4)]) == [(4, 1)]
    assert pod.rings([(i, j, 3) for i in range(4) for j in range(4)]) == [(4, 2), (4, 2)]
    assert pod.rings([(1, 2, 3), (1, 2, 3)]) == []


ASK = """
import json, re
import jax
from jax.experimental import topologies
from model.chips import CHIPS, topology_of
from jax.sharding import Mesh, NamedSharding, PartitionSpec

said = {}
for name in %s:
    topology = topology_of(name)
    extra = {"chip_config_name": topology.chip.configuration} if topology.chip.configuration else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices
    here = NamedSharding(Mesh(devices[:1], ("one",)), PartitionSpec())
    far_too_large = jax.ShapeDtypeStruct((1 << 20, 1 << 20), "bfloat16", sharding=here)
    try:
        jax.jit(lambda x: x.T * 2).lower(far_too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        gib = float(re.findall(r"([0-9.]+)G", str(error))[-1])
    said[name] = (len(devices), gib, len({d.coords[0] for d in devices}))
print(json.dumps(said))
"""
SMALLEST = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def test_libtpu_has_as_many_devices_and_as_much_memory():
    if importlib.util.find_spec("libtpu") is None:
        if os.environ.get("LOAM_REQUIRE_LIBTPU"):
            pytest.fail("libtpu is not installed: `make env EXTRAS=tpu` installs it")
        pytest.skip("libtpu, the TPU compiler, is not installed")
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    done = subprocess.run([sys.executable, "-c", ASK % SMALLEST], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (devices, gib, sides) in json.loads(done.stdout.splitlines()[-1]).items():
        topology: Topology = topology_of(name)
        assert devices == topology.num_devices, name
        assert topology.chip.hbm_bytes == int(gib * 2**30), name
        assert sides == topology.shape[0], name
        assert devices == math.prod(topology.shape) * topology.chip.devices_per_chip
