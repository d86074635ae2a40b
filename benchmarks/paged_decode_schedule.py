"""Whether decode attention keeps up with memory, by the TPU compiler's schedules: python benchmarks/paged_decode_schedule.py

No TPU is needed: the kernel is compiled by libtpu (the extra `tpu`) for each chip generation. What a block of pages costs to
compute, in VLIW bundles of the loop over blocks (control and the starting of copies included, every branch counted), stands
against the cycles in which HBM delivers the block at its documented bandwidth. The smaller of the two hides behind the larger,
so their ratio over a row of 8,192 tokens, with what begins and ends it, is an upper bound of the share of the bandwidth that
the kernel can use; how long a copy really takes, no schedule tells.

  --table   writes its part of docs/kernels.md

The last line is JSON: that share, the worst of all chips, for every case.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.tpu_schedule import TOPOLOGIES, compiler_environment, read_schedule, write_section
from model.chips import CHIPS

CONTEXT, PAGE_SIZE = 8192, 64
# Query heads, key-value heads, width of keys (whole registers), of values, whether pages are int8.
CASES = {
    "32 heads, 8 of keys": (32, 8, 128, 128, False),
    "the same, int8": (32, 8, 128, 128, True),
    "16 heads, 16 of keys": (16, 16, 128, 128, False),
    "latent, 128 heads": (128, 1, 640, 512, False),
}


def compile_for(topology: str, case: str) -> None:
    """In a process of its own, which libtpu's flags demand; prints the shape of a buffer of two blocks."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from model.kernels.kv_pages import Int8Pages
    from model.kernels.paged_decode import block_shape, paged_decode

    heads, kv_heads, width, v_width, int8 = CASES[case]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    everywhere = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices[:1]), ("one",)), jax.sharding.PartitionSpec())

    def shape(*dimensions: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=everywhere)

    rows, pages_of_row = 8, CONTEXT // PAGE_SIZE
    values = shape(rows * pages_of_row, kv_heads, PAGE_SIZE, width, dtype=jnp.int8 if int8 else jnp.bfloat16)
    scales = shape(rows * pages_of_row, kv_heads, 1, 128, dtype=jnp.float32)
    pages = (Int8Pages(values, scales) if int8 else values,) * (2 if v_width == width else 1)

    def run(q: jax.Array, pages: Any, table: jax.Array, positions: jax.Array) -> jax.Array:
        return paged_decode(q, pages, table, positions, width=v_width, scale=width**-0.5)

    ids = shape(rows, pages_of_row, dtype=jnp.int32), shape(rows, 1, dtype=jnp.int32)
    jax.jit(run).lower(shape(rows, 1, heads, width), pages, *ids).compile()
    pages_of_block, heads_of_group = block_shape(pages, heads // kv_heads, jnp.dtype(jnp.bfloat16), pages_of_row)
    of_head = sum(x.dtype.itemsize * math.prod(x.shape[2:]) for x in jax.tree.leaves(pages))
    print(json.dumps([pages_of_block, heads_of_group, of_head]))


def measure(chip_name: str, case: str) -> dict[str, float]:
    """Of one case on a chip: bytes of a copy and of a block, bundles and cycles of a block, and the share of the bandwidth."""
    chip = CHIPS[chip_name]
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--worker", TOPOLOGIES[chip_name], case]
        done = subprocess.run(command, env=compiler_environment(Path(directory)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case} for {chip_name}: {done.stderr[-2000:]}")
        schedule = read_schedule(Path(directory), "paged_decode")
    pages, heads, bytes_of_head = json.loads(done.stdout.splitlines()[-1])
    (loop,) = schedule.tile_loops()
    of_row = sum(1 for bundle in schedule.bundles if bundle.depth) - len(loop)
    of_block = pages * heads * bytes_of_head
    # Each core of a chip walks over its own heads, and has its share of the bandwidth.
    cores = chip.cores if CASES[case][1] > 1 else 1
    cycles = of_block / (chip.hbm_bandwidth / cores) * chip.clock
    blocks = math.ceil(CONTEXT / PAGE_SIZE / pages)
    share = min(1.0, blocks * cycles / (blocks * len(loop) + of_row))
    return {
        "copy": heads * bytes_of_head / (1 if CASES[case][3] < CASES[case][2] else 2),
        "block": of_block,
        "bundles": len(loop),
        "cycles": cycles,
        "row": of_row,
        "share": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=list(TOPOLOGIES), default=list(TOPOLOGIES))
    parser.add_argument("--table", action="store_true", help="write its part of docs/kernels.md")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        compile_for(*arguments.worker)
        return
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu, the TPU compiler, is not installed: `make env EXTRAS=tpu` installs it.")
    lines = [
        "| chip | case | KiB of a page's copy | KiB of a block | bundles a block | HBM's cycles a block | "
        "bundles a row besides | share of bandwidth, at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shares: dict[str, float] = {}
    for chip in arguments.chips:
        for case in CASES:
            found = measure(chip, case)
            shares[case] = min(shares.get(case, 1.0), round(found["share"], 4))
            lines.append(
                f"| {chip} | {case} | {found['copy'] / 1024:.0f} | {found['block'] / 1024:,.0f} | {found['bundles']:,.0f} | "
                f"{found['cycles']:,.0f} | {found['row']:,.0f} | {found['share']:.0%} |"
            )
            print(lines[-1], flush=True)
    if arguments.table:
        write_section(TITLE, TEXT.format(table="\n".join(lines)))
    print(json.dumps({"benchmark": "paged_decode_schedule", "chips": arguments.chips, **shares}))


TITLE = "Decode attention against memory"
TEXT = """Made by `python benchmarks/paged_decode_schedule.py --table` (with `make env EXTRAS=tpu`); no TPU took part. One new
token a row, 8,192 tokens in pages of 64, bfloat16 but where int8 is named. Bundles are the compiler's; the cycles are those in
which HBM delivers a block's pages at its documented bandwidth, a core's share of it where heads are divided over two. Where
they are more than the bundles, the kernel waits for memory. The share of the bandwidth is an upper bound: bundles may stall,
and copies have latencies, of which no schedule tells.

{table}
"""


if __name__ == "__main__":
    main()
