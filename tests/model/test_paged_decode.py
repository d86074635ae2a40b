"""Decode attention for TPU against a float64 reference, in TPU interpret mode: memory starts as NaN, copies that race are told.

Whole engine steps are compiled for TPUs by libtpu, on meshes too."""

import functools
import itertools
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import inference.engine
import model.kernels.paged_decode
from inference.config import EngineConfig
from inference.engine import Engine
from inference.request import Request
from inference.sampling import Sampling
from model.attention import cached_attention
from model.kernels.kv_pages import Int8Pages
from model.kernels.paged_decode import needed_pages, paged_decode
from model.presets import preset
from model.sharding import MESH_AXES, Layout, make_mesh
from tests.libtpu import run_with_libtpu
from tests.networks import random_params

SCALE, SLOTS, WIDTH = 0.3, 8, 16


@pytest.fixture(autouse=True)
def no_races(capfd, monkeypatch):
    """The interpreter prints what it finds. Blocks of four pages, for it is slow."""
    monkeypatch.setattr(model.kernels.paged_decode, "BLOCK_SLOTS", 4 * SLOTS)
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def interpret():
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True))


def reference(q, keys, values, positions, sinks, window, cap):
    """Each query alone, over keys [B, positions, K, D] and values in order; float64 [B, T, H, width]."""
    B, T, H, _ = q.shape
    group = H // keys.shape[2]
    out = np.zeros((B, T, H, values.shape[-1]))
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        stop = positions[b, t] + 1
        if stop > 0:
            seen = slice(max(0, stop - window) if window else 0, stop)
            logits = keys[b, seen, h // group] @ q[b, t, h] * SCALE
            logits = cap * np.tanh(logits / cap) if cap else logits
            weights = np.exp(logits)
            total = weights.sum() + (0.0 if sinks is None else np.exp(sinks[h]))
            out[b, t, h] = weights @ values[b, seen, h // group] / total
    return out


def rows_of(lengths, tokens):
    """int32 [B, tokens]: positions of the last tokens of rows so long, then padding; rows shorter than that have fewer."""
    positions = np.full((len(lengths), tokens), -1, np.int32)
    for row, length in enumerate(lengths):
        count = min(length, tokens - row % 2 if tokens > 1 else tokens)
        positions[row, :count] = np.arange(length - count, length)
    return positions


def brute_force_pages(row, window):
    """Numbers of the pages that hold a slot which a query of the row sees."""
    return sorted({s // SLOTS for at in row for s in range(max(0, at - window + 1) if window else 0, at + 1)})


def a_pool(rng, positions, kv_heads, width, window, arrays):
    """Pages in no order, NaN but for what is needed; a table that names no page where none is needed; and the rows in order."""
    B, table_width = len(positions), int(positions.max()) // SLOTS + 3
    needed = [brute_force_pages(row, window) for row in positions]
    numbers = iter(rng.permutation(sum(map(len, needed)) + 2).astype(np.int32))
    table = np.full((B, table_width), 1 << 20, np.int32)
    pools = [np.full((sum(map(len, needed)) + 2, kv_heads, SLOTS, width), np.nan, np.float32) for _ in range(arrays)]
    rows = [np.zeros((B, table_width * SLOTS, kv_heads, width)) for _ in range(arrays)]
    for b, p in [(row, page) for row in range(B) for page in needed[row]]:
        table[b, p] = next(numbers)
        for pool, row in zip(pools, rows, strict=True):
            page = rng.standard_normal((kv_heads, SLOTS, width)).astype(np.float32)
            pool[table[b, p]], row[b, p * SLOTS : (p + 1) * SLOTS] = page, page.swapaxes(0, 1)
    return pools, table, rows


def rounded_pool(pool, row, table):
    """A pool in 8 bits, NaN scales where it has NaNs; and the rows of what it holds."""
    scales = np.abs(pool).max(axis=-1) / 127
    values = np.round(np.nan_to_num(pool / np.where(scales == 0, 1, scales)[..., None])).astype(np.int8)
    kept, row = values * scales[..., None], row.copy()
    for b, p in np.argwhere(table < len(pool)):
        row[b, p * SLOTS : (p + 1) * SLOTS] = kept[table[b, p]].swapaxes(0, 1)
    return Int8Pages(jnp.asarray(values), jnp.asarray(np.pad(scales, ((0, 0), (0, 0), (0, 5)))[:, :, None])), row


def check(*, window=0, cap=0.0, group=2, kv_heads=2, with_sinks=False, latent=False, int8=False, tokens=1, lengths):
    """One array of keys, whose first columns are the values, if `latent`."""
    rng = np.random.default_rng(tokens)
    positions = rows_of(lengths, tokens)
    width = WIDTH - 5 if latent else WIDTH
    pools, table, rows = a_pool(rng, positions, kv_heads, WIDTH, window, 1 if latent else 2)
    pages = tuple(map(jnp.asarray, pools))
    if int8:
        pages, rows = zip(*(rounded_pool(*pair, table) for pair in zip(pools, rows, strict=True)), strict=True)
    q = rng.standard_normal((len(lengths), tokens, kv_heads * group, WIDTH)).astype(np.float32)
    sinks = rng.standard_normal(kv_heads * group).astype(np.float32) if with_sinks else None
    expected = reference(q.astype(np.float64), rows[0], rows[-1][..., :width], positions, sinks, window, cap)
    with interpret():
        out = paged_decode(
            jnp.asarray(q), pages, jnp.asarray(table), jnp.asarray(positions),
            None if sinks is None else jnp.asarray(sinks), width=width, scale=SCALE, window=window, cap=cap,
        )  # fmt: skip
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=0)


# One token, empty rows first, amid and last, page borders, and more pages than a block holds.
UNEVEN = (0, 1, 8, 0, 0, 9, 75, 23, 0)
PRODUCT = list(itertools.product((0, 10), (0.0, 2.0), (1, 3), (False, True), (False, True), (False, True), (1, 3, 8)))


def test_short_rows_of_all_kinds():
    check(lengths=UNEVEN)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 10, "cap": 2.0, "group": 3, "with_sinks": True, "tokens": 3},
        {"latent": True, "kv_heads": 1, "group": 5, "tokens": 2, "with_sinks": True},
        {"kv_heads": 3, "group": 1, "window": 40},
        {"int8": True, "window": 40, "tokens": 2},
        pytest.param({"int8": True, "latent": True, "kv_heads": 1}, marks=pytest.mark.slow),
    ],
)
def test_values_of_a_few_combinations(options):
    """All are in the slow test below."""
    check(lengths=(30, 70, 0, 17), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "cap", "group", "with_sinks", "latent", "int8", "tokens"), PRODUCT)
def test_values_of_all_combinations(window, cap, group, with_sinks, latent, int8, tokens):
    check(
        window=window, cap=cap, group=group, with_sinks=with_sinks, latent=latent, int8=int8, tokens=tokens, lengths=UNEVEN,
        kv_heads=1 if latent else 4,
    )  # fmt: skip


def test_bfloat16_is_as_near_as_its_rounding():
    rng = np.random.default_rng(0)
    positions = rows_of((40, 7), 1)
    pages = tuple(jnp.asarray(rng.standard_normal((8, 1, 16, 128)), jnp.bfloat16) for _ in range(2))
    table = rng.permutation(8).reshape(2, 4).astype(np.int32)
    q = jnp.asarray(rng.standard_normal((2, 1, 4, 128)), jnp.bfloat16)
    keys, values = (np.asarray(x, np.float64)[table].swapaxes(2, 3).reshape(2, 64, 1, 128) for x in pages)
    expected = reference(np.asarray(q, np.float64), keys, values, positions, None, 0, 0.0)
    with interpret():
        out = paged_decode(q, pages, jnp.asarray(table), jnp.asarray(positions), width=128, scale=SCALE)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("window", [0, 1, 7, 8, 9, 20, 1000])
def test_pages_needed_are_those_with_a_slot_that_is_seen(window):
    """With a window, queries near each other see no gap: needed pages are a range."""
    for tokens in (1, 2, 5):
        positions = rows_of([*range(1, 40), 0, 200], tokens)
        first, stop = (np.asarray(x) for x in needed_pages(jnp.asarray(positions), SLOTS, window))
        for row, begin, end in zip(positions, first, stop, strict=True):
            assert list(range(begin, end)) == brute_force_pages(row, window)


@pytest.mark.parametrize(
    ("kv_heads", "over"), [(2, ("tensor",)), pytest.param(1, (), marks=pytest.mark.slow)], ids=["of every head", "of all heads"]
)
def test_heads_on_a_mesh_attend_as_on_one_device(kv_heads, over):
    rng = np.random.default_rng(0)
    layout = Layout(
        make_mesh(dict.fromkeys(MESH_AXES, 1) | {"tensor": 2}, jax.devices()[:2]), {"heads": ("tensor",), "kv_heads": over}
    )
    shapes = ((2, 1, 4, WIDTH), (8, kv_heads, SLOTS, WIDTH), (8, kv_heads, SLOTS, WIDTH))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    new = (k[:2, :, 0][:, None], v[:2, :, 0][:, None])
    table, positions = jnp.arange(8, dtype=jnp.int32).reshape(2, 4), jnp.asarray(rows_of((30, 9), 1))
    attend = functools.partial(cached_attention, q, new, (k, v), table, positions, jnp.arange(4.0), scale=SCALE)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        out = jax.jit(lambda: attend(backend="flash", layout=layout))()
    np.testing.assert_allclose(out, attend(backend="xla"), atol=1e-6)


# --- In the engine ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "length", "cache_dtype"),
    [
        ("tiny-gemma2", 1, 1, "model"),
        *(
            pytest.param(name, 2, 9, dtype, marks=pytest.mark.slow)
            for name in ("tiny-gemma2", "tiny-deepseek")
            for dtype in ("model", "int8")
        ),
    ],
)
def test_the_engine_decodes_by_the_kernel_as_in_plain_jax(name, layers, length, cache_dtype, monkeypatch):
    monkeypatch.setattr(inference.engine, "check_backend", lambda *_: None)
    config = EngineConfig(max_batch=1, cache_tokens=64, page_size=32, prefill_chunk=8, cache_dtype=cache_dtype)
    request = Request(list(range(3, 3 + length)), Sampling(temperature=0.0), max_tokens=2)
    answers = []
    for backend in ("flash", "xla"):
        network = preset(name, vocab_size=48, max_seq_len=32, num_layers=layers, attention_backend=backend)
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
            answers.append(Engine(random_params(network), network, config).generate([request])[0][0])
    for ours, plain in zip(*answers, strict=True):
        assert ours.token == plain.token
        assert ours.raw_logprob == pytest.approx(plain.raw_logprob, abs=1e-5)


def test_what_the_kernel_cannot_run_is_refused(monkeypatch):
    network = preset("tiny-llama", attention_backend="flash", dtype="bfloat16")
    params = random_params(network)
    with pytest.raises(ValueError, match=r"model\.attention_backend='flash' is not for 'cpu' devices.*set it to 'xla'"):
        Engine(params, network)
    monkeypatch.setattr(inference.engine, "check_backend", lambda *_: None)
    with pytest.raises(ValueError, match=r"engine\.page_size=24 must be a multiple of 16 .* with bfloat16 pages"):
        Engine(params, network, EngineConfig(page_size=24))


# --- The real compiler --------------------------------------------------------------------------------------------------------

COMPILE = textwrap.dedent(
    """
    import sys, json
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from model.kernels.paged_decode import paged_decode

    topologies_, cases = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    for topology in topologies_:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        mesh = jax.sharding.Mesh(np.array(devices[:1]), ("one",))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        shape = lambda *dims, dtype="int32": jax.ShapeDtypeStruct(dims, dtype, sharding=everywhere)
        for tokens, heads, kv_heads, slots, head_dim, width, dtype, window, cap in cases:

            def run(q, pages, table, positions, sinks):
                return paged_decode(q, pages, table, positions, sinks, width=width, scale=0.1, window=window, cap=cap)

            pages = (shape(512, kv_heads, slots, head_dim, dtype=dtype),) * (1 if width < head_dim else 2)
            q, sinks = shape(4, tokens, heads, head_dim, dtype=dtype), shape(heads, dtype="float32")
            jax.jit(run).lower(q, pages, shape(4, 64), shape(4, tokens), sinks).compile()
    """
)
LLAMA = (1, 32, 8, 64, 128, 128, "bfloat16", 0, 0.0)


def test_it_compiles_for_tpus():
    run_with_libtpu(COMPILE, json.dumps(["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]), json.dumps([LLAMA]))


@pytest.mark.slow
def test_it_compiles_for_every_generation():
    """Many queries, all heads with keys of their own, latent attention, small pages, windows and caps, float32."""
    cases = [
        LLAMA,
        (8, 64, 8, 64, 128, 128, "bfloat16", 1000, 0.0),
        (1, 32, 32, 64, 128, 128, "bfloat16", 0, 0.0),
        (1, 8, 4, 16, 256, 256, "bfloat16", 4096, 50.0),
        (1, 128, 1, 64, 640, 512, "bfloat16", 0, 0.0),
        (8, 128, 1, 64, 640, 512, "bfloat16", 0, 0.0),
        (2, 128, 1, 64, 640, 512, "float32", 0, 0.0),
        (8, 512, 64, 64, 128, 128, "bfloat16", 0, 0.0),
        (5, 8, 2, 8, 128, 128, "float32", 0, 0.0),
        (1, 32, 8, 512, 128, 128, "float32", 0, 0.0),
    ]
    generations = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
    run_with_libtpu(COMPILE, json.dumps(generations), json.dumps(cases))


ENGINE = textwrap.dedent(
    """
    import json, sys
    import jax, jax.numpy as jnp
    from jax.experimental import topologies
    from inference.programs import Placement, decode, prefill
    from model.params import abstract_params, param_shardings, param_specs
    from model.presets import preset
    from model.sharding import DECODE_RULES, MESH_AXES, Layout, make_mesh
    from model.transformer import empty_pages

    for name, tensor, cache_dtype in json.loads(sys.argv[1]):
        model = preset(name, attention_backend="flash", dtype="bfloat16")
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
        layout = Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | {"tensor": tensor}, devices[:tensor]), DECODE_RULES)
        specs = param_specs(model)
        on = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        params = jax.tree.map(on, abstract_params(specs), param_shardings(specs, layout))
        placement = Placement.beside(params, model)
        of_pages = layout.sharding(None, "kv_heads" if placement.kv_heads else None)
        pages = jax.tree.map(lambda x: on(x, of_pages), jax.eval_shape(lambda: empty_pages(model, 8192, 64, cache_dtype)))
        ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.sharding())
        for program, rows, tokens in ((decode, 8, 1), (prefill, 1, 64)):
            new = ids(rows, tokens)
            compiled = program.lower(params, model, placement, pages, ids(rows, 32), new, new).compile()
            memory, pool = compiled.memory_analysis(), jax.tree.leaves(pages)[0]
            print(json.dumps({
                "kernels": compiled.as_text().count("paged_decode"),
                "layers": model.num_layers,
                "temporary": memory.temp_size_in_bytes,
                "array": pool.size * pool.dtype.itemsize // (tensor if placement.kv_heads else 1),
                "heads": placement.heads, "kv_heads": placement.kv_heads,
            }))
    """
)


def engine_programs(*cases):
    lines = run_with_libtpu(ENGINE, json.dumps(cases)).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.parametrize(
    ("case", "axes"),
    [
        (("tiny-gemma2", 2, "int8"), (["tensor"], ["tensor"])),
        *(
            pytest.param(("tiny-gemma2", tensor, dtype), (["tensor"], ["tensor"]), marks=pytest.mark.slow)
            for tensor, dtype in ((1, "model"), (2, "model"), (1, "int8"))
        ),
        pytest.param(("tiny-deepseek", 2, "model"), (["tensor"], []), marks=pytest.mark.slow),
    ],
)
def test_steps_of_the_engine_compile_for_a_tpu_and_copy_no_pages(case, axes):
    """Pages are written where they lie: no program has room for a copy of one layer's."""
    decode, prefill = engine_programs(case)
    assert decode["kernels"] >= decode["layers"]
    assert prefill["kernels"] == 0
    for program in (decode, prefill):
        assert (program["heads"], program["kv_heads"]) == axes
        assert program["temporary"] < program["array"] / 4
