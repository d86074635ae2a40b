"""Checkpoints that are written in the background, appear whole or not at all, and are checked to the last bit when read.

Orbax writes and commits (a temporary directory, then a rename); each array is an uncompressed Zarr file at its own path, so
that every byte of it counts. Orbax does not notice a flipped bit: it restores wrong weights in silence. So each checkpoint
also carries a manifest, in the same commit: path, shape, dtype and digest of every leaf, the caller's metadata, and the
SHA-256 of all that. A leaf is checked after every restore, on the devices, against the digest taken before the save. The
small files, Orbax's own notes among them, are also checked byte by byte, against sums taken right after the commit.

    runs/<name>/checkpoints/<step>/state/params/blocks/...   the arrays
    runs/<name>/checkpoints/<step>/manifest/metadata         the manifest
    runs/<name>/checkpoints/<step>/SHA256SUMS                of files below 1 MiB; missing if a kill came before it
    runs/<name>/checkpoints/damaged-<step>/                  found damaged, set aside, never read again
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from train.distributed import ALONE, Group

PyTree = Any

SUMS = "SHA256SUMS"
SUMMED_BYTES = 1 << 20  # Larger files are array data, which the digests cover; reading them twice would double a restore.

# Orbax warns about every option that differs from its defaults, at every save, and logs pages of what it then raises.
absl.logging.set_verbosity(absl.logging.FATAL)


def _print_unraisable(raised: sys.UnraisableHookArgs, print_it: Callable[..., Any] = sys.unraisablehook) -> None:
    """Drops what other reads and writes print, pages of it, at whatever time, when Orbax abandons them because one failed."""
    coroutine = getattr(raised.object, "cr_code", None)
    if str(raised.exc_value) != "Event loop is closed" and not (coroutine and "orbax" in coroutine.co_filename):
        print_it(raised)


sys.unraisablehook = _print_unraisable


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is incomplete, or is not what was saved."""


class TreeMismatch(ValueError):
    """A sound checkpoint of another state than the one asked for."""


def _mix(word: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser: a bijection of uint32 in which every input bit moves about half of the output bits."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32: narrow types widened, 64-bit types split along a new last axis of 2."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(x.real), _words(x.imag)], axis=-1)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)


def digest(x: jax.Array) -> jax.Array:
    """64-bit digest of an array's bits, uint32 [2], computed where the array lives.

    With w_i the i-th 32-bit word in row-major order and m_i = mix(w_i ^ mix(i)), the digest is the pair
    (sum m_i, sum mix(m_i + c)) mod 2^32.
      - Sums mod 2^32 do not depend on their order: any sharding over any number of devices and hosts gives the same digest.
      - mix is a bijection, so for a given i another w_i means another m_i: a change within one word, hence of one element of
        at most 32 bits, moves both sums, with certainty. Several changes at once cancel in both with probability 2^-64.
      - i enters before mixing, so that elements that trade places are noticed. (i is taken mod 2^32; only a trade over a
        distance of exactly a multiple of 2^32 words would go unseen.)
    It guards against accidents, not against an adversary.
    """
    words = _words(x)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = _mix(words ^ _mix(index))
    lanes = (mixed, _mix(mixed + np.uint32(0x9E3779B9)))
    # One reduction with two results reads the array once: four times as fast on CPU as two sums.
    zeros = (np.uint32(0), np.uint32(0))
    sums = jax.lax.reduce(lanes, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(words.ndim)))
    return jnp.stack(sums)


@functools.cache
def _digest_on(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """`digest`, with a result that every process of the mesh can read."""
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return jax.jit(digest, out_shardings=everywhere)


def digests(leaves: dict[str, jax.Array]) -> dict[str, str]:
    """The digest of each leaf as 16 hexadecimal digits.

    One at a time: XLA's CPU client runs independent programs at once, and the collectives of two wait for each other for ever
    where there is a thread for each device and no more.
    """
    values = {path: jax.device_get(_digest_on(leaf.sharding)(leaf)) for path, leaf in leaves.items()}
    return {path: f"{value[0]:08x}{value[1]:08x}" for path, value in values.items()}


def flatten(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """Leaves by path, such as `params/blocks/attention/query` or `opt_state/0/mu/embedding`, and the structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path: a dict key must not contain '/'")
    return named, structure


class Checkpoints:
    """The checkpoints of one run, by step.

    A state is any pytree of jax arrays with at least one level, over any mesh; metadata is a small JSON object. Every process
    of a job makes the same calls and is told the same: what is there is process 0's word, damage that one finds is damage for
    all. Errors of a background save surface as CheckpointError at the next call.
    """

    def __init__(self, directory: str, keep: int | None, group: Group = ALONE):
        """Opens `directory`, creating it if need be.

        Args:
          directory: a local path, or one of a mounted or supported remote file system (`gs://`).
          keep: how many of the newest checkpoints stay. None opens for reading only: nothing is created, deleted or renamed,
            so that sampling and verifying never disturb a running job.
          group: the processes that all open it.

        Raises:
          OSError: the directory cannot be created or written to; or, for reading, does not exist.
        """
        self._directory = epath.Path(directory).absolute() if "://" not in directory else epath.Path(directory)
        self._read_only = keep is None
        if self._read_only:
            if not self._directory.is_dir():
                raise FileNotFoundError(f"{directory} is not a directory of checkpoints: give the run that was trained")
        elif group.is_first:
            _check_writable(self._directory)
        self._group = group
        group.barrier("directory of checkpoints")
        # Named processes meet at the coordination service, where a deadline holds; all of them would at a collective.
        processes = ocp.options.MultiprocessingOptions(active_processes=set(range(group.count)) if group.count > 1 else None)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=self._read_only,
            create=False,
            cleanup_tmp_directories=not self._read_only,
            save_interval_steps=1,
            multiprocessing_options=processes,
            async_options=ocp.options.AsyncOptions(timeout_secs=int(group.deadlines.phase_seconds)),
        )
        self._handlers = {
            "state": ocp.PyTreeCheckpointHandler(
                use_ocdbt=False,
                # Compressing float32 weights would save 7 % of the space for twice the time.
                use_compression=False,
                # Replicas would each write a slice of small arrays too, after compiling a program for every slice.
                type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 22))
                ),
                multiprocessing_options=processes,
            ),
            "manifest": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
        }
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=self._handlers)
        self._saving: int | None = None

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> None:
        """Starts writing `state`; returns when its buffers may be donated, before the files are complete.

        Raises:
          ValueError: there is a checkpoint of this step already, or `metadata` would not come back from JSON as it is.
          CheckpointError: this or the previous save failed; the older checkpoints are intact.
        """
        if json.loads(json.dumps(metadata)) != metadata:
            raise ValueError(f"checkpoint metadata {metadata} changes on its way through JSON: use str, int, float, list, dict")
        if step in self.steps():
            raise ValueError(f"step {step} has a checkpoint in {self._directory} already: a step is saved once")
        leaves, _ = flatten(state)
        hashes = digests(leaves)
        manifest = {
            "step": step,
            "metadata": metadata,
            "leaves": {
                path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": hashes[path]}
                for path, leaf in leaves.items()
            },
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves), manifest=ocp.args.JsonSave({**manifest, "sha256": _seal(manifest)})
        )
        self._saving = step
        with self._write_errors():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Returns when the last save is complete. Raises CheckpointError if it failed."""
        with self._write_errors():
            self._finish_save()

    def close(self) -> None:
        """`wait`, then ends the background threads."""
        with self._write_errors():
            try:
                self._finish_save()
            finally:
                self._manager.close()

    def _finish_save(self) -> None:
        self._manager.wait_until_finished()
        if self._saving is not None and self._group.is_first:
            directory = self._directory / str(self._saving)
            files = (parent / name for parent, _, names in directory.walk() for name in names)
            files = (path for path in files if path.stat().length < SUMMED_BYTES)
            sums = _sums(directory, sorted(str(path.relative_to(directory)) for path in files))
            temporary = directory / f".{SUMS}"
            temporary.write_text(sums)
            temporary.rename(directory / SUMS)
        self._saving = None

    def delete(self, step: int) -> None:
        """Removes a complete checkpoint."""
        with self._write_errors():
            self._manager.delete(step)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first; whether they are sound shows when they are read."""
        self.wait()
        self._manager.reload()
        return self._group.from_first("steps", lambda: sorted(self._manager.all_steps()))

    def restore(self, step: int, abstract: PyTree, partial: bool = False) -> tuple[PyTree, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
          abstract: tree of jax.ShapeDtypeStruct; a leaf without sharding goes to the default device.
          partial: leaves that `abstract` lacks are left unread (a sampler wants no optimizer state) instead of refused.

        Returns:
          The state, every leaf bitwise what was saved, and the metadata.

        Raises:
          TreeMismatch: the checkpoint is of another state; every path that is missing, left over or different is named.
          DamagedCheckpoint: it is incomplete or not what was saved.
        """
        wanted, structure = flatten(abstract)
        manifest, leaves = {}, {}
        problem = ""
        try:
            self._check_files(step)
            manifest = self._read_manifest(step)
            _check_tree(f"{self._directory}/{step}", manifest["leaves"], wanted, partial)
            leaves = self._read_leaves(step, wanted)
        except DamagedCheckpoint as error:
            problem = str(error)
        problem = next(filter(None, self._group.gather("restore", problem)), "")
        if problem:
            raise DamagedCheckpoint(problem)
        found = digests(leaves)
        wrong = [path for path in wanted if found[path] != manifest["leaves"][path]["digest"]]
        if wrong:
            raise DamagedCheckpoint(f"what was read differs from what was saved in {_listed(wrong)}")
        return structure.unflatten([leaves[path] for path in wanted]), manifest["metadata"]

    def metadata(self, step: int) -> dict[str, Any]:
        """What the caller saved beside the state. Raises DamagedCheckpoint if it cannot be read."""

        def read() -> tuple[dict[str, Any], str]:
            try:
                return self._read_manifest(step)["metadata"], ""
            except DamagedCheckpoint as error:
                return {}, str(error)

        metadata, problem = self._group.from_first("metadata", read)
        if problem:
            raise DamagedCheckpoint(problem)
        return metadata

    def restore_newest(
        self, abstract: PyTree, log: Callable[[str], None], partial: bool = False, among: list[int] | None = None
    ) -> tuple[PyTree, dict[str, Any], int] | None:
        """Reads the newest sound checkpoint (`among` these steps): (state, metadata, step), or None if there is none at all.

        A damaged one is reported through `log` in one line and renamed `damaged-<step>`, nothing being deleted. This happens
        only after an older one has proved readable: a fault that all of them share (no memory, a bad mesh) is no damage.

        Raises:
          TreeMismatch: as in `restore`.
          CheckpointError: there are checkpoints, and none can be read.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in sorted(self.steps() if among is None else among, reverse=True):
            try:
                state, metadata = self.restore(step, abstract, partial)
            except DamagedCheckpoint as error:
                damaged[step] = error
                continue
            for bad_step, error in damaged.items():
                log(f"checkpoint {bad_step} is damaged ({error}); {self._set_aside(bad_step)}; using step {step} instead")
            return state, metadata, step
        if damaged:
            reasons = "; ".join(f"step {step}: {error}" for step, error in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be read ({reasons}). If the reason lies outside of the files, "
                "remove it and try again; to begin from the first step, move this directory away."
            )
        return None

    def verify_step(self, step: int) -> StepReport:
        """Reads a checkpoint without a model, everything on the default device, and compares it with its manifest."""
        leaves: dict[str, Any] = {}
        try:
            leaves = self._read_manifest(step)["leaves"]
            abstract = {
                path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"])) for path, leaf in leaves.items()
            }
            self.restore(step, abstract)
            problem = ""
        except DamagedCheckpoint as error:
            problem = str(error)
        num_bytes = sum(math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize for leaf in leaves.values())
        return StepReport(step, len(leaves), num_bytes, problem)

    def _check_files(self, step: int) -> None:
        directory = self._directory / str(step)
        if not (directory / SUMS).exists():
            return
        try:
            saved = (directory / SUMS).read_text()
            here = _sums(directory, [line.partition("  ")[2] for line in saved.splitlines()])
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"a file listed in {SUMS} cannot be read: {_one_line(error)}") from error
        wrong = [line.partition("  ")[2] for line in set(here.splitlines()) - set(saved.splitlines())]
        if here != saved:
            raise DamagedCheckpoint(f"{_listed(sorted(wrong)) or SUMS} is not what was saved")

    def _read_manifest(self, step: int) -> dict[str, Any]:
        manifest = self._read(step, "manifest", ocp.args.JsonRestore())
        seal = manifest.pop("sha256", None) if isinstance(manifest, dict) else None
        if seal != _seal(manifest) or manifest["step"] != step:
            raise DamagedCheckpoint("its manifest is not what was saved")
        return manifest

    def _read_leaves(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = {path: leaf.sharding or default for path, leaf in wanted.items()}
        for path, sharding in shardings.items():
            sharding.shard_shape(wanted[path].shape)  # An impossible sharding is the caller's mistake: tell it as it is.
        abstract = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path]) for path, leaf in wanted.items()
        }
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,  # The trees have been compared already, against the sealed manifest.
        )
        return self._read(step, "state", arguments)

    def _read(self, step: int, item: str, arguments: ocp.args.CheckpointArgs) -> Any:
        """Orbax's restore; whatever it stumbles over is reported as damage of the step.

        That of the handler: the manager's would wait for processes that have stumbled.
        """
        self.wait()
        try:
            return self._handlers[item].restore(self._directory / str(step) / item, args=arguments)
        except Exception as error:
            problem = _one_line(error)
        gc.collect()  # The reads that it leaves behind hold what they have read.
        raise DamagedCheckpoint(problem)

    def _set_aside(self, step: int) -> str:
        """Renames a damaged step (unless read-only), and says what was done."""
        if self._read_only:
            return "left where it is"

        # A step that is written again, after an older one was restored, can be damaged again.
        def rename() -> str:
            names = (f"damaged-{step}" + (f"-{again}" if again else "") for again in itertools.count())
            name = next(name for name in names if not (self._directory / name).exists())
            (self._directory / str(step)).rename(self._directory / name)
            return name

        name = self._group.from_first("setting aside", rename)
        self._manager.reload()
        return f"set aside as {name}"

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            step, self._saving = self._saving, None
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._directory}: {_one_line(error)}. The older ones "
                "there are intact. Make sure that the disk is writable and has room (or lower checkpoint.keep), and start the "
                "same command again: the run continues from the newest of them."
            ) from error


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What `verify` found of one step; `problem` is empty if it is sound."""

    step: int
    num_leaves: int
    num_bytes: int
    problem: str


def verify(directory: str) -> list[StepReport]:
    """Checks every checkpoint of a directory against its own manifest, oldest first; changes nothing."""
    checkpoints = Checkpoints(directory, keep=None)
    reports = [checkpoints.verify_step(step) for step in checkpoints.steps()]
    checkpoints.close()
    return reports


def _check_writable(directory: epath.Path) -> None:
    probe = directory / ".writable"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"checkpoints cannot be written to {directory}: {_one_line(error)}. Choose another --config.run_dir, or change its "
            "permissions."
        ) from error


def check_room(directory: str, abstract: PyTree, copies: int) -> None:
    """Raises OSError unless the disk of a local `directory` has room for so many more states; all bytes of a state count."""
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    free = shutil.disk_usage(directory).free
    if size * copies > free:
        raise OSError(
            f"{directory} will need room for {copies} more checkpoints of {_mebibytes(size)}, {_mebibytes(size * copies)} in "
            f"all, and its disk has {_mebibytes(free)} free: make room, choose another --config.run_dir, or lower "
            "checkpoint.keep (one more exists while it is written)"
        )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _check_tree(name: str, saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct], partial: bool) -> None:
    """Raises TreeMismatch unless the checkpoint holds exactly (`partial`: at least) the wanted leaves."""
    problems = [f"{path} is missing" for path in wanted if path not in saved]
    if not partial:
        problems += [f"{path} is left over" for path in saved if path not in wanted]
    for path in wanted.keys() & saved.keys():
        here = (list(wanted[path].shape), str(wanted[path].dtype))
        there = (saved[path]["shape"], saved[path]["dtype"])
        if here != there:
            problems.append(f"{path} is {there[1]}{there[0]} instead of {here[1]}{here[0]}")
    if problems:
        raise TreeMismatch(
            f"checkpoint {name} holds the state of another config: {_listed(sorted(problems))}. Use the config that it was "
            "written with (config.json of its run), or another --config.run_dir."
        )


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sums(directory: epath.Path, names: list[str]) -> str:
    """One line `sha256  name` for each file, as `sha256sum -c` reads it."""
    return "".join(f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def _one_line(error: BaseException) -> str:
    """The innermost cause, which names the file; Orbax wraps it in pages of settings."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 400 else f"{message[:150]} ... {message[-250:]}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
