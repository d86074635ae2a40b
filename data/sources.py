"""Sources: where documents come from.

  stdlib       the running Python's documentation topics, docstrings of its C modules, and source files: some 12 MB of
               English and code on every machine, nothing to download (PSF-2.0).
  files        local .txt and .md (one document a file), .jsonl and .parquet (one a row), plain or .gz or .zst; a file, a
               directory (searched recursively) or a glob.
  huggingface  a data set of the Hugging Face hub, streamed.
  task         prompts of a verifiable task of `data/tasks/`, each followed by its solution; with wrong answers beside or in
               place of it where the content wants them.

A row's document is the text of one of its fields, or whatever the caller makes of the row. The order of documents is the same
on every run.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import importlib
import inspect
import io
import json
import random
import sys
import sysconfig
import tokenize
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from data.config import Content, SourceConfig
from data.tasks.mistakes import mistaken, mistaken_steps

_TEXT_SUFFIXES = (".txt", ".md")
_FORMATS = (*_TEXT_SUFFIXES, ".jsonl", ".parquet")
_COMPRESSIONS = (".gz", ".zst")
_FORMATS_HELP = f"readable formats are {', '.join(_FORMATS)}, each also with {' or '.join(_COMPRESSIONS)}"


RowText = Callable[[Any, str], str]  # of a row of .jsonl, .parquet or the hub, and where it stands


@dataclasses.dataclass(frozen=True)
class Document:
    """Attributes:
    text: encodable as UTF-8; may be blank.
    id: unique and stable within its source.
    """

    text: str
    id: str
    source: str
    licence: str


def read_documents(
    config: SourceConfig, seed: int = 0, row_text: RowText | None = None, content: Content = "text"
) -> Iterator[Document]:
    """Documents of one source, in a fixed order. Rows whose text is null are empty documents.

    Args:
      seed: of the draw that `config.max_bytes` asks for.
      row_text: makes the text of a row, and then files must have rows; None takes the field `config.text_field`.
      content: what the rows of a task are to hold: `pairs` of its solution and a wrong answer, or answers with `labels`, half
        of which are wrong, or `steps`, half of whose solutions go wrong.

    With `config.max_bytes`, local sources are read twice: once to draw documents in an order that depends on their text and
    `seed` alone, once to yield those drawn.  A hub stream is shuffled by its own buffer and read until the limit.  Either
    way the last document is cut to meet the limit.

    Raises:
      FileNotFoundError: `config.path` names nothing.
      ValueError: a file cannot be read as its name says; the message names file and line.
      ModuleNotFoundError: an optional package is needed.
      ConnectionError: the hub cannot be reached.
    """
    check_source(config)
    if not config.max_bytes:
        documents = _texts(config, seed, row_text, content)
    elif config.kind == "huggingface":
        documents = _first_bytes(_texts(config, seed, row_text), config.max_bytes)
    else:
        documents = _sample(config, seed, row_text)
    for id, text, licence in documents:
        yield Document(text, id, config.name, licence or config.licence or "unknown")


def check_source(config: SourceConfig) -> None:
    """Raises what `read_documents` would raise at once, without reading a document."""
    if config.kind == "files":
        _files(config)
    elif config.kind == "huggingface":
        _import_optional("datasets", f"reading the hub data set {config.path!r}")


def identity(config: SourceConfig) -> list[Any]:
    """JSON value that changes when the source may yield other documents: names, sizes and times, not contents."""
    if config.kind == "stdlib":
        return [sys.version, sys.platform]
    if config.kind == "files":
        return [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in _files(config)]
    return []  # The hub's is the revision in the config.


def _texts(
    config: SourceConfig, seed: int, row_text: RowText | None, content: Content = "text"
) -> Iterator[tuple[str, str, str]]:
    """(id, text, licence or "") of all documents."""
    if config.kind == "stdlib":
        documents = ((id, text, "PSF-2.0") for id, text in _stdlib_texts())
    elif config.kind == "files":
        documents = ((id, text, "") for name, path in _files(config) for id, text in _file_texts(config, name, path, row_text))
    elif config.kind == "task":
        documents = ((id, text, "generated") for id, text in _task_texts(config, seed, row_text, content))
    else:
        documents = _hub_texts(config, seed, row_text)
    for id, text, licence in documents:
        # JSON can spell half of a surrogate pair, which no encoding of text can hold.
        yield id, text.encode("utf-8", "replace").decode(), licence


def _task_texts(config: SourceConfig, seed: int, row_text: RowText | None, content: Content) -> Iterator[tuple[str, str]]:
    assert config.task is not None
    task = config.task.make()
    for index in range(config.num_examples):
        example = task.example(index, seed, "train")
        row: dict[str, Any] = {"prompt": example.prompt, "completion": task.solution(example)}
        rng = random.Random(f"mistake/{seed}/{index}")
        if content == "pairs":
            row = {"prompt": example.prompt, "chosen": row["completion"], "rejected": mistaken(task, example, rng)}
        elif content == "labels":
            row["label"] = rng.random() < 0.5
            row["completion"] = row["completion"] if row["label"] else mistaken(task, example, rng)
        elif content == "steps":
            right = row["completion"].split("\n")
            steps, labels = (right, [True] * len(right)) if rng.random() < 0.5 else mistaken_steps(task, example, rng)
            row = {"prompt": example.prompt, "completions": steps, "labels": labels}
        where = f"{config.task.name} {index}"
        yield where, row_text(row, where) if row_text else row["prompt"] + row["completion"]


def _first_bytes(documents: Iterator[tuple[str, str, str]], max_bytes: int) -> Iterator[tuple[str, str, str]]:
    for id, text, licence in documents:
        yield id, _cut(text, max_bytes), licence
        max_bytes -= len(text.encode())
        if max_bytes <= 0:
            return


def _sample(config: SourceConfig, seed: int, row_text: RowText | None) -> Iterator[tuple[str, str, str]]:
    """The first `max_bytes` in the order of the documents' hashes, yielded in the order of the source."""
    salt = seed.to_bytes(16, "little")
    keyed = []
    for i, (_, text, _) in enumerate(_texts(config, seed, row_text)):
        data = text.encode()
        keyed.append((hashlib.blake2b(data, digest_size=16, salt=salt).digest(), i, len(data)))
    allowed, remaining = {}, config.max_bytes
    for _, i, size in sorted(keyed):
        allowed[i] = remaining
        remaining -= size
        if remaining <= 0:
            break
    for i, (id, text, licence) in enumerate(_texts(config, seed, row_text)):
        if i in allowed:
            yield id, _cut(text, allowed[i]), licence


def _cut(text: str, num_bytes: int) -> str:
    data = text.encode()
    return text if len(data) <= num_bytes else data[:num_bytes].decode(errors="ignore")


# --- stdlib -------------------------------------------------------------------------------------------------------------

# Installed packages and tests; the topics, which are documents already; tables of characters, which nobody wrote.
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings"}


def _stdlib_texts() -> Iterator[tuple[str, str]]:
    """Topics, docstrings of C modules (a document a module), source files; exact duplicates once."""
    seen = set()
    for generator in (_topics, _c_docstrings, _source_files):
        for id, text in generator():
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield id, text


def _topics() -> Iterator[tuple[str, str]]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"topic/{name}", topics[name]


def _c_docstrings() -> Iterator[tuple[str, str]]:
    """Only modules written in C are imported: their docstrings have no source file, and importing them runs no script."""
    extensions = Path(sysconfig.get_path("stdlib"), "lib-dynload").glob("*.so")
    names = {*sys.builtin_module_names, *(path.name.partition(".")[0] for path in extensions)}
    for name in sorted(names):
        # Test helpers; a terminal, a window system.
        if name.startswith(("_test", "_ctypes_test", "_xx", "xx", "_tkinter", "readline")):
            continue
        try:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                module = importlib.import_module(name)
        except ImportError:  # the system's library behind it is not installed
            continue
        if text := "\n\n".join(_docstrings(module, name)):
            yield f"docstrings/{name}", text + "\n"


def _docstrings(owner: Any, name: str) -> Iterator[str]:
    """Docstring of a module or class written in C, then signature and docstring of each thing it defines."""
    if isinstance(owner.__doc__, str):
        yield f"{name}\n\n{inspect.cleandoc(owner.__doc__)}"
    for key, member in sorted(vars(owner).items()):
        if inspect.isclass(member):
            if inspect.ismodule(owner) and member.__module__.lstrip("_") == name.lstrip("_"):  # deque is collections.deque
                yield from _docstrings(member, f"{name}.{key}")
        elif isinstance(member, (types.BuiltinFunctionType, types.MethodDescriptorType, types.GetSetDescriptorType)):
            signature = (getattr(member, "__text_signature__", None) or "").replace("$", "")
            if isinstance(member.__doc__, str) and key != "__new__":
                yield f"{name}.{key}{signature}\n\n{inspect.cleandoc(member.__doc__)}"


def _source_files() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_SOURCE.isdisjoint(relative.parts):
            try:
                with tokenize.open(path) as file:
                    yield f"source/{relative.as_posix()}", file.read()
            except (SyntaxError, UnicodeDecodeError):  # a file about encodings that is in none
                continue


# --- files --------------------------------------------------------------------------------------------------------------


def _files(config: SourceConfig) -> list[tuple[str, Path]]:
    """(name that does not depend on where the directory lies, path), sorted."""
    path = Path(config.path)
    if path.is_file():
        _format(path)
        return [(path.name, path)]
    if path.is_dir():
        candidates = sorted(p for p in path.rglob("*") if p.is_file())
        found = [(p.relative_to(path).as_posix(), p) for p in candidates if _format_or_none(p)]
        if not found:
            raise FileNotFoundError(
                f"data source {config.name!r}: no readable file among the {len(candidates)} in {path}; {_FORMATS_HELP}"
            )
        return found
    found = [Path(p) for p in sorted(glob.glob(config.path, recursive=True)) if Path(p).is_file()]
    if not found:
        origin = f"; it can be had from {config.origin}" if config.origin else ""
        raise FileNotFoundError(
            f"data source {config.name!r}: {config.path!r} is neither a file nor a directory nor a glob that matches one "
            f"(looked from {Path.cwd()}); put the text there, or point the source's `path` at it{origin}"
        )
    for p in found:
        _format(p)
    return [(p.as_posix(), p) for p in found]


def _format_or_none(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSIONS else path.suffix
    return suffix if suffix in _FORMATS else None


def _format(path: Path) -> str:
    suffix = _format_or_none(path)
    if suffix is None:
        raise ValueError(f"{path} is in no format that this source can read: {_FORMATS_HELP}")
    return suffix


def _file_texts(config: SourceConfig, name: str, path: Path, row_text: RowText | None) -> Iterator[tuple[str, str]]:
    suffix = _format(path)
    if row_text and suffix in _TEXT_SUFFIXES:
        raise ValueError(f"{path} has no rows: examples of chats are read from .jsonl and .parquet")
    try:
        with _open(path) as file:
            if suffix in _TEXT_SUFFIXES:
                yield name, file.read().decode()
            elif suffix == ".jsonl":
                yield from _jsonl_texts(config, name, file, row_text)
            else:
                yield from _parquet_texts(config, name, file, row_text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it, for example with iconv, or leave it out") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged or incomplete gzip file ({error}): fetch it again") from error


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        zstandard = _import_optional("zstandard", f"reading {path}")
        try:
            # The stream reader takes a truncated file for a short one; the one-shot function does not.
            return io.BytesIO(b"".join(_zst_frames(zstandard, path.read_bytes())))
        except (zstandard.ZstdError, EOFError) as error:
            raise ValueError(f"{path} is a damaged or incomplete zst file ({error}): fetch it again") from error
    return open(path, "rb")


def _zst_frames(zstandard: Any, data: bytes) -> Iterator[bytes]:
    while data:
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        yield decompressor.decompress(data)
        if not decompressor.eof:
            raise EOFError("it ends within a frame")
        data = decompressor.unused_data


def _jsonl_texts(
    config: SourceConfig, name: str, file: IO[bytes] | gzip.GzipFile, row_text: RowText | None
) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not valid JSON ({error}); .jsonl holds one JSON object a line") from error
        where = f"{name}, line {number}"
        yield f"{name}:{number}", row_text(row, where) if row_text else _row_text(row, config, where)


def _row_text(row: Any, config: SourceConfig, where: str) -> str:
    """The text of a row, "" where it is null. Raises ValueError where there is no such field or it holds something else."""
    if not isinstance(row, dict) or config.text_field not in row:
        fields = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no field {config.text_field!r} (found: {fields}); set the source's text_field")
    text = row[config.text_field]
    if not isinstance(text, str | None):
        raise ValueError(
            f"{where}: field {config.text_field!r} holds {type(text).__name__}, not text; set the source's text_field"
        )
    return text or ""


def _parquet_texts(
    config: SourceConfig, name: str, file: IO[bytes] | gzip.GzipFile, row_text: RowText | None
) -> Iterator[tuple[str, str]]:
    _import_optional("pyarrow", f"reading {name}")
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{name} is not a readable parquet file ({error}): fetch it again") from error
    if row_text:
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        yield from ((f"{name}:{number}", row_text(row, f"{name}, row {number}")) for number, row in enumerate(rows, start=1))
        return
    if config.text_field not in table.schema_arrow.names:
        raise ValueError(
            f"{name}: no column {config.text_field!r} (found: {table.schema_arrow.names}); set the source's text_field"
        )
    kind = table.schema_arrow.field(config.text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
        raise ValueError(f"{name}: column {config.text_field!r} holds {kind}, not text; set the source's text_field")
    number = 0
    for batch in table.iter_batches(columns=[config.text_field]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield f"{name}:{number}", text or ""


# --- huggingface --------------------------------------------------------------------------------------------------------


def _hub_texts(config: SourceConfig, seed: int, row_text: RowText | None) -> Iterator[tuple[str, str, str]]:
    datasets = _import_optional("datasets", f"reading the hub data set {config.path!r}")
    try:
        rows = datasets.load_dataset(
            config.path,
            name=config.hub_config or None,
            split=config.hub_split,
            revision=config.hub_revision or None,
            streaming=True,
        )
        if config.max_bytes:
            rows = rows.shuffle(seed=seed, buffer_size=10_000)
        licence = rows.info.license if rows.info else ""
        for number, row in enumerate(rows):
            where = f"data set {config.path!r}, row {number}"
            text = row_text(row, where) if row_text else _row_text(row, config, where)
            yield f"{config.path}:{number}", text, licence or ""
    except ValueError:
        raise
    except Exception as error:  # the libraries below raise dozens of unrelated types
        raise ConnectionError(
            f"the hub data set {config.path!r} (split {config.hub_split!r}) cannot be read: {type(error).__name__}: {error}. "
            "Check its name and this machine's network. Without a network, run `hf download --repo-type dataset "
            f"{config.path} --local-dir DIR` where there is one, copy DIR here, and use kind='files' with path=DIR"
        ) from error


def _import_optional(package: str, purpose: str) -> types.ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package!r}, which is not installed: pip install 'loam[data]'"
        ) from error
