"""`loam compile`: what it refuses, what it proposes, and one small step compiled by libtpu, end to end."""

import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import experiments.compile as loam_compile
import experiments.inspect
import train.memory
from experiments import collectives, compile_rl
from experiments.cli import load_run_config, load_train_config, main
from experiments.compile import (
    GIB,
    as_overrides,
    attention_call_cycles,
    candidates,
    changed_config,
    check_fits,
    exhausted_bytes,
    proposals,
)
from experiments.hlo import Kernel
from experiments.inspect import describe_plan
from experiments.tpu_schedule import AttentionCode
from model.chips import CHIPS, topology_of
from model.ring_attention import zigzag
from tests.libtpu import require_libtpu
from train.memory import plan_memory, plan_sampler
from train.step import mesh_sizes

CONFIG = """
from ml_collections import ConfigDict
from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.presets import preset

def get_config():
    config = ConfigDict()
    config.model = preset({model!r}, scan_layers=True, remat="none", dtype="bfloat16")
    config.data = DataConfig(
        sources=(SourceConfig(name="stdlib", kind="stdlib", held_out_fraction=0.1),),
        tokenizer=TokenizerConfig(kind="byte_bpe", vocab_size=300),
        seq_len={seq_len},
    )
    config.steps = 10
    config.batch_size = {batch_size}
    config.mesh = {mesh!r}
    config.run_dir = {run_dir!r}
    return config
"""


CUDNN = "--config.model.attention_backend=cudnn"


def write_config(directory, model="tiny-llama", seq_len=64, batch_size=8, mesh=None):
    path = directory / "job.py"
    mesh = mesh or {"data": 2, "fsdp": 2}
    fields = {"model": model, "seq_len": seq_len, "batch_size": batch_size, "mesh": mesh, "run_dir": str(directory / "run")}
    path.write_text(CONFIG.format(**fields))
    return str(path)


def test_a_small_sharded_step_compiles_and_is_reported(tmp_path, capsys):
    require_libtpu()
    path = write_config(tmp_path)
    assert main(["compile", f"--config={path}", "--topology=v5e:2x2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "run" / "compile_v5e_2x2.json").read_text()) == report
    assert report["mesh"]["data"] == report["mesh"]["fsdp"] == 2
    assert report["fits"]
    # Adam's two moments beside the parameters, all halved by fsdp; 2 rows of 64 tokens, five arrays of 4 bytes.
    config = load_train_config(path, [])
    plan = plan_memory(config, mesh_sizes(config, 4))
    state = plan["parameters"] + plan["optimizer state"]
    arguments = state + 2 * 64 * 5 * 4
    assert arguments <= report["memory"]["arguments"] <= 2 * arguments  # 64 lanes are padded to 128
    memory = report["memory"]
    live = sum(memory.values()) - 2 * memory["aliased"]
    assert report["hbm_bytes_per_device"] == live < report["hbm_limit_bytes"] == int(15.75 * GIB)
    # Without remat every matmul runs once, and twice for its gradients; those of `xla` meet all 64 keys of so short a row.
    model = config.model
    matrices = 2 * (2 * 64 * (64 + 32) + 3 * 64 * 96) + 64 * 512  # queries and output, keys and values; the MLP; the head
    assert (model.num_layers, model.d_model, model.num_heads, model.num_kv_heads) == (2, 64, 4, 2)
    assert (model.head_dim, model.d_ff, model.vocab_size) == (16, 96, 512)
    pairs = 2 * 4 * 64 * (16 + 16)  # of a token, over layers, heads, keys and the dimensions of keys and values
    assert report["matmul_flops_per_device"] == 3 * 2 * (2 * 64) * (matrices + pairs)
    seconds = sum(report["estimated_cycles"].values()) / 1.5e9 + report["exposed_collective_seconds"]
    assert report["estimated_step_seconds"] == pytest.approx(seconds, rel=0.01)
    assert report["estimated_mfu"] == pytest.approx(report["model_flops_per_step"] / (seconds * 4 * 197e12), rel=0.01)
    assert report["collectives"]
    for row in report["collectives"]:
        assert row["axes"] in ("data", "fsdp", "data+fsdp"), row
        assert 0 <= row["exposed_seconds"] <= row["seconds"]
    assert report["loops_of_unknown_length"] == []
    text = loam_compile.describe(report)
    assert "the compiler's estimate" in text
    assert f"MFU {100 * report['estimated_mfu']:.1f} %" in text


@pytest.mark.slow
def test_every_call_of_a_kernel_finds_its_schedule(tmp_path, capsys):
    """On a ring one kernel is called several times with equal code, of which the compiler leaves one schedule."""
    require_libtpu()
    path = write_config(tmp_path, seq_len=128, mesh={"data": 1, "fsdp": 2, "context": 2})
    words = ["--config.model.attention_backend=flash", "--config.model.head_dim=128", "--config.model.remat=full"]
    assert main(["compile", f"--config={path}", "--topology=v5e:2x2", "--json", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    passes = [name for name in ("forward", "backward") for kernel in report["kernels"] if name in kernel["instruction"]]
    assert len(passes) == len(report["kernels"]) > 2
    assert set(passes) == {"forward", "backward"}
    assert all(kernel["by"] == "its schedule" and kernel["cycles"] > 0 for kernel in report["kernels"])
    assert report["estimated_cycles"]["kernel"] == pytest.approx(sum(kernel["cycles"] for kernel in report["kernels"]))
    assert any(row["axes"] == "context" and row["kind"] == "collective-permute" for row in report["collectives"])


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_an_error_with_proposals(tmp_path, capsys):
    require_libtpu()
    path = write_config(tmp_path, "llama3.2-1b", seq_len=8192, batch_size=16, mesh={"data": 4, "fsdp": 1})
    assert main(["compile", f"--config={path}", "--topology=v5e:2x2", "--json"]) == 1
    out, error = capsys.readouterr()
    report = json.loads(out)
    assert not report["fits"]
    assert [report[name] for name in ("estimated_step_seconds", "estimated_mfu", "collectives")] == [None] * 3
    assert report["hbm_bytes_per_device"] > report["hbm_limit_bytes"]
    assert "GiB of HBM on each device of v5e:2x2, which has 15.75" in error
    assert "--config.model.remat=full" in error


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_calls_of_a_ring_are_charged_for_the_tiles_that_they_visit(tmp_path, monkeypatch, pass_, devices):
    """The mean over devices and steps, by looking at every tile of 1,024 and every part of 512 that a device computes."""
    code = AttentionCode(full=1_000_000, masked=10_000, part=300_000, row=7_000)  # full and part: more than the MXUs need
    monkeypatch.setattr(loam_compile, "read_schedule", lambda *_: None)
    monkeypatch.setattr(loam_compile.AttentionCode, "of", lambda _, parts_of_block: {2: code}[parts_of_block])
    length, heads, kv_heads = 8192, 4, 2
    config = load_train_config(
        write_config(tmp_path), [f"--config.model.max_seq_len={length}", f"--config.data.seq_len={length}"]
    )
    queries, keys = (f"bf16[2,{count},{length // devices},128]{{3,2,1,0}}" for count in (heads, kv_heads))
    operands = (queries, keys, keys) if pass_ == "forward" else (keys, keys, queries, queries)
    kernel = Kernel(f"flash_{pass_}", 1.0, operands)
    charged = attention_call_cycles(pass_, kernel, "", config, topology_of("v5e:2x2"), devices, tmp_path)

    visited = []
    for rows, columns in itertools.product(np.split(zigzag(length // 512, devices), devices), repeat=2):
        some = (rows[:, None] >= columns).reshape(len(rows) // 2, 2, len(columns) // 2, 2)
        # A full tile's every key is earlier than its first query; that of one block and itself is masked, in three parts.
        whole = (rows[:, None] > columns).reshape(some.shape).all(axis=(1, 3))
        parts = np.sum(some, axis=(1, 3))[~whole]
        visited.append(np.sum(whole) * code.full + np.sum(parts > 0) * code.masked + np.sum(parts) * code.part)
    grid_heads = heads if pass_ == "forward" else kv_heads
    grid = 2 * grid_heads * length / devices / 1024
    assert charged == pytest.approx(2 * heads * np.mean(visited) + grid * code.row)


@pytest.mark.parametrize(
    "shapes",
    [("256,128", "2,128,128"), ("128,256", "256,128"), ("256,128", "256,128")],
    ids=["rows", "by_matrices", "as_they_stand"],
)
def test_a_grouped_matmul_is_charged_for_the_tiles_that_its_groups_visit(tmp_path, monkeypatch, shapes):
    """256 rows of 2 experts of 128 x 128, whose equal widths must not be taken for rows; a step costs one cycle here."""
    monkeypatch.setattr(loam_compile, "read_schedule", lambda *_: None)
    monkeypatch.setattr(loam_compile, "grouped_matmul_cycles", lambda _, steps, least: steps)
    words = ["--config.model.d_model=128", "--config.model.moe.d_ff=128", "--config.model.moe.num_experts=4"]
    config = load_train_config(write_config(tmp_path, "tiny-mixtral"), words)
    kernel = Kernel("gmm.1", 1.0, tuple(f"bf16[{shape}]{{1,0}}" for shape in shapes))
    mesh = {"expert": 2, "tensor": 1}
    charged = loam_compile.grouped_matmul_call_cycles(kernel, "", config, topology_of("v5e:2x2"), mesh, tmp_path)
    # In float32 and bfloat16 one tile holds all 256 rows; the group that does not begin it visits it again.
    assert charged == 2


def test_a_gather_by_all_reduce_counts_whole_however_well_it_is_covered():
    one = collectives.Collective("all-gather", "x", 1, [(0, 1)], 1, cycles=9.0, exposed_cycles=2.0)
    kinds = {"all-gather": 2, collectives.GATHER_BY_ALL_REDUCE: 9, "all-reduce": 0, "reduce-scatter": 0}
    assert {kind: loam_compile.exposed_as_gather(dataclasses.replace(one, kind=kind)) for kind in kinds} == kinds


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-mixtral"])
def test_what_is_recomputed_is_what_exceeds_three_passes(tmp_path, model):
    config = load_train_config(write_config(tmp_path, model), [])
    moe, d_model = config.model.moe, 64
    layer = 2 * d_model * (64 + 32) + (d_model * moe.num_experts if moe else 3 * d_model * 96)
    head = d_model * 512
    # Layers twice forward and twice for gradients, the head three times in all; experts are in kernels.
    done = 2 * 8 * 64 * (4 * 2 * layer + 3 * head)
    assert loam_compile.recomputed_share(config, done) == pytest.approx(2 * layer / (8 * layer + 3 * head))


# --- Refusals, before anything is compiled --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v5e:5x5"], "topology 'v5e:5x5' does not exist"),
        (["--topology=v9:2x2"], "'v9' is no TPU generation"),
        (["--topology=v5e:2x2", "--config.mesh.data=3"], "must multiply to 4"),
        (["--topology=v5e:2x2", "--config.batch_size=6"], "does not fit. the rows of a micro-batch"),
        (["--topology=v5e:2x4", "--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=8"], "does not divide"),
        (["--topology=v5e:2x2", CUDNN], "'cudnn' is not for 'tpu' devices"),
        (["--topology=v5e:2x2", "--search", CUDNN], "'cudnn' is not for 'tpu' devices"),
    ],
)
def test_bad_input_is_told_before_the_compiler_starts(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loam_compile, "run_alone", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr(loam_compile, "require_libtpu", lambda: None)
    if CUDNN in words:
        monkeypatch.setattr(train.memory, "_residual_bytes", lambda *_: pytest.fail("the model was traced"))
    assert main(["compile", f"--config={write_config(tmp_path)}", *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def compiler_that_says(told):
    """In place of the process that compiles."""

    def run_alone(command, environment, most_seconds):
        Path(command[-1], "report.json").write_text(json.dumps(told))
        return 0, ""

    return run_alone


def test_generated_code_is_live_memory(tmp_path, monkeypatch):
    memory = {"arguments": 3000, "outputs": 200, "aliased": 100, "temporaries": 50, "generated_code": 7}
    mesh = {"data": 2, "fsdp": 2, "expert": 1}
    told = {"mesh": mesh, "memory": memory, "estimated_step_seconds": 2.0, "collectives": []}
    monkeypatch.setattr(loam_compile, "run_alone", compiler_that_says(told))
    report = loam_compile.compile_config(write_config(tmp_path), [], topology_of("v5e:2x2"))
    assert report["hbm_bytes_per_device"] == 3000 + 200 - 100 + 50 + 7


def test_what_adapters_adapt_is_among_the_arguments_of_a_refused_step(tmp_path, monkeypatch):
    refused = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (63.82G) exceeds "
        "available HBM (15.75G)."
    )
    told = {"memory": None, "refused": refused, "mesh": {"data": 2, "fsdp": 2, "expert": 1}}
    told |= {"estimated_step_seconds": None, "collectives": None}
    monkeypatch.setattr(loam_compile, "run_alone", compiler_that_says(told))
    path = Path(write_config(tmp_path))
    lora = '    config.lora, config.initial_weights = {"rank": 2}, "not read"\n'
    path.write_text(path.read_text().replace("    return config", f"{lora}    return config"))
    report = loam_compile.compile_config(str(path), [], topology_of("v5e:2x2"))
    # Of float32, which fsdp halves, two layers and a head of 512 tokens.
    layer = 2 * 64 * (64 + 32) + 3 * 64 * 96
    assert report["hbm_bytes_per_device"] - 63.82 * GIB >= 4 * (2 * layer + 512 * 64) / 2


def test_a_missing_compiler_is_an_error_that_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loam_compile.importlib.util, "find_spec", lambda _: None)
    assert main(["compile", f"--config={write_config(tmp_path)}", "--topology=v5e:2x2"]) == 1
    assert "`make env EXTRAS=tpu`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (63.82G) exceeds "
            "available HBM (15.75G).",
            63.82 * GIB + 1000,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.",
            20.5 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 200.0M of 128.00M vmem.", None),
    ],
)
def test_the_compilers_refusal_becomes_a_number(message, size):
    found = exhausted_bytes(message, arguments=1000)
    assert found is None if size is None else found == pytest.approx(size, abs=1)


# --- Proposals and candidates ---------------------------------------------------------------------------------------


RL_CONFIG = """
from ml_collections import ConfigDict
from data.config import TaskConfig
from model.presets import preset

def get_config():
    config = ConfigDict()
    config.model = preset("tiny-llama", scan_layers=True, remat="full", dtype="bfloat16", max_seq_len=64)
    config.initial_weights = "not read"
    config.task = TaskConfig("addition")
    config.steps = 10
    config.policy = {{"group_size": 4, "kl": {{"loss_coefficient": 0.1}}}}
    config.rollouts = {{"prompts": 4, "max_prompt_tokens": 17, "max_tokens": 16}}
    config.eval = {{"prompts": 2, "samples": 2}}
    config.mesh = {{"data": 1, "fsdp": 2, "tensor": 2}}
    config.run_dir = {run_dir!r}
    return config
"""


MESH_OF_TEACHER = ("--config.mesh.fsdp=4", "--config.mesh.tensor=1")


@pytest.fixture
def rl_config(tmp_path):
    path = tmp_path / "by_reward.py"
    path.write_text(RL_CONFIG.format(run_dir=str(tmp_path / "run")))
    return str(path)


@pytest.mark.slow
def test_the_programs_of_reinforcement_learning_compile(rl_config, capsys):
    require_libtpu()
    judged = "--config.reward_model=x"
    assert main(["compile", f"--config={rl_config}", "--topology=v5e:2x2", "--json", judged]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"]
    assert list(report["programs"]) == ["hand_over", "decode", "score", "update", "judge"]
    # Whoever decodes has half of each weight, by tensor; a quarter of them was there before: float32, 4 bytes.
    half = 4 * (2 * (2 * 64 * (64 + 32) + 3 * 64 * 96) + 2 * 64 * 512) // 2
    assert half <= report["planned_bytes_per_device"]["weights of the sampler"] <= 1.02 * half  # norms are whole
    assert report["resharding_bytes_per_device"] == pytest.approx(half / 2, rel=0.02)
    assert {row["axes"] for row in report["programs"]["hand_over"]["collectives"]} == {"fsdp"}
    # Decoding splits over heads and width, and gathers no weights.
    decode = report["programs"]["decode"]
    assert {row["axes"] for row in decode["collectives"]} == {"tensor"}
    assert all(one["estimated_step_seconds"] > 0 for one in report["programs"].values())
    text = compile_rl.describe(report)
    assert f"MFU {100 * report['estimated_update_mfu']:.1f} %" in text


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("--config.mesh.fsdp=2", "--config.mesh.tensor=2"), MESH_OF_TEACHER], ids=str)
def test_experts_learn_by_reinforcement_too(rl_config, mesh, capsys):
    require_libtpu()
    path = Path(rl_config)
    path.write_text(path.read_text().replace('preset("tiny-llama"', 'preset("tiny-mixtral", attention_backend="flash"'))
    assert main(["compile", f"--config={rl_config}", "--topology=v5e:2x2", "--json", *mesh]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"]
    # No weights are gathered to decode.
    assert {row["axes"] for row in report["programs"]["decode"]["collectives"]} <= {"tensor"}


@pytest.mark.parametrize(("weights_ms", "expected_ms"), [(1, 15), (20, 25)], ids=["of all work", "less than all reads"])
def test_a_decoded_token_reads_the_pages_beside_what_the_compiler_knows(weights_ms, expected_ms):
    chip = topology_of("v6e:8x8").chip
    report = {
        "topology": "v6e:8x8",
        "planned_bytes_per_device": {"pages of the sampler": 5 / 1e3 * chip.hbm_bandwidth},
        "least_decode_seconds": (5 + weights_ms) / 1e3,
        "programs": {"decode": {"estimated_step_seconds": 0.01}},
    }
    assert compile_rl.decode_seconds(report) == pytest.approx(expected_ms / 1e3)


def test_a_teacher_stands_beside_all_but_the_update(rl_config, monkeypatch):
    told = {"memory": dict.fromkeys(("arguments", "outputs", "temporaries", "generated_code"), 1000) | {"aliased": 500}}
    told |= {"mesh": {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}, "estimated_step_seconds": 2.0, "collectives": []}
    monkeypatch.setattr(loam_compile, "run_alone", compiler_that_says(told))
    alone = compile_rl.compile_config(rl_config, MESH_OF_TEACHER, topology_of("v5e:2x2"))
    path = Path(rl_config)
    teacher = 'config.distillation = {"teacher": "not read", "model": preset("tiny-llama", max_seq_len=64)}'
    path.write_text(path.read_text().replace("    return config", f"    {teacher}\n    return config"))
    taught = compile_rl.compile_config(rl_config, MESH_OF_TEACHER, topology_of("v5e:2x2"))
    assert taught["planned_bytes_per_device"]["teacher"] == alone["planned_bytes_per_device"]["parameters"]
    more = {
        name: one["held_beside_bytes"] - alone["programs"][name]["held_beside_bytes"]
        for name, one in taught["programs"].items()
    }
    size = taught["planned_bytes_per_device"]["teacher"]
    assert more == {"hand_over": size, "decode": size, "score": size, "update": 0}


def test_a_reward_model_stands_beside_all_but_what_judges(rl_config, monkeypatch):
    told = {"memory": dict.fromkeys(("arguments", "outputs", "temporaries", "generated_code"), 1000) | {"aliased": 500}}
    told |= {"mesh": {"data": 1, "fsdp": 2, "expert": 1, "tensor": 2}, "estimated_step_seconds": 2.0, "collectives": []}
    monkeypatch.setattr(loam_compile, "run_alone", compiler_that_says(told))
    alone, judged = (
        compile_rl.compile_config(rl_config, words, topology_of("v5e:2x2")) for words in ([], ["--config.reward_model=x"])
    )
    beside = [{name: one["held_beside_bytes"] for name, one in report["programs"].items()} for report in (alone, judged)]
    # A network of the policy's shape, and a row of weights for its head, which is scattered over fsdp.
    size = alone["planned_bytes_per_device"]["parameters"] + 4 * 64 // 2
    assert {name: more - beside[0].get(name, 0) for name, more in beside[1].items() if name != "judge"} == dict.fromkeys(
        ("hand_over", "decode", "score", "update"), size
    )
    held = judged["planned_bytes_per_device"]
    assert beside[1]["judge"] == sum(held[name] for name in compile_rl.HELD if name in held) - size


def test_what_stands_beside_a_program_counts(rl_config, monkeypatch, capsys):
    told = {"memory": dict.fromkeys(("arguments", "outputs", "temporaries", "generated_code"), 1000) | {"aliased": 500}}
    told |= {"mesh": {"data": 1, "fsdp": 2, "expert": 1, "tensor": 2}, "estimated_step_seconds": 2.0, "collectives": []}
    monkeypatch.setattr(loam_compile, "run_alone", compiler_that_says(told))
    report = compile_rl.compile_config(rl_config, [], topology_of("v5e:2x2"))
    plan = report["planned_bytes_per_device"]
    # Each weight is scattered over all four devices but for the norms; two moments of Adam.
    assert plan["weights of the sampler"] == pytest.approx(2 * plan["parameters"], rel=0.02)
    assert plan["reference"] == plan["parameters"] == pytest.approx(plan["optimizer state"] / 2, rel=0.01)
    # Rows of 32 tokens and one more are three pages of 16, and there is one page more; keys and values of two heads, halved.
    assert plan["pages of the sampler"] == (16 * 3 + 1) * 16 * 2 * 2 * 2 * 16 * 2 // 2
    sampler, state = plan["weights of the sampler"] + plan["pages of the sampler"], plan["parameters"] + plan["optimizer state"]
    beside = {name: one["held_beside_bytes"] for name, one in report["programs"].items()}
    assert beside["decode"] == state + plan["reference"]
    assert beside["update"] == sampler + plan["reference"]
    assert beside["score"] == beside["hand_over"] == sampler + plan["reference"] + plan["optimizer state"]
    assert all(one["hbm_bytes_per_device"] == 3500 + one["held_beside_bytes"] for one in report["programs"].values())
    compile_rl.check_fits(report)
    untimed = report | {"programs": {name: one | {"estimated_step_seconds": None} for name, one in report["programs"].items()}}
    assert "hosts" not in compile_rl.describe(untimed)
    assert "these are 4 hosts, and reinforcement learning runs in one" in compile_rl.describe(untimed | {"topology": "v5e:4x4"})
    small = dataclasses.replace(topology_of("v5e:2x2"), chip=dataclasses.replace(CHIPS["v5e"], hbm_bytes=beside["score"]))
    refused = compile_rl.compile_config(rl_config, [], small)
    assert not refused["programs"]["score"]["fits"]
    with pytest.raises(loam_compile.DoesNotFit, match="by_reward needs .* during `(score|hand_over)`"):
        compile_rl.check_fits(refused)
    assert main(["compile", f"--config={rl_config}", "--topology=v5e:2x2", "--search"]) == 1
    assert "--search knows training steps alone" in capsys.readouterr().err


def test_inspect_plans_reinforcement_learning(rl_config, capsys):
    assert main(["inspect", f"--config={rl_config}", "--topology=v5e:2x2"]) == 0
    text = capsys.readouterr().out
    config = load_run_config(rl_config, [])
    mesh = mesh_sizes(config, 4)
    plan = plan_memory(config, mesh) | plan_sampler(config, mesh)
    assert f"{sum(plan.values()) / 2**20:,.1f} MiB" in text
    assert all(name in text for name in ("weights of the sampler", "pages of the sampler", "reference"))
    assert "16 answers of at most 16 tokens" in text


def llama(tmp_path, **changes):
    path = write_config(tmp_path, "llama3-8b", seq_len=2048, batch_size=64, mesh={"data": 16, "fsdp": 1})
    return changed_config(load_train_config(path, []), changes)


def test_proposals_need_less_by_plan_and_those_that_fit_come_first(tmp_path):
    config, topology = llama(tmp_path), topology_of("v5e:4x4")
    before = sum(plan_memory(config, mesh_sizes(config, 16)).values())
    texts = proposals(config, topology)
    planned = [float(text.split("planned: ")[1].split()[0]) for text in texts]
    assert 0 < len(texts) <= 4
    assert all(size * GIB < before for size in planned)
    report = {"fits": False, "hbm_bytes_per_device": 99 * GIB, "refused": ""}
    with pytest.raises(
        loam_compile.DoesNotFit, match=r"needs 99.00 GiB of HBM on each device of v5e:4x4, which has 15.75. Try --config"
    ):
        check_fits(report, config, topology)


def test_what_fits_is_no_error(tmp_path):
    check_fits({"fits": True}, llama(tmp_path), topology_of("v5e:4x4"))


def test_another_memory_than_hbm_is_told_in_the_compilers_words(tmp_path):
    report = {"fits": False, "hbm_bytes_per_device": None, "refused": "memory space vmem"}
    with pytest.raises(RuntimeError, match="not of HBM: memory space vmem"):
        check_fits(report, llama(tmp_path), topology_of("v5e:4x4"))


def test_candidates_use_all_devices_and_fit_by_plan(tmp_path):
    config, topology = llama(tmp_path), topology_of("v5e:4x4")
    found = candidates(config, topology)
    assert found
    meshes = set()
    for changes in found:
        changed = changed_config(config, changes)
        mesh = mesh_sizes(changed, 16)
        assert math.prod(mesh.values()) == 16
        assert sum(plan_memory(changed, mesh).values()) <= topology.chip.hbm_bytes
        meshes.add((mesh["data"], mesh["fsdp"], mesh["tensor"]))
    assert len(meshes) == len({tuple(m) for m in meshes}) > 1
    assert (16, 1, 1) not in meshes  # 8 billion parameters on every device
    # Of each mesh and batch all policies from that which keeps most and fits.
    order, policies = loam_compile.REMAT_ORDER, {}
    for changes in found:
        policies.setdefault(json.dumps(changes | {"model.remat": ""}), []).append(changes["model.remat"])
    for key, kept in policies.items():
        most = min(map(order.index, kept))
        assert sorted(kept, key=order.index) == list(order[most:])
        if most:
            more = changed_config(config, json.loads(key) | {"model.remat": order[most - 1]})
            assert sum(plan_memory(more, mesh_sizes(more, 16)).values()) > topology.chip.hbm_bytes


def test_candidates_are_what_is_given_then_the_best_guess_of_each_mesh(tmp_path):
    config, topology = llama(tmp_path), topology_of("v5e:4x4")
    found = candidates(config, topology)
    fitting = found[-1]
    again = candidates(changed_config(config, fitting), topology)
    assert again[0] == fitting
    assert sorted(map(str, again)) == sorted(map(str, found))
    meshes = [tuple(value for key, value in changes.items() if key.startswith("mesh")) for changes in again[1:]]
    every = set(meshes)
    assert len(every) > 1
    assert set(meshes[: len(every)]) == every


def test_experts_are_tried_on_an_axis_of_their_own_and_without(tmp_path):
    path = write_config(tmp_path, "tiny-mixtral", mesh={"data": 1, "fsdp": 2, "expert": 2})
    found = candidates(load_train_config(path, []), topology_of("v5e:2x2"))
    assert {changes["mesh.expert"] for changes in found} == {1, 2}
    assert {changes["mesh.context"] for changes in found} == {1}


def test_changes_are_the_overrides_that_make_them(tmp_path):
    changes = {"mesh.fsdp": 4, "mesh.data": 1, "model.remat": "full", "batch_size": 4}
    path = write_config(tmp_path)
    assert load_train_config(path, as_overrides(changes)) == changed_config(load_train_config(path, []), changes)


def test_a_search_ranks_by_time_per_token(tmp_path, monkeypatch, capsys):
    """Fewer rows take less time a step, but more a token; what does not fit is left out."""

    def pretend(path, overrides, topology, most_seconds):
        config = load_train_config(path, overrides)
        tokens = config.tokens_per_step
        report = {"fits": config.mesh.tensor < 4, "tokens_per_step": tokens, "estimated_step_seconds": 1 + 1e-6 * tokens}
        return report | {"estimated_mfu": 0.5, "hbm_bytes_per_device": 2 * GIB, "topology": "v5e:2x2"}

    monkeypatch.setattr(loam_compile, "compile_config", pretend)
    monkeypatch.setattr(loam_compile, "require_libtpu", lambda: None)
    path, run_dir = write_config(tmp_path), f"--config.run_dir={tmp_path / 'run'}"
    words = ["compile", f"--config={path}", "--topology=v5e:2x2", "--search", "--tries=1000", "--json", run_dir]
    assert main(words) == 0
    out, said = capsys.readouterr()
    best = json.loads(out)
    times = [one["estimated_step_seconds"] / one["tokens_per_step"] for one in best["ranking"]]
    assert times == sorted(times)
    assert times[0] == best["estimated_step_seconds"] / best["tokens_per_step"]
    assert best["tokens_per_step"] == max(one["tokens_per_step"] for one in best["ranking"])
    assert not any("--config.mesh.tensor=4" in one["overrides"] for one in best["ranking"])
    assert all(" ".join(one["overrides"]) in said.split("estimate, with")[1] for one in best["ranking"])


# Stands for the compiler: it hangs, with a child, on full remat, and crashes, fails or refuses by the mesh.
FAKE_COMPILER = """
import json, os, pathlib, signal, sys, time
directory = pathlib.Path(sys.argv[1])
task = json.loads((directory / "task.json").read_text())
mesh = {word.split("mesh.")[1].split("=")[0]: int(word.split("=")[1]) for word in task["overrides"] if "mesh." in word}
if "--config.model.remat=full" in task["overrides"]:
    child = os.fork()
    if child:
        pathlib.Path(sys.argv[2]).write_text(f"{os.getpid()} {child}")
    time.sleep(60)
if mesh["tensor"] == 2:
    os.kill(os.getpid(), signal.SIGSEGV)
if mesh["fsdp"] == 4:
    sys.exit("INTERNAL: Mosaic failed to compile TPU kernel")
memory = {"arguments": 1, "outputs": 0, "aliased": 0, "temporaries": 0, "generated_code": 0}
report = {"mesh": {**mesh, "expert": 1}, "memory": memory, "estimated_step_seconds": 2.0, "collectives": [], "kernels": []}
(directory / "report.json").write_text(json.dumps({"error": "no such layout"} if mesh["data"] == 2 else report))
"""


def is_alive(pid):
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_search_survives_what_the_compiler_fails_on(tmp_path, monkeypatch):
    """A crash, an error, a refusal and a hang: each is told, what compiles is ranked, and nothing is left running."""
    run_alone, logged = loam_compile.run_alone, []

    def compiler(command, environment, most_seconds):
        assert most_seconds == 900
        hangs = "remat=full" in Path(command[-1], "task.json").read_text()
        fake = [sys.executable, "-c", FAKE_COMPILER, command[-1], str(tmp_path / "pids")]
        return run_alone(fake, environment, 3 if hangs else None)

    monkeypatch.setattr(loam_compile, "run_alone", compiler)
    meshes = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2)]
    changes: list[dict] = [{"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor} for data, fsdp, tensor in meshes]
    changes.append({**changes[0], "model.remat": "full"})
    monkeypatch.setattr(loam_compile, "candidates", lambda *_: changes)
    path, slice_ = write_config(tmp_path), topology_of("v5e:2x2")
    ranked = loam_compile.search(path, [], slice_, 5, logged.append)
    assert [one for one, _ in ranked] == changes[:1]
    failures = [line.partition(": failed: ")[2] for line in logged if "failed" in line]
    refused, failed, crashed, hung = failures
    assert refused == "no such layout"
    assert "ended with status 1: INTERNAL: Mosaic failed" in failed
    assert "ended with status -11" in crashed
    assert hung == "took more than 3 s"
    until = time.monotonic() + 20
    while any(map(is_alive, (tmp_path / "pids").read_text().split())):
        assert time.monotonic() < until, "the compiler still runs"
    monkeypatch.setattr(loam_compile, "candidates", lambda *_: changes[1:3])
    nothing = "none of the 2 candidates tried fits v5e:2x2, and 2 failed to compile: mend what the compiler said of each$"
    with pytest.raises(ValueError, match=nothing):
        loam_compile.search(path, [], slice_, 5, logged.append)


@pytest.mark.parametrize(
    ("ends", "tries", "told"),
    [
        ("large large", 2, "tried fits v5e:2x2: take a larger slice"),
        ("large large", 1, "tried fits v5e:2x2: raise --tries, since 1 more fit by plan, or take a larger slice"),
        ("late late", 2, "and 2 failed to compile, 2 of which took more than 900 s: leave more of the machine to the compiler"),
        ("late broken late", 2, "1 of which took more than 900 s: leave more of the machine to the compiler, or raise --tries"),
        ("broken large", 2, "and 1 failed to compile: take a larger slice"),
    ],
)  # fmt: skip
def test_a_search_that_finds_nothing_says_what_would_help(tmp_path, monkeypatch, ends, tries, told):
    errors = {"late": loam_compile.TookTooLong("took more than 900 s"), "broken": RuntimeError("Mosaic failed")}
    outcomes = iter(ends.split())

    def pretend(*_):
        if error := errors.get(next(outcomes)):
            raise error
        return {"fits": False}

    monkeypatch.setattr(loam_compile, "compile_config", pretend)
    monkeypatch.setattr(loam_compile, "candidates", lambda *_: [{"batch_size": 8}] * len(ends.split()))
    with pytest.raises(ValueError, match=f"none of the {tries} candidates") as refusal:
        loam_compile.search(write_config(tmp_path), [], topology_of("v5e:2x2"), tries, print)
    assert told in str(refusal.value)
    assert ("--tries" in str(refusal.value)) == (tries < len(ends.split()))


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.78, ""), (0.8, "it may not fit"), (0.99, "it may not fit"), (1.01, "it will hardly fit")],
)
def test_inspect_says_how_far_a_plan_can_be_trusted(tmp_path, monkeypatch, share, told):
    """What stands below the chip's HBM by less than plans have been too low is told, too."""
    slice_ = topology_of("v5e:2x2")
    plan = {"parameters": 1000, "activations": round(share * slice_.chip.hbm_bytes) - 1000}
    monkeypatch.setattr(experiments.inspect, "plan_memory", lambda *_: plan)
    text = describe_plan(load_train_config(write_config(tmp_path), []), slice_)
    warnings = [line.strip() for line in text.splitlines() if "fit" in line]
    assert [line.partition(":")[0] for line in warnings] == ([told] if told else [])
    assert all("up to 21 % below what the compiler allocates" in line for line in warnings)


def test_inspect_plans_a_slice(tmp_path, capsys):
    path = write_config(tmp_path, "llama3-8b", seq_len=2048, batch_size=256, mesh={"data": 1, "fsdp": -1})
    assert main(["inspect", f"--config={path}", "--topology=v5e:16x16", "--config.model.remat=full"]) == 0
    text = capsys.readouterr().out
    assert "v5e:16x16 (256 devices), mesh data 1, fsdp 256" in text
    config = load_train_config(path, ["--config.model.remat=full"])
    plan = plan_memory(config, mesh_sizes(config, 256))
    assert f"{sum(plan.values()) / 2**20:,.1f} MiB" in text
    assert "of its 15.75 GiB" in text
    assert main(["inspect", f"--config={path}", "--topology=v5e:2x2", "--config.batch_size=8"]) == 0
    assert "it will hardly fit" in capsys.readouterr().out
    assert main(["inspect", f"--config={path}", "--topology=v5e:2x2", "--config.batch_size=8", CUDNN]) == 1
    output = capsys.readouterr()
    assert "'cudnn' is not for 'tpu' devices" in output.err
    assert not output.out


def test_inspect_plans_slices_joined_along_data(tmp_path, capsys):
    """A device holds what it would on one slice with a batch as many times smaller."""
    path = write_config(tmp_path, "llama3-8b", seq_len=2048, batch_size=1024, mesh={"data": -1, "fsdp": 256})
    words = ["inspect", f"--config={path}", "--topology=v5e:16x16", "--config.model.remat=full"]
    assert main([*words, "--slices=4"]) == 0
    text = capsys.readouterr().out
    assert "memory per device of 4 x v5e:16x16 (1,024 devices), mesh data 4, fsdp 256" in text
    assert main([*words, "--config.batch_size=256"]) == 0
    one = capsys.readouterr().out
    memory = [[line for line in told.splitlines() if "MiB" in line] for told in (text, one)]
    assert memory[0]
    assert memory[0] == memory[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--topology=v5e:16x16", "--slices=2"], "data=1 does not divide over 2 slices"),
        (["--slices=2"], "--slices=2 says how many of --topology there are, which is not given"),
        (["--topology=v5e:16x16", "--slices=0"], "--slices=0 must be at least 1"),
    ],
)
def test_inspect_refuses_slices_that_cannot_be_joined(tmp_path, capsys, words, told):
    path = write_config(tmp_path, "llama3-8b", seq_len=2048, batch_size=1024, mesh={"data": 1, "fsdp": -1})
    assert main(["inspect", f"--config={path}", *words]) == 1
    output = capsys.readouterr()
    assert told in output.err
    assert not output.out
