"""Our flash attention against jax's splash attention, by the TPU compiler's schedules: python benchmarks/attention_schedule.py

No TPU is needed: both are compiled by libtpu (the extra `tpu`), for each chip generation, and compared by the number of VLIW
bundles that a head takes. 8,192 tokens, head dimension 128, bfloat16, as

  causal   one document
  packed   eight documents of 1,024 tokens
  shifted  the same, begun 512 tokens earlier, so that documents end amid our tiles
  uneven   eight documents of 655 to 1,333 tokens, which end anywhere

Splash attention visits the same tiles in all, because its masks do not know of segments. It is taken at the block sizes that
suit it best in each case. Counted is the whole kernel, every basic block as often as it runs; those whose condition only the
hardware knows, such as the waits and starts of copies, in every round of their loop. Splash has work for visited tiles,
beginnings and ends for rows of tiles, and control for all steps of its grid, of which it visits every tile or none.

  --tune    also tries our block sizes, and writes the best of each chip to model/kernels/block_sizes.json
  --table   writes docs/kernels.json, with hashes of the kernel's source and of what counts, and of it docs/kernels.md

The last line is JSON: ours over theirs, the worst of all chips.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.tpu_schedule import (
    KERNELS_PAGE,
    TOPOLOGIES,
    UNITS,
    AttentionCode,
    Bundle,
    Schedule,
    Tiles,
    compiler_environment,
    read_schedule,
    used,
    write_section,
)

# With so many heads no operand fits into VMEM, where the compiler would put those of a few heads.
LENGTH, HEAD_DIM, HEADS = 8192, 128, 64
LAYOUTS = {  # lengths of documents
    "causal": (LENGTH,),
    "packed": (1024,) * 8,
    "shifted": (512, *(1024,) * 7, 512),
    "uneven": (1201, 830, 1017, 1333, 655, 1150, 902, 1104),
}
PASSES = ("forward", "backward")
# (queries, keys, keys computed at once)
SPLASH_SIZES = (
    (512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024), (512, 1024, 512), (512, 1024, 1024), (512, 2048, 512),
    (512, 2048, 1024), (1024, 512, 512), (1024, 2048, 512), (1024, 2048, 1024), (2048, 512, 512), (2048, 1024, 512),
    (2048, 1024, 1024), (2048, 2048, 512), (2048, 2048, 1024),
)  # fmt: skip
OUR_SIZES = ((512, 512), (1024, 512), (1024, 1024))
RESULTS = KERNELS_PAGE.with_suffix(".json")
KERNELS = Path(__file__).resolve().parent.parent / "model" / "kernels"


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

    heads, ids = shape(1, HEADS, LENGTH, HEAD_DIM), shape(1, LENGTH, dtype="int32")
    compile_for(topology, both, heads, heads, ids, ids)


def compile_splash(topology: str, sizes: tuple[int, int, int], segments: bool) -> None:
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    bq, bk, compute = sizes
    attention = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((LENGTH, LENGTH))] * HEADS),
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

    heads = shape(HEADS, LENGTH, HEAD_DIM)
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


def tiles_of_layout(layout: str, pass_: str, block: tuple[int, int]) -> Tiles:
    """What our kernel visits of one head."""
    import jax.numpy as jnp
    import numpy as np

    from model.kernels.tiles import BlockSizes, make_plan, part_sizes

    lengths = LAYOUTS[layout]
    segments = np.repeat(np.arange(len(lengths)), lengths)[None] + 1
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    ids = (jnp.asarray(segments), jnp.asarray(positions))
    visits = getattr(make_plan(*ids, *ids, sizes=BlockSizes(block, block)), pass_)
    every, full = int(np.sum(visits.stop - visits.first)), int(np.sum(visits.full_stop - visits.full_first))
    part = part_sizes(block)
    parts = int(np.sum(visits.part_stop - visits.part_first)) - full * (block[0] // part[0]) * (block[1] // part[1])
    return Tiles(full, every - full, parts, LENGTH // block[pass_ == "backward"])


def our_bundles(layout: str, pass_: str, sizes: tuple[int, ...], schedule: Schedule) -> dict[str, Any]:
    """Bundles of a head, and what the code of a full tile looks like."""
    from model.kernels.tiles import part_sizes

    block, of_keys = (sizes[0], sizes[1]), pass_ == "backward"
    tiles = tiles_of_layout(layout, pass_, block)
    code = AttentionCode.of(schedule, block[of_keys] // part_sizes(block)[of_keys])
    typical = schedule.tile_loops()[1 if tiles.full else 0]
    return {
        "sizes": sizes,
        "parts": part_sizes(block),
        **{f"tiles_{name}": n for name, n in dataclasses.asdict(tiles).items()},
        **{f"bundles_{name}": n for name, n in dataclasses.asdict(code).items()},
        "bundles": code.cycles(tiles),
        "mxu_use": used(typical, "MXU") / schedule.capacity["MXU"] / len(typical),
        "spills": used(typical, "SPILL"),
    }


def splash_bundles(sizes: tuple[int, ...], schedule: Schedule) -> dict[str, Any]:
    """Bundles of a head, the same for every layout."""
    tiles = sum((last_query - 1) // sizes[1] + 1 for last_query in range(sizes[0], LENGTH + 1, sizes[0]))
    blocks = [block for block in schedule.blocks() if block[0].depth]
    work = max((block for block in blocks if used(block, "MXU")), key=len)
    others = [block for block in blocks if not used(block, "MXU")]
    # What stores vectors begins or ends a row of tiles; what does not is run in every step, that of a skipped tile too.
    of_row = sum(len(block) for block in others if used(block, "VSTORE"))
    of_step = sum(len(block) for block in others if not used(block, "VSTORE"))
    rows, steps = LENGTH // sizes[0], (LENGTH // sizes[0]) * (LENGTH // sizes[1])
    return {
        "sizes": sizes,
        "tiles": tiles,
        "rows": rows,
        "steps": steps,
        "bundles_tile": len(work),
        "bundles_row": of_row,
        "bundles_step": of_step,
        "bundles": tiles * len(work) + rows * of_row + steps * of_step,
        "mxu_use": used(work, "MXU") / schedule.capacity["MXU"] / len(work),
        "spills": used(work, "SPILL"),
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
                    ours = kind == "ours"
                    result = our_bundles(layout, pass_, sizes, schedule) if ours else splash_bundles(sizes, schedule)
                    tried.setdefault(f"{layout}_{pass_}/{kind}", []).append(result)
    return {
        f"{layout}_{pass_}": {
            kind: min(tried[f"{layout}_{pass_}/{kind}"], key=lambda result: result["bundles"]) for kind in ("ours", "splash")
        }
        for layout in LAYOUTS
        for pass_ in PASSES
    }


def table(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> str:
    ours_columns = ("full tiles", "masked", "their parts", "bundles a full tile", "a part", "a row", "MXU slots used", "spills")
    splash_columns = ("tile", "tiles", "bundles a tile", "a row", "a step", "MXU slots used", "spills")
    titles = ["chip", "case", *(f"ours: {x}" for x in ours_columns), *(f"splash: {x}" for x in splash_columns), "ours / splash"]
    rows = [titles, ["---"] * len(titles)]
    for chip, cases in results.items():
        for case, sides in cases.items():
            of_ours = ("tiles_full", "tiles_masked", "tiles_parts", "bundles_full", "bundles_part", "bundles_row")
            of_splash = ("tiles", "bundles_tile", "bundles_row", "bundles_step")
            cells = [chip, case.replace("_", " ")]
            for side, names in (("ours", of_ours), ("splash", of_splash)):
                numbers = sides[side]
                if side == "splash":
                    cells.append(" x ".join(map(str, numbers["sizes"][:2])))
                cells += [f"{numbers[name]:,}" for name in names]
                cells += [f"{numbers['mxu_use']:.0%}", f"{numbers['spills']:,}"]
            rows.append([*cells, f"{ratio(sides):.3f}"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def ratio(sides: dict[str, dict[str, Any]]) -> float:
    return sides["ours"]["bundles"] / sides["splash"]["bundles"]


def page(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> str:
    """The section of docs/kernels.md that tells the results."""
    return PAGE.format(table=table(results))


def made_of() -> dict[str, str]:
    """What our schedules of a chip depend on, but for the block sizes, which stand beside them."""
    sources = [(KERNELS / name).read_text() for name in ("flash_attention.py", "tiles.py")]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {"kernel_sha256": source_hash(*sources), "counting_sha256": counting_hash(), **versions}


def counting_hash() -> str:
    """Of what compiles both kernels and counts them: the rest of the modules that it lies in changes no number."""
    code = [
        *(Bundle, Schedule, used, Tiles, AttentionCode, read_schedule),
        *(compile_ours, compile_splash, shape, compile_for, tiles_of_layout, our_bundles, splash_bundles, measure),
    ]
    sizes = (UNITS, TOPOLOGIES, LENGTH, HEAD_DIM, HEADS, LAYOUTS, PASSES, SPLASH_SIZES)
    return source_hash(*map(inspect.getsource, code), repr(sizes))


def source_hash(*sources: str) -> str:
    """SHA-256 of what Python modules do, whatever their comments, docstrings and layout, and the same for every Python."""

    def outline(node: Any) -> Any:
        if isinstance(node, list):
            return [outline(item) for item in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            body = node.body[1:]
        fields = {name: body if name == "body" else value for name, value in ast.iter_fields(node)}
        # What a later Python adds to a node is empty for code that an earlier one reads.
        return [type(node).__name__, {name: outline(value) for name, value in fields.items() if value not in (None, [])}]

    return hashlib.sha256(json.dumps([outline(ast.parse(source)) for source in sources]).encode()).hexdigest()


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
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"made_of": {}, "chips": {}}
        kept["chips"] |= results
        kept["made_of"] |= dict.fromkeys(results, made_of())
        kept = {part: {chip: of_chip[chip] for chip in TOPOLOGIES if chip in of_chip} for part, of_chip in kept.items()}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        write_section(TITLE, page(kept["chips"]))
    worst = {
        f"{case}_vs_splash": round(max(ratio(cases[case]) for cases in results.values()), 4)
        for case in (f"{layout}_{pass_}" for layout in LAYOUTS for pass_ in PASSES)
    }
    print(json.dumps({"benchmark": "attention_schedule", "chips": args.chips, **worst}))


TITLE = "Kernels, by their schedules"
PAGE = """Made by `python benchmarks/attention_schedule.py --table` (with `make env EXTRAS=tpu`), which writes docs/kernels.json
too; no TPU took part. The compiler of libtpu writes the final VLIW bundles of a kernel; a bundle is one cycle where nothing
stalls, so these numbers are the compiler's estimate and a lower bound, good for comparing two kernels, not for predicting
seconds.

8,192 tokens, head dimension 128, bfloat16. `causal` is one document, `packed` eight of 1,024 tokens, `shifted` the same begun
512 tokens earlier, `uneven` eight of 655 to 1,333 tokens, which end anywhere. Ours are tiles of 1,024 x 1,024; those not wholly
allowed are computed in parts of 512 x 512, and parts without an allowed pair are left out. jax's splash attention, with its
fused backward pass, is taken for each case at the best of those of fifteen block sizes, from 512 to 2,048, that compile.

Both kernels are counted whole: every basic block as often as it runs. Ours has, besides full tiles and parts, what each masked
tile costs around its parts (`bundles_masked` in docs/kernels.json), and what begins and ends a row of tiles. Splash has tiles,
beginnings and ends of rows, and the control of every step of its grid, of which 28 of 64 (tiles of 1,024) visit nothing. Code
that the hardware may skip, such as the start of a copy that is already there, counts as run on either side. What XLA does
outside is not counted: splash adds up a partial gradient of the queries for each block of keys, ours begins with zeros and is
scaled and transposed. MXU slots used and spills are those of a full tile, or of a part if none is full.

Documents that end anywhere meet more parts than their pairs would fill: of those of `uneven` 42% of the pairs are allowed, of
those of `packed` 67%. So `uneven` may take a little more than a third of splash. Smaller parts leave less out of use, but take
more bundles by the pair: experiments/LOG.md.

{table}
"""


if __name__ == "__main__":
    main()
