"""Tiles and cycles of the attention kernels, counted from their schedules."""

import dataclasses
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from benchmarks import attention_schedule
from experiments import hlo
from experiments.cli import load_train_config
from experiments.compile import kernel_report
from experiments.tpu_schedule import (
    TOPOLOGIES,
    UNITS,
    AttentionCode,
    Bundle,
    Schedule,
    Tiles,
    causal_tiles,
    compiler_environment,
    page_sections,
    read_schedule,
)
from model.chips import CHIPS, topology_of
from model.kernels.tiles import BlockSizes
from tests.libtpu import run_with_libtpu
from tests.tiny import write_tiny_job
from train.config import DistillationConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("length", [512, 1000, 1024])
@pytest.mark.parametrize("window", [0, 1, 100, 300])
@pytest.mark.parametrize(
    ("block", "part"), [((128, 128), (128, 128)), ((256, 128), (64, 128)), ((128, 512), (128, 128)), ((256, 256), (128, 64))]
)
def test_tiles_of_a_causal_document_are_those_with_an_allowed_pair(length, window, block, part):
    rows, columns = -(-length // block[0]) * block[0], -(-length // block[1]) * block[1]
    distance = np.arange(rows)[:, None] - np.arange(columns)[None, :]
    allowed = (distance >= 0) & (np.arange(rows)[:, None] < length) & (np.arange(columns)[None, :] < length)
    allowed &= (distance < window) if window else True
    tiles = allowed.reshape(rows // block[0], block[0], columns // block[1], block[1])
    some, every = tiles.any(axis=(1, 3)), tiles.all(axis=(1, 3))
    # Parts of full tiles are not counted: those tiles are computed whole.
    rest = allowed & ~np.repeat(np.repeat(every, block[0], axis=0), block[1], axis=1)
    parts = rest.reshape(rows // part[0], part[0], columns // part[1], part[1]).any(axis=(1, 3))
    for of_keys in (False, True):
        expected = Tiles(np.sum(every), np.sum(some & ~every), np.sum(parts), every.shape[of_keys])
        assert causal_tiles(length, window, block, part, of_keys) == expected


def schedule_of(*parts: tuple[int, str, int, bool]) -> Schedule:
    """Each part: depth, where control flow arrives (LB begins a loop), bundles, whether they use the MXU."""
    bundles = []
    for depth, starts, count, works in parts:
        units = tuple(int(works and unit == "MXU") for unit in UNITS)
        bundles += [Bundle(depth, starts if i == 0 else "", False, units) for i in range(count)]
    return Schedule(bundles, dict.fromkeys(UNITS, 4))


def test_bundles_are_multiplied_by_the_tiles_of_their_loop():
    # A tile waits for a copy in a loop of its own, and visits its parts in one or two loops.
    around, wait = (2, "LB", 30, False), [(3, "LB", 5, False), (2, "", 3, False)]
    in_rounds = [around, *wait, (3, "LB", 7, False), (4, "LB", 50, True), (3, "", 2, False), (2, "", 1, False)]
    at_once = [around, *wait, (3, "LB", 50, True), (2, "", 1, False)]
    full = [(2, "LB", 40, True)]
    for masked, parts_of_block, of_masked in ((in_rounds, 2, 39 + 2 * 9), (at_once, 1, 39)):
        schedule = schedule_of(
            (0, "", 9, False), (1, "LB", 10, False), *masked, (1, "", 1, False), *full, (1, "", 1, False), *masked
        )  # fmt: skip
        code = AttentionCode.of(schedule, parts_of_block)
        # 12 bundles stand around the loops over tiles; they are run once for each row of tiles.
        assert code == AttentionCode(full=40, masked=of_masked, part=50, row=12)
    assert code.cycles(Tiles(full=7, masked=3, parts=8, rows=2)) == 7 * 40 + 3 * 39 + 8 * 50 + 2 * 12
    assert code.cycles(Tiles(full=7, masked=3, parts=8, rows=2), 45, 10) == 7 * 45 + 3 * 39 + 8 * 50 + 2 * 12


def test_a_kernel_that_has_changed_is_not_counted_wrongly():
    with pytest.raises(ValueError, match="2 inner loops of our kernel use the MXU, not 3"):
        AttentionCode.of(schedule_of((1, "LB", 2, True), (1, "LB", 2, True)), 1)


def test_the_page_of_kernels_tells_what_was_measured():
    """docs/kernels.md is made of docs/kernels.json, whose tiles are those of our plan, and whose ratios hold the bounds."""
    results = json.loads(attention_schedule.RESULTS.read_text())["chips"]
    assert list(results) == list(TOPOLOGIES)
    assert page_sections()[attention_schedule.TITLE].strip() == attention_schedule.page(results).strip()
    for chip, cases in results.items():
        sizes = BlockSizes.of_chip(CHIPS[chip])
        for case, sides in cases.items():
            layout, pass_ = case.split("_")
            ours, splash = sides["ours"], sides["splash"]
            assert tuple(ours["sizes"]) == getattr(sizes, pass_)
            tiles = attention_schedule.tiles_of_layout(layout, pass_, tuple(ours["sizes"]))
            assert {f"tiles_{name}": n for name, n in dataclasses.asdict(tiles).items()}.items() <= ours.items()
            parts = ours["tiles_parts"] * ours["bundles_part"] + ours["tiles_masked"] * ours["bundles_masked"]
            full, rows = ours["tiles_full"] * ours["bundles_full"], ours["tiles_rows"] * ours["bundles_row"]
            assert ours["bundles"] == full + parts + rows
            of_splash = sum(splash[f"{name}s"] * splash[f"bundles_{name}"] for name in ("tile", "row", "step"))
            assert splash["bundles"] == of_splash
            # Documents that end anywhere miss the third on two chips, as the page says: no worse than that.
            bound = {"causal": 1, "uneven": 0.36}.get(layout, 1 / 3)
            assert attention_schedule.ratio(sides) <= bound, (chip, case)


@pytest.mark.parametrize("chip", list(TOPOLOGIES))
def test_the_kernels_that_were_counted_are_those_of_today(chip):
    kept = json.loads(attention_schedule.RESULTS.read_text())["made_of"][chip]
    sources = [(ROOT / "model/kernels" / name).read_text() for name in ("flash_attention.py", "tiles.py")]
    assert kept["kernel_sha256"] == attention_schedule.source_hash(*sources), (
        f"model/kernels/flash_attention.py or tiles.py has changed since docs/kernels.json was made: "
        f"python benchmarks/attention_schedule.py --table --chips {chip}"
    )
    assert kept["counting_sha256"] == attention_schedule.counting_hash(), (
        f"the counting in benchmarks/attention_schedule.py or experiments/tpu_schedule.py has changed since docs/kernels.json: "
        f"python benchmarks/attention_schedule.py --table --chips {chip}"
    )
    pins = (ROOT / "constraints.txt").read_text()
    assert [name for name in ("jax", "jaxlib", "libtpu") if f"\n{name}=={kept[name]};" not in pins] == []


def test_the_hash_of_a_source_is_of_what_it_does():
    source = """
def f(x: int) -> str:
    'Says x.'
    y = x + 1  # more
    return f"{y!r:>9} {{it's}}"
"""
    same = 'def f(x:int)->str:\n  """Other words."""\n  y = (x+1)\n\n  return f"{y!r:>9} {{it\'s}}"'
    undocumented = same.replace('"""Other words."""', "")
    hashes = {attention_schedule.source_hash(text) for text in (source, same, undocumented)}
    # The same number on every version of Python.
    assert hashes == {"5175c5485e3bc75f2d5894bf21e9837ad57399a494b04e54962df29b25bd8db1"}
    changes = [
        ("x + 1", "x - 1"),
        ("x + 1", "x + 2"),
        ("def f", "def g"),
        ("it's", "its"),
        ("!r", "!s"),
        (": int", ""),
        ("y = x", "z = x"),
    ]
    changed = {attention_schedule.source_hash(source.replace(*change)) for change in changes}
    assert len(changed - hashes) == len(changes)
    assert attention_schedule.source_hash(source, "x") != attention_schedule.source_hash("x", source)


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
    changes = ("data.seq_len=2048", "model.max_seq_len=2048", "model.window_pattern=(0,)", "model.dtype='bfloat16'")
    config = load_train_config(str(write_tiny_job(tmp_path)), [f"--config.{change}" for change in changes])
    for kernel in kernels:
        report = kernel_report(kernel, kernel.name, config, topology_of("v5e:2x2"), {"context": 1}, dump)
        # Rows, heads; tiles of 1,024 x 1,024: two on the diagonal, each of three parts of 512 x 512, and one below. The MXUs do
        # 131,072 FLOPs in a cycle.
        products = 2 if "flash_forward" in kernel.name else 5
        least = products * 2 * 1024 * 1024 * 128 / 131_072
        part, full, _ = (len(loop) for loop in read_schedule(dump, f"-{kernel.name}-").tile_loops())
        tiles = 2 * 4 * (2 * 3 * max(part, least / 4) + max(full, least))
        assert tiles < report["cycles"] < 1.2 * tiles


def test_a_kernel_without_a_schedule_takes_its_flops_at_peak(tmp_path):
    kernel = hlo.Kernel("gmm.1", 6.0, (), flops=131_072e3)
    config = load_train_config(str(write_tiny_job(tmp_path)), [])
    report = kernel_report(kernel, None, config, topology_of("v5e:2x2"), 1, tmp_path)
    assert report["cycles"] == 6 * 1000
    assert report["by"] == "its FLOPs at peak"


def test_a_teacher_whose_kernels_are_others_has_its_flops_at_peak(tmp_path, monkeypatch):
    """Its schedule is not taken for the student's, nor the other way round; of one of the same shapes it does not matter."""
    monkeypatch.setattr("experiments.compile.attention_call_cycles", lambda *_: 1.0)
    kernel = hlo.Kernel("flash_forward.1", 2.0, (), flops=131_072e3)
    config = load_train_config(str(write_tiny_job(tmp_path)), [])
    like_it = dataclasses.replace(config.model, num_layers=2 * config.model.num_layers)
    teachers = {None: 1.0, like_it: 1.0, dataclasses.replace(like_it, window_pattern=(7,)): 1000.0}
    for teacher, cycles in teachers.items():
        distillation = teacher and DistillationConfig("somebody", teacher)
        taught = dataclasses.replace(config, distillation=distillation)
        report = kernel_report(kernel, kernel.name, taught, topology_of("v5e:2x2"), {"context": 1}, tmp_path)
        assert report["cycles"] == 2 * cycles
