"""Our flash attention against jax's splash attention, by the TPU compiler's schedules: python benchmarks/attention_schedule.py

No TPU is needed: both are compiled by libtpu (the extra `tpu`), for each chip generation, and compared by the number of VLIW
bundles of a tile times the number of tiles visited. 8,192 tokens, head dimension 128, bfloat16, one head, as

  causal   one document
  packed   eight documents of 1,024 tokens
  shifted  the same, begun 512 tokens earlier, so that documents end amid our tiles

Splash attention visits the same tiles in all, because its masks do not know of segments. It is taken at the block sizes that
suit it best in each case. Counted is what a tile costs: of ours the loop over tiles, of splash the block that computes and what
its grid does in every step; not what begins and ends a row of tiles.

  --tune    also tries our block sizes, and writes the best of each chip to model/kernels/block_sizes.json
  --table   writes docs/kernels.md

The last line is JSON: ours over theirs, the worst of all chips.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.tpu_schedule import TOPOLOGIES, Schedule, compiler_environment, read_schedule, used, write_section

LENGTH, HEAD_DIM, DOCUMENT = 8192, 128, 1024
LAYOUTS = {"causal": (LENGTH, 0), "packed": (DOCUMENT, 0), "shifted": (DOCUMENT, DOCUMENT // 2)}  # length, tokens of it cut off
PASSES = ("forward", "backward")
# (queries, keys, keys computed at once)
SPLASH_SIZES = ((512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024))
OUR_SIZES = ((512, 512), (1024, 512), (1024, 1024))
WORK = "MXU"  # What tells a tile's code from the rest of a kernel.


# --- In a process for each compilation, which libtpu's flags demand ---------------------------------------------------------


def compile_ours(topology: str, sizes: tuple[int, int]) -> None:
    import jax
    import jax.numpy as jnp

    from model.kernels.flash_attention import flash_attention
    from model.kernels.tiles import BlockSizes, make_plan

    def both(q: jax.Array, d_out: jax.Array, segments: jax.Array, positions: jax.Array) -> Any:
        plan = make_plan(segments, positions, segments, positions, sizes=BlockSizes(sizes, sizes))
        (_, lse), pull = jax.vjp(lambda q, k, v: flash_attention(q, k, v, plan, scale=HEAD_DIM**-0.5), q, q, q)
        return pull((d_out, jnp.zeros_like(lse)))

    heads, ids = shape(1, 1, LENGTH, HEAD_DIM), shape(1, LENGTH, dtype="int32")
    compile_for(topology, both, heads, heads, ids, ids)


def compile_splash(topology: str, sizes: tuple[int, int, int], segments: bool) -> None:
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    bq, bk, compute = sizes
    attention = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((LENGTH, LENGTH))]),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=bq, block_kv=bk, block_kv_compute=compute, block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
    )  # fmt: skip

    def both(q: jax.Array, d_out: jax.Array, ids: jax.Array) -> Any:
        segment_ids = splash_attention_kernel.SegmentIds(ids, ids) if segments else None
        _, pull = jax.vjp(lambda *qkv: attention(*qkv, segment_ids), q, q, q)
        return pull(d_out)

    heads = shape(1, LENGTH, HEAD_DIM)
    compile_for(topology, both, heads, heads, shape(LENGTH, dtype="int32"))


def shape(*dimensions: int, dtype: str = "bfloat16") -> Any:
    import jax

    return jax.ShapeDtypeStruct(dimensions, dtype)


def compile_for(topology: str, function: Any, *arguments: Any) -> None:
    import jax
    import numpy as np
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("one",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in arguments)
    jax.jit(function).lower(*arguments).compile()


# --- Counting -----------------------------------------------------------------------------------------------------------------


def schedules(kind: str, topology: str, sizes: tuple[int, ...]) -> tuple[Schedule, Schedule] | None:
    """Forward and backward schedule of a compilation; None if the kernel does not compile with these sizes."""
    names = ("flash_forward", "flash_backward") if kind == "ours" else ("splash_mha_fwd", "splash_mha_dkv")
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--worker", kind, topology, json.dumps(sizes)]
        done = subprocess.run(command, env=compiler_environment(Path(directory)), capture_output=True, text=True)
        if done.returncode:
            print(f"{kind} {topology} {sizes}: {done.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
            return None
        forward, backward = (read_schedule(Path(directory), name) for name in names)
        return forward, backward


def tile_codes(kind: str, schedule: Schedule) -> list[list[Any]]:
    """The code of a tile: of ours, the loops over masked, full and again masked tiles; of splash, all that each step runs."""
    if kind == "ours":
        loops = schedule.tile_loops()
        if len(loops) != 3:
            raise ValueError(f"{len(loops)} loops of our kernel use the {WORK}, not 3: its code has changed, mend this count")
        return loops
    blocks = schedule.blocks()
    work = max((block for block in blocks if used(block, WORK)), key=len)
    # Blocks that store vectors besides begin or end a row of tiles.
    control = [block for block in blocks if block[0].depth and not used(block, WORK) and not used(block, "VSTORE")]
    return [work + [bundle for block in control for bundle in block]]


def tiles_visited(kind: str, layout: str, pass_: str, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(masked, full) tiles of one head; splash has one kind only, and no notion of documents."""
    import jax.numpy as jnp
    import numpy as np

    if kind == "splash":
        last_query = np.arange(sizes[0], LENGTH + 1, sizes[0]) - 1
        return int(np.sum(last_query // sizes[1] + 1)), 0
    from model.kernels.tiles import BlockSizes, make_plan

    document, cut_off = LAYOUTS[layout]
    segments, positions = (jnp.asarray(x[None]) for x in np.divmod(np.arange(LENGTH) + cut_off, document))
    block = (sizes[0], sizes[1])
    plan = make_plan(segments + 1, positions, segments + 1, positions, sizes=BlockSizes(block, block))
    visits = getattr(plan, pass_)
    every = int(np.sum(visits.stop - visits.first))
    full = int(np.sum(visits.full_stop - visits.full_first))
    return every - full, full


def bundles(kind: str, layout: str, pass_: str, sizes: tuple[int, ...], schedule: Schedule) -> dict[str, Any]:
    """Bundles of all tiles of a head, and what its code looks like."""
    codes = tile_codes(kind, schedule)
    masked, full = tiles_visited(kind, layout, pass_, sizes)
    of_masked, of_full = len(codes[0]), len(codes[min(1, len(codes) - 1)])
    typical = codes[1] if kind == "ours" and full else codes[0]
    return {
        "sizes": sizes,
        "tiles": masked + full,
        "bundles_per_tile": of_full if full else of_masked,
        "bundles": masked * of_masked + full * of_full,
        "mxu_use": used(typical, "MXU") / schedule.capacity["MXU"] / len(typical),
        "spills": used(typical, "SPILL"),
    }


def measure(chip: str, our_sizes: dict[str, tuple[tuple[int, int], ...]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{layout_pass: {ours, splash}} of a chip, each at its best of the given sizes."""
    topology = TOPOLOGIES[chip]
    tried: dict[str, list[dict[str, Any]]] = {}
    candidates = {size for sizes in our_sizes.values() for size in sizes}
    for kind, sizes in [("ours", size) for size in sorted(candidates)] + [("splash", size) for size in SPLASH_SIZES]:
        for segments in (False, True) if kind == "splash" else (False,):
            found = schedules("splash_segments" if segments else kind, topology, sizes)
            for pass_, schedule in zip(PASSES, found or (), strict=False):
                if kind == "ours" and sizes not in our_sizes[pass_]:
                    continue
                for layout in LAYOUTS:
                    if kind == "splash" and segments != (layout != "causal"):
                        continue
                    result = bundles(kind, layout, pass_, sizes, schedule)
                    tried.setdefault(f"{layout}_{pass_}/{kind}", []).append(result)
    return {
        f"{layout}_{pass_}": {
            kind: min(tried[f"{layout}_{pass_}/{kind}"], key=lambda result: result["bundles"]) for kind in ("ours", "splash")
        }
        for layout in LAYOUTS
        for pass_ in PASSES
    }


def table(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> str:
    lines = [
        "| chip | case | ours: tile | tiles | bundles a tile | MXU slots used | spills a tile | splash: tile | tiles | "
        "bundles a tile | ours / splash |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for chip, cases in results.items():
        for case, sides in cases.items():
            ours, splash = sides["ours"], sides["splash"]
            lines.append(
                f"| {chip} | {case.replace('_', ' ')} | {ours['sizes'][0]} x {ours['sizes'][1]} | {ours['tiles']} | "
                f"{ours['bundles_per_tile']:,} | {ours['mxu_use']:.0%} | {ours['spills']:,} | "
                f"{splash['sizes'][0]} x {splash['sizes'][1]} | {splash['tiles']} | {splash['bundles_per_tile']:,} | "
                f"{ours['bundles'] / splash['bundles']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=list(TOPOLOGIES), default=list(TOPOLOGIES))
    parser.add_argument("--tune", action="store_true", help="choose our block sizes anew")
    parser.add_argument("--table", action="store_true", help="write docs/kernels.md")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, topology, sizes = args.worker
        if kind == "ours":
            compile_ours(topology, tuple(json.loads(sizes)))
        else:
            compile_splash(topology, tuple(json.loads(sizes)), segments=kind == "splash_segments")
        return
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu, the TPU compiler, is not installed: `make env EXTRAS=tpu` installs it.")
    from model.kernels.tiles import BLOCK_SIZES_FILE

    chosen: dict[str, Any] = json.loads(BLOCK_SIZES_FILE.read_text()) if BLOCK_SIZES_FILE.exists() else {}
    results = {}
    for chip in args.chips:
        tuned = {name: (tuple(size),) for name, size in chosen.get(chip, {}).items()}
        results[chip] = measure(chip, {name: OUR_SIZES if args.tune else tuned[name] for name in PASSES})
        print(f"{chip}: {json.dumps(results[chip])}", flush=True)
        if args.tune:
            chosen[chip] = {name: results[chip][f"causal_{name}"]["ours"]["sizes"] for name in PASSES}
            BLOCK_SIZES_FILE.write_text(json.dumps(chosen, indent=2) + "\n")
    print(table(results))
    if args.table:
        write_section("Kernels, by their schedules", PAGE.format(table=table(results)))
    worst = {
        f"{case}_vs_splash": round(max(r[case]["ours"]["bundles"] / r[case]["splash"]["bundles"] for r in results.values()), 4)
        for case in (f"{layout}_{pass_}" for layout in LAYOUTS for pass_ in PASSES)
    }
    print(json.dumps({"benchmark": "attention_schedule", "chips": args.chips, **worst}))


PAGE = """Made by `python benchmarks/attention_schedule.py --table` (with `make env EXTRAS=tpu`); no TPU took part. The compiler
of libtpu writes the final VLIW bundles of a kernel; a bundle is one cycle where nothing stalls, so these numbers are the
compiler's estimate and a lower bound, good for comparing two kernels, not for predicting seconds.

8,192 tokens, head dimension 128, bfloat16. `causal` is one document, `packed` eight of 1,024 tokens, `shifted` the same begun
512 tokens earlier: documents that end amid tiles visit twice as many of them. jax's splash attention, with its fused backward
pass, at its best block sizes; counted is what a tile costs, loop or grid step included, but not what begins and ends a row of
tiles. Bundles a tile are those of one in which all pairs are allowed, or of a masked one if all are.

{table}
"""


if __name__ == "__main__":
    main()
