"""docs/pods.md, made by experiments/pods.py, and the configs it is about."""

import json

import pytest

from experiments import pods
from experiments.cli import load_train_config
from experiments.compile import compile_config
from model.chips import topology_of
from tests.libtpu import require_libtpu
from train.step import mesh_sizes

NAMES = [path.stem for path in pods.CONFIGS]
REPORTS = json.loads(pods.REPORTS.read_text())


def report(**changes):
    return {
        "topology": "v5e:2x2", "devices": 4, "mesh": {"data": 1, "fsdp": 4}, "tokens_per_step": 4096, "remat": "full",
        "hbm_bytes_per_device": 3 * 2**30, "hbm_limit_bytes": 15 * 2**30, "model_flops_per_step": 8e12,
        "matmul_flops_per_device": 131_072 * 1.2e9, "exposed_collective_seconds": 0.3,
        "estimated_cycles": {"matmul": 1.5e9, "kernel": 0.75e9, "copy": 0.15e9, "slice": 0.15e9},
        "collectives": [{"kind": "all-reduce", "bytes": 8e9}, {"kind": "all-gather", "bytes": 4e9}],
        "exposed_all_gathers": [{"exposed_seconds": 0.05, "name": "a"}],
        "kernels": [{"instruction": "flash_forward.1", "cycles": 0.6e9}, {"instruction": "gmm.3", "cycles": 0.15e9}],
        "estimated_step_seconds": 2.0, "estimated_mfu": 0.456, "compile_seconds": 61.0,
    } | changes  # fmt: skip


def test_the_page_says_what_the_reports_do():
    reduced = report(collectives=[{"kind": "all-reduce", "bytes": 8e9}], exposed_all_gathers=[])
    lines = pods.page({"llama": report(), "other": report(exposed_all_gathers=[]), "reduced": reduced}).splitlines()
    assert sum(line.startswith("| [") for line in lines) == 3
    expected = "| v5e:2x2 | fsdp 4 | 4,096 | full | 3.0 of 15.0 GiB | 2.00 s | 45.6 % |  | 61 s |"
    assert f"| [llama](../configs/pods/llama.py) {expected}" in lines
    # v5e has 1.5 G cycles a second, and its MXUs do 131,072 FLOPs in each: of the two seconds matmuls take half.
    assert "| llama | 50 % | 80 % | 20 % | 5 % | 10 % | 15 % | 2.5 % (1 of them) |" in lines
    assert "| other | 50 % | 80 % | 20 % | 5 % | 10 % | 15 % | none |" in lines
    assert "| reduced | 50 % | 80 % | 20 % | 5 % | 10 % | 15 % | gathered by all-reduce |" in lines


def test_every_config_of_a_pod_has_a_report():
    assert set(REPORTS) == set(NAMES)


def test_the_page_in_the_checkout_is_that_of_its_reports():
    assert pods.PAGE.read_text() == pods.page(REPORTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_a_pod_was_compiled_as_it_stands(name):
    path = pods.ROOT / f"configs/pods/{name}.py"
    config, compiled = load_train_config(str(path), []), REPORTS[name]
    topology = topology_of(pods.topology_in(path))
    assert compiled["topology"] == topology.name
    assert compiled["mesh"] == mesh_sizes(config, topology.num_devices)
    assert (compiled["tokens_per_step"], compiled["remat"]) == (config.tokens_per_step, config.model.remat)
    assert compiled["hbm_bytes_per_device"] <= compiled["hbm_limit_bytes"] == topology.chip.hbm_bytes
    memory = f"{compiled['hbm_bytes_per_device'] / 2**30:.1f} of {topology.chip.hbm_bytes / 2**30:.4g} GiB a device"
    speed = f"{compiled['estimated_step_seconds']:.3g} s a step, {100 * compiled['estimated_mfu']:.1f} % MFU"
    assert all(words in path.read_text() for words in (memory, speed)), (memory, speed)
    memory = compiled["memory"]
    assert compiled["hbm_bytes_per_device"] == sum(memory.values()) - 2 * memory["aliased"]
    if not config.model.moe:
        assert not compiled["loops_of_unknown_length"]
        assert (
            sum(one["exposed_seconds"] for one in compiled["exposed_all_gathers"]) < 0.01 * compiled["estimated_step_seconds"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_a_pod_compiles_within_the_memory_of_its_slice(name):
    require_libtpu()
    path = pods.ROOT / f"configs/pods/{name}.py"
    compiled = compile_config(str(path), [], topology_of(pods.topology_in(path)))
    assert compiled["fits"], compiled["memory"]
    assert compiled["hbm_bytes_per_device"] == pytest.approx(REPORTS[name]["hbm_bytes_per_device"], rel=0.1)
