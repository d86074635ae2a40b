"""Flash attention against a float64 reference, in TPU interpret mode: memory starts as NaN, copies that race are told."""

import collections
import functools
import itertools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import model.kernels.flash_attention as flash_attention_module
from model.attention import attention, make_pattern, ring_part
from model.config import MlaConfig, ModelConfig
from model.kernels import tiles
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


def check(ids, *, window, cap, heads, sinks, dtype, tolerance, sizes=SIZES, seed=1, detect_races=True, head_dim=32):
    """Output, log-sum-exp and all gradients, those of the log-sum-exp among them, of one or several sets of ids of one shape.

    Args:
      heads: (of queries, of keys and values).
      sinks: of each head of queries, MASKED where there is none; None is an attention without.
    """
    several = ids if isinstance(ids, list) else [ids]
    (B, T), S, (H, K), D = several[0][0].shape, several[0][2].shape[1], heads, head_dim
    rng = np.random.default_rng(seed)
    shapes = ((B, H, T, D), (B, K, S, D), (B, K, S, D), (B, H, T, D), (B, H, T))
    # Rounded first, so that only what is computed differs.
    *qkv, d_out, d_lse = (np.asarray(jnp.asarray(rng.standard_normal(shape), dtype), np.float64) for shape in shapes)
    has_sink = np.zeros(H, bool) if sinks is None else np.asarray(sinks) > MASKED

    def results(function, d_out, d_lse, *inputs):
        values, pull = jax.vjp(function, *inputs)
        return [*values, *(x for x in pull((d_out, d_lse)) if x is not None)]

    @jax.jit
    def ours(d_out, d_lse, ids, *inputs):
        plan = make_plan(*ids, window, sizes)
        return results(
            lambda *inputs: flash_attention(*inputs[:3], plan, inputs[3], scale=SCALE, cap=cap), d_out, d_lse, *inputs
        )

    for each in several:
        allowed = allowed_pairs(*each, window)
        # The log-sum-exp of a query that sees nothing is no function of anything.
        d_lse_of_seeing = np.where(np.any(allowed, axis=-1)[:, None] | has_sink[:, None], d_lse, 0.0)
        with jax.enable_x64(True):
            exact = None if sinks is None else jnp.where(has_sink, jnp.asarray(sinks, jnp.float64), -jnp.inf)
            exact_inputs = [jnp.asarray(x) for x in (d_out, d_lse_of_seeing, *qkv)]
            expected = results(functools.partial(reference, allowed=allowed, cap=cap), *exact_inputs, exact)
        rounded = [jnp.asarray(x, dtype) for x in qkv] + [None if sinks is None else jnp.asarray(sinks, jnp.float32)]
        with interpret(detect_races):
            found = ours(
                jnp.asarray(d_out, dtype), jnp.asarray(d_lse_of_seeing, jnp.float32), jax.tree.map(jnp.asarray, each), *rounded
            )
        names = ("out", "lse", "dq", "dk", "dv", "d_sinks")[: 5 if sinks is None else 6]
        for name, x, y in zip(names, found, expected, strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y)
            y = np.where(y == MASKED, np.float32(MASKED), y)
            assert np.all(np.isfinite(x)), name
            np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, np.abs(y[y > MASKED / 2]).max()), rtol=0, err_msg=name)


def same(ids):
    return (*ids, *ids)


MHA, MQA, GQA = (2, 2), (2, 1), (4, 2)
QUICK = [(50, 2.0, MQA, (0.3, -1.0)), (0, 0.0, GQA, None)]
PRODUCT = list(itertools.product((0, 50), (0.0, 2.0), (MHA, GQA), (256, 300)))


@pytest.mark.parametrize(("window", "cap", "heads", "sinks"), QUICK)
def test_values_and_gradients(window, cap, heads, sinks):
    """A few of the combinations; all are in the slow test below."""
    check(same(layouts(300)), window=window, cap=cap, heads=heads, sinks=sinks, dtype=jnp.float32, tolerance=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize(("window", "cap", "heads", "total"), PRODUCT)
def test_values_and_gradients_of_all_combinations(window, cap, heads, total, dtype, tolerance, monkeypatch):
    """Each with queries of the same tokens as the keys and with queries of later ones; with and without sinks, by head.

    256 tokens are two blocks, 300 are two larger ones of four parts, of which one lies in the padding.
    """
    monkeypatch.setattr(tiles, "PART", 128)
    segments, positions = layouts(total + 100, seed=total)
    keys = segments[:, :total], positions[:, :total]
    several = [(segments[:, offset:][:, :total], positions[:, offset:][:, :total], *keys) for offset in (0, 100)]
    sinks = (0.3, MASKED, MASKED, -1.0)[: heads[0]]
    sizes = SIZES if total == 256 else BlockSizes((256, 256), (256, 256))
    check(
        several, window=window, cap=cap, heads=heads, sinks=sinks, dtype=dtype, tolerance=tolerance, sizes=sizes,
        detect_races=False,
    )  # fmt: skip


def test_bfloat16():
    check(same(layouts(258)), window=50, cap=0.0, heads=MQA, sinks=None, dtype=jnp.bfloat16, tolerance=2e-2)


@pytest.mark.parametrize(
    ("forward", "backward", "part"),
    [
        ((256, 128), (128, 256), 128),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (((128, 256), (256, 128), 128), ((256, 128), (128, 256), 512), ((128, 256), (256, 128), 512))
        ),
    ],
)
def test_tiles_that_are_not_square(forward, backward, part, monkeypatch):
    """With tiles of 128 keys below 256 queries, two rows in turn add to the same block of the queries' gradients."""
    monkeypatch.setattr(tiles, "PART", part)
    sizes = BlockSizes(forward, backward)
    check(same(layouts(500)), window=0, cap=0.0, heads=MHA, sinks=None, dtype=jnp.float32, tolerance=3e-6, sizes=sizes)


def test_a_row_that_is_no_multiple_of_a_strip():
    """Its 600 queries are one block of 640, a strip of 512 and one of 128."""
    ids = tuple(x[None] for x in document_ids([200, 370], 600))
    check(same(ids), window=0, cap=0.0, heads=MHA, sinks=None, dtype=jnp.float32, tolerance=3e-6, sizes=BlockSizes())


@pytest.mark.parametrize(("forward", "backward"), [((1024, 1024), (512, 512)), ((128, 512), (512, 256))])
@pytest.mark.parametrize("queries", [300, 640, 1100])
def test_a_row_is_padded_by_less_than_the_larger_tile(forward, backward, queries):
    keys = 2 * queries
    ids = [jax.ShapeDtypeStruct((1, length), jnp.int32) for length in (queries, queries, keys, keys)]
    plan = jax.eval_shape(functools.partial(make_plan, sizes=BlockSizes(forward, backward)), *ids)
    for side, (length, padded) in enumerate([(queries, plan.q_ids.shape[-1]), (keys, plan.kv_ids.shape[-1])]):
        larger, smaller = max(forward[side], backward[side]), min(forward[side], backward[side])
        assert length <= padded < length + (larger if length > smaller else 128)
        assert all(padded % size[side] == 0 for size in (plan.sizes.forward, plan.sizes.backward))


@pytest.mark.slow
def test_a_row_between_the_sizes_of_the_two_kernels():
    """Its 300 queries are one block in the forward pass and two in the backward one."""
    ids = tuple(x[None] for x in document_ids([100, 170], 300))
    sizes = BlockSizes((512, 512), (256, 256))
    check(same(ids), window=0, cap=0.0, heads=(1, 1), sinks=None, dtype=jnp.float32, tolerance=3e-6, sizes=sizes)


def test_a_full_tile_of_two_strips(monkeypatch):
    monkeypatch.setattr(flash_attention_module, "STRIP", 128)
    ids = tuple(x[None] for x in document_ids([512], 512))
    sizes = BlockSizes((256, 256), (256, 256))
    check(same(ids), window=0, cap=0.0, heads=(1, 1), sinks=None, dtype=jnp.float32, tolerance=3e-6, sizes=sizes)


def test_segments_in_any_order():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (2, 260)), rng.integers(0, 300, (2, 260))
    check(same(ids), window=90, cap=0.0, heads=MHA, sinks=(0.5, -0.2), dtype=jnp.float32, tolerance=3e-6)


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


def test_heads_over_a_mesh_give_what_plain_jax_gives_on_one_device():
    """Grouped heads with sinks over tensor=2, values and gradients: each device has two heads of queries and one of keys."""
    layout = Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | {"tensor": 2}, jax.devices()[:2]), TRAIN_RULES)
    assert layout.shards("heads") == layout.shards("kv_heads") == 2
    ids = tuple(x[None] for x in document_ids([50, 60], 120))
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((1, 120, heads, 32)), jnp.float32) for heads in (4, 2, 2, 4))
    sinks = jnp.asarray(rng.standard_normal(4), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(on_mesh, *inputs):
        options = {"backend": "flash", "layout": layout} if on_mesh else {"backend": "reference"}

        def attend(q, k, v, sinks):
            pattern = make_pattern(*same(ids), window=40, **options)
            return attention(q, k, v, pattern, sinks, scale=SCALE, cap=2.0, **options)

        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(d_out)

    with interpret(detect_races=False):
        found = jax.block_until_ready(run(True, q, k, v, sinks))
    for ours, theirs in zip(found, run(False, q, k, v, sinks), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


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
    in_tiles = allowed.reshape(B, T // block[0], block[0], S // block[1], block[1])
    return in_tiles.any((2, 4)), in_tiles.all((2, 4))


def in_ranges(first, stop, count):
    numbers = np.arange(count)
    return (numbers >= np.asarray(first)[..., None]) & (numbers < np.asarray(stop)[..., None])


def visited(visits, count):
    some, full = (in_ranges(*pair, count) for pair in ((visits.first, visits.stop), (visits.full_first, visits.full_stop)))
    return some, full


@pytest.mark.parametrize("window", [0, 1, 130, 700])
@pytest.mark.parametrize("block", [(128, 128), (256, 128), (128, 256)])
@pytest.mark.parametrize("sharding", ["none", "halves", "zigzag"])
def test_visited_tiles_and_parts_are_the_fewest_possible(window, block, sharding, monkeypatch):
    """Forward and backward, for documents in a row: one, random, of single tokens, at tile edges, with padding."""
    monkeypatch.setattr(tiles, "PART", 128)
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
        some_parts, _ = brute_force(ids, window, (128, 128))
        for visits, transposed in ((plan.forward, False), (plan.backward, True)):
            expected_some, expected_full = (x.swapaxes(1, 2) if transposed else x for x in (some, full))
            found_some, found_full = visited(visits, expected_some.shape[-1])
            np.testing.assert_array_equal(found_some, expected_some)
            np.testing.assert_array_equal(found_full, expected_full)
            expected_parts = some_parts.swapaxes(1, 2) if transposed else some_parts
            found_parts = in_ranges(visits.part_first, visits.part_stop, expected_parts.shape[-1])
            np.testing.assert_array_equal(found_parts, expected_parts)


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


def dealt_ids(lengths, devices):
    """Segments and positions of a row, by device of a ring: [devices, tokens of a device]."""
    total = sum(lengths)
    return tuple(x[zigzag(total, devices)].reshape(devices, -1) for x in document_ids(lengths, total))


RING_LAYOUTS = [
    [1024] * 8,
    [1201, 830, 1017, 1333, 655, 1150, 902, 1104],
    pytest.param([8192], marks=pytest.mark.slow),
    pytest.param([5, 8000, 187], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize("lengths", RING_LAYOUTS)
def test_a_ring_visits_the_fewest_tiles_possible(lengths, devices):
    """Of 8,192 tokens, in the plan that a mesh makes: blocks end where a device's two parts of the row do."""
    layout = Layout.of(make_mesh(dict.fromkeys(MESH_AXES, 1) | {"context": devices}, jax.devices()[:devices]), TRAIN_RULES)
    segments, positions = dealt_ids(lengths, devices)
    ids = [jnp.asarray(x.reshape(1, -1)) for x in (segments, positions)]
    plan = jax.jit(lambda *ids: make_pattern(*ids, *ids, window=0, backend="flash", layout=layout))(*ids)
    half = 8192 // devices // 2
    block = plan.sizes.forward
    assert plan.sizes == BlockSizes((min(half, 1024),) * 2, (min(half, 1024),) * 2)
    fewest = sum(
        np.sum(brute_force((segments[i : i + 1], positions[i : i + 1], segments[j : j + 1], positions[j : j + 1]), 0, block)[0])
        for i, j in itertools.product(range(devices), repeat=2)
    )
    for visits in (plan.forward, plan.backward):
        assert np.sum(visits.stop - visits.first) == fewest


@pytest.mark.parametrize("devices", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
@pytest.mark.parametrize("lengths", [[256] * 4, pytest.param([300, 5, 719], marks=pytest.mark.slow)])
def test_the_kernels_compute_the_fewest_tiles_possible(lengths, devices, monkeypatch):
    """Counted as they run, over all pairs of devices of a ring; dq, dk and dv are of one pass, which computes a tile once.

    A device has two parts of the row, of at least 128 tokens each: blocks end where parts do.
    """
    total = max(1024, 256 * devices)
    lengths = [length * total // 1024 for length in lengths]
    computed = []
    logits = flash_attention_module._Logits.__call__

    def counted(self, k, q):
        jax.debug.callback(lambda: computed.append((q.shape[0], k.shape[0])))
        return logits(self, k, q)

    monkeypatch.setattr(flash_attention_module._Logits, "__call__", counted)
    pairs = np.array(list(itertools.product(range(devices), repeat=2)))
    by_device = dealt_ids(lengths, devices)
    ids = [jnp.asarray(x[pairs[:, side]]) for side in (0, 1) for x in by_device]
    sizes = BlockSizes().dividing(total // devices // 2)
    block = sizes.forward
    some, _ = brute_force([np.asarray(x) for x in ids], 0, block)
    q = jnp.ones((len(pairs), 1, total // devices, 32))

    @jax.jit
    def forward(q, ids):
        return flash_attention(q, q, q, make_plan(*ids, 0, sizes), scale=SCALE)

    @jax.jit
    def backward(q, ids, lse):
        return flash_gradients(q, q, q, make_plan(*ids, 0, sizes), q, lse, lse, scale=SCALE)

    with interpret(detect_races=False):
        lse = jax.block_until_ready(forward(q, ids))[1]
        jax.effects_barrier()
        of_forward = computed.copy()
        computed.clear()
        jax.block_until_ready(backward(q, ids, lse))
        jax.effects_barrier()
    assert of_forward == [block] * np.sum(some)
    assert computed == [block] * np.sum(some)


def test_the_kernels_compute_of_masked_tiles_the_parts_with_an_allowed_pair(monkeypatch):
    """Counted as they run: a tile that is wholly allowed at once, of any other its parts."""
    monkeypatch.setattr(tiles, "PART", 128)
    computed = collections.Counter()
    logits = flash_attention_module._Logits.__call__

    def counted(self, k, q):
        jax.debug.callback(lambda: computed.update([(q.shape[0], k.shape[0])]))
        return logits(self, k, q)

    monkeypatch.setattr(flash_attention_module._Logits, "__call__", counted)
    ids = same(tuple(x[None] for x in document_ids([5, 763], 768)))
    _, full = brute_force(ids, 0, (256, 256))
    parts = brute_force(ids, 0, (128, 128))[0].reshape(3, 2, 3, 2)
    masked = int(np.sum(parts & ~full.reshape(3, 1, 3, 1)))
    assert (full.sum(), masked) == (1, 17)  # and not the 20 of five tiles: of those on the diagonal three of four
    expected = {(256, 256): 1, (128, 128): masked}
    q = jnp.ones((1, 1, 768, 32))
    plan = make_plan(*(jnp.asarray(x) for x in ids), 0, BlockSizes((256, 256), (256, 256)))
    with interpret(detect_races=False):
        lse = jax.block_until_ready(jax.jit(lambda q: flash_attention(q, q, q, plan, scale=SCALE))(q))[1]
        jax.effects_barrier()
        assert computed == expected
        computed.clear()
        jax.block_until_ready(jax.jit(lambda q: flash_gradients(q, q, q, plan, q, lse, lse, scale=SCALE))(q))
        jax.effects_barrier()
    assert computed == expected


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [128, 192])
def test_values_and_gradients_at_the_sizes_that_are_shipped(head_dim):
    """Tiles of 1,024 in parts of 512, two strips, and heads as wide as models have them, for documents that end anywhere."""
    ids = tuple(x[None] for x in document_ids([700, 1, 1027, 300], 2048))
    check(
        same(ids), window=0, cap=0.0, heads=MQA, sinks=None, dtype=jnp.float32, tolerance=1e-5, sizes=BlockSizes(),
        head_dim=head_dim, detect_races=False,
    )  # fmt: skip


# --- The real compiler --------------------------------------------------------------------------------------------------------

COMPILE = textwrap.dedent(
    """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from model.chips import chip_of
    from model.kernels.flash_attention import flash_attention
    from model.kernels.tiles import BlockSizes, make_plan

    topology, length, head_dim, group, window = sys.argv[1], *map(int, sys.argv[2:6])
    cap, gradients, dtype = float(sys.argv[6]), int(sys.argv[7]), jnp.dtype(sys.argv[8])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    everywhere = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices[:1]), ("one",)), jax.sharding.PartitionSpec())
    shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=everywhere)

    def run(q, k, v, sinks, segments, positions):
        sizes = BlockSizes.of_chip(chip_of(devices[0].device_kind), head_dim, cap).for_itemsize(dtype.itemsize)
        plan = make_plan(segments, positions, segments, positions, window, sizes)
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
@pytest.mark.parametrize(
    ("head_dim", "group", "window", "cap"), [(64, 1, 0, 50.0), (128, 4, 1000, 0.0), (128, 2, 0, 50.0), (256, 2, 0, 50.0)]
)
def test_it_compiles_for_every_generation(topology, head_dim, group, window, cap):
    compile_for(topology, 4096, head_dim, group, window, cap, gradients=True)


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_values_wider_than_keys_are_refused_when_the_config_is_read(backend):
    def config(width):
        mla = MlaConfig(q_lora_rank=0, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=width)
        sizes = {"vocab_size": 8, "num_layers": 1, "d_model": 32, "num_heads": 2, "d_ff": 8, "max_seq_len": 8}
        return ModelConfig(**sizes, mla=mla, attention_backend=backend, dtype="bfloat16")

    assert config(16).head_dim == 16
    with pytest.raises(ValueError, match=r"v_head_dim=17 is more than the keys' 16"):
        config(17)


def test_heads_too_wide_for_vmem_are_refused_when_the_config_is_read():
    sizes = {"vocab_size": 8, "num_layers": 1, "d_model": 8, "num_heads": 1, "d_ff": 8, "max_seq_len": 8}
    ModelConfig(**sizes, attention_backend="flash", head_dim=256)
    with pytest.raises(ValueError, match="model.head_dim=264 is too large.*take 'xla', or at most 256"):
        ModelConfig(**sizes, attention_backend="flash", head_dim=264)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2"])
@pytest.mark.parametrize(("head_dim", "group", "window", "cap"), [(128, 2, 0, 0.0), (128, 2, 0, 50.0), (256, 2, 1000, 50.0)])
def test_float32_fits_into_vmem_in_smaller_tiles(topology, head_dim, group, window, cap):
    compile_for(topology, 4096, head_dim, group, window, cap, gradients=True, dtype="float32")


def test_tiles_of_float32_are_smaller_and_still_whole_registers():
    assert BlockSizes().for_itemsize(2) == BlockSizes()
    assert BlockSizes().for_itemsize(4) == BlockSizes(forward=(512, 512), backward=(256, 256))
    assert BlockSizes((256, 1024), (256, 128)).for_itemsize(4) == BlockSizes((128, 512), (128, 128))


@pytest.mark.slow
def test_a_million_tokens_fit_into_scalar_memory():
    compile_for("v5e:2x2", 1 << 20, 128, 1, 0, 0.0, gradients=True)
