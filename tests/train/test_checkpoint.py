"""Checkpoints: bitwise round trips, every kind of damage noticed, nothing lost."""

import os
import pathlib
import random
import shutil
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from train import checkpoint
from train.checkpoint import CheckpointError, Checkpoints, TreeMismatch

# What Orbax leaves behind of a failed call is not heard of.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

REPOSITORY = pathlib.Path(checkpoint.__file__).parents[1]
METADATA = {"data_step": 7, "skipped": [[3, 4]], "seconds": 0.1, "config": "abc"}


def make_state(seed: int) -> dict:
    """Every leaf filled with random bits: NaNs with payloads, denormals and negative zeros included."""
    generator = np.random.default_rng(seed)

    def bits(shape, dtype):
        dtype = np.dtype(dtype)
        return jnp.asarray(np.frombuffer(generator.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape))

    return {
        "params": {"embedding": bits((33, 16), np.float32), "blocks": [{"scale": bits((5,), ml_dtypes.bfloat16)}]},
        "opt_state": (bits((33, 16), np.float32), bits((4, 3, 2), np.int8), jnp.asarray([True, False, True])),
        "half": bits((6, 2), np.float16),
        "ema": None,
        "step": jnp.int32(seed),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same_bits(a, b) -> bool:
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def write(directory, steps, keep=5) -> None:
    checkpoints = Checkpoints(str(directory), keep=keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {**METADATA, "data_step": step})
    checkpoints.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with sound checkpoints of steps 1 and 2; copy it before doing harm."""
    directory = tmp_path_factory.mktemp("written") / "checkpoints"
    write(directory, (1, 2))
    return directory


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def restore_newest(directory, target=None):
    lines: list[str] = []
    checkpoints = Checkpoints(str(directory), keep=5)
    try:
        return checkpoints.restore_newest(target or abstract(make_state(1)), lines.append), lines
    finally:
        checkpoints.close()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(REPOSITORY), str(pathlib.Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
    )


def numpy_digest(x: np.ndarray) -> str:
    """The documented formula in Python integers, from the array's bytes."""

    def mix(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    word_bytes = min(x.dtype.itemsize, 4)
    content = x.tobytes()
    words = [int.from_bytes(content[i : i + word_bytes], "little") for i in range(0, len(content), word_bytes)]
    mixed = [mix(word ^ mix(i)) for i, word in enumerate(words)]
    return f"{sum(mixed) % 2**32:08x}{sum(mix((m + 0x9E3779B9) % 2**32) for m in mixed) % 2**32:08x}"


def test_digest_is_the_documented_formula():
    leaves, _ = checkpoint.flatten(make_state(3))
    assert checkpoint.digests(leaves) == {path: numpy_digest(np.asarray(leaf)) for path, leaf in leaves.items()}


def test_digest_of_64_bit_types():
    with jax.enable_x64(True):
        for x in (np.arange(6, dtype=np.float64) / 7, np.arange(4) << 40, np.asarray([1 + 2j], np.complex64)):
            expected = numpy_digest(x.view(np.uint32) if x.dtype.kind == "c" else x.view(np.uint64).view(np.uint32))
            assert checkpoint.digests({"x": jnp.asarray(x)}) == {"x": expected}


def test_digest_notices_any_flip_and_any_swap():
    x = np.random.default_rng(0).standard_normal((33, 16)).astype(np.float32)
    seen = {checkpoint.digests({"x": jnp.asarray(x)})["x"]}
    for trial in range(100):
        y = x.copy()
        flat = y.reshape(-1).view(np.uint32)
        i, j = np.random.default_rng(trial).choice(flat.size, 2, replace=False)
        if trial % 2:
            flat[[i, j]] = flat[[j, i]]
        else:
            flat[i] ^= np.uint32(1 << trial % 32)
        seen.add(checkpoint.digests({"x": jnp.asarray(y)})["x"])
    assert len(seen) == 101


def test_round_trip_is_bitwise(directory):
    (state, metadata, step), lines = restore_newest(directory)
    assert step == 2
    assert same_bits(state, make_state(2))
    assert metadata == {**METADATA, "data_step": 2}
    assert lines == []


def test_empty_directory_has_nothing_to_restore(tmp_path):
    assert restore_newest(tmp_path / "new") == (None, [])


def test_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    write(tmp_path, (1, 2, 3, 10), keep=2)
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    assert checkpoints.steps() == [3, 10]
    with pytest.raises(ValueError, match="step 10 has a checkpoint"):
        checkpoints.save(10, make_state(10), {})
    checkpoints.save(11, make_state(11), {})
    assert checkpoints.steps() == [10, 11]
    checkpoints.close()


def test_metadata_that_json_would_change_is_refused(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    with pytest.raises(ValueError, match="through JSON"):
        checkpoints.save(1, make_state(1), {"window": (1, 2)})
    assert checkpoints.steps() == []
    checkpoints.close()


def flip_a_bit(path, choose):
    content = bytearray(path.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("trial", range(50))
def test_every_flipped_bit_is_noticed(directory, trial):
    """Of any file of a checkpoint, its list of sums included."""
    choose = random.Random(trial)
    flip_a_bit(choose.choice(sorted(path for path in (directory / "2").rglob("*") if path.is_file())), choose)
    (state, metadata, step), lines = restore_newest(directory)
    assert step == 1
    assert same_bits(state, make_state(1))
    assert metadata == {**METADATA, "data_step": 1}
    assert len(lines) == 1
    assert "checkpoint 2 is damaged" in lines[0]
    assert "\n" not in lines[0]
    assert (directory / "damaged-2").is_dir()
    assert not (directory / "2").exists()


@pytest.mark.parametrize("trial", range(20))
def test_a_flipped_bit_of_array_data_is_noticed_by_the_digests_alone(directory, trial):
    """As in files too large to be summed, or where a kill came before the sums."""
    (directory / "2" / checkpoint.SUMS).unlink()
    choose = random.Random(trial)
    arrays = [path for path in sorted((directory / "2" / "state").rglob("[0-9]*")) if path.is_file()]
    # Of a bool's byte only the lowest bit means anything.
    arrays = [path for path in arrays if path.parent.name != "array_metadatas" and "opt_state/2/" not in str(path)]
    assert len(arrays) == 6
    flip_a_bit(choose.choice(arrays), choose)
    (state, _, step), lines = restore_newest(directory)
    assert step == 1
    assert same_bits(state, make_state(1))
    assert "what was read differs from what was saved" in lines[0] or "checkpoint 2 is damaged" in lines[0]


def test_sums_are_those_of_sha256sum(written):
    assert subprocess.run(["sha256sum", "-c", "--quiet", checkpoint.SUMS], cwd=written / "2").returncode == 0


@pytest.mark.parametrize(
    "victim", ["manifest", "state", "manifest/metadata", "state/params/embedding/0.0", "state/half/.zarray"]
)
@pytest.mark.parametrize("harm", ["delete", "truncate"])
def test_missing_and_truncated_files_fall_back(directory, victim, harm):
    path = directory / "2" / victim
    if path.is_dir():
        shutil.rmtree(path)
    elif harm == "delete":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    (state, _, step), lines = restore_newest(directory)
    assert step == 1
    assert same_bits(state, make_state(1))
    assert len(lines) == 1
    assert restore_newest(directory)[1] == []


def test_a_step_under_another_name_is_damage(directory):
    (directory / "2").rename(directory / "3")
    (_, _, step), lines = restore_newest(directory)
    assert step == 1
    assert "checkpoint 3 is damaged" in lines[0]


def test_when_all_are_damaged_it_raises_and_moves_nothing(directory):
    for step in (1, 2):
        os.truncate(directory / str(step) / "state/params/embedding/0.0", 10)
    with pytest.raises(CheckpointError, match=r"step 2: .*step 1: "):
        restore_newest(directory)
    assert {"1", "2"} <= set(os.listdir(directory))


def replaced(**changes):
    state = {**abstract(make_state(1)), **changes}
    return {key: value for key, value in state.items() if value != "absent"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (replaced(half="absent"), "half is left over"),
        (replaced(more=jax.ShapeDtypeStruct((2,), jnp.float32)), "more is missing"),
        (replaced(ema={"embedding": jax.ShapeDtypeStruct((33, 16), jnp.float32)}), "ema/embedding is missing"),
        (
            replaced(half=jax.ShapeDtypeStruct((7, 2), jnp.float16)),
            r"half is float16\[6, 2\] instead of float16\[7, 2\]",
        ),
        (
            replaced(half=jax.ShapeDtypeStruct((5, 2), jnp.float16)),
            r"half is float16\[6, 2\] instead of float16\[5, 2\]",
        ),
        (
            replaced(half=jax.ShapeDtypeStruct((2, 6), jnp.float16)),
            r"half is float16\[6, 2\] instead of float16\[2, 6\]",
        ),
        (
            replaced(half=jax.ShapeDtypeStruct((6, 2), jnp.float32)),
            r"half is float16\[6, 2\] instead of float32\[6, 2\]",
        ),
    ],
)
def test_state_of_another_config_is_refused_by_name(written, target, message):
    with pytest.raises(TreeMismatch, match=message):
        restore_newest(written, target)
    assert {"1", "2"} <= set(os.listdir(written))


def test_partial_restore_reads_what_was_asked_for(written):
    checkpoints = Checkpoints(str(written), keep=None)
    target = {"params": abstract(make_state(1))["params"]}
    state, _ = checkpoints.restore(2, target, partial=True)
    assert same_bits(state, {"params": make_state(2)["params"]})
    with pytest.raises(TreeMismatch, match="params/head is missing"):
        checkpoints.restore(2, {"params": {"head": jax.ShapeDtypeStruct((2,), jnp.float32)}}, partial=True)
    checkpoints.close()


def test_an_impossible_sharding_is_not_damage(written):
    mesh = jax.sharding.AbstractMesh((3,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    target = replaced(half=jax.ShapeDtypeStruct((6, 2), jnp.float16, sharding=sharding))
    with pytest.raises(ValueError, match="evenly divide") as error:
        restore_newest(written, target)
    assert not isinstance(error.value, CheckpointError)


def test_read_only_use_changes_nothing(directory):
    os.truncate(directory / "2/state/params/embedding/0.0", 10)
    (directory / "3.orbax-checkpoint-tmp").mkdir()  # A save that a running job has in hand.
    before = sorted(directory.rglob("*"))
    reports = checkpoint.verify(str(directory))
    assert [(report.step, bool(report.problem)) for report in reports] == [(1, False), (2, True)]
    leaves = jax.tree.leaves(make_state(1))
    assert (reports[0].num_leaves, reports[0].num_bytes) == (len(leaves), sum(leaf.nbytes for leaf in leaves))
    reader = Checkpoints(str(directory), keep=None)
    _, _, step = reader.restore_newest(abstract(make_state(1)), lambda line: None)
    reader.close()
    assert step == 1
    assert sorted(directory.rglob("*")) == before


def test_verify_names_the_damaged_leaf(directory):
    path = directory / "1/state/params/embedding/0.0"
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    assert "params/embedding" in checkpoint.verify(str(directory))[0].problem


def test_odd_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/checkpoints"):
        with pytest.raises(OSError, match="cannot be written"):
            Checkpoints(str(bad), keep=2)
    with pytest.raises(FileNotFoundError, match="not a directory of checkpoints"):
        checkpoint.verify(str(tmp_path / "absent"))


def test_buffers_may_be_donated_right_after_save(tmp_path):
    state = {str(i): jax.random.normal(jax.random.key(i), (512, 1024)) for i in range(8)}
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.5 + 1, state), donate_argnums=0)
    state = advance(state)
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    for step in range(4):
        expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
        # A state whose host copies jax has not cached, as in training.
        state = jax.jit(lambda state: jax.tree.map(lambda x: x + 0, state), donate_argnums=0)(state)
        checkpoints.save(step, state, {})
        for _ in range(4):
            state = advance(state)
        jax.block_until_ready(state)
        restored, _ = checkpoints.restore(step, abstract(state))
        assert same_bits(jax.tree.map(np.asarray, restored), expected)
    checkpoints.close()


def test_kill_during_an_asynchronous_save(tmp_path):
    result = run_python(
        f"""
        import os, signal
        import jax.numpy as jnp
        from train.checkpoint import Checkpoints
        from test_checkpoint import make_state
        checkpoints = Checkpoints({str(tmp_path)!r}, keep=2)
        checkpoints.save(1, make_state(1), {{}})
        checkpoints.wait()
        checkpoints.save(2, make_state(2) | {{"big": jnp.zeros((64, 1024, 1024))}}, {{}})
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert result.returncode == -9, result.stderr
    assert not (tmp_path / "2").exists()
    assert list(tmp_path.glob("2.*"))
    (state, _, step), _ = restore_newest(tmp_path)
    assert step == 1
    assert same_bits(state, make_state(1))
    # The remains are removed in the background, at the latest before the next save.
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert not list(tmp_path.glob("2.*"))
    (state, _, step), _ = restore_newest(tmp_path)
    assert step == 2
    assert same_bits(state, make_state(2))


def test_a_full_disk_is_told_at_the_next_call_and_the_older_checkpoints_stay(tmp_path):
    result = run_python(
        f"""
        import resource, signal
        import jax.numpy as jnp
        from train.checkpoint import CheckpointError, Checkpoints
        from test_checkpoint import make_state
        checkpoints = Checkpoints({str(tmp_path)!r}, keep=2)
        checkpoints.save(1, make_state(1), {{}})
        checkpoints.save(2, make_state(2), {{}})
        checkpoints.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoints.save(3, make_state(3) | {{str(i): jnp.ones((1024, 1024)) for i in range(8)}}, {{}})
        try:
            checkpoints.save(4, make_state(4), {{}})
        except CheckpointError as error:
            print(error)
        """
    )
    assert "Traceback" not in result.stderr
    assert "the checkpoint of step 3 could not be written" in result.stdout, result.stderr
    assert "File too large" in result.stdout
    assert "older ones there are intact" in result.stdout
    assert [report.problem for report in checkpoint.verify(str(tmp_path))] == ["", ""]
    (_, _, step), _ = restore_newest(tmp_path)
    assert step == 2


def test_only_what_orbax_leaves_behind_goes_unheard():
    heard = []
    for error in (RuntimeError("Event loop is closed"), RuntimeError("something else")):
        checkpoint._print_unraisable(types.SimpleNamespace(exc_value=error, object=None), heard.append)
    assert [str(raised.exc_value) for raised in heard] == ["something else"]


def test_digest_and_restore_do_not_depend_on_the_sharding(written):
    """Eight virtual devices restore what one device wrote, and agree on every digest however an array is laid out."""
    result = run_python(
        f"""
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from train import checkpoint
        from test_checkpoint import abstract, make_state, numpy_digest, same_bits
        assert len(jax.devices()) == 8
        x = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
        mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        for spec in (P(), P("data"), P("tensor", "data"), P(None, ("data", "tensor")), P(("tensor", "data"))):
            assert checkpoint.digests({{"x": jax.device_put(x, NamedSharding(mesh, spec))}})["x"] == numpy_digest(x), spec
        target = abstract(make_state(2))
        sharded = NamedSharding(mesh, P(None, "tensor"))
        target["params"]["embedding"] = jax.ShapeDtypeStruct((33, 16), np.float32, sharding=sharded)
        state, _ = checkpoint.Checkpoints({str(written)!r}, keep=None).restore(2, target)
        assert state["params"]["embedding"].sharding == sharded
        assert same_bits(state, make_state(2))
        print("agreed")
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert result.stdout == "agreed\n", result.stderr
