"""From a config to packed rows on disk, in four stages, each a directory keyed by the hash of what made it.

  documents-*   each source's text, split into train.jsonl and held_out.jsonl; counts, licence, content hash.
  tokenizer-*   trained on a sample of the training documents of all sources.
  tokens-*      each source's documents as token ids (`data/storage.py`).
  packed-*      the rows of every source, and the manifest of it all.

Of chats, a document is an example as one line of JSON (`data/chat.py`), and its tokens come with what the model is to write.

A stage is built in a directory of another name and renamed when complete, under a lock: a killed process leaves nothing
that could be taken for complete, and two processes do not build the same stage twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from data.chat import BadExample, import_row, to_json
from data.chat_encoder import DEFAULT_TEMPLATE, ChatEncoder
from data.chat_rows import Refused, Sequences, encode_examples, encode_prompts, rendered_texts
from data.config import IGNORE, ChatContent, Content, DataConfig, SourceConfig
from data.prompts import PromptRows
from data.sources import Document, RowText, check_source, identity, read_documents
from data.storage import JUDGED, PackedRows, Split, write_documents, write_index
from data.tokenizer import Tokenizer, load_tokenizer, split_text, train_tokenizer

FORMAT_VERSION = 5
SPLITS: tuple[Split, Split] = ("train", "held_out")
_MAX_ENCODE_CHARACTERS = 1 << 20
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST)

Log = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Everything that training and evaluation need of the data.

    Attributes:
      train, held_out: rows by source name (prompts: PromptRows); a source that holds nothing out is missing from `held_out`.
      chat: what conversations are encoded with; None where the data is text.
      manifest: per source its name, kind, path, revision, licence, content hash and how many blank documents were skipped, and
        per split its documents, characters, bytes, tokens, rows and fill; the tokenizer; the packing. Of chats, how many
        examples were left out, by reason, and `targets` counts what the model is to write.
      manifest_hash: of the manifest; two equal ones mean equal training rows.
    """

    tokenizer: Tokenizer
    chat: ChatEncoder | None
    train: dict[str, Any]
    held_out: dict[str, Any]
    manifest: dict[str, Any]
    manifest_hash: str
    directory: Path
    document_dirs: dict[str, Path]

    def held_out_texts(self, name: str) -> Iterator[str]:
        """Raw text of each held-out document of source `name`."""
        return _read_texts(self.document_dirs[name], "held_out")

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of what the model is to continue: the beginning of a document or, of chats, a user's question."""
        if self.chat is None:
            return self.tokenizer.encode_prompt(text)
        return self.chat.encode_prompt([{"role": "user", "content": text}]).tolist()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end what the model writes."""
        if self.chat is not None:
            return self.chat.stop_ids
        return frozenset() if self.tokenizer.eos_id is None else frozenset({self.tokenizer.eos_id})


def prepare(
    config: DataConfig, seed: int = 0, log: Log = print, tokenizer: Tokenizer | None = None, chat_template: str = ""
) -> PreparedData:
    """Prepares the data of `config` under `config.cache_dir`, or finds it there.

    Args:
      seed: draws the documents of sources with `max_bytes`; nothing else depends on it.
      log: receives lines of progress.
      tokenizer, chat_template: of the model that is trained on, unless `config` names its own; None and "" are none.

    Raises:
      FileNotFoundError, ValueError, ModuleNotFoundError, ConnectionError: bad input; the message says what to do.
      OSError: the cache directory cannot be written.
    """
    for source in config.sources:
        check_source(source)
    cache = Path(config.cache_dir)
    if config.tokenizer.path:
        tokenizer, chat_template = load_tokenizer(config.tokenizer.path), load_chat_template(config.tokenizer.path)
    template = config.chat_template or chat_template or DEFAULT_TEMPLATE
    if config.content != "text" and tokenizer is not None:
        ChatEncoder(tokenizer, template)  # What is wrong with it is told before anything is read.

    documents = {source.name: _prepare_documents(cache, source, config.content, seed, log) for source in config.sources}
    if tokenizer is None:
        tokenizer = _prepare_tokenizer(cache, config, template, documents, log)
    chat = ChatEncoder(tokenizer, template) if config.content != "text" else None
    tokens = {name: _prepare_tokens(cache, name, config, tokenizer, chat, stage, log) for name, stage in documents.items()}
    packed = _prepare_rows(cache, config, tokenizer, chat, documents, tokens, log)

    def rows_of(name: str, split: Split) -> PackedRows | PromptRows:
        if config.content == "prompts":
            return PromptRows(tokens[name].path / f"{split}.jsonl")
        directories = tokens[name].path, packed.path
        return PackedRows(*directories, f"{name}_", split, config.seq_len, tokenizer.vocab_size, config.content)

    rows = {
        split: {name: rows_of(name, split) for name in tokens if packed.manifest["sources"][name][split]["rows"]}
        for split in SPLITS
    }
    return PreparedData(
        tokenizer=tokenizer,
        chat=chat,
        train=rows["train"],
        held_out=rows["held_out"],
        manifest=packed.manifest,
        manifest_hash=_hash_json(packed.manifest),
        directory=packed.path,
        document_dirs={name: stage.path for name, stage in documents.items()},
    )


def load_chat_template(directory: str | Path) -> str:
    """The template that lies beside a tokenizer, "" if there is none."""
    path = Path(directory) / "chat_template.jinja"
    return path.read_text() if path.is_file() else ""


# --- Stages -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Stage:
    path: Path
    manifest: dict[str, Any]


def _stage(cache: Path, name: str, key: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> _Stage:
    """The directory `name`-hash(`key`), built by `build` (which returns its manifest) unless it is there."""
    key = {"format_version": FORMAT_VERSION, **key}
    path = cache / f"{name}-{_hash_json(key)}"
    if not path.is_dir():
        with _writing_to(cache), _locked(path.with_name(f".{path.name}.lock")):
            if not path.is_dir():
                partial = path.with_name(f".{path.name}.partial")
                # Whoever left it is dead: the lock is ours.
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    manifest = build(partial)
                    files = {p.name: _fingerprint(p) for p in sorted(partial.iterdir())}
                    text = json.dumps({"key": key, "files": files, "manifest": manifest}, indent=2)
                    (partial / "manifest.json").write_text(text + "\n")
                    partial.rename(path)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
    stored = json.loads((path / "manifest.json").read_text())
    for file, fingerprint in stored["files"].items():
        if not (path / file).is_file() or _fingerprint(path / file) != fingerprint:
            raise ValueError(
                f"{path / file} is missing or is not what was written: it was damaged after it was prepared; delete {path} and "
                "start again"
            )
    return _Stage(path, stored["manifest"])


def _fingerprint(path: Path) -> list[Any]:
    """Size, and the hash of what nothing else would notice a change in: an index. ArrayRecord checks its own records."""
    if path.suffix != ".npy":
        return [path.stat().st_size, ""]
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()[:32]]


@contextlib.contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):  # ArrayRecord's way
            reason = str(error) if "write() failed" in str(error) else None
        else:
            reason = error.strerror if error.errno in _UNWRITABLE else None
        if reason is None:
            raise
        raise OSError(
            f"cannot prepare the data in {cache}: {reason}; make room there or let data.cache_dir name another directory "
            "(what was complete is kept)"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that ends with the process, however it ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _prepare_documents(cache: Path, source: SourceConfig, content: Content, seed: int, log: Log) -> _Stage:
    key = {"source": dataclasses.asdict(source), "identity": identity(source), "seed": seed if source.max_bytes else 0}
    key |= {"content": content}
    return _stage(cache, f"documents-{source.name}", key, lambda path: _write_texts(path, source, content, seed, log))


def _examples(source: SourceConfig, content: Content, refused: Refused) -> RowText | None:
    """Makes a line of JSON of a row of the source that holds an example, and "" of a bad one; None where rows hold texts."""
    if content == "text":
        return None

    def row_text(row: Any, where: str) -> str:
        try:
            return to_json(import_row(row, content, source.margin))
        except BadExample as error:
            refused.add(error, where)
            return ""

    return row_text


def _tell_refused(refused: Refused, name: str, total: int, log: Log) -> None:
    """Raises ValueError if no example is left of `total`."""
    number = refused.counts.total()
    if number == total and total:
        raise ValueError(f"data source {name!r}: none of {total:,} examples can be used. {refused}")
    if number:
        log(f"data: {name!r}: left out {number:,} of {total:,} examples. {refused}")


def _write_texts(directory: Path, source: SourceConfig, content: Content, seed: int, log: Log) -> dict[str, Any]:
    refused = Refused()
    log(f"data: reading source {source.name!r} ({source.kind})")
    counts = {split: {"documents": 0, "characters": 0, "bytes": 0} for split in SPLITS}
    hashes = {split: hashlib.blake2b(digest_size=16) for split in SPLITS}
    licences, skipped = set(), 0
    with (
        open(directory / "train.jsonl", "w", encoding="utf-8") as train,
        open(directory / "held_out.jsonl", "w", encoding="utf-8") as held_out,
    ):
        files = {"train": train, "held_out": held_out}
        for document in _progress_bar(read_documents(source, seed, _examples(source, content, refused), content), source.name):
            if not document.text.strip():
                skipped += 1
                continue
            licences.add(document.licence)
            for split, text in split_held_out(document, source, content):
                data = text.encode()
                files[split].write(json.dumps({"id": document.id, "text": text}, ensure_ascii=False) + "\n")
                hashes[split].update(hashlib.blake2b(data, digest_size=16).digest())
                counts[split]["documents"] += 1
                counts[split]["characters"] += len(text)
                counts[split]["bytes"] += len(data)
    skipped -= refused.counts.total()
    _tell_refused(refused, source.name, refused.counts.total() + sum(counts[split]["documents"] for split in SPLITS), log)
    train_count, held_out_count = counts["train"]["documents"], counts["held_out"]["documents"]
    if not train_count + held_out_count:
        raise ValueError(f"data source {source.name!r} is empty: no document of it holds any text; check {source.path!r}")
    if not train_count or (source.held_out_fraction and not held_out_count):
        raise ValueError(
            f"data source {source.name!r}: of {train_count + held_out_count} documents, held_out_fraction="
            f"{source.held_out_fraction} leaves {train_count} for training and {held_out_count} held out; change the fraction, "
            "use held_out_split='position', or set it to 0 to hold nothing out"
        )
    return {
        "name": source.name,
        "kind": source.kind,
        "path": source.path,
        "revision": source.hub_revision,
        "licence": ", ".join(sorted(licences)),
        "skipped": skipped,
        **({} if content == "text" else {"refused": dict(refused.counts)}),
        **{split: {**counts[split], "content_hash": hashes[split].hexdigest()} for split in SPLITS},
    }


def split_held_out(document: Document, source: SourceConfig, content: Content = "text") -> list[tuple[Split, str]]:
    """Which part of a document is trained on and which is held out; empty parts are left out.

    All answers to one prompt go the same way.
    """
    text = document.text
    if source.held_out_split == "hash":
        key = text if content in ("text", "conversations") else json.dumps(json.loads(text)["prompt"])
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "big") / 2**64 < source.held_out_fraction
        return [("held_out" if held_out else "train", text)]
    cut = int(len(text) * (1 - source.held_out_fraction))
    parts: list[tuple[Split, str]] = [("train", text[:cut]), ("held_out", text[cut:])]
    return [(split, part) for split, part in parts if part]


def _prepare_tokenizer(cache: Path, data: DataConfig, template: str, documents: dict[str, _Stage], log: Log) -> Tokenizer:
    config, content = data.tokenizer, data.content
    # The characters of held-out text must have ids too (nanoGPT); every other kind can write text it has not seen.
    splits = SPLITS if config.kind == "chars" else SPLITS[:1]
    manifests = [stage.manifest for stage in documents.values()]
    total_bytes = sum(manifest[split]["bytes"] for manifest in manifests for split in splits)
    fraction = 1.0 if config.kind == "chars" else min(1.0, config.train_bytes / total_bytes)

    def build(path: Path) -> dict[str, Any]:
        log(f"data: making a {config.kind} tokenizer from {fraction * total_bytes / 1e6:.1f} MB")
        texts = (text for stage in documents.values() for split in splits for text in _read_texts(stage.path, split))
        if content != "text":
            texts = (text for line in texts for text in rendered_texts(line, content, template))
        tokenizer = train_tokenizer(config, sample_text(texts, fraction))
        tokenizer.save(path)
        return {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}

    contents = [manifest[split]["content_hash"] for manifest in manifests for split in splits]
    key = {"tokenizer": dataclasses.asdict(config), "contents": contents}
    key |= {} if content == "text" else {"chat_template": template}
    return load_tokenizer(_stage(cache, f"tokenizer-{config.kind}", key, build).path)


def sample_text(texts: Iterable[str], fraction: float) -> Iterator[str]:
    """About `fraction` of all text, in passages of at most 64 Ki characters that are chosen by their hash."""
    for text in texts:
        for passage in split_text(text, 1 << 16):
            digest = hashlib.blake2b(passage.encode(), digest_size=8, person=b"sample").digest()
            if int.from_bytes(digest, "big") / 2**64 < fraction:
                yield passage


def _prepare_tokens(
    cache: Path, name: str, config: DataConfig, tokenizer: Tokenizer, chat: ChatEncoder | None, documents: _Stage, log: Log
) -> _Stage:
    def build(path: Path) -> dict[str, Any]:
        log(f"data: tokenising source {name!r}")
        if chat is not None:
            return _write_chats(path, name, config, chat, documents, log)
        for split in SPLITS:
            ids = encode_documents(tokenizer, _read_texts(documents.path, split))
            ids = _progress_bar(ids, f"{name}, {split}", documents.manifest[split]["documents"])
            write_documents(path, split, ids, tokenizer.vocab_size)
        tables = {split: np.load(path / f"{split}_documents.npy") for split in SPLITS}
        return {split: {"tokens": int(table[:, 2].sum())} for split, table in tables.items()}

    contents = [documents.manifest[split]["content_hash"] for split in SPLITS]
    key = {"tokenizer": tokenizer.fingerprint, "contents": contents}
    if chat is not None:
        key |= {"content": config.content, "chat": chat.fingerprint, "seq_len": config.seq_len}
    return _stage(cache, f"tokens-{name}", key, build)


def _write_chats(
    directory: Path, name: str, config: DataConfig, chat: ChatEncoder, documents: _Stage, log: Log
) -> dict[str, Any]:
    """The sequences of all examples, or the prompts; what does not fit a row is left out and counted."""
    content = config.content
    assert content != "text"
    manifest: dict[str, Any] = {}
    refused, total = Refused(), 0
    for split in SPLITS:
        lines = list(_read_texts(documents.path, split))
        total += len(lines)
        show = functools.partial(_progress_bar, what=f"{name}, {split}", total=len(lines))
        if content == "prompts":
            prompts = show(encode_prompts(lines, chat, config.seq_len, refused))
            manifest[split] = _write_prompts(directory / f"{split}.jsonl", prompts)
        else:
            examples = show(encode_examples(lines, content, chat, config.seq_len, refused))
            manifest[split] = _write_sequences(directory, split, examples, chat, content)
        if lines and not manifest[split]["sequences"]:
            raise ValueError(f"data source {name!r}: none of {len(lines):,} examples can be used ({split}). {refused}")
    _tell_refused(refused, name, total, log)
    return manifest | {"refused": dict(refused.counts)}


def _write_prompts(path: Path, prompts: Iterable[dict[str, Any]]) -> dict[str, int]:
    number = tokens = 0
    with open(path, "w", encoding="utf-8") as file:
        for prompt in prompts:
            file.write(json.dumps(prompt, ensure_ascii=False) + "\n")
            number += 1
            tokens += len(prompt["ids"])
    return {"sequences": number, "tokens": tokens, "targets": tokens}


def _write_sequences(
    directory: Path, split: Split, examples: Iterable[Sequences], chat: ChatEncoder, content: ChatContent
) -> dict[str, int]:
    labels: list[float] = []
    counts = {"sequences": 0, "tokens": 0, "targets": 0}

    def sequences() -> Iterator[np.ndarray]:
        for example in examples:
            labels.extend(example.labels)
            counts["sequences"] += len(example.encoded)
            counts["tokens"] += sum(one.ids.size for one in example.encoded)
            counts["targets"] += sum(int(one.trained.sum()) for one in example.encoded)
            yield from example.flagged()

    write_documents(directory, split, sequences(), chat.tokenizer.vocab_size, content)
    if content in JUDGED:
        np.save(directory / f"{split}_labels.npy", np.array(labels, np.float32))
    if content == "steps":
        counts["steps"] = sum(label != IGNORE for label in labels)
    return counts


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Token ids int32 [num_tokens] of each text, with <bos> and <eos> where the tokenizer has them.

    A text above a million characters is encoded in parts, cut at a line: tokenizers need many times a text's own memory.
    """
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    waiting: list[list[str]] = []  # parts of each text, encoded together so that the library can use its threads
    size = 0

    def encode_waiting() -> Iterator[np.ndarray]:
        encoded = iter(tokenizer.encode_batch([part for parts in waiting for part in parts]))
        for parts in waiting:
            ids = [token for _ in parts for token in next(encoded)]
            yield np.array(before + ids + after, np.int32)

    for text in texts:
        waiting.append(list(split_text(text, _MAX_ENCODE_CHARACTERS)))
        size += len(text)
        if size >= _MAX_ENCODE_CHARACTERS:
            yield from encode_waiting()
            waiting, size = [], 0
    yield from encode_waiting()


def _prepare_rows(
    cache: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    chat: ChatEncoder | None,
    documents: dict[str, _Stage],
    tokens: dict[str, _Stage],
    log: Log,
) -> _Stage:
    def build(path: Path) -> dict[str, Any]:
        sources = {}
        for name, stage in tokens.items():
            sources[name] = dict(documents[name].manifest)
            for split in SPLITS:
                packed = {"rows": stage.manifest[split].get("sequences"), "fill": 1.0}
                if config.content != "prompts":
                    packed = write_index(stage.path, path, f"{name}_", split, config.seq_len, config.packing, config.content)
                # Of chats, `targets` are those that the model is to write.
                sources[name][split] = {**sources[name][split], **packed, **stage.manifest[split]}
            if chat is not None:
                sources[name]["refused"] = dict(Counter(sources[name]["refused"]) + Counter(stage.manifest["refused"]))
            train, held_out = (sources[name][split] for split in SPLITS)
            log(
                f"data: {name!r}: {train['documents']:,} documents, {train['bytes'] / 1e6:.1f} MB, {train['tokens']:,} tokens, "
                f"{train['rows']:,} rows of {config.seq_len}, {100 * train['fill']:.1f} % full"
            )
            if held_out["documents"] and not held_out["targets"]:
                raise ValueError(
                    f"data source {name!r} holds out {held_out['bytes']} bytes without a token to predict: raise its "
                    "held_out_fraction"
                )
            if chat is None and train["targets"] < config.seq_len:
                raise ValueError(
                    f"data source {name!r} has {train['targets']} tokens to train on, fewer than one row of "
                    f"data.seq_len={config.seq_len}: give it more text or shorten the rows"
                )
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
            "packing": {"seq_len": config.seq_len, "packing": config.packing},
            **({} if chat is None else {"content": config.content, "chat": chat.fingerprint}),
            "sources": sources,
        }

    key = {
        "tokens": {name: stage.path.name for name, stage in tokens.items()},
        "documents": {name: stage.path.name for name, stage in documents.items()},
        "seq_len": config.seq_len,
        "packing": config.packing,
        "content": config.content,
    }
    return _stage(cache, "packed", key, build)


def _read_texts(directory: Path, split: Split) -> Iterator[str]:
    with open(directory / f"{split}.jsonl", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _progress_bar(documents: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """Shows how many documents have passed, on a terminal only."""
    return tqdm.tqdm(documents, desc=f"data: {what}", total=total, unit=" documents", disable=None, leave=False)
