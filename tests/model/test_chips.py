"""Generations, slices and links; and that libtpu agrees."""

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from model import attention
from model.chips import CHIPS, Topology, chip_of, shapes, topology_of
from model.kernels import tiles
from model.sharding import MESH_AXES, make_mesh
from tests.libtpu import run_with_libtpu
from train.peak import peak_flops


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


def test_chips_that_stand_apart_share_the_links_between_them():
    """Every chip of a ring of 16 sends to the one 8 places on, or 4 places, and so on around: counted link by link."""
    ring = topology_of("v6e:16x16")
    for apart in (1, 2, 4, 8):
        members = 16 // apart
        # A reduce-scatter in both directions: each chip sends half of its (members - 1) / members each way, `apart` links on.
        load = np.zeros((16, 2))
        for chip in range(16):
            for direction in (0, 1):
                for hop in range(apart):
                    place = (chip + hop) % 16 if direction == 0 else (chip - 1 - hop) % 16
                    load[place, direction] += (members - 1) / members / 2
        ((found, links),) = ring.rings([(place, 3) for place in range(0, 16, apart)])
        assert found == members
        assert (members - 1) / members / links == pytest.approx(load.max())


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
    said[name] = (len(devices), gib, len({d.coords[0] for d in devices}), devices[0].device_kind)
print(json.dumps(said))
"""
SMALLEST = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def test_libtpu_has_as_many_devices_and_as_much_memory():
    """The least of any version: 0.0.50 keeps 10 MiB more of three of them than 0.0.42. A table must not promise more."""
    said = json.loads(run_with_libtpu(ASK % SMALLEST).splitlines()[-1])
    for name, (devices, gib, sides, kind) in said.items():
        topology: Topology = topology_of(name)
        assert chip_of(kind) is topology.chip
        assert devices == topology.num_devices, name
        assert round(gib - topology.chip.hbm_bytes / 2**30, 4) in (0, 0.01), name
        assert sides == topology.shape[0], name
        assert devices == math.prod(topology.shape) * topology.chip.devices_per_chip


def test_a_device_that_is_no_tpu_is_of_no_generation():
    assert chip_of(jax.devices()[0].device_kind) is None
    assert chip_of("NVIDIA H100 80GB HBM3") is None


def test_mfu_of_tpus_is_against_their_data_sheet():
    assert peak_flops([SimpleNamespace(device_kind="TPU v5 lite")] * 4, "float32") == 4 * 197e12


def test_attention_takes_the_block_sizes_of_its_chip(monkeypatch, tmp_path):
    table = {name: {"forward": [128, 256], "backward": [256, 128]} for name in json.loads(tiles.BLOCK_SIZES_FILE.read_text())}
    assert set(table) == set(CHIPS)
    path = tmp_path / "block_sizes.json"
    path.write_text(json.dumps(table))
    monkeypatch.setattr(tiles, "BLOCK_SIZES_FILE", path)
    ids = np.ones((1, 2048), np.int32)

    def sizes(kind, itemsize, head_dim=128, soft_cap=0.0):
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
        shape = {"itemsize": itemsize, "head_dim": head_dim, "soft_cap": soft_cap}
        return attention.make_pattern(ids, ids, ids, ids, window=0, backend="flash", **shape).sizes

    assert sizes("TPU v6 lite", 2) == tiles.BlockSizes((128, 256), (256, 128))
    assert sizes("TPU v6 lite", 2, 256) == tiles.BlockSizes((128, 256), (256, 128))
    assert sizes("TPU v4", 2) == sizes("TPU v4", 2, 64, 50.0) == tiles.BlockSizes((128, 256), (256, 128))
    assert sizes("TPU v4", 2, 256) == sizes("TPU v4", 2, 128, 50.0) == tiles.BlockSizes((128, 256), (128, 128))
    assert sizes("cpu", 2) == tiles.BlockSizes()
    assert sizes("cpu", 4) == tiles.BlockSizes((512, 512), (256, 256))


# --- Several slices -----------------------------------------------------------------------------------------------------------


class Device(SimpleNamespace):
    __hash__ = object.__hash__


def slices_of(number: int, chips: int = 4) -> list[Device]:
    """Devices of so many v5e slices, the slices' taking turns as jax may list them."""
    return [
        Device(
            id=i * number + s, platform="tpu", device_kind="TPU v5 lite", coords=(i // 2, i % 2, 0), core_on_chip=0,
            process_index=s, slice_index=s,
        )
        for i in range(chips)
        for s in range(number)
    ]  # fmt: skip


def test_only_data_parallel_copies_lie_on_different_slices():
    sizes = dict.fromkeys(MESH_AXES, 1) | {"data": 4, "fsdp": 2}
    mesh = make_mesh(sizes, slices_of(2))
    indices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 2)
    assert (indices == indices[:, :1]).all()
    assert indices[:, 0].tolist() == [0, 0, 1, 1]
    assert len({device.id for device in mesh.devices.flat}) == 8


def test_a_mesh_whose_other_axes_would_cross_slices_is_refused():
    sizes = dict.fromkeys(MESH_AXES, 1) | {"data": 1, "fsdp": 8}
    with pytest.raises(ValueError, match="data=1 does not divide over 2 slices.*a multiple of 2; for example data=2 x fsdp=4"):
        make_mesh(sizes, slices_of(2))
