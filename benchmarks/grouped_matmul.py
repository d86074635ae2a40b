"""Grouped matmuls of experts on TPUs, XLA's own against jax's megablox kernels: python benchmarks/grouped_matmul.py

No TPU is needed: each is compiled by libtpu (the extra `tpu`) for each chip generation. Counted are the bundles of a tile (the
longer of the branches that use the MXUs, of which each step runs one, and all that does not) times the tiles that groups visit,
a tile that two groups share twice; of what is no kernel, the cycles that the compiler estimates. bfloat16; printed are
multiples of the cycles that the MXUs need at their peak, for

  forward     rows x matrices
  d_rows      the gradient by the rows
  d_weights   the gradient by the matrices

  --chips=v5e,v6e    some generations only; on v4 XLA has no kernel

The last line is JSON: for every chip and shape, cycles of megablox over XLA's, all three together.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.tpu_schedule import (
    TOPOLOGIES,
    compiler_environment,
    grouped_matmul_cycles,
    grouped_matmul_steps,
    read_schedule,
)
from model.chips import CHIPS

# Rows, groups, width and result of the first product of experts, on one device.
SHAPES = {"mixtral-8x7b, 1 expert": (16384, 1, 4096, 14336), "qwen3-30b-a3b, 16 experts": (16384, 16, 2048, 768)}
PASSES = ("forward", "d_rows", "d_weights")


def compile_for(topology: str, shape: tuple[int, ...], kind: str) -> None:
    """In a process of its own, "megablox" or "XLA"; prints the program."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from model.kernels.grouped_matmul import grouped_matmul

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("one",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows, groups, width, result = shape

    def run(x: jax.Array, w: jax.Array, d_out: jax.Array, sizes: jax.Array) -> Any:
        platform = "tpu" if kind == "megablox" else "cpu"
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, platform), x, w)
        return out, pull(d_out)

    shapes = ((rows, width), (groups, width, result), (rows, result))
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=everywhere) for s in shapes]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32, sharding=everywhere)
    print(jax.jit(run).lower(*arguments, sizes).compile().as_text())


def cycles(chip: str, shape: tuple[int, ...], kind: str) -> dict[str, float]:
    """Of each pass, in multiples of what the MXUs need."""
    from model.kernels.grouped_matmul import tiling

    rows, groups, width, result = shape
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--worker", TOPOLOGIES[chip], json.dumps(shape), kind]
        done = subprocess.run(command, env=compiler_environment(Path(directory)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{kind} for {chip} and {shape}: {done.stderr[-2000:]}")
        found = {}
        for pass_, name in zip(PASSES, ("-jvp_jit_gmm", "transpose_jvp_jit_gmm", "transpose_jvp_jit_tgmm"), strict=True):
            inner, outer = (result, width) if pass_ == "d_rows" else (width, result)
            tile = tiling(2)(rows, inner, outer)
            if kind == "XLA" and pass_ == "d_weights":
                found[pass_] = max(float(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', done.stdout))
                continue
            if kind == "XLA":
                call = rf"%(ragged-dot-none[.\d]*) = bf16\[{rows},{outer}\].*?ragged_dot_tiling=\"(\d+),(\d+),(\d+)\""
                match = re.search(call, done.stdout)
                assert match is not None, f"XLA's ragged dot of {shape} is no kernel any more"
                name, tile = f"-{match[1]}-", (int(match[2]), int(match[3]), int(match[4]))
            steps = grouped_matmul_steps(rows, groups, inner, outer, tile)
            found[pass_] = grouped_matmul_cycles(read_schedule(Path(directory), name), steps, least=0)
    # A kernel runs on one core, or on each with its share of the tiles.
    ideal = 2 * rows * width * result / (CHIPS[chip].flops_per_cycle / CHIPS[chip].cores)
    return {pass_: n / ideal for pass_, n in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="v5e,v5p,v6e,tpu7x")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        topology, shape, kind = arguments.worker
        compile_for(topology, json.loads(shape), kind)
        return
    ratios: dict[str, float] = {}
    for chip in arguments.chips.split(","):
        for name, shape in SHAPES.items():
            totals = []
            for kind in ("XLA", "megablox"):
                found = cycles(chip, shape, kind)
                totals.append(sum(found.values()))
                words = ", ".join(f"{pass_} {times:.2f}" for pass_, times in found.items())
                print(f"{chip:<6} {name:<26} {kind:<9} {words}", flush=True)
            ratios[f"{chip}, {name}"] = totals[1] / totals[0]
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
