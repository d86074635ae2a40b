"""docs/pods.md: every config of configs/pods, compiled for the slice that its docstring names.

`make pods` compiles those that docs/pods.json has no report of, one after the other, minutes each, and writes both files;
`python -m experiments.pods NAME…` compiles the named ones again.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from experiments.compile import GIB, Report, compile_config, require_libtpu
from model.chips import topology_of
from train.files import write_atomic, write_json_atomic

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs/pods").glob("*.py") if path.name != "__init__.py")
REPORTS, PAGE = ROOT / "docs/pods.json", ROOT / "docs/pods.md"
KEPT = (
    "topology", "devices", "mesh", "tokens_per_step", "remat", "hbm_bytes_per_device", "hbm_limit_bytes", "memory",
    "model_flops_per_step", "matmul_flops_per_device", "estimated_cycles", "kernels", "collectives", "exposed_all_gathers",
    "exposed_collective_seconds", "loops_of_unknown_length", "estimated_step_seconds", "estimated_mfu", "compile_seconds",
    "jax",
)  # fmt: skip
COMPARED = ("all-gather", "all-reduce")

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

"""


def topology_in(path: Path) -> str:
    """The slice of a pod config: that of the command in its docstring."""
    match = re.search(r"--topology=(\S+)", path.read_text())
    assert match is not None, path
    return match[1]


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
    lines = [
        "| config | slice | mesh | tokens a step | remat | HBM a device | step | MFU | MaxText measured | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, report in sorted(reports.items()):
        mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
        memory = f"{report['hbm_bytes_per_device'] / GIB:.1f} of {report['hbm_limit_bytes'] / GIB:.1f} GiB"
        mfu = f"{100 * report['estimated_mfu']:.1f} %"
        lines.append(
            f"| [{name}](../configs/pods/{name}.py) | {report['topology']} | {mesh} | {report['tokens_per_step']:,} | "
            f"{report['remat']} | {memory} | {report['estimated_step_seconds']:.2f} s | {mfu} | "
            f"{MAXTEXT.get(name, '')} | {report['compile_seconds']:.0f} s |"
        )
    lines += [
        "",
        "## Where the estimated step goes",
        "",
        "Attention is our kernel, experts are jax's megablox, for one document as long as the row and an even router. *Matmul",
        "speed* is what the compiler expects of matmuls outside of kernels, over the chip's peak. A collective is exposed as",
        "far as the device waits for it; each piece of work covers one collective at a time. *Gathered by all-reduce*: XLA",
        "does so where shards of parameters are narrower than a register; that no all-gather is exposed then says nothing.",
        "",
        "| config | matmuls | matmul speed | attention | experts | other | exposed collectives | of these all-gathers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, report in sorted(reports.items()):
        matmuls, *parts = (f"{100 * share:.0f} %" for share in shares(report).values())
        ideal = report["matmul_flops_per_device"] / topology_of(report["topology"]).chip.flops_per_cycle
        gathers = report["exposed_all_gathers"]
        waited = sum(one["exposed_seconds"] for one in gathers) / report["estimated_step_seconds"]
        moved = {kind: sum(one["bytes"] for one in report["collectives"] if one["kind"] == kind) for kind in COMPARED}
        by_all_reduce = moved["all-gather"] < 0.01 * moved["all-reduce"]
        told = f"{100 * waited:.1f} % ({len(gathers)} of them)" if gathers else "none"
        told = "gathered by all-reduce" if by_all_reduce else told
        speed = f"{100 * ideal / report['estimated_cycles']['matmul']:.0f} %"
        lines.append(f"| {name} | {' | '.join([matmuls, speed, *parts, told])} |")
    return HEADER + "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    require_libtpu()
    reports: dict[str, Any] = json.loads(REPORTS.read_text()) if REPORTS.exists() else {}
    known = {path.stem: path for path in CONFIGS}
    for name in names or [name for name in known if name not in reports]:
        print(f"compiling {name} for {topology_in(known[name])}", flush=True)
        report = compile_config(str(known[name]), [], topology_of(topology_in(known[name])))
        if not report["fits"]:
            raise RuntimeError(f"{name} does not fit: {report['hbm_bytes_per_device']} of {report['hbm_limit_bytes']} bytes")
        reports[name] = {key: report[key] for key in KEPT}
        write_json_atomic(REPORTS, reports)
        write_atomic(PAGE, page(reports).encode())
        print(
            f"  {report['compile_seconds']:.0f} s, MFU {100 * report['estimated_mfu']:.1f} % (the compiler's estimate)",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
