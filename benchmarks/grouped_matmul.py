"""Grouped matmuls of experts on TPUs, XLA's own against jax's megablox kernels: python benchmarks/grouped_matmul.py

No TPU is needed: each is compiled by libtpu (the extra `tpu`) for each chip generation. Counted are the bundles of a kernel's
loop over tiles times the tiles that groups of equal size visit, a tile that two groups share twice; of what is no kernel, the
cycles that the compiler estimates. bfloat16; printed are multiples of the cycles that the MXUs need at their peak, for

  forward     rows x matrices
  d_rows      the gradient by the rows
  d_weights   the gradient by the matrices

  --chips=v5e,v6e    some generations only

The last line is JSON: for every chip and shape, the best tile of megablox and cycles over XLA's, all three together.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.tpu_schedule import TOPOLOGIES, compiler_environment, read_schedule
from model.chips import CHIPS

# Rows, groups, width and result of the first product of experts, on one device.
SHAPES = {"mixtral-8x7b, 1 expert": (16384, 1, 4096, 14336), "qwen3-30b-a3b, 16 experts": (16384, 16, 2048, 768)}
TILES = ((128, 1024, 1024), (256, 1024, 1024), (512, 1024, 1024), (512, 2048, 1024))
PASSES = ("forward", "d_rows", "d_weights")


def compile_both(topology: str, shape: tuple[int, ...], tile: tuple[int, ...]) -> None:
    """In a process of its own: megablox with that tile, or XLA's where it is empty. Prints the program of XLA's."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from model.kernels import grouped_matmul as kernel

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("one",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows, groups, width, result = shape
    if tile:
        kernel.TILE = tile

    def run(x: jax.Array, w: jax.Array, d_out: jax.Array, sizes: jax.Array) -> Any:
        product = lambda x, w: kernel.grouped_matmul(x, w, sizes, "tpu" if tile else "xla")  # noqa: E731
        out, pull = jax.vjp(product, x, w)
        return out, pull(d_out)

    shapes = ((rows, width), (groups, width, result), (rows, result))
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=everywhere) for s in shapes]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32, sharding=everywhere)
    print(jax.jit(run).lower(*arguments, sizes).compile().as_text())


def tiles_visited(shape: tuple[int, ...], pass_: str, tile: tuple[int, ...]) -> int:
    """Steps of a kernel's grid, for groups whose borders are not those of tiles."""
    rows, groups, width, result = shape
    inner, outer = (result, width) if pass_ == "d_rows" else (width, result)
    return (math.ceil(rows / tile[0]) + groups - 1) * math.ceil(inner / tile[1]) * math.ceil(outer / tile[2])


def cycles(chip: str, shape: tuple[int, ...], tile: tuple[int, ...]) -> dict[str, float]:
    """Of each pass, in multiples of what the MXUs need."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--worker", TOPOLOGIES[chip], json.dumps(shape), json.dumps(tile)]
        done = subprocess.run(command, env=compiler_environment(Path(directory)), capture_output=True, text=True)
        if done.returncode:
            print(f"{chip} {shape} {tile}: {done.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
            return {}
        found = {}
        for pass_, name in zip(PASSES, ("-jvp_jit_gmm", "transpose_jvp_jit_gmm", "transpose_jvp_jit_tgmm"), strict=True):
            if not tile and pass_ == "d_weights":
                found[pass_] = max(float(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', done.stdout))
                continue
            used = tile
            if not tile:
                inner, outer = (shape[3], shape[2]) if pass_ == "d_rows" else (shape[2], shape[3])
                call = rf"%(ragged-dot-none[.\d]*) = bf16\[{shape[0]},{outer}\].*?ragged_dot_tiling=\"([\d,]+)\""
                match = re.search(call, done.stdout)
                assert match is not None, f"XLA's ragged dot of {shape} is no kernel any more"
                name, used = f"-{match[1]}-", tuple(map(int, match[2].split(",")))
                assert used[1] <= inner
            loop = max(read_schedule(Path(directory), name).loops(), key=len)
            found[pass_] = len(loop) * tiles_visited(shape, pass_, used)
    rows, _, width, result = shape
    return {pass_: n * CHIPS[chip].cores / CHIPS[chip].cores for pass_, n in found.items()} | {
        "ideal": 2 * rows * width * result / CHIPS[chip].flops_per_cycle * CHIPS[chip].cores
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        topology, shape, tile = arguments.worker
        compile_both(topology, json.loads(shape), tuple(json.loads(tile)))
        return
    best: dict[str, dict[str, Any]] = {}
    for chip in arguments.chips.split(","):
        for name, shape in SHAPES.items():
            totals = {}
            for tile in ((), *TILES):
                found = cycles(chip, shape, tile)
                if not found:
                    continue
                ideal = found.pop("ideal")
                totals[tile] = sum(found.values())
                words = ", ".join(f"{pass_} {n / ideal:.2f}" for pass_, n in found.items())
                print(f"{chip:<6} {name:<26} {'XLA' if not tile else 'x'.join(map(str, tile)):<15} {words}", flush=True)
            xla = totals.pop(())
            tile = min(totals, key=lambda tile: totals[tile])
            best[f"{chip}, {name}"] = {"tile": tile, "megablox_vs_xla": totals[tile] / xla}
    print(json.dumps(best))


if __name__ == "__main__":
    main()
