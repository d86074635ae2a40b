"""What the documentation and libtpu say of each generation, and along which links a group communicates."""

import json

import pytest

from experiments.launch_tpu import GENERATIONS, check_topology
from model.chips import CHIPS, chip_of, rings, wraps
from tests.libtpu import run_with_libtpu


def test_every_generation_that_can_be_launched_is_described():
    assert set(CHIPS) == set(GENERATIONS)
    assert all(name == chip.name for name, chip in CHIPS.items())
    assert chip_of("v5p:4x4x8") is CHIPS["v5p"]
    with pytest.raises(ValueError, match="no TPU generation 'v5litepod' is known, only v4, v5e, v5p, v6e, tpu7x"):
        chip_of("v5litepod:4x4")


def test_the_clock_is_the_one_that_is_quoted():
    """1.05, 1.5 and 1.75 GHz; that of tpu7x only follows from its peak."""
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


@pytest.mark.parametrize(
    ("name", "two_way"), [("v4", 600e9), ("v5e", 400e9), ("v5p", 1200e9), ("v6e", 800e9), ("tpu7x", 1200e9)]
)
def test_links_add_up_to_the_documented_bandwidth_of_a_chip(name, two_way):
    chip = CHIPS[name]
    assert 2 * 2 * chip.torus * chip.link_bandwidth * GENERATIONS[name].devices_per_chip == two_way


def test_rings_close_where_the_torus_does():
    assert wraps((16, 16)) == (True, True)
    assert wraps((8, 16)) == (False, True)
    assert wraps((4, 4, 8)) == (True, True, True)
    assert wraps((2, 4, 4)) == (False, False, False)
    pod = (4, 4, 8)
    assert rings(pod, [(0, 0, k) for k in range(8)]) == [(8, 2)]
    assert rings(pod, [(0, 0, k) for k in range(4)]) == [(4, 1)]
    assert rings(pod, [(i, j, 3) for i in range(4) for j in range(4)]) == [(4, 2), (4, 2)]
    assert rings(pod, [(1, 2, 3), (1, 2, 3)]) == []


ASK = """
import json, re
import jax
from jax.experimental import topologies
from model.chips import CHIPS
from jax.sharding import Mesh, NamedSharding, PartitionSpec

said = {}
for name in %s:
    configuration = CHIPS[name.partition(":")[0]].configuration
    extra = {"chip_config_name": configuration} if configuration else {}
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
    for name, (devices, gib, side) in json.loads(run_with_libtpu(ASK % SMALLEST).splitlines()[-1]).items():
        topology = check_topology(name)
        assert devices == topology.devices, name
        assert CHIPS[topology.generation].hbm_bytes == int(gib * 2**30), name
        assert len(topology.shape) == CHIPS[topology.generation].torus
        assert side == topology.shape[0], name
