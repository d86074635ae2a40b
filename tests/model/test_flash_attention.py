"""Flash attention against a float64 reference, in TPU interpret mode: memory starts as NaN, copies that race are told."""

import functools
import itertools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from model.attention import attention, make_pattern, ring_part
from model.kernels.flash_attention import flash_attention, flash_gradients
from model.kernels.tiles import MASKED, BlockSizes, make_plan
from model.ring_attention import zigzag
from model.sharding import MESH_AXES, TRAIN_RULES, Layout, make_mesh
from tests.libtpu import run_with_libtpu

SCALE = 0.3
SIZES = BlockSizes(forward=(128, 128), backward=(128, 128))


def interpret(detect_races=True):
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan", detect_races=detect_races))


@pytest.fixture(autouse=True)
def no_races(capfd):
    """The interpreter prints what it finds."""
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def document_ids(lengths, total):
    """Segments and positions of documents of the given lengths, then padding."""
    segments, positions = np.zeros(total, np.int32), np.zeros(total, np.int32)
    start = 0
    for number, length in enumerate(lengths, start=1):
        segments[start : start + length] = number
        positions[start : start + length] = np.arange(length)
        start += length
    return segments, positions


def layouts(total, seed=0):
    """[4, total] segments and positions: one document, random ones, boundaries at and beside tile edges, mostly padding."""
    rng = np.random.default_rng(seed)
    random = []
    while sum(random) < total - 40:
        random.append(int(rng.integers(1, 90)))
    edges = [127, 1, 1, 128, total - 257]
    rows = [document_ids(lengths, total) for lengths in ([total], random[:-1], edges, [3, 20])]
    return tuple(np.stack(ids) for ids in zip(*rows, strict=True))


def allowed_pairs(q_segments, q_positions, kv_segments, kv_positions, window):
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    allowed = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] > 0) & (distance >= 0)
    return allowed & (distance < window) if window else allowed


def reference(q, k, v, sinks, allowed, cap):
    """The textbook formula; of the arguments' dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    logits = jnp.einsum("bhtd,bhsd->bhts", q, k) * SCALE
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    logits = jnp.where(allowed[:, None], logits, -jnp.inf)
    sinks = jnp.full(q.shape[1], -jnp.inf) if sinks is None else sinks
    logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[None, :, None, None], (*logits.shape[:3], 1))], axis=-1)
    empty = jnp.all(jnp.isneginf(logits), axis=-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(empty, 0.0, logits), axis=-1)
    out = jnp.einsum("bhts,bhsd->bhtd", jnp.where(empty, 0.0, weights)[..., :-1], v)
    lse = jnp.where(empty[..., 0], MASKED, jax.nn.logsumexp(jnp.where(empty, 0.0, logits), axis=-1))
    return out, lse


def check(ids, *, window, cap, group, with_sinks, dtype, tolerance, sizes=SIZES, head_dim=32, seed=1):
    """Output, log-sum-exp and all gradients, those of the log-sum-exp among them."""
    (B, T), S = ids[0].shape, ids[2].shape[1]
    rng = np.random.default_rng(seed)
    shapes = ((B, 2, T, head_dim), (B, 2 // group, S, head_dim), (B, 2 // group, S, head_dim), (B, 2, T, head_dim), (B, 2, T))
    # Rounded first, so that only what is computed differs.
    q, k, v, d_out, d_lse = (np.asarray(jnp.asarray(rng.standard_normal(shape), dtype), np.float64) for shape in shapes)
    sinks = rng.standard_normal(2) if with_sinks else None
    allowed = allowed_pairs(*ids, window)
    d_lse = np.where(np.any(allowed, axis=-1)[:, None] | with_sinks, d_lse, 0.0)

    with jax.enable_x64(True):
        inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
        function = lambda q, k, v, sinks=None: reference(q, k, v, sinks, allowed, cap)  # noqa: E731
        expected, pull = jax.vjp(function, *inputs)
        expected_gradients = pull((jnp.asarray(d_out), jnp.asarray(d_lse)))

    plan = make_plan(*ids, window, sizes)
    function = lambda q, k, v, sinks=None: flash_attention(q, k, v, plan, sinks, scale=SCALE, cap=cap)  # noqa: E731
    inputs = [jnp.asarray(x, dtype) for x in (q, k, v)] + ([] if sinks is None else [jnp.asarray(sinks, jnp.float32)])
    with interpret():
        (out, lse), pull = jax.vjp(function, *inputs)
        gradients = pull((jnp.asarray(d_out, dtype), jnp.asarray(d_lse, jnp.float32)))
    names = ("out", "lse", "dq", "dk", "dv", "d_sinks")
    for name, x, y in zip(names, (out, lse, *gradients), (*expected, *expected_gradients), strict=False):
        x, y = np.asarray(x, np.float64), np.asarray(y)
        y = np.where(y == MASKED, np.float32(MASKED), y)
        assert np.all(np.isfinite(x)), name
        np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, np.abs(y[y > MASKED / 2]).max()), rtol=0, err_msg=name)


def same(ids):
    return (*ids, *ids)


PRODUCT = list(itertools.product((0, 50), (0.0, 2.0), (1, 2), (False, True), (256, 300)))


@pytest.mark.parametrize(("window", "cap", "group", "with_sinks", "total"), PRODUCT[:: len(PRODUCT) // 4 + 1] + PRODUCT[-1:])
def test_values_and_gradients(window, cap, group, with_sinks, total):
    """A few of the combinations; all are in the slow test below."""
    check(
        same(layouts(total + 2)), window=window, cap=cap, group=group, with_sinks=with_sinks, dtype=jnp.float32, tolerance=3e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("window", "cap", "group", "with_sinks", "total"), PRODUCT)
def test_values_and_gradients_of_all_combinations(window, cap, group, with_sinks, total, offset, dtype, tolerance):
    segments, positions = layouts(total + 2, seed=total)
    later = slice(total // 2, None) if offset else slice(None)  # Queries of the second half against all keys.
    ids = (segments[:, later], positions[:, later], segments, positions)
    check(ids, window=window, cap=cap, group=group, with_sinks=with_sinks, dtype=dtype, tolerance=tolerance)


def test_bfloat16():
    check(same(layouts(258)), window=50, cap=0.0, group=2, with_sinks=False, dtype=jnp.bfloat16, tolerance=2e-2)


@pytest.mark.parametrize(("forward", "backward"), [((256, 128), (128, 256)), ((128, 256), (256, 128))])
def test_tiles_that_are_not_square(forward, backward):
    """With tiles of 128 keys below 256 queries, two rows in turn add to the same block of the queries' gradients."""
    sizes = BlockSizes(forward, backward)
    check(same(layouts(500)), window=0, cap=0.0, group=1, with_sinks=False, dtype=jnp.float32, tolerance=3e-6, sizes=sizes)


def test_a_row_that_is_no_multiple_of_a_strip():
    """Its 600 queries are one block of 640, a strip of 512 and one of 128."""
    ids = tuple(x[None] for x in document_ids([200, 370], 600))
    check(same(ids), window=0, cap=0.0, group=1, with_sinks=False, dtype=jnp.float32, tolerance=3e-6, sizes=BlockSizes())


def test_segments_in_any_order():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (2, 260)), rng.integers(0, 300, (2, 260))
    check(same(ids), window=90, cap=0.0, group=1, with_sinks=True, dtype=jnp.float32, tolerance=3e-6)


def joined(parts):
    """Outputs and log-sum-exps of parts of the keys, put together as ring attention does."""
    total = functools.reduce(jnp.logaddexp, (lse for _, lse in parts))
    return sum(out * jnp.exp(lse - total)[..., None] for out, lse in parts), total


def test_parts_of_the_keys_add_up_by_their_log_sum_exp():
    """What ring attention does with the keys of other devices."""
    segments, positions = layouts(258)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 1, 258, 32)), jnp.float32) for _ in range(3))

    def over(keys):
        plan = make_plan(segments, positions, segments[:, keys], positions[:, keys], 0, SIZES)
        return flash_attention(q, k[:, :, keys], v[:, :, keys], plan, scale=SCALE)

    with interpret():
        (whole, lse), *parts = over(slice(None)), over(slice(0, 100)), over(slice(100, None))
    out, together = joined(parts)
    real = (segments > 0)[:, None]
    np.testing.assert_allclose(np.where(real, together, 0), np.where(real, lse, 0), atol=1e-5)
    np.testing.assert_allclose(np.where(real[..., None], out, 0), whole, atol=1e-5)


HALVES = (slice(0, 128), slice(128, 256))


@pytest.mark.parametrize(("window", "cap"), [(50, 2.0), pytest.param(0, 0.0, marks=pytest.mark.slow)])
def test_gradients_of_parts_of_the_keys_add_up(window, cap):
    """Those of the queries; those of keys and values stand side by side. With grouped heads and padding."""
    segments, positions = (x[None] for x in document_ids([90, 140], 256))
    rng = np.random.default_rng(0)
    q, d_out, k, v = (rng.standard_normal((1, heads, 256, 32)).astype(np.float32) for heads in (2, 2, 1, 1))
    allowed = allowed_pairs(segments, positions, segments, positions, window)
    with jax.enable_x64(True):
        function = lambda *qkv: reference(*qkv, None, allowed, cap)  # noqa: E731
        (out, lse), pull = jax.vjp(function, *(jnp.asarray(x, jnp.float64) for x in (q, k, v)))
        expected = pull((jnp.asarray(d_out, jnp.float64), jnp.zeros_like(lse)))
        lse, delta = (np.asarray(x, np.float32) for x in (lse, jnp.sum(out * d_out, axis=-1)))

    @jax.jit
    def of_part(k, v, kv_segments, kv_positions):
        plan = make_plan(segments, positions, kv_segments, kv_positions, window, SIZES)
        return flash_gradients(jnp.asarray(q), k, v, plan, jnp.asarray(d_out), lse, delta, scale=SCALE, cap=cap)

    with interpret(detect_races=False):
        parts = [of_part(k[:, :, keys], v[:, :, keys], segments[:, keys], positions[:, keys]) for keys in HALVES]
    dq, dk, dv = zip(*parts, strict=True)
    for x, y in zip((sum(dq), np.concatenate(dk, axis=2), np.concatenate(dv, axis=2)), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6 * np.abs(y).max(), rtol=0)


def test_bfloat16_parts_are_not_rounded_before_they_are_joined():
    """Values with a mean keep the rounding of the weights small beside that of the output."""
    segments, positions = (x[None] for x in document_ids([256], 256))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 1, 256, 32)) + mean, jnp.bfloat16) for mean in (0, 0, 2))
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v))
        expected, _ = reference(*exact, None, allowed_pairs(segments, positions, segments, positions, 0), 0.0)

    @jax.jit
    def of_part(k, v, kv_segments, kv_positions):
        plan = make_plan(segments, positions, kv_segments, kv_positions, 0, SIZES)
        return flash_attention(q, k, v, plan, scale=SCALE, out_dtype=jnp.float32)

    with interpret(detect_races=False):
        parts = [of_part(k[:, :, keys], v[:, :, keys], segments[:, keys], positions[:, keys]) for keys in HALVES]
    rounded = [(out.astype(jnp.bfloat16), lse) for out, lse in parts]
    error, with_rounding = (
        np.sqrt(np.mean(np.square(np.asarray(joined(each)[0], np.float64) - np.asarray(expected)))) for each in (parts, rounded)
    )
    assert error < with_rounding / 2


@pytest.mark.parametrize("backend", ["reference", "xla", "flash"])
def test_all_that_a_part_of_a_ring_returns_is_float32(backend):
    q, k, ids = (
        jnp.zeros((1, 4, 128, 32), jnp.bfloat16),
        jnp.zeros((1, 2, 128, 32), jnp.bfloat16),
        jnp.ones((1, 128), jnp.int32),
    )
    pattern = make_pattern(ids, ids, ids, ids, window=0, backend=backend)
    statistics = jnp.zeros((1, 4, 128), jnp.float32)
    part = ring_part(scale=SCALE, cap=0.0, backend=backend)
    forward = jax.eval_shape(part.forward, q, k, k, pattern)
    gradients = jax.eval_shape(part.gradients, q, k, k, pattern, q, statistics, statistics)
    assert {x.dtype for x in (*forward, *gradients)} == {jnp.dtype(jnp.float32)}
    assert [x.shape for x in (*forward, *gradients)] == [q.shape, statistics.shape, q.shape, k.shape, k.shape]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_ring_of_kernels_gives_what_plain_jax_gives(dtype):
    """Values and gradients over two devices that hold the tokens in zigzag order."""
    layout = Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | {"context": 2}, jax.devices()[:2]), TRAIN_RULES)
    order = zigzag(256, 2)
    segments, positions = (x[None, order] for x in document_ids([100, 140], 256))
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((1, 256, heads, 32)), dtype) for heads in (2, 1, 1, 2))
    sinks = jnp.asarray(rng.standard_normal(2), jnp.float32)
    results = {}
    for backend in ("reference", "flash"):

        @jax.jit
        def attend(q, k, v, sinks, backend=backend):
            pattern = make_pattern(segments, positions, segments, positions, window=90, backend=backend, layout=layout)
            return attention(q, k, v, pattern, sinks, scale=SCALE, cap=2.0, backend=backend, layout=layout)

        with interpret(detect_races=False):
            out, pull = jax.vjp(attend, q, k, v, sinks)
            results[backend] = jax.block_until_ready((out, *pull(d_out)))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for ours, theirs in zip(results["flash"], results["reference"], strict=True):
        theirs = np.asarray(theirs, np.float32)
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_keys_of_tiles_that_are_not_visited_are_never_read():
    """NaNs in keys and values of other documents do not reach a document in tiles of its own."""
    segments, positions = (x[None] for x in document_ids([128, 128, 128], 384))
    plan = make_plan(segments, positions, segments, positions, 0, SIZES)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 384, 32)).astype(np.float32) for _ in range(3))
    poisoned = [np.where(np.arange(384)[:, None] < 256, np.nan, x).astype(np.float32) for x in (k, v)]
    with interpret():
        clean, _ = flash_attention(*(jnp.asarray(x) for x in (q, k, v)), plan, scale=SCALE)
        dirty, _ = flash_attention(*(jnp.asarray(x) for x in (q, *poisoned)), plan, scale=SCALE)
    np.testing.assert_array_equal(clean[:, :, 256:], dirty[:, :, 256:])
    assert np.all(np.isnan(dirty[:, :, :256]))


# --- Which tiles are visited ------------------------------------------------------------------------------------------------


def brute_force(ids, window, block):
    """(holds an allowed pair, is wholly allowed) of every tile, by looking at every pair."""
    q_ids, kv_ids = ids[:2], ids[2:]
    padded = [np.pad(x, ((0, 0), (0, -x.shape[1] % b))) for xs, b in ((q_ids, block[0]), (kv_ids, block[1])) for x in xs]
    allowed = allowed_pairs(*padded, window)
    B, T, S = allowed.shape
    tiles = allowed.reshape(B, T // block[0], block[0], S // block[1], block[1])
    return tiles.any((2, 4)), tiles.all((2, 4))


def visited(visits, count):
    tiles = np.arange(count)
    some = (tiles >= np.asarray(visits.first)[..., None]) & (tiles < np.asarray(visits.stop)[..., None])
    full = (tiles >= np.asarray(visits.full_first)[..., None]) & (tiles < np.asarray(visits.full_stop)[..., None])
    return some, full


@pytest.mark.parametrize("window", [0, 1, 130, 700])
@pytest.mark.parametrize("block", [(128, 128), (256, 128), (128, 256)])
@pytest.mark.parametrize("sharding", ["none", "halves", "zigzag"])
def test_visited_tiles_are_the_fewest_possible(window, block, sharding):
    """Forward and backward, for documents in a row: one, random, of single tokens, at tile edges, with padding."""
    total = 1024
    rng = np.random.default_rng(window)
    random_lengths = [rng.integers(1, high, 400) for high in (10, 200, 600)]
    kinds = [
        np.array([total]),
        np.ones(total, int),
        np.array([128] * 8),
        np.array([127, 1, 129, 255, 2, 254, 256]),
        *random_lengths,
    ]
    rows = [document_ids(lengths[np.cumsum(lengths) <= total], total) for lengths in kinds]
    segments, positions = (np.stack(x) for x in zip(*rows, strict=True))
    dealt = np.split(zigzag(total, 2), 2)
    shards = {
        "none": [((segments, positions), (segments, positions))],
        "halves": [((segments[:, 512:], positions[:, 512:]), (segments[:, :512], positions[:, :512]))],
        "zigzag": [
            tuple(tuple(x[:, dealt[part]] for x in (segments, positions)) for part in pair)
            for pair in itertools.product(range(2), repeat=2)
        ],
    }[sharding]
    for q_ids, kv_ids in shards:
        ids = (*q_ids, *kv_ids)
        plan = make_plan(*ids, window, BlockSizes(block, block))
        some, full = brute_force(ids, window, block)
        for visits, transposed in ((plan.forward, False), (plan.backward, True)):
            expected_some, expected_full = (x.swapaxes(1, 2) if transposed else x for x in (some, full))
            found_some, found_full = visited(visits, expected_some.shape[-1])
            np.testing.assert_array_equal(found_some, expected_some)
            np.testing.assert_array_equal(found_full, expected_full)


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_no_tile_is_missed_and_none_taken_for_full(seed):
    rng = np.random.default_rng(seed)
    high = int(rng.integers(1, 5))
    ids = tuple(
        np.repeat(rng.integers(0, high + 1, (2, 24)), 32, axis=1) if i % 2 == 0 else rng.integers(0, 900, (2, 768))
        for i in range(4)
    )
    window = int(rng.choice([0, 100, 1000]))
    plan = make_plan(*ids, window, SIZES)
    some, full = brute_force(ids, window, (128, 128))
    for visits, transposed in ((plan.forward, False), (plan.backward, True)):
        found_some, found_full = visited(visits, 6)
        assert np.all(found_some >= (some.swapaxes(1, 2) if transposed else some))
        assert np.all(found_full <= (full.swapaxes(1, 2) if transposed else full))


# --- The real compiler --------------------------------------------------------------------------------------------------------

COMPILE = textwrap.dedent(
    """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from model.kernels.flash_attention import flash_attention
    from model.kernels.tiles import BlockSizes, make_plan

    topology, length, head_dim, group, window = sys.argv[1], *map(int, sys.argv[2:6])
    cap, gradients, dtype = float(sys.argv[6]), int(sys.argv[7]), jnp.dtype(sys.argv[8])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    everywhere = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices[:1]), ("one",)), jax.sharding.PartitionSpec())
    shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=everywhere)

    def run(q, k, v, sinks, segments, positions):
        plan = make_plan(segments, positions, segments, positions, window, BlockSizes().for_itemsize(dtype.itemsize))
        call = lambda q, k, v, sinks: flash_attention(q, k, v, plan, sinks, scale=0.1, cap=cap)
        if not gradients:
            return call(q, k, v, sinks)
        out, pull = jax.vjp(call, q, k, v, sinks)
        return pull(out)

    q, kv = shape(1, group, length, head_dim), shape(1, 1, length, head_dim)
    ids = shape(1, length, dtype=jnp.int32)
    jax.jit(run).lower(q, kv, kv, shape(group, dtype=jnp.float32), ids, ids).compile()
    """
)


def compile_for(topology, length, head_dim, group, window, cap, gradients, dtype="bfloat16"):
    run_with_libtpu(COMPILE, topology, length, head_dim, group, window, cap, int(gradients), dtype)


def test_it_compiles_for_a_tpu():
    compile_for("v5e:2x2", 2048, 128, 2, 0, 0.0, gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("head_dim", "group", "window", "cap"), [(64, 1, 0, 0.0), (128, 4, 1000, 0.0), (256, 2, 0, 50.0)])
def test_it_compiles_for_every_generation(topology, head_dim, group, window, cap):
    compile_for(topology, 4096, head_dim, group, window, cap, gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2"])
@pytest.mark.parametrize(("head_dim", "group", "window", "cap"), [(128, 2, 0, 0.0), (256, 2, 1000, 50.0)])
def test_float32_fits_into_vmem_in_smaller_tiles(topology, head_dim, group, window, cap):
    compile_for(topology, 4096, head_dim, group, window, cap, gradients=True, dtype="float32")


def test_tiles_of_float32_are_smaller_and_still_whole_registers():
    assert BlockSizes().for_itemsize(2) == BlockSizes()
    assert BlockSizes().for_itemsize(4) == BlockSizes(forward=(512, 512), backward=(256, 256))
    assert BlockSizes((256, 1024), (256, 128)).for_itemsize(4) == BlockSizes((128, 512), (128, 128))


@pytest.mark.slow
def test_a_million_tokens_fit_into_scalar_memory():
    compile_for("v5e:2x2", 1 << 20, 128, 1, 0, 0.0, gradients=True)
