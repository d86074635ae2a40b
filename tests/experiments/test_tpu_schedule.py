"""Tiles and cycles of the attention kernels, counted from their schedules."""

import textwrap

import numpy as np
import pytest

from experiments import hlo
from experiments.cli import load_train_config
from experiments.compile import kernel_report
from experiments.tpu_schedule import (
    UNITS,
    Bundle,
    Schedule,
    attention_cycles,
    causal_tiles,
    compiler_environment,
    read_schedule,
)
from model.chips import topology_of
from tests.libtpu import run_with_libtpu
from tests.tiny import write_tiny_job


@pytest.mark.parametrize("length", [512, 1000, 1024])
@pytest.mark.parametrize("window", [0, 1, 100, 300])
@pytest.mark.parametrize("block", [(128, 128), (256, 128), (128, 512)])
def test_tiles_of_a_causal_document_are_those_with_an_allowed_pair(length, window, block):
    rows, columns = -(-length // block[0]) * block[0], -(-length // block[1]) * block[1]
    distance = np.arange(rows)[:, None] - np.arange(columns)[None, :]
    allowed = (distance >= 0) & (np.arange(rows)[:, None] < length) & (np.arange(columns)[None, :] < length)
    allowed &= (distance < window) if window else True
    tiles = allowed.reshape(rows // block[0], block[0], columns // block[1], block[1])
    some, every = tiles.any(axis=(1, 3)), tiles.all(axis=(1, 3))
    assert causal_tiles(length, window, block) == (np.sum(some & ~every), np.sum(every))


def schedule_of(*parts: tuple[int, str, int, bool]) -> Schedule:
    """Each part: depth, where control flow arrives (LB begins a loop), bundles, whether they use the MXU."""
    bundles = []
    for depth, starts, count, works in parts:
        units = tuple(int(works and unit == "MXU") for unit in UNITS)
        bundles += [Bundle(depth, starts if i == 0 else "", False, units) for i in range(count)]
    return Schedule(bundles, dict.fromkeys(UNITS, 4))


def test_bundles_are_multiplied_by_the_tiles_of_their_loop():
    tile = [(2, "LB", 50, True), (3, "LB", 5, False), (2, "", 3, True)]  # waits for a copy in a loop of its own
    full = [(2, "LB", 40, True)]
    schedule = schedule_of((0, "", 9, False), (1, "LB", 10, False), *tile, (1, "", 1, False), *full, (1, "", 1, False), *tile)
    assert [len(loop) for loop in schedule.tile_loops()] == [58, 40, 58]
    # 12 bundles stand around the loops over tiles; they are run once for each row of tiles.
    assert attention_cycles(schedule, tiles=(3, 7), rows_of_tiles=2, least=10) == 3 * 58 + 7 * 40 + 2 * 12
    assert attention_cycles(schedule, tiles=(3, 7), rows_of_tiles=2, least=45) == 3 * 58 + 7 * 45 + 2 * 12


def test_a_kernel_that_has_changed_is_not_counted_wrongly():
    with pytest.raises(ValueError, match="2 inner loops of our kernel use the MXU, not 3"):
        attention_cycles(schedule_of((1, "LB", 2, True), (1, "LB", 2, True)), (1, 1), 1, 1)


COMPILED = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from model.kernels.flash_attention import flash_attention
from model.kernels.tiles import make_plan

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
here = jax.NamedSharding(jax.sharding.Mesh(devices[:1], ("one",)), jax.P())

def loss(q, k, ids):
    plan = make_plan(ids, ids, ids, ids)
    return jnp.sum(flash_attention(q, k, k, plan, scale=0.1)[0].astype(jnp.float32))

shapes = (((2, 4, 2048, 128), jnp.bfloat16), ((2, 2, 2048, 128), jnp.bfloat16), ((2, 2048), jnp.int32))
arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in shapes]
print(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text())
"""


@pytest.mark.slow
def test_a_compiled_kernel_has_the_cycles_of_its_tiles(tmp_path, monkeypatch):
    dump = tmp_path / "schedules"
    dump.mkdir()
    monkeypatch.setenv("LIBTPU_INIT_ARGS", compiler_environment(dump)["LIBTPU_INIT_ARGS"])
    text = run_with_libtpu(textwrap.dedent(COMPILED))
    kernels = hlo.work(hlo.parse(text)).kernels
    assert len(kernels) == 2
    overrides = ["--config.data.seq_len=2048", "--config.model.max_seq_len=2048", "--config.model.window_pattern=(0,)"]
    config = load_train_config(str(write_tiny_job(tmp_path)), overrides)
    for kernel in kernels:
        report = kernel_report(kernel, kernel.name, config, topology_of("v5e:2x2"), 1, dump)
        # Rows, heads; tiles of 1,024 x 1,024: two on the diagonal, one below. The MXUs do 131,072 FLOPs in a cycle.
        products = 2 if "flash_forward" in kernel.name else 5
        least = products * 2 * 1024 * 1024 * 128 / 131_072
        loops = read_schedule(dump, f"-{kernel.name}-").tile_loops()
        masked, full, _ = (max(least, len(loop)) for loop in loops)
        tiles = 2 * 4 * (2 * masked + full)
        assert tiles < report["cycles"] < 1.2 * tiles


def test_a_kernel_without_a_schedule_takes_its_flops_at_peak(tmp_path):
    kernel = hlo.Kernel("gmm.1", 6.0, (), flops=131_072e3)
    config = load_train_config(str(write_tiny_job(tmp_path)), [])
    report = kernel_report(kernel, None, config, topology_of("v5e:2x2"), 1, tmp_path)
    assert report["cycles"] == 6 * 1000
    assert report["by"] == "its FLOPs at peak"
