"""docs/pods.md: every config of configs/pods, compiled for the slice that its docstring names.

`make pods` compiles those that docs/pods.json has no report of, or one of another config, compiler or flags, one after the
other, minutes each, and writes both files; `python -m experiments.pods NAME…` compiles the named ones again.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments import compile_rl
from experiments.cli import load_run_config
from experiments.collectives import GATHER_BY_ALL_REDUCE
from experiments.compile import GIB, ITEMSIZE, MOST_COMPILE_SECONDS, Report, compile_config, require_libtpu
from experiments.config import chosen
from model.chips import topology_of
from model.xla import TPU_FLAGS
from train.config import TrainConfig
from train.files import write_atomic, write_json_atomic
from train.rl_config import RLConfig
from train.rollouts import engine_config

QWEN3 = "qwen3_30b_a3b_v6e"
ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs/pods").glob("*.py") if path.name != "__init__.py")
REPORTS, PAGE = ROOT / "docs/pods.json", ROOT / "docs/pods.md"
KEPT = (
    "topology", "devices", "mesh", "tokens_per_step", "remat", "hbm_bytes_per_device", "hbm_limit_bytes", "memory",
    "planned_bytes_per_device", "model_flops_per_step", "matmul_flops_per_device", "recomputed_flops_share",
    "estimated_cycles", "kernels", "collectives", "exposed_all_gathers", "exposed_collective_seconds",
    "sparse_core_programs", "loops_of_unknown_length", "estimated_step_seconds", "estimated_mfu", "compile_seconds",
)  # fmt: skip
# Of reinforcement learning, which has several programs.
KEPT_OF_RL = (
    "topology", "devices", "mesh", "rows_per_step", "rows_per_update", "row_tokens", "decoded_rows", "remat",
    "hbm_limit_bytes", "planned_bytes_per_device", "model_flops_per_update", "estimated_update_mfu", "least_decode_seconds",
    "resharding_bytes_per_device", "resharding_link_seconds", "fits",
)  # fmt: skip
KEPT_OF_A_PROGRAM = (
    "memory", "held_beside_bytes", "hbm_bytes_per_device", "fits", "estimated_cycles", "collectives",
    "exposed_collective_seconds", "sparse_core_programs", "loops_of_unknown_length", "estimated_step_seconds",
    "compile_seconds",
)  # fmt: skip
# Of the estimated step, for gathers of weights that no work covers. Not 0: the first of a layer has nothing before it in the
# body of the loop over layers to hide behind, and the head's has little; in docs/pods.json at most 0.4 % of a step. If
# a whole pass of a dense model had to wait for its gathers, that would be 2 to 3 %: half their seconds there, over those of the
# step. The bound lies between.
MOST_EXPOSED_GATHERS = 0.01

# What MaxText has measured: its page "Optimized models tiering", and for tpu7x the table of training/ironwood in tpu-recipes
# (1,207 TFLOP/s on each chip of 2,307), both read in November 2026.
MAXTEXT = {
    "llama3_8b_v6e": "45.5 % (Llama 3.1 8B, 256 chips)",
    "llama3_70b_v5p": "65.4 % (Llama 2 70B, rows of 4,096)",
    "mixtral_8x7b_v5p": "52.6 % (256 chips, rows of 4,096)",
    "llama3_70b_tpu7x": "52.3 % (the same chips, rows and batch)",
}

HEADER = """# Pods: what the compiler says

Made by `make pods` with libtpu, the TPU compiler, on a machine without a TPU. **Bytes are what the compiler allocates; seconds
and MFU are its estimate** (cycles of its operations over the clock, bundles of our kernels times the tiles they visit for one
document as long as the row, and collectives by their bytes over the links where no work covers them). Nothing here was
measured on a TPU: contention for HBM, stalls and stragglers are not in it. MaxText's numbers are measurements.
Compiling was timed by the wall clock on one core, which it shared with other work at times.

"""


NOTES_ON_QWEN3 = """
## What limits Qwen3-30B-A3B

Its experts are many and narrow: each token goes to {chosen} of {experts}, {width} wide, so that its FLOPs are few beside the
rows and weights that travel. An expert axis left less (experiments/LOG.md): a ragged all-to-all, and copies of its rooms.
Here tokens stay at home, and a device gathers {gathered:.0f} GB of weights a step, for which it waits {exposed:.2f} of
{gathering:.2f} s. Matmuls and kernels take {busy:.2f} of {step:.2f} s, so that {best:.0f} % is the best that the rest could
leave. Of the rest most are reductions, copies, slices and element-wise operations, {other:.2f} s: {passes:.0f} times what one
pass over a layer's copies of its tokens needs of the HBM in each layer. Which of them could go is open.
"""
PARTS = """
## Where the estimated step goes

Attention is our kernel, experts are jax's megablox, for one document as long as the row and an even router. *Matmul
speed* is what the compiler expects of matmuls outside of kernels, over the chip's peak; *recomputed* is the part of their
FLOPs that remat does over again. *Other* are slices, copies, reductions and element-wise operations, which HBM sets the pace
of. A step is *limited by* the largest of these losses, which add up to what the MFU lacks: matmuls that are computed again,
matmuls below the peak, other operations, exposed collectives, and what kernels (attention, experts) take beyond the model's
own FLOPs at peak: what is masked, computed again, or waits for an MXU.

A collective is exposed as far as the device waits for it; each piece of work covers one collective at a time. Gathers that
XLA has made all-reduces of shards padded with zeros count whole, whatever stands beside them: they move twice the bytes.
What stays exposed of the gathers of dense models is at the head and at the beginning of each layer, forward and recomputed,
where the body of the loop over layers has no work yet: the compiler does not begin it in the layer before. On the whole of a
slice of v5e or v6e gradients are summed on every device and not scattered; the exposed collectives are mostly those. What else
SparseCores do has no estimate, and is in none of these seconds; `loam compile` lists it.

| config | matmuls | matmul speed | recomputed | attention | experts | other | exposed collectives | of these gathers |
|---|---|---|---|---|---|---|---|---|
"""

REINFORCEMENT = """
## Reinforcement learning: training and decoding in one run

**Compiled ahead: a run of reinforcement learning is one process so far, and this slice has many hosts.**

Its programs share the devices, in two layouts: the trainer's (weights scattered over fsdp and tensor) and the sampler's (split
over tensor alone, so that no token waits for a gather; copies along fsdp decode the same rows). HBM is what each program takes
by the compiler, and what the run holds beside it by plan: the sampler keeps weights and pages while the trainer works, and the
trainer its state while the sampler does. *Resharding* is `hand_over`, once a step: what arrives at each device, the estimated
seconds of it on the links if nothing else used them, and those of the whole program. A decoded token is one for every row that
is decoded at once, at the end of full rows: the compiler's estimate, which knows only the FLOPs of attention's kernel, and the
reading of the pages. All seconds are estimates.

The axis `tensor` is as large as decoding wants it, and larger than the trainer does; what updates pay for it stands below. A
mesh of its own for the sampler would spare that; there is none yet.

"""
COLUMNS_OF_RL = (
    "config", "slice", "mesh", "rows a step", "HBM a device: hand_over", "decode", "score", "update", "resharding",
    "a decoded token", "score", "update", "MFU of the update", "compiled in",
)  # fmt: skip


def topology_in(path: Path) -> str:
    """The slice of a pod config: that of the command in its docstring."""
    match = re.search(r"--topology=(\S+)", path.read_text())
    assert match is not None, path
    return match[1]


def made_of(config: TrainConfig | RLConfig) -> dict[str, Any]:
    """What a report depends on beside our own code."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {"config_sha256": config_hash(config), "flags": list(TPU_FLAGS), **versions}


def config_hash(config: TrainConfig | RLConfig) -> str:
    """SHA-256 of what the programs are compiled from, as far as it differs from the defaults: a new option changes no hash."""
    if isinstance(config, RLConfig):
        names = ("model", "policy", "lora", "optimizer", "mesh")
        of_rows = ("num_rows", "update_rows", "accumulation", "row_tokens", "chunk_tokens")
        sizes: dict[str, Any] = {name: getattr(config, name) for name in of_rows}
        sizes |= {"temperature": config.rollouts.temperature, "engine": chosen(engine_config(config))}
    else:
        names = ("model", "loss", "optimizer", "mesh")
        sizes = {"batch_size": config.batch_size, "accumulation": config.accumulation, "seq_len": config.data.seq_len}
    parts = {name: chosen(getattr(config, name)) for name in names}
    return hashlib.sha256(json.dumps(parts | sizes, sort_keys=True).encode()).hexdigest()


def limited_by(report: Report) -> str:
    """The largest of `losses`, and its share of the estimated step."""
    found = losses(report)
    largest = max(found, key=lambda name: found[name])
    return f"{largest}, {100 * found[largest]:.0f} %"


def losses(report: Report) -> dict[str, float]:
    """What stands between the estimated MFU and 1, as fractions of the estimated step: they add up to what is missing."""
    parts, step = shares(report), report["estimated_step_seconds"]
    chip = topology_of(report["topology"]).chip
    at_peak = report["matmul_flops_per_device"] / chip.flops_per_cycle / chip.clock / step
    found = {
        "recomputed matmuls": report["recomputed_flops_share"] * at_peak,
        "matmuls below peak": parts["matmuls"] - at_peak,
        "other operations": parts["other operations"],
        "exposed collectives": parts["exposed collectives"],
    }
    # Of kernels the estimate has no FLOPs: what they run beyond the model's own is what is left.
    return found | {"kernels": 1 - report["estimated_mfu"] - sum(found.values())}


def exposed_gathers_share(report: Report) -> float:
    """Of the estimated step; the gate is MOST_EXPOSED_GATHERS."""
    return sum(one["exposed_seconds"] for one in report["exposed_all_gathers"]) / report["estimated_step_seconds"]


def shares(report: Report) -> dict[str, float]:
    """Where the estimated step goes, as fractions of it."""
    clock = topology_of(report["topology"]).chip.clock
    seconds = {kind: cycles / clock for kind, cycles in report["estimated_cycles"].items()}
    attention = sum(one["cycles"] for one in report["kernels"] if "flash" in one["instruction"]) / clock
    parts = {"matmuls": seconds.pop("matmul"), "attention": attention, "experts": seconds.pop("kernel") - attention}
    parts |= {"other operations": sum(seconds.values()), "exposed collectives": report["exposed_collective_seconds"]}
    return {name: value / report["estimated_step_seconds"] for name, value in parts.items()}


def page(reports: dict[str, Report]) -> str:
    """The text of docs/pods.md."""
    of_rl = {name: report for name, report in reports.items() if "programs" in report}
    reports = {name: report for name, report in reports.items() if name not in of_rl}
    lines = [
        "| config | slice | mesh | tokens a step | remat | HBM a device | planned | step | MFU | limited by | MaxText measured "
        "| compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, report in sorted(reports.items()):
        mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
        planned = f"{sum(report['planned_bytes_per_device'].values()) / GIB:.1f} GiB"
        memory = f"{report['hbm_bytes_per_device'] / GIB:.1f} of {report['hbm_limit_bytes'] / GIB:.1f} GiB"
        mfu = f"{100 * report['estimated_mfu']:.1f} %"
        lines.append(
            f"| [{name}](../configs/pods/{name}.py) | {report['topology']} | {mesh} | {report['tokens_per_step']:,} | "
            f"{report['remat']} | {memory} | {planned} | {report['estimated_step_seconds']:.2f} s | {mfu} | "
            f"{limited_by(report)} | {MAXTEXT.get(name, '')} | {report['compile_seconds']:.0f} s |"
        )
    lines += PARTS.splitlines()
    for name, report in sorted(reports.items()):
        matmuls, *parts = (f"{100 * share:.0f} %" for share in shares(report).values())
        ideal = report["matmul_flops_per_device"] / topology_of(report["topology"]).chip.flops_per_cycle
        speed = f"{100 * ideal / report['estimated_cycles']['matmul']:.0f} %"
        again = f"{100 * report['recomputed_flops_share']:.0f} %"
        gathers = report["exposed_all_gathers"]
        told = f"{100 * exposed_gathers_share(report):.1f} % ({len(gathers)} of them)" if gathers else "none"
        reduced = sum(one["kind"] == GATHER_BY_ALL_REDUCE for one in gathers)
        told += f", {reduced} by all-reduce" if reduced else ""
        lines.append(f"| {name} | {' | '.join([matmuls, speed, again, *parts, told])} |")
    notes = notes_on(reports[QWEN3]) if QWEN3 in reports else ""
    of_rl_lines = [
        f"| {' | '.join(COLUMNS_OF_RL)} |",
        "|---" * len(COLUMNS_OF_RL) + "|",
        *(rl_line(name, report) for name, report in sorted(of_rl.items())),
        *(f"\n{exposed_over_tensor(name, report['programs']['update'])}" for name, report in sorted(of_rl.items())),
    ]
    return HEADER + "\n".join(lines) + "\n" + notes + REINFORCEMENT + "\n".join(of_rl_lines) + "\n"


def notes_on(qwen3: Report) -> str:
    """What NOTES_ON_QWEN3 tells, with the numbers of its report and its config."""
    model = load_run_config(str(ROOT / f"configs/pods/{QWEN3}.py"), []).model
    moe, chip = model.moe, topology_of(qwen3["topology"]).chip
    assert moe is not None
    step, parts = qwen3["estimated_step_seconds"], shares(qwen3)
    busy, other = step * (parts["matmuls"] + parts["attention"] + parts["experts"]), step * parts["other operations"]
    gathers = [row for row in qwen3["collectives"] if row["kind"] == "all-gather"]
    copies = qwen3["tokens_per_step"] / qwen3["devices"] * moe.experts_per_token
    one_pass = model.num_layers * copies * model.d_model * ITEMSIZE[model.dtype] / chip.hbm_bandwidth
    return NOTES_ON_QWEN3.format(
        chosen=moe.experts_per_token,
        experts=moe.num_experts,
        width=moe.d_ff,
        gathered=sum(row["bytes"] for row in gathers) / 1e9,
        gathering=sum(row["seconds"] for row in gathers),
        exposed=sum(row["exposed_seconds"] for row in gathers),
        busy=busy,
        step=step,
        other=other,
        best=100 * qwen3["estimated_mfu"] * step / busy,
        passes=other / one_pass,
    )


def exposed_over_tensor(name: str, update: Report) -> str:
    seconds = sum(row["exposed_seconds"] for row in update["collectives"] if row["axes"] == "tensor")
    step = update["estimated_step_seconds"]
    return f"{name}: of the {step:.1f} s of an update {seconds:.1f} are exposed collectives of activations over `tensor`."


def rl_line(name: str, report: Report) -> str:
    """A row of the table of reinforcement learning."""
    programs, limit = report["programs"], report["hbm_limit_bytes"] / GIB
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    memory = [f"{programs[program]['hbm_bytes_per_device'] / GIB:.1f}" for program in compile_rl.PROGRAMS]
    memory[0] = f"{memory[0]} of {limit:.1f} GiB"
    hand_over = programs["hand_over"]["estimated_step_seconds"]
    moved = f"{report['resharding_bytes_per_device'] / GIB:.2f} GiB, {1e3 * report['resharding_link_seconds']:.0f} ms on links"
    cells = [
        f"[{name}](../configs/pods/{name}.py)",
        report["topology"],
        mesh,
        f"{report['rows_per_step']:,} of {report['row_tokens']:,} tokens",
        *memory,
        f"{moved}, {1e3 * hand_over:.0f} ms in all",
        f"{1e3 * compile_rl.decode_seconds(report):.1f} ms for {report['decoded_rows']} rows",
        f"{programs['score']['estimated_step_seconds']:.2f} s",
        f"{programs['update']['estimated_step_seconds']:.2f} s",
        f"{100 * report['estimated_update_mfu']:.1f} %",
        f"{sum(one['compile_seconds'] for one in programs.values()):.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def kept_of_rl(report: Report) -> Report:
    programs = {name: {key: one[key] for key in KEPT_OF_A_PROGRAM} for name, one in report["programs"].items()}
    return {key: report[key] for key in KEPT_OF_RL} | {"programs": programs}


def compiled(name: str, path: Path) -> Report:
    """What docs/pods.json keeps of a config.

    Raises:
      RuntimeError: it does not fit, or took too long to compile.
    """
    topology = topology_of(topology_in(path))
    if isinstance(load_run_config(str(path), []), RLConfig):
        report = compile_rl.compile_config(str(path), [], topology)
        compile_rl.check_fits(report)
        slowest = max(one["compile_seconds"] for one in report["programs"].values())
        kept = kept_of_rl(report)
    else:
        report = compile_config(str(path), [], topology)
        if not report["fits"]:
            raise RuntimeError(f"{name} does not fit: {report['hbm_bytes_per_device']} of {report['hbm_limit_bytes']} bytes")
        slowest, kept = report["compile_seconds"], {key: report[key] for key in KEPT}
    if slowest > MOST_COMPILE_SECONDS:
        raise RuntimeError(f"{name} compiled in {slowest:.0f} s, more than {MOST_COMPILE_SECONDS}")
    return kept


def main(names: list[str]) -> None:
    require_libtpu()
    reports: dict[str, Any] = json.loads(REPORTS.read_text()) if REPORTS.exists() else {}
    known = {path.stem: path for path in CONFIGS}
    sources = {name: made_of(load_run_config(str(path), [])) for name, path in known.items()}
    for name in names or [name for name in known if reports.get(name, {}).get("made_of") != sources[name]]:
        print(f"compiling {name} for {topology_in(known[name])}", flush=True)
        reports[name] = compiled(name, known[name]) | {"made_of": sources[name]}
        write_json_atomic(REPORTS, reports)
        write_atomic(PAGE, page(reports).encode())
        mfu = reports[name].get("estimated_mfu") or reports[name]["estimated_update_mfu"]
        print(f"  fits; MFU {100 * mfu:.1f} % (the compiler's estimate)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
