"""`loam compile`: compiles the programs of a config for a TPU slice, on a machine that has none, and says what they take.

Pretraining and fine-tuning have one, the training step; those of reinforcement learning are in experiments/compile_rl.py.

The compiler is libtpu's own, so what does not fit into HBM does not fit on the slice either. Seconds and MFU are the compiler's
estimate: cycles of its operations over the clock, the bundles of Pallas kernels times the tiles of one document as long as a
row, and the time that collectives need on the links beyond the work that covers them. Nothing was measured.

Every compilation has a process of its own, because libtpu reads its flags once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import operator
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import collectives, hlo
from experiments.launch_local import POLL_SECONDS, end_by, noted_stops
from experiments.tpu_schedule import (
    AttentionCode,
    causal_tiles,
    compiler_environment,
    grouped_matmul_cycles,
    grouped_matmul_steps,
    read_schedule,
)
from model.chips import Topology, topology_of
from model.config import ModelConfig, check
from model.xla import TPU_FLAGS, with_flags
from train.config import TrainConfig
from train.rl_config import RLConfig

if TYPE_CHECKING:
    from train.step import Job

GIB = 2**30
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
# What keeps more comes first: the first that fits recomputes least.
REMAT_ORDER = ("none", "dots", "attention", "full")
Report = dict[str, Any]
ITEMSIZE = {"bfloat16": 2, "float32": 4}
MOST_COMPILE_SECONDS = 900
RANKED = ("tokens_per_step", "estimated_step_seconds", "estimated_mfu", "hbm_bytes_per_device")


class DoesNotFit(RuntimeError):
    """The step needs more HBM than a device has."""


class TookTooLong(RuntimeError):
    """The compiler was stopped at its limit of seconds."""


# --- In a process of its own --------------------------------------------------------------------------------------------------


def compile_program(config: TrainConfig | RLConfig, program: str, topology: Topology, dump: Path) -> Report:
    """Compiles one program of the config. The report lacks what needs no compiler.

    Args:
      program: `step`, or one of `experiments.compile_rl.PROGRAMS` or JUDGE.

    If it has Pallas kernels, this process is replaced by one whose compiler leaves its schedules in `dump`: that takes a
    third longer.
    """
    import jax
    from jax.experimental import topologies

    # With megacore a v4 chip is one device, as it is on a TPU VM.
    options: dict[str, Any] = {"chip_config_name": topology.chip.configuration} if topology.chip.configuration else {}
    if topology.num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    begin = time.perf_counter()
    if isinstance(config, RLConfig):
        from experiments.compile_rl import lower

        lowered, on_mesh = lower(config, program, devices)
    else:
        lowered, on_mesh = lower_step(config, program, devices)
    if not dump.exists() and "tpu_custom_call" in lowered.as_text():
        dump.mkdir()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], compiler_environment(dump))
    lowered_at = time.perf_counter()
    mesh = {str(axis): size for axis, size in on_mesh.shape.items()}
    report: Report = {"mesh": mesh, "lower_seconds": lowered_at - begin, "jax": jax.__version__}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report | {"memory": None, "refused": str(error), "estimated_step_seconds": None, "collectives": None}
    report["compile_seconds"] = time.perf_counter() - lowered_at
    memory = compiled.memory_analysis()
    report["memory"] = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "generated_code": memory.generated_code_size_in_bytes,
    }
    places = [device.coords for device in on_mesh.devices.flat]
    return report | analyse(compiled.as_text(), config, topology, mesh, places, dump)


def lower_step(config: TrainConfig, program: str, devices: Sequence[Any]) -> tuple[Any, Any]:
    """The training step, lowered, and its mesh."""
    from train.step import abstract_batch, make_trainer

    assert program == "step"
    trainer = make_trainer(config, devices)
    return trainer.step.lower(trainer.abstract_state, abstract_batch(config)), trainer.mesh


def analyse(
    text: str, config: Job, topology: Topology, mesh: Mapping[str, int], places: Sequence[Sequence[int]], dump: Path
) -> Report:
    """What the text of the compiled program tells."""
    module = hlo.parse(text, chunks_of_experts(config, mesh["expert"]))
    done = hlo.work(module)
    dumped = {kernel.code: kernel.name for kernel in done.kernels if has_schedule(dump, kernel.name)}
    kernels = [kernel_report(kernel, dumped.get(kernel.code), config, topology, mesh, dump) for kernel in done.kernels]
    cycles = done.cycles | {"kernel": sum(kernel["cycles"] for kernel in kernels)}
    clock = topology.chip.clock
    found = collectives.find(
        module,
        lambda one: collectives.seconds(one, topology, places) * clock,
        {kernel["instruction"]: kernel["cycles"] / kernel["times"] for kernel in kernels},
    )
    rows = collectives.traffic(found, mesh, topology)
    exposed = sum(row.exposed_seconds for row in rows)
    return {
        "estimated_cycles": cycles,
        "matmul_flops_per_device": done.flops,
        "kernels": kernels,
        "collectives": [row._asdict() for row in rows],
        "exposed_all_gathers": [
            {
                "name": one.name,
                "kind": one.kind,
                "bytes": one.times * one.moved_bytes(topology.num_devices),
                "times": one.times,
                "exposed_seconds": one.times * waited / clock,
            }
            for one in found
            if (waited := exposed_as_gather(one))
        ],
        "exposed_collective_seconds": exposed,
        "sparse_core_programs": [dataclasses.asdict(aside) for aside in done.asides],
        "loops_of_unknown_length": done.unknown_loops,
        "estimated_step_seconds": sum(cycles.values()) / clock + exposed,
    }


def exposed_as_gather(one: collectives.Collective) -> float:
    """Cycles of a gather that no work covers; 0 for other collectives.

    One that has become an all-reduce counts whole, whatever stands beside it: it holds the links twice as long as it had to,
    and while it does, nothing else that moves is covered.
    """
    if one.kind == collectives.GATHER_BY_ALL_REDUCE:
        return one.cycles
    return one.exposed_cycles if one.kind == "all-gather" else 0.0


def recomputed_share(config: Job, matmul_flops: float) -> float:
    """Of the FLOPs of a step's matmuls outside of Pallas kernels, the part that remat does over again.

    Args:
      matmul_flops: of all devices. Those of the flash kernel and, in layers with experts, of the grouped matmul are not in it.
    """
    from model.flops import train_matrix_flops_per_token

    per_token = train_matrix_flops_per_token(config.model, config.lora)
    needed = config.update_rows * config.row_tokens * (sum(per_token.values()) - per_token["experts"])
    return 1 - needed / matmul_flops


def chunks_of_experts(config: Job, devices: int) -> float:
    """How often the loops over a device's rows for experts run (`model/moe.py`) if the router is even; no other loop's length
    is open."""
    moe = config.model.moe
    return moe.experts_per_token / min(moe.experts_per_token, moe.num_experts // devices) if moe else 1.0


def has_schedule(dump: Path, instruction: str) -> bool:
    return any(dump.glob(f"*-{instruction}-*final_bundles.txt"))


def kernel_report(
    kernel: hlo.Kernel, schedule: str | None, config: Job, topology: Topology, mesh: Mapping[str, int], dump: Path
) -> Report:
    """Calls of a Pallas kernel, and cycles of all of them: of attention and experts from their schedules, of others from their
    FLOPs, and so where a teacher has other ones.

    Args:
      schedule: the instruction under whose name the kernel's schedule was dumped.
    """
    attention = re.search(r"flash_(forward|backward)", kernel.name)  # An instruction is named after scopes around it, too.
    moe = config.model.moe
    source = "its schedule"
    if config.distillation and shapes_of_kernels(config.distillation.model) != shapes_of_kernels(config.model):
        schedule = None  # Whose kernel it is cannot be told: the teacher's are called the same.
    if attention and schedule:
        each = attention_call_cycles(attention[1], kernel, f"-{schedule}-", config, topology, mesh["context"], dump)
    elif moe and schedule and "gmm" in kernel.name:
        each = grouped_matmul_call_cycles(kernel, f"-{schedule}-", config, topology, mesh, dump)
    else:
        each, source = kernel.flops / topology.chip.flops_per_cycle, "its FLOPs at peak"
    return {"instruction": kernel.name, "times": kernel.times, "cycles": kernel.times * each, "by": source}


def shapes_of_kernels(model: ModelConfig) -> tuple[Any, ...]:
    """What the cycles of its kernels are reckoned from, besides their operands."""
    windows = [model.window(layer) for layer in range(model.num_layers)]
    shares = {window: windows.count(window) / len(windows) for window in windows}
    return shares, model.head_dim, model.attention_soft_cap, model.dtype, model.d_model, model.moe


def attention_call_cycles(
    pass_: str, kernel: hlo.Kernel, schedule: str, config: Job, topology: Topology, context: int, dump: Path
) -> float:
    """Cycles of one call for a document as long as a row: the mean over the layers' windows and over parts of the context."""
    from model.kernels.tiles import BlockSizes, part_sizes

    # Queries and keys, [B, H, T, D] and [B, K, S, D]: two of the operands, in another order in each pass.
    wide = [shape for shape in map(hlo.first_shape, kernel.operands) if len(shape) == 4]
    queries, keys = (wide[0], wide[1]) if pass_ == "forward" else (wide[2], wide[0])
    model = config.model
    sizes = BlockSizes.of_chip(topology.chip, model.head_dim, model.attention_soft_cap).for_itemsize(ITEMSIZE[model.dtype])
    if context > 1:
        sizes = sizes.dividing(queries[2] // 2)
    block = getattr(sizes, pass_)
    block = (min(block[0], queries[2]), min(block[1], keys[2]))
    part = part_sizes(block)
    length, of_keys = config.row_tokens, pass_ == "backward"
    layers = [model.window(layer) for layer in range(model.num_layers)]
    tiles = [causal_tiles(length, window, block, part, of_keys) for window in layers]
    mean = functools.reduce(operator.add, tiles) * (queries[0] * queries[1] / len(layers) / context**2)
    grid = keys if of_keys else queries
    visits = dataclasses.replace(mean, rows=grid[0] * grid[1] * grid[2] / block[of_keys])
    chip = topology.chip
    # The cores of a device share the steps of the grid; each has its part of the MXUs.
    pair = (5 if of_keys else 2) * 2 * queries[3] / (chip.flops_per_cycle / chip.cores)
    code = AttentionCode.of(read_schedule(dump, schedule), block[of_keys] // part[of_keys])
    return code.cycles(visits, pair * math.prod(block), pair * math.prod(part)) / chip.cores


def grouped_matmul_call_cycles(
    kernel: hlo.Kernel, schedule: str, config: Job, topology: Topology, mesh: Mapping[str, int], dump: Path
) -> float:
    """Cycles of one call with all rows filled."""
    from model.kernels.grouped_matmul import tiling

    moe = config.model.moe
    assert moe is not None
    groups = moe.num_experts // mesh["expert"]
    # Rows [R, D] and matrices [G, D, F], in either order; for the matrices' gradient rows of both widths, in any layout.
    first, second = sorted((s for s in map(hlo.first_shape, kernel.operands) if len(s) > 1), key=len)[:2]
    if len(second) == 3:
        rows, inner = first
        outer = math.prod(second[1:]) // inner
    else:
        matrix = config.model.d_model * (moe.d_ff // mesh["tensor"])
        rows = math.isqrt(math.prod(first) * math.prod(second) // matrix)
        inner, outer = math.prod(first) // rows, math.prod(second) // rows
    tile = tiling(ITEMSIZE[config.model.dtype])(rows, inner, outer)
    chip = topology.chip
    least = 2 * math.prod(tile) / (chip.flops_per_cycle / chip.cores)
    steps = grouped_matmul_steps(rows, groups, inner, outer, tile)
    return grouped_matmul_cycles(read_schedule(dump, schedule), steps, least) / chip.cores


def worker(directory: Path) -> None:
    """Reads task.json (config, overrides, program and topology) and writes report.json: a report, or {"error": message}."""
    from experiments.cli import load_run_config

    task = json.loads((directory / "task.json").read_text())
    try:
        config = load_run_config(task["config"], task["overrides"])
        report = compile_program(config, task["program"], topology_of(task["topology"]), directory / "schedules")
    except (ValueError, RuntimeError) as error:
        report = {"error": str(error)}
    (directory / "report.json").write_text(json.dumps(report))


# --- Here ---------------------------------------------------------------------------------------------------------------------


def require_libtpu() -> None:
    """Raises ImportError with what to do unless the compiler is installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "libtpu, the TPU compiler, is not installed: `make env EXTRAS=tpu` in a checkout, or `pip install 'jax[tpu]'`, "
            "installs it. No TPU is needed"
        )


def run_compiler(
    path: str, overrides: Sequence[str], program: str, topology: Topology, most_seconds: float | None = None
) -> Report:
    """What `compile_program` says, in a process of its own, and the `flags` it had.

    Raises:
      ValueError: what the mesh or the network is refused for.
      RuntimeError: the compiler failed, or took more than `most_seconds`.
    """
    environment = compiler_environment()
    environment["LIBTPU_INIT_ARGS"] = with_flags(environment["LIBTPU_INIT_ARGS"], TPU_FLAGS)
    with tempfile.TemporaryDirectory() as directory:
        task = {"config": path, "overrides": list(overrides), "program": program, "topology": topology.name}
        Path(directory, "task.json").write_text(json.dumps(task))
        command = [sys.executable, "-m", "experiments.compile", directory]
        status, said = run_alone(command, environment, most_seconds)
        output = Path(directory, "report.json")
        if not output.exists():
            last = [line for line in said.strip().splitlines() if line.strip()][-3:]
            raise RuntimeError(f"the compiler for {topology.name} ended with status {status}: {' / '.join(last)}")
        compiled = json.loads(output.read_text())
    if "error" in compiled:
        raise ValueError(compiled["error"])
    return {"flags": environment["LIBTPU_INIT_ARGS"].split(), **compiled}


def run_alone(command: Sequence[str], environment: Mapping[str, str], most_seconds: float | None) -> tuple[int, str]:
    """The exit status of a command and what it wrote to stderr. It leaves nothing running, unless this is killed by SIGKILL.

    Raises:
      TookTooLong: it took more than `most_seconds`.
    """
    until = time.monotonic() + (math.inf if most_seconds is None else most_seconds)
    with tempfile.TemporaryFile("w+", errors="replace") as said, noted_stops() as stops:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=said, text=True, start_new_session=True
        )
        while process.poll() is None and not stops and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        status = process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        said.seek(0)
        text = said.read()
    if stops:
        end_by(stops[0])
    if status is None:
        raise TookTooLong(f"took more than {most_seconds:g} s")
    return status, text


def live_bytes(memory: Mapping[str, int]) -> int:
    """Of HBM, while a program runs."""
    return memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] + memory["generated_code"]


def compile_config(path: str, overrides: Sequence[str], topology: Topology, most_seconds: float | None = None) -> Report:
    """The report of a training config for a slice; `fits` says whether its HBM suffices.

    Raises:
      ValueError: what the config, the mesh or the attention backend is refused for.
      RuntimeError: the compiler failed, or took more than `most_seconds`.
    """
    from experiments.cli import load_train_config
    from model.flops import train_flops_per_token
    from train.memory import plan_memory
    from train.step import check_backends, mesh_sizes

    config = load_train_config(path, list(overrides))
    check_backends(config, "tpu")
    plan = plan_memory(config, mesh_sizes(config, topology.num_devices))
    compiled = run_compiler(path, overrides, "step", topology, most_seconds)
    chip, tokens = topology.chip, config.tokens_per_step
    flops = train_flops_per_token(config.model, config.data.seq_len, config.lora) * tokens
    report: Report = {
        "config": config.name,
        "overrides": list(overrides),
        "topology": topology.name,
        "chip": chip.name,
        "devices": topology.num_devices,
        "tokens_per_step": tokens,
        "remat": config.model.remat,
        "rows_per_device": config.batch_size // config.accumulation / shards(compiled["mesh"]),
        "hbm_limit_bytes": chip.hbm_bytes,
        "model_flops_per_step": flops,
        "planned_bytes_per_device": plan,
        **compiled,
    }
    memory = compiled["memory"]
    if memory is None:
        kept = ("parameters", "optimizer state", "moving average", "frozen weights", "reference", "teacher")
        arguments = sum(plan.get(name, 0) for name in kept)
        live = exhausted_bytes(compiled["refused"], arguments)
    else:
        live = live_bytes(memory)
    seconds = report["estimated_step_seconds"]
    # A reference, a teacher and heads of other objectives have matmuls of their own.
    alone = config.objective is None and config.distillation is None
    if memory is not None and config.model.attention_backend == "flash" and alone:
        done = compiled["matmul_flops_per_device"] * topology.num_devices
        report["recomputed_flops_share"] = recomputed_share(config, done)
    report["estimated_mfu"] = seconds and flops / (seconds * topology.num_devices * chip.peak_flops)
    report["hbm_bytes_per_device"] = live
    report["fits"] = memory is not None and live is not None and live <= chip.hbm_bytes
    return report


def shards(mesh: Mapping[str, int]) -> int:
    """Over how many parts of the mesh the rows of a batch lie."""
    from model.sharding import TRAIN_RULES

    return math.prod(mesh[axis] for axis in TRAIN_RULES["batch"])


def exhausted_bytes(message: str, arguments: int) -> int | None:
    """Bytes that a refused program needs per device, from the compiler's message; None if it is not about HBM.

    Args:
      arguments: bytes of the program's arguments, which one of its messages leaves out.
    """
    number = r"([\d.]+)([KMGT]?)"
    if match := re.search(rf"Used {number}i?B? of [\d.]+[KMGT]?i?B? hbm", message):
        return int(float(match[1]) * UNITS[match[2]])
    if match := re.search(rf"memory on HBM, the total memory required for HLO temporaries \({number}\)", message):
        return int(float(match[1]) * UNITS[match[2]]) + arguments
    return None


def proposals(config: TrainConfig, topology: Topology) -> list[str]:
    """Overrides that need less memory, with what the plan says of each; those that fit first, no more than four."""
    from train.memory import plan_memory
    from train.step import mesh_sizes

    mesh = mesh_sizes(config, topology.num_devices)
    rows = config.batch_size // config.accumulation // shards(mesh)
    tried: list[dict[str, Any]] = [
        {"model.remat": policy} for policy in REMAT_ORDER[REMAT_ORDER.index(config.model.remat) + 1 :]
    ]
    if rows > 1:
        tried += [{"accumulation": 2 * config.accumulation}, {"batch_size": config.batch_size // 2}]
    if mesh["data"] > 1:
        tried.append({"mesh.data": 1, "mesh.fsdp": mesh["data"] * mesh["fsdp"]})
    if mesh["fsdp"] % 2 == 0:
        tried.append({"mesh.fsdp": mesh["fsdp"] // 2, "mesh.tensor": 2 * mesh["tensor"], "batch_size": config.batch_size // 2})
    if not config.loss.chunk_tokens:
        tried.append({"loss.chunk_tokens": 1024})
    found = []
    for changes in tried:
        try:
            changed = changed_config(config, changes)
            total = sum(plan_memory(changed, mesh_sizes(changed, topology.num_devices)).values())
        except ValueError:
            continue
        found.append((total, f"{' '.join(as_overrides(changes))} (planned: {total / GIB:.1f} GiB)"))
    found.sort(key=lambda item: (item[0] > topology.chip.hbm_bytes, item[0] if item[0] > topology.chip.hbm_bytes else 0))
    return [text for _, text in found[:4]]


def changed_config(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """A config with some dotted keys set."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            value = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section or name: value})
    return config


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in changes.items()]


def check_fits(report: Report, config: TrainConfig, topology: Topology) -> None:
    """Raises DoesNotFit, with what would, unless the report's program fits."""
    if report["fits"]:
        return
    needed = report["hbm_bytes_per_device"]
    if needed is None:
        raise RuntimeError(f"the compiler ran out of a memory on the chip, not of HBM: {report['refused']}")
    better = proposals(config, topology)
    hint = f"Try {'; or '.join(better)}" if better else "Take a larger slice"
    raise DoesNotFit(
        f"{config.name} needs {needed / GIB:.2f} GiB of HBM on each device of {topology.name}, which has "
        f"{topology.chip.hbm_bytes / GIB:.2f}. {hint}"
    )


# --- Searching ----------------------------------------------------------------------------------------------------------------


def candidates(config: TrainConfig, topology: Topology) -> list[dict[str, Any]]:
    """Changes of mesh, remat and batch that pass the checks and, by plan, fit.

    Meshes over data, fsdp and tensor, with the context axis of the config and its expert axis or none: what those are worth
    depends on documents and router, which the estimate takes to be as long as a row and even. 1, 2, 4 or 8 rows for each of
    data x fsdp x expert. The config as it is comes first if it fits, then the best guess for each mesh, then the second best
    for each, and so on. To recompute less is guessed to be better, then more rows; of meshes, less tensor parallelism, then
    experts spread as in the config.
    """
    from model.sharding import TRAIN_RULES, factorizations, mesh_problem, resolve_sizes
    from train.memory import plan_memory
    from train.step import mesh_arrays

    given = resolve_sizes(dataclasses.asdict(config.mesh), topology.num_devices)

    def change(mesh: Mapping[str, int], rows: int, remat: str) -> dict[str, Any]:
        changes: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.items()}
        return changes | {"model.remat": remat, "batch_size": rows * shards(mesh) * config.accumulation}

    def fits(changes: Mapping[str, Any], mesh: dict[str, int]) -> bool:
        try:
            changed = changed_config(config, changes)
        except ValueError:  # Some jobs go with some axes only.
            return False
        if mesh_problem(mesh_arrays(changed), TRAIN_RULES, mesh):
            return False
        return sum(plan_memory(changed, mesh).values()) <= topology.chip.hbm_bytes

    found = []
    for mesh in factorizations(topology.num_devices):
        if mesh["context"] != given["context"] or mesh["expert"] not in (1, given["expert"]):
            continue
        guesses = [
            changes for remat in REMAT_ORDER for rows in (8, 4, 2, 1) if fits(changes := change(mesh, rows, remat), mesh)
        ]
        order = (mesh["tensor"], mesh["expert"] != given["expert"], mesh["data"])
        found += [(rank, *order, changes) for rank, changes in enumerate(guesses)]
    as_given = change(given, config.batch_size // (shards(given) * config.accumulation), config.model.remat)
    ordered = [changes for *_, changes in sorted(found, key=lambda item: item[:-1])]
    return [as_given] * fits(as_given, given) + [changes for changes in ordered if changes != as_given]


def search(
    path: str, overrides: Sequence[str], topology: Topology, tries: int, log: Callable[[str], None]
) -> list[tuple[dict[str, Any], Report]]:
    """(changes, report) of the first `tries` candidates that fit, the fastest per token first. One that the compiler fails on,
    or takes more than MOST_COMPILE_SECONDS for, is told and left out.

    Raises:
      ValueError: none is left.
    """
    from experiments.cli import load_train_config
    from train.step import check_backends

    config = load_train_config(path, list(overrides))
    check_backends(config, "tpu")
    log(f"planning the memory of meshes, remat policies and batches on {topology.name}")
    planned = candidates(config, topology)
    check(bool(planned), f"no mesh, remat policy and batch of {config.name} fits {topology.name} by plan: take a larger slice")
    log(f"{len(planned)} candidates fit by plan; compiling the first {min(tries, len(planned))}")
    found, failed, late = [], 0, 0
    for changes in planned[:tries]:
        words = as_overrides(changes)
        try:
            report = compile_config(path, [*overrides, *words], topology, MOST_COMPILE_SECONDS)
        except (ValueError, RuntimeError) as error:  # The others may do; what was found already is worth hours.
            log(f"  {' '.join(words)}: failed: {error}")
            failed += 1
            late += isinstance(error, TookTooLong)
            continue
        verdict = f"{1e6 * seconds_per_token(report):.4g} us a token" if report["fits"] else "does not fit"
        log(f"  {' '.join(words)}: {verdict}")
        if report["fits"]:
            found.append((changes, report))
    tried = min(tries, len(planned))
    check(bool(found), f"none of the {tried} candidates {nothing_found(tried, len(planned) - tried, failed, late, topology)}")
    return sorted(found, key=lambda item: seconds_per_token(item[1]))


def nothing_found(tried: int, untried: int, failed: int, late: int, topology: Topology) -> str:
    """Why a search has nothing to show, and what would help.

    Args:
      failed: of those tried, those without a program; `late` are those of them that took too long.
    """
    told = f"tried fits {topology.name}"
    told += f", and {failed} failed to compile" if failed else ""
    told += f", {late} of which took more than {MOST_COMPILE_SECONDS} s" if late else ""
    fixes = [
        *(["leave more of the machine to the compiler"] if late else []),
        *([f"raise --tries, since {untried} more fit by plan"] if untried else []),
        *(["take a larger slice"] if failed < tried else []),
    ]
    return f"{told}: {', or '.join(fixes) or 'mend what the compiler said of each'}"


def seconds_per_token(report: Report) -> float:
    return report["estimated_step_seconds"] / report["tokens_per_step"]


# --- Printing -----------------------------------------------------------------------------------------------------------------


def describe(report: Report) -> str:
    """The report for people."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    lines = [
        f"{report['config']} on {report['topology']}: {report['devices']} devices, mesh {mesh}, "
        f"{report['tokens_per_step']:,} tokens a step, remat {report['remat']}",
        f"lowered in {report['lower_seconds']:.1f} s, compiled in {report.get('compile_seconds', 0):.0f} s",
        "",
        "memory per device",
    ]
    if report["memory"]:
        lines += [f"  {name.replace('_', ' '):<36}{size / GIB:>10.2f} GiB" for name, size in report["memory"].items()]
    total, limit = report["hbm_bytes_per_device"], report["hbm_limit_bytes"]
    planned = sum(report["planned_bytes_per_device"].values())
    if total is not None:
        lines.append(f"  {'live at once':<36}{total / GIB:>10.2f} GiB of {limit / GIB:.2f} (planned: {planned / GIB:.2f})")
    if not report["memory"]:
        return "\n".join(lines)
    cycles = report["estimated_cycles"]
    whole = sum(cycles.values()) or 1
    lines += ["", "the compiler's estimate of cycles per device and step"]
    lines += [f"  {name:<36}{count:>16,.0f}{100 * count / whole:>7.1f} %" for name, count in cycles.items() if count]
    for kernel in report["kernels"]:
        told = f"{kernel['cycles']:,.0f} cycles by {kernel['by']}"
        lines.append(f"  kernel {kernel['instruction']:<29}{kernel['times']:>10,.0f} calls, {told}")
    if report["sparse_core_programs"]:
        lines.append(f"  {told_of_asides(report['sparse_core_programs'])}")
    if report["loops_of_unknown_length"]:
        names = ", ".join(report["loops_of_unknown_length"])
        lines.append(f"  loops whose length is not known, counted once or, over experts' rows, as for an even router: {names}")
    heads = f"{'count':>7}{'async':>7}{'covered':>9}{'GiB':>9}{'seconds':>9}{'exposed':>9}"
    lines += ["", f"  {'collective':<20}{'over':<20}{heads}"]
    lines += [
        f"  {row['kind']:<20}{row['axes']:<20}{row['count']:>7.0f}{row['asynchronous']:>7.0f}{row['covered']:>9.0f}"
        f"{row['bytes'] / GIB:>9.2f}{row['seconds']:>9.4f}{row['exposed_seconds']:>9.4f}"
        for row in report["collectives"]
    ]
    gathers = sorted(report["exposed_all_gathers"], key=lambda one: -one["exposed_seconds"])
    if gathers:
        lines.append(
            f"  gathers that work does not cover, or not wholly, or that are all-reduces: {len(gathers)}; the longest:"
        )
        lines += [
            f"    {one['name']:<28}{one['kind']:<26}{one['times']:>6.0f} times{one['bytes'] / GIB:>9.3f} GiB"
            f"{one['exposed_seconds']:>9.4f} s"
            for one in gathers[:4]
        ]
    lines += [
        "",
        f"model FLOPs per step {report['model_flops_per_step']:.4g}",
        f"the compiler's estimate: {report['estimated_step_seconds']:.4f} s a step, MFU {100 * report['estimated_mfu']:.1f} %",
    ]
    return "\n".join(lines)


def told_of_asides(programs: Sequence[Mapping[str, Any]]) -> str:
    """What SparseCores do beside collectives, of which the compiler has no estimate."""
    opcodes = ", ".join(sorted({opcode for one in programs for opcode in one["opcodes"]}))
    times, size = sum(one["times"] for one in programs), sum(one["times"] * one["result_bytes"] for one in programs)
    return (
        f"on SparseCores beside collectives, not in the estimate: {len(programs)} programs ({opcodes}), run "
        f"{times:,.0f} times, {size / 2**20:,.3f} MiB of results"
    )


def ranking_table(ranking: Sequence[Mapping[str, Any]]) -> str:
    """What a search found, the fastest per token first."""
    lines = [f"{'us a token':>11}{'MFU':>8}{'GiB':>8}  by the compiler's estimate, with"]
    for one in ranking:
        each = 1e6 * one["estimated_step_seconds"] / one["tokens_per_step"]
        gib = one["hbm_bytes_per_device"] / GIB
        lines.append(f"{each:>11.4g}{100 * one['estimated_mfu']:>7.1f}%{gib:>8.1f}  {' '.join(one['overrides'])}")
    return "\n".join(lines)


def save(report: Report, run_dir: str) -> Path:
    """Writes the report beside the run."""
    from train.files import write_json_atomic

    directory = Path(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"compile_{report['topology'].replace(':', '_')}.json"
    write_json_atomic(path, report)
    return path


def main(arguments: argparse.Namespace) -> int:
    """`loam compile`: the exit status."""
    from experiments.cli import load_run_config

    topology = topology_of(arguments.topology)
    config = load_run_config(arguments.config, arguments.overrides)
    by_reward = isinstance(config, RLConfig)
    check(not (by_reward and arguments.search), "--search knows training steps alone, not reinforcement learning: leave it out")
    require_libtpu()
    os.environ["JAX_PLATFORMS"] = "cpu"  # Nothing is computed here; a plan needs no device.
    if by_reward:
        from experiments import compile_rl

        report = compile_rl.compile_config(arguments.config, arguments.overrides, topology)
        path = save(report, config.run_dir)
        print(json.dumps(report) if arguments.json else f"{compile_rl.describe(report)}\n\n{path}")
        compile_rl.check_fits(report)
        return 0
    if arguments.search:
        log = (lambda line: print(line, file=sys.stderr)) if arguments.json else print
        ranked = search(arguments.config, arguments.overrides, topology, arguments.tries, log)
        changes, report = ranked[0]
        config = changed_config(config, changes)
        report["ranking"] = [
            {"overrides": as_overrides(changed), **{key: one[key] for key in RANKED}} for changed, one in ranked
        ]
        log(f"\n{ranking_table(report['ranking'])}\n")
    else:
        report = compile_config(arguments.config, arguments.overrides, topology)
    path = save(report, config.run_dir)
    print(json.dumps(report) if arguments.json else f"{describe(report)}\n\n{path}")
    check_fits(report, config, topology)
    return 0


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
