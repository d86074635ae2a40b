"""docs/pods.md, made by experiments/pods.py, and the configs it is about."""

import dataclasses
import json
import re

import jax
import pytest

from experiments import compile_rl, pods
from experiments.cli import load_run_config, load_train_config
from experiments.compile import compile_config
from experiments.config import chosen
from experiments.inspect import PLAN_MAY_LACK
from model.chips import topology_of
from model.xla import TPU_FLAGS
from tests.libtpu import require_libtpu
from train.memory import plan_memory, plan_sampler
from train.rl_config import RLConfig
from train.step import mesh_sizes

LOADED = {path.stem: load_run_config(str(path), []) for path in pods.CONFIGS}
NAMES = [name for name, config in LOADED.items() if not isinstance(config, RLConfig)]
NAMES_OF_RL = [name for name in LOADED if name not in NAMES]
REPORTS = json.loads(pods.REPORTS.read_text())


def report(**changes):
    return {
        "topology": "v5e:2x2", "devices": 4, "mesh": {"data": 1, "fsdp": 4}, "tokens_per_step": 4096, "remat": "full",
        "hbm_bytes_per_device": 3 * 2**30, "hbm_limit_bytes": 15 * 2**30, "model_flops_per_step": 8e12,
        "planned_bytes_per_device": {"parameters": 2**30, "optimizer state": 1.5 * 2**30}, "recomputed_flops_share": 0.25,
        "matmul_flops_per_device": 131_072 * 1.2e9, "exposed_collective_seconds": 0.3,
        "estimated_cycles": {"matmul": 1.5e9, "kernel": 0.75e9, "copy": 0.15e9, "slice": 0.15e9},
        "exposed_all_gathers": [{"exposed_seconds": 0.05, "name": "a", "kind": "all-gather"}],
        "kernels": [{"instruction": "flash_forward.1", "cycles": 0.6e9}, {"instruction": "gmm.3", "cycles": 0.15e9}],
        "estimated_step_seconds": 2.0, "estimated_mfu": 0.456, "compile_seconds": 61.0,
    } | changes  # fmt: skip


def test_the_page_says_what_the_reports_do():
    reduced = report(exposed_all_gathers=[{"exposed_seconds": 0.2, "name": "a", "kind": "all-gather by all-reduce"}])
    lines = pods.page({"llama": report(), "other": report(exposed_all_gathers=[]), "reduced": reduced}).splitlines()
    assert sum(line.startswith("| [") for line in lines) == 3
    expected = "| v5e:2x2 | fsdp 4 | 4,096 | full | 3.0 of 15.0 GiB | 2.5 GiB | 2.00 s | 45.6 % | exposed collectives, 15 % | "
    expected += " | 61 s |"
    assert f"| [llama](../configs/pods/llama.py) {expected}" in lines
    # v5e has 1.5 G cycles a second, and its MXUs do 131,072 FLOPs in each: of the two seconds matmuls take half.
    assert "| llama | 50 % | 80 % | 25 % | 20 % | 5 % | 10 % | 15 % | 2.5 % (1 of them) |" in lines
    assert "| other | 50 % | 80 % | 25 % | 20 % | 5 % | 10 % | 15 % | none |" in lines
    assert "| reduced | 50 % | 80 % | 25 % | 20 % | 5 % | 10 % | 15 % | 10.0 % (1 of them), 1 by all-reduce |" in lines


def test_what_limits_qwen3_is_told_in_numbers_of_its_report():
    moved = {"kind": "all-gather", "bytes": 40e9, "seconds": 0.61, "exposed_seconds": 0.27}
    rows = [moved, moved | {"bytes": 2e9, "seconds": 0.02, "exposed_seconds": 0.01}, moved | {"kind": "all-reduce"}]
    text = pods.page({"qwen3_30b_a3b_v6e": report(collectives=rows)})
    assert "each token goes to 8 of 128, 768 wide" in text
    assert "gathers 42 GB of weights a step, for which it waits 0.28 of\n0.63 s" in text
    # Two seconds, as `report` has them; half of them for matmuls, a quarter for kernels, a tenth for the rest.
    assert "take 1.50 of 2.00 s, so that 61 % is the best" in text
    # 1,024 tokens a device, 8 copies of each of 2,048 numbers of 2 bytes, in 48 layers, at 819 GB/s.
    passes = re.search(r"(\d+) times what one\npass", text)
    assert passes
    assert int(passes[1]) == pytest.approx(0.2 / (1024 * 8 * 2048 * 2 * 48 / 819e9), rel=0.02)


def test_what_the_mfu_lacks_is_made_up_of_losses():
    """Of two seconds matmuls take one, 0.8 at peak, a quarter of which is done again; kernels 0.6, others 0.2, waiting 0.3."""
    found = pods.losses(report())
    assert found == pytest.approx(
        {
            "recomputed matmuls": 0.1,
            "matmuls below peak": 0.1,
            "other operations": 0.1,
            "exposed collectives": 0.15,
            "kernels": 1 - 0.456 - 0.45,
        },
        abs=2e-3,  # the clock is not 1.5 GHz exactly
    )
    assert sum(found.values()) == pytest.approx(1 - 0.456)
    assert pods.limited_by(report()) == "exposed collectives, 15 %"
    assert pods.limited_by(report(exposed_collective_seconds=0.1, recomputed_flops_share=0.5)) == "recomputed matmuls, 20 %"


def test_a_config_is_known_by_what_its_step_is_compiled_from():
    path = str(pods.ROOT / f"configs/pods/{NAMES[0]}.py")
    config = load_train_config(path, [])

    def hash_with(*words):
        return pods.config_hash(load_train_config(path, [f"--config.{word}" for word in words]))

    known = pods.config_hash(config)
    changed = ["model.rope.theta=1", "mesh.data=2", "loss.z_loss=0", "optimizer.b2=0.9", "batch_size=3", "data.seq_len=4096"]
    assert len({known, *map(hash_with, changed)}) == 1 + len(changed)
    # Neither what does not enter the step, nor what says no more than the defaults do.
    assert known == hash_with("run_dir=elsewhere", "checkpoint.every=7", "mesh.tensor=1")

    @dataclasses.dataclass(frozen=True)
    class Before:
        width: int
        depth: int = 2

    @dataclasses.dataclass(frozen=True)
    class After(Before):
        option: bool = False

    fields = chosen(After(5))
    assert fields == chosen(Before(5)) == {"width": 5}
    assert chosen(After(5, option=True)) == {"width": 5, "option": True}


def test_every_config_of_a_pod_has_a_report():
    assert set(REPORTS) == set(LOADED)


def test_the_page_in_the_checkout_is_that_of_its_reports():
    assert pods.PAGE.read_text() == pods.page(REPORTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_a_pod_was_compiled_as_it_stands(name):
    path = pods.ROOT / f"configs/pods/{name}.py"
    config, compiled = LOADED[name], REPORTS[name]
    topology = topology_of(pods.topology_in(path))
    assert compiled["topology"] == topology.name
    assert compiled["mesh"] == mesh_sizes(config, topology.num_devices)
    assert (compiled["tokens_per_step"], compiled["remat"]) == (config.tokens_per_step, config.model.remat)
    assert compiled["hbm_bytes_per_device"] <= compiled["hbm_limit_bytes"] == topology.chip.hbm_bytes
    memory = f"{compiled['hbm_bytes_per_device'] / 2**30:.1f} of {topology.chip.hbm_bytes / 2**30:.4g} GiB a device"
    speed = f"{compiled['estimated_step_seconds']:.3g} s a step, {100 * compiled['estimated_mfu']:.1f} % MFU"
    assert all(words in path.read_text() for words in (memory, speed)), (memory, speed)
    assert compiled["made_of"]["config_sha256"] == pods.config_hash(config)
    memory = compiled["memory"]
    assert compiled["hbm_bytes_per_device"] == sum(memory.values()) - 2 * memory["aliased"]
    planned = sum(compiled["planned_bytes_per_device"].values())
    if compiled["made_of"]["jax"] == jax.__version__:  # Another traces other residuals.
        assert compiled["planned_bytes_per_device"] == plan_memory(config, compiled["mesh"])
    assert planned == pytest.approx(compiled["hbm_bytes_per_device"], rel=0.25)
    assert planned >= (1 - PLAN_MAY_LACK) * compiled["hbm_bytes_per_device"], "`loam inspect` promises less"
    assert 0 < compiled["recomputed_flops_share"] <= 0.26  # all but the loss's products twice, in four passes
    if not config.model.moe:
        assert not compiled["loops_of_unknown_length"]
        assert pods.exposed_gathers_share(compiled) < pods.MOST_EXPOSED_GATHERS


@pytest.mark.parametrize("name", NAMES_OF_RL)
def test_a_run_of_reinforcement_learning_was_compiled_in_both_layouts(name):
    path, config, compiled = pods.ROOT / f"configs/pods/{name}.py", LOADED[name], REPORTS[name]
    topology = topology_of(pods.topology_in(path))
    assert compiled["topology"] == topology.name
    assert compiled["mesh"] == mesh_sizes(config, topology.num_devices)
    plan = plan_memory(config, compiled["mesh"]) | plan_sampler(config, compiled["mesh"])
    if compiled["made_of"]["jax"] == jax.__version__:
        assert compiled["planned_bytes_per_device"] == plan
    assert compiled["made_of"]["config_sha256"] == pods.config_hash(config)
    assert list(compiled["programs"]) == list(compile_rl.PROGRAMS)
    for program, one in compiled["programs"].items():
        memory, arguments = one["memory"], compile_rl.PROGRAMS[program]
        beside = sum(plan.get(part, 0) for part in compile_rl.HELD if part not in arguments)
        assert one["hbm_bytes_per_device"] == sum(memory.values()) - 2 * memory["aliased"] + beside
        assert one["hbm_bytes_per_device"] <= compiled["hbm_limit_bytes"] == topology.chip.hbm_bytes
        # What is planned for a program's arguments is what the compiler gives them, but for rows and padding.
        planned = sum(plan.get(part, 0) for part in arguments)
        assert planned == pytest.approx(memory["arguments"], rel=0.05)
    # A device gathers over fsdp what tensor parallelism leaves it of the weights: all but the part that it has.
    weights = plan["weights of the sampler"] * (1 - 1 / compiled["mesh"]["fsdp"])
    assert compiled["resharding_bytes_per_device"] == pytest.approx(weights, rel=0.02)
    assert compiled["resharding_link_seconds"] > weights / (4 * topology.chip.link_bandwidth)
    most = max(one["hbm_bytes_per_device"] for one in compiled["programs"].values()) / 2**30
    told = f"{most:.1f} of {topology.chip.hbm_bytes / 2**30:.4g} GiB a device"
    assert told in path.read_text(), told


@pytest.mark.parametrize("name", list(REPORTS))
def test_a_config_of_a_pod_was_compiled_with_the_flags_of_today(name):
    made_of = REPORTS[name]["made_of"]
    assert made_of["flags"] == list(TPU_FLAGS)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_a_pod_was_compiled_in_time(name):
    assert REPORTS[name]["compile_seconds"] < pods.MOST_COMPILE_SECONDS


@pytest.mark.parametrize("name", NAMES_OF_RL)
def test_a_run_of_reinforcement_learning_was_compiled_in_time(name):
    assert all(one["compile_seconds"] < pods.MOST_COMPILE_SECONDS for one in REPORTS[name]["programs"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES_OF_RL)
def test_a_run_of_reinforcement_learning_compiles_within_the_memory_of_its_slice(name):
    require_libtpu()
    path = pods.ROOT / f"configs/pods/{name}.py"
    compiled = compile_rl.compile_config(str(path), [], topology_of(pods.topology_in(path)))
    compile_rl.check_fits(compiled)
    for program, one in compiled["programs"].items():
        assert one["hbm_bytes_per_device"] == pytest.approx(REPORTS[name]["programs"][program]["hbm_bytes_per_device"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_a_pod_compiles_within_the_memory_of_its_slice(name):
    require_libtpu()
    path = pods.ROOT / f"configs/pods/{name}.py"
    compiled = compile_config(str(path), [], topology_of(pods.topology_in(path)))
    assert compiled["fits"], compiled["memory"]
    assert compiled["compile_seconds"] < pods.MOST_COMPILE_SECONDS
    if not LOADED[name].model.moe:
        assert pods.exposed_gathers_share(compiled) < pods.MOST_EXPOSED_GATHERS
    for key, tolerance in (("hbm_bytes_per_device", 0.1), ("estimated_step_seconds", 0.05), ("estimated_mfu", 0.05)):
        assert compiled[key] == pytest.approx(REPORTS[name][key], rel=tolerance), key
