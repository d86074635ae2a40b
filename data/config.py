"""What the data is: sources, tokenizer, packing, mixture.  Frozen and validated; neither jax nor a source is touched."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any, Literal

from data.tasks.registry import make_task
from data.tasks.task import Task

SourceKind = Literal["stdlib", "files", "huggingface", "task"]
TokenizerKind = Literal["bytes", "chars", "byte_bpe", "wordpiece", "spm_bpe", "spm_unigram", "huggingface"]
Packing = Literal["best_fit", "sequential"]
Split = Literal["hash", "position"]
Margin = Literal["none", "column", "scores"]
ChatContent = Literal["conversations", "pairs", "labels", "steps", "prompts"]
Content = Literal["text", "conversations", "pairs", "labels", "steps", "prompts"]

# Label of a token that ends no step of a solution, or one that nobody judged.
IGNORE = -100.0


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A verifiable task of `data/tasks/`, by name.

    Attributes:
      options: (field, value) pairs of the task's own config.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self.make()

    def make(self) -> Task:
        """
        Raises:
          ValueError: no such task or option.
        """
        return make_task(self.name, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One stream of documents.

    Attributes:
      name: how mixtures and reports call it; unique in a config.
      path: `files`: a file, directory or glob; `huggingface`: the data set's name on the hub.
      licence: recorded in the manifest.
      origin: where to get it; told when `path` is missing.
      text_field: the column that holds the text (jsonl, parquet, huggingface).
      hub_config, hub_split, hub_revision: which part of a hub data set, pinned by revision.
      max_bytes: stop after this many bytes of text, taken in a seeded random order of documents; 0 is all.
      task, num_examples: `task`: so many training prompts of it with their solutions; for `pairs` with a wrong answer each,
        for `labels` with a right or a wrong one, for `steps` with worked ones, half of which go wrong.
      margin: of `pairs`, by how much a reward model is to tell the answers apart (arXiv:2307.09288): `column` is what `margin`
        holds, where there is one; `scores` is `score_chosen` - `score_rejected`, on whatever scale these are.
      held_out_split: `hash` holds whole documents out, chosen by the hash of their content; `position` holds out the last
        part of every document (nanoGPT's split of one long text).
      held_out_fraction: expected share of documents (`hash`) or exact share of characters (`position`).
    """

    name: str
    kind: SourceKind
    path: str = ""
    licence: str = ""
    origin: str = ""
    text_field: str = "text"
    hub_config: str = ""
    hub_split: str = "train"
    hub_revision: str = ""
    max_bytes: int = 0
    task: TaskConfig | None = None
    num_examples: int = 0
    margin: Margin = "column"
    held_out_split: Split = "hash"
    held_out_fraction: float = 0.01

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(
                f"data source {self.name!r}: a name, of letters, digits and _.- only, is needed (files are named so)"
            )
        if self.max_bytes < 0:
            raise ValueError(f"data source {self.name!r}: max_bytes={self.max_bytes} must be >= 0 (0 is all)")
        if (self.kind == "task") != (self.task is not None and self.num_examples > 0):
            raise ValueError(f"data source {self.name!r}: kind='task' needs task and num_examples, and no other kind has them")
        if self.kind not in ("stdlib", "task") and not self.path:
            raise ValueError(f"data source {self.name!r} of kind {self.kind!r} needs a path")
        if self.kind == "huggingface" and not self.hub_revision:
            raise ValueError(
                f"data source {self.name!r}: hub data sets change under their name; set hub_revision to a commit of "
                f"{self.path!r}, as its page shows"
            )
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"data source {self.name!r}: held_out_fraction={self.held_out_fraction} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Attributes:
    kind: `byte_bpe` and `wordpiece` through `tokenizers`; `spm_bpe` and `spm_unigram` through SentencePiece with byte
      fallback; `chars` is the sorted set of characters seen (nanoGPT); `bytes` needs no training; `huggingface` is somebody
      else's tokenizer.json, which only `path` can name.
    vocab_size: includes special tokens; ignored by `bytes` and `chars`.
    path: directory of a saved tokenizer to load instead of training one.
    train_bytes: how much text the training sees, a seeded sample of the documents.
    document_boundaries: wrap each document as <bos> text <eos>; off, a document is its bare text (nanoGPT).
    """

    kind: TokenizerKind = "byte_bpe"
    vocab_size: int = 4096
    path: str = ""
    train_bytes: int = 20_000_000
    document_boundaries: bool = True

    def __post_init__(self) -> None:
        if self.kind == "huggingface" and not self.path:
            raise ValueError("data.tokenizer.kind='huggingface' cannot be trained: set data.tokenizer.path, or another kind")
        if self.vocab_size < 260 and self.kind not in ("bytes", "chars"):
            raise ValueError(
                f"data.tokenizer.vocab_size={self.vocab_size}: {self.kind} needs at least 260 (256 bytes, special tokens)"
            )


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """From `start_step` on, sources are drawn in these integer proportions; the pattern repeats exactly.

    Attributes:
      start_step: first data step it governs; the first mixture of a config starts at 0.
      proportions: (source name, integer weight) pairs; a source not named is not drawn.
    """

    start_step: int
    proportions: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if not self.proportions or any(weight < 1 for _, weight in self.proportions):
            raise ValueError(f"data.mixtures: proportions={self.proportions} must be positive integers, at least one")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Attributes:
    content: what a row of the sources is: a text, or one of the kinds of `data/chat.py`, read from .jsonl and .parquet.
    chat_template: Jinja, of contents that are chats. Empty is the one that came with the tokenizer, or else
      `data.chat_encoder.DEFAULT_TEMPLATE`.
    mixtures: schedule of proportions, by increasing start_step; may be empty only when there is one source.
    packing: `best_fit` (arXiv:2404.10830) fills rows with whole documents where they fit; `sequential` cuts documents in
      order, a document's tail shares its row with the next document's head.
    attend_across_documents: one segment per row, positions running on, instead of isolated documents.
    cache_dir: prepared data sets live here, keyed by the hash of what made them.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: TokenizerConfig = TokenizerConfig()
    mixtures: tuple[MixtureConfig, ...] = ()
    seq_len: int = 256
    packing: Packing = "best_fit"
    attend_across_documents: bool = False
    cache_dir: str = "runs/data"
    loader_threads: int = 1
    prefetch_batches: int = 4
    content: Content = "text"
    chat_template: str = ""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("data.sources is empty: name at least one source")
        if len(set(names)) < len(names):
            raise ValueError(f"data.sources: names must be unique, got {names}")
        if self.seq_len < 2:
            raise ValueError(f"data.seq_len={self.seq_len} must be at least 2")
        if self.loader_threads < 0 or self.prefetch_batches < 1:
            raise ValueError("data.loader_threads must be >= 0 and data.prefetch_batches >= 1")
        if len(names) > 1 and not self.mixtures:
            raise ValueError(f"data.mixtures: several sources ({names}) need explicit integer proportions")
        if self.content == "text" and self.chat_template:
            raise ValueError("data.chat_template is of no use for data.content='text': set data.content, or leave it out")
        if self.content != "text":
            self._check_chat()
        for source in self.sources:
            if source.margin != "column" and self.content != "pairs":
                raise ValueError(
                    f"data source {source.name!r}: margin={source.margin!r} is of pairs, and data.content={self.content!r} has "
                    "none: leave it out"
                )
        starts = [mixture.start_step for mixture in self.mixtures]
        if starts and (starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts))):
            raise ValueError(f"data.mixtures: start_step must begin at 0 and increase, got {starts}")
        for mixture in self.mixtures:
            for name, _ in mixture.proportions:
                if name not in names:
                    raise ValueError(f"data.mixtures names {name!r}, which is not in data.sources {names}")

    def _check_chat(self) -> None:
        """Raises ValueError for what would cut a conversation, or show it another."""
        for source in self.sources:
            if source.kind == "stdlib":
                raise ValueError(f"data source {source.name!r} of kind 'stdlib' has no {self.content}: set data.content='text'")
            if source.max_bytes or source.held_out_split == "position":
                raise ValueError(
                    f"data source {source.name!r}: max_bytes and held_out_split='position' cut texts, and {self.content} "
                    "cannot be cut: leave them out"
                )
        if self.packing != "best_fit" or self.attend_across_documents:
            raise ValueError(
                f"data.content={self.content!r} goes with packing='best_fit' and attend_across_documents=False alone: examples "
                "are neither cut nor shown to each other"
            )
