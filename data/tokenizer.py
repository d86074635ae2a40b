"""Tokenizers: train, save, load, encode, decode, and the exact byte length of every token.

A token is a fixed byte string, for every kind, and decoding is concatenation.  Hence `decode(encode(text)) == text` for
all text, bits per byte are exact, and a stream can be decoded token by token.  What each kind does to keep that promise:

  bytes        one token per UTF-8 byte.
  chars        the sorted set of characters seen (nanoGPT); any other character is an error.
  byte_bpe     byte-level BPE, split as GPT-4 does: words with their leading mark, up to three digits, runs of whitespace.
  wordpiece    greedy longest match over the same byte-level words.  Deviations from BERT: 1. whitespace is part of the
               words and nothing is lower-cased, so nothing is lost; 2. a word's start is marked by its space instead of
               its continuation by `##`; 3. `tokenizers` picks the vocabulary by frequency of merges, not by likelihood.
  spm_bpe      SentencePiece with identity normalisation, no dummy prefix and byte fallback.  It uses U+2581 for the space
  spm_unigram  internally, so our code spells a U+2581 of the text in bytes.

  huggingface  the tokenizer.json of another model, byte-level or SentencePiece with byte fallback.  Here the promise is
               kept as far as that tokenizer allows.  Decoding is concatenation always, but 1. what its normaliser changes
               is lost (NFC: Qwen's own tokenizer.json); 2. a SentencePiece tokenizer that puts a space before a text gives
               it back (`decode(encode("a")) == " a"`) and takes U+2581 for a space; 3. added tokens that swallow the
               whitespace beside them (`lstrip`, `rstrip`: Phi-3) lose it.

The special tokens <bos> and <eos> are the last two ids, but of other models wherever they are.  No text can produce special
tokens: `<eos>` spelled in a document gives ordinary tokens.  Only what is encoded with `parse_special=True` does, which is for
text that a chat template of ours has written, and not for users' (`data.chat_template.encode_chat`).
"""

from __future__ import annotations

import abc
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.config import TokenizerConfig, TokenizerKind

# GPT-4's split (tiktoken cl100k_base).
GPT4_SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPM_SPACE = "\u2581"
NO_TEXT = "\ufffd"
_DESCRIPTION_FILE = "loam_tokenizer.json"


class Tokenizer(abc.ABC):
    """Text <-> token ids.  Picklable, and safe to use from several threads.

    Attributes:
      kind: how it was made.
      token_bytes: what each id decodes to; empty for special tokens.
      bos_id, eos_id: special tokens; None when documents are not wrapped.
      special_tokens: text of each special token -> id; what a chat template writes to mean it.
      byte_lengths: int32 [vocab_size], len(token_bytes[id]).
      fingerprint: hash of all that encoding depends on.
    """

    model_file: str

    def __init__(self, kind: TokenizerKind, model: bytes, document_boundaries: bool):
        self.kind: TokenizerKind = kind
        self.model = model
        self.special_tokens: dict[str, int] = {}
        token_bytes = self._load(model)
        self.bos_id, self.eos_id = (len(token_bytes), len(token_bytes) + 1) if document_boundaries else (None, None)
        if document_boundaries:
            self.special_tokens = {"<bos>": len(token_bytes), "<eos>": len(token_bytes) + 1}
        self.token_bytes = (*token_bytes, *([b"", b""] if document_boundaries else []))
        self.byte_lengths = np.array([len(token) for token in self.token_bytes], np.int32)
        identity = json.dumps([kind, document_boundaries]).encode() + model
        self.fingerprint = hashlib.blake2b(identity, digest_size=16).hexdigest()

    @abc.abstractmethod
    def _load(self, model: bytes) -> list[bytes]:
        """Opens `model`; returns what each of its ids decodes to.  <bos> and <eos> come after these."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.token_bytes)

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of `text`, without special tokens, and the character at which each begins (or which it is a part of)."""
        ids = self.encode(text)
        of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
        ends = np.cumsum(self.byte_lengths[ids], dtype=np.int64)
        return ids, [of_byte[end - length] for end, length in zip(ends, self.byte_lengths[ids], strict=True)]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of the beginning of a document: <bos> where documents are wrapped, then `text`."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exact bytes of `ids`; any prefix of the ids gives a prefix of the bytes.

        Raises:
          ValueError: an id outside [0, vocab_size).
        """
        tokens = []
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} is outside the vocabulary [0, {self.vocab_size}) of this {self.kind} tokenizer: "
                    "decode with the tokenizer that made the ids"
                )
            tokens.append(self.token_bytes[token])
        return b"".join(tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_answer(self, ids: Iterable[int]) -> str:
        """Text of what a model wrote, with U+FFFD in place of each token that is no text: a special one, or one outside of
        [0, vocab_size). So an answer with such a token within is not taken for the text around it."""
        known = (self.token_bytes[token] if 0 <= token < self.vocab_size else b"" for token in map(int, ids))
        return b"".join(token or NO_TEXT.encode() for token in known).decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        """Writes the model and a description into `directory`, which is created."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.model_file).write_bytes(self.model)
        description = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "document_boundaries": self.eos_id is not None,
            "fingerprint": self.fingerprint,
        }
        (directory / _DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes."""

    model_file = "bytes.model"

    def _load(self, model: bytes) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


class UnknownCharacter(ValueError):
    """A text holds a character that a tokenizer of characters has no id for."""


class CharTokenizer(Tokenizer):
    """Ids are the positions in a sorted string of characters."""

    model_file = "chars.txt"

    def _load(self, model: bytes) -> list[bytes]:
        self._ids = {character: i for i, character in enumerate(model.decode())}
        return [character.encode() for character in self._ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [[self._ids[character] for character in text] for text in texts]
        except KeyError as error:
            character = error.args[0]
            raise UnknownCharacter(
                f"the chars tokenizer has never seen {character!r} (U+{ord(character):04X}): it can only write the "
                f"{len(self._ids)} characters of its training text; use kind='byte_bpe' or 'bytes' for open text"
            ) from None


class SubwordTokenizer(Tokenizer):
    """A `tokenizers` model over byte-level words."""

    model_file = "tokenizer.json"

    def _load(self, model: bytes) -> list[bytes]:
        # Two threads encode twice as fast; the library turns its own threads off unless told otherwise.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        vocabulary = self._tokenizer.get_vocab()
        byte_of = byte_of_character()
        return [bytes(byte_of[character] for character in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback."""

    model_file = "tokenizer.model"

    def _load(self, model: bytes) -> list[bytes]:
        import sentencepiece

        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._space_character_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPM_SPACE.encode()]
        token_bytes = []
        for i in range(processor.get_piece_size()):
            piece = processor.id_to_piece(i)
            if processor.is_unknown(i):
                token_bytes.append(b"")  # never produced: every byte has a piece
            elif processor.is_byte(i):
                token_bytes.append(bytes([int(piece[3:5], 16)]))  # "<0x0A>"
            else:
                token_bytes.append(piece.replace(_SPM_SPACE, " ").encode())
        return token_bytes

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> list[int]:
        first, *others = self._processor.encode(text.split(_SPM_SPACE))
        for ids in others:
            first += self._space_character_ids + ids
        return first


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, with the special tokens that begin and end a text.

    Args:
      model: content of the file.
      special: ids of `bos` and `eos`, None where there is none, and `adds_bos`: whether a text begins with it.

    Raises:
      ValueError: the file is broken, or of a kind whose tokens are no fixed bytes (WordPiece, unigram without byte fallback).
    """

    model_file = "tokenizer.json"

    def __init__(self, model: bytes, special: Mapping[str, int | bool | None]):
        self.special = dict(special)
        super().__init__("huggingface", model, document_boundaries=False)
        self.bos_id, self.eos_id = (self._known(special.get(name)) for name in ("bos", "eos"))
        self.adds_bos = bool(special.get("adds_bos")) and self.bos_id is not None
        identity = json.dumps(["huggingface", self.bos_id, self.eos_id, self.adds_bos]).encode() + model
        self.fingerprint = hashlib.blake2b(identity, digest_size=16).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:  # the library forgets `encode_special_tokens`
        return HuggingFaceTokenizer, (self.model, self.special)

    def _known(self, token: int | bool | None) -> int | None:
        if token is not None and not 0 <= token < self.vocab_size:
            raise ValueError(f"special token {token} is not in the vocabulary of {self.vocab_size}: take both from one model")
        return token

    def _load(self, model: bytes) -> list[bytes]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        import tokenizers

        try:
            description = json.loads(model)
            alphabet = _alphabet(description)
            self._plain, self._parsing = (tokenizers.Tokenizer.from_str(model.decode()) for _ in range(2))
            added = {int(token["id"]): token for token in description.get("added_tokens") or ()}
            vocabulary = self._plain.get_vocab(with_added_tokens=True)
        except ValueError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"this is not a tokenizer.json that can be read ({error}): download it again") from error
        for tokenizer in (self._plain, self._parsing):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        self.special_tokens = {token["content"]: i for i, token in added.items() if token["special"]}
        token_bytes = [b""] * (1 + max(vocabulary.values(), default=-1))
        for token, i in vocabulary.items():
            token_bytes[i] = alphabet(token) if i not in added else b"" if added[i]["special"] else token.encode()
        return token_bytes

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """Token ids of each text, without <bos> and <eos>.

        Args:
          parse_special: whether text that spells a special token becomes it: never of text that users write.
        """
        tokenizer = self._parsing if parse_special else self._plain
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """See `encode_batch`."""
        return self.encode_batch([text], parse_special)[0]

    def encode_with_starts(self, text: str, parse_special: bool = False) -> tuple[list[int], list[int]]:
        """See `encode_batch`; places are of `text` before it was normalised."""
        encoding = (self._parsing if parse_special else self._plain).encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def encode_prompt(self, text: str) -> list[int]:
        assert self.bos_id is not None or not self.adds_bos
        return ([self.bos_id] if self.adds_bos and self.bos_id is not None else []) + self.encode(text)

    def save(self, directory: str | Path) -> None:
        super().save(directory)
        path = Path(directory) / _DESCRIPTION_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"special": self.special}, indent=2) + "\n")


def as_huggingface(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The same tokens as a tokenizer.json. Other programs take text that spells <bos> or <eos> for these.

    Raises:
      ValueError: its kind has no such form.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    if isinstance(tokenizer, SubwordTokenizer):
        described = tokenizers.Tokenizer.from_str(tokenizer.model.decode())
    elif isinstance(tokenizer, ByteTokenizer):
        described = tokenizers.Tokenizer(models.BPE(vocab=byte_of_character(), merges=[]))
        described.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        raise ValueError(
            f"a {tokenizer.kind} tokenizer has no form that other programs read: byte-level ones have (kind='byte_bpe')"
        )
    described.decoder = decoders.ByteLevel()
    described.add_special_tokens(sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__))
    if tokenizer.bos_id is not None:
        described.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", tokenizer.bos_id)])
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "adds_bos": tokenizer.bos_id is not None}
    return HuggingFaceTokenizer(described.to_str().encode(), special)


def _alphabet(description: Mapping[str, Any]) -> Callable[[str], bytes]:
    """The bytes of a token of this tokenizer.json."""
    decoder = description.get("decoder") or {}
    steps = decoder.get("decoders", ()) if decoder.get("type") == "Sequence" else (decoder,)
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        byte_of = byte_of_character()
        # A token of other characters is itself, as some added ones are.
        return lambda token: bytes(map(byte_of.__getitem__, token)) if byte_of.keys() >= set(token) else token.encode()
    byte_fallback = "ByteFallback" in kinds and (description.get("model") or {}).get("byte_fallback")
    if byte_fallback and kinds <= {"ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}:
        return lambda token: (
            bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.replace(_SPM_SPACE, " ").encode()
        )
    raise ValueError(
        f"a tokenizer.json whose decoder is {decoder.get('type')!r} has tokens that are no fixed bytes: byte-level ones and "
        "SentencePiece ones with byte fallback can be used"
    )


def open_huggingface_tokenizer(directory: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer of a checkpoint's directory: tokenizer.json, and tokenizer_config.json if it is there.

    Raises:
      ValueError: there is no tokenizer.json, or it cannot be used.
    """
    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file():
        raise ValueError(
            f"{directory} has no tokenizer.json, the one form that is read: open it with transformers and save_pretrained it"
        )
    try:
        model = (directory / "tokenizer.json").read_bytes()
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        ids = {token["content"]: token["id"] for token in json.loads(model).get("added_tokens") or ()}
        named = {name: config.get(f"{name}_token") for name in ("bos", "eos")}
        texts = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
        special = {name: ids.get(text) for name, text in texts.items()}
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = special["bos"] is not None and special["bos"] in _put_before(model)
        return HuggingFaceTokenizer(model, special | {"adds_bos": adds_bos})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the tokenizer in {directory} cannot be used: {error}") from error


def _put_before(model: bytes) -> list[int]:
    """What a tokenizer.json itself puts around a text."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(model.decode()).encode("").ids


_CLASSES: dict[TokenizerKind, type[Tokenizer]] = {
    "bytes": ByteTokenizer,
    "chars": CharTokenizer,
    "byte_bpe": SubwordTokenizer,
    "wordpiece": SubwordTokenizer,
    "spm_bpe": SentencePieceTokenizer,
    "spm_unigram": SentencePieceTokenizer,
}


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Trains on all of `texts` (`config.train_bytes` is the caller's business).  Same texts, same fingerprint.

    Raises:
      ValueError: no text, or not enough of it for `config.vocab_size`.
    """
    if config.kind == "bytes":
        model = b"bytes"
    elif config.kind == "chars":
        model = "".join(sorted(set().union(*texts))).encode()
        if not model:
            raise ValueError("the chars tokenizer was given no text: check the data sources")
    elif config.kind in ("byte_bpe", "wordpiece"):
        model = _train_subwords(config, texts)
    else:
        model = _train_sentencepiece(config, texts)
    return _CLASSES[config.kind](config.kind, model, config.document_boundaries)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Loads what `Tokenizer.save` wrote.

    Raises:
      FileNotFoundError: `directory` does not hold a saved tokenizer.
      ValueError: the files do not have the fingerprint they were saved with.
    """
    directory = Path(directory)
    if not (directory / _DESCRIPTION_FILE).is_file():
        raise FileNotFoundError(
            f"no saved tokenizer in {directory}: {_DESCRIPTION_FILE} is missing; point data.tokenizer.path at a directory "
            "that Tokenizer.save wrote, or leave it empty to train one"
        )
    description = json.loads((directory / _DESCRIPTION_FILE).read_text())
    if description["kind"] == "huggingface":
        model = (directory / HuggingFaceTokenizer.model_file).read_bytes()
        tokenizer = HuggingFaceTokenizer(model, description["special"])
    else:
        tokenizer_class = _CLASSES[description["kind"]]
        model = (directory / tokenizer_class.model_file).read_bytes()
        tokenizer = tokenizer_class(description["kind"], model, description["document_boundaries"])
    if tokenizer.fingerprint != description["fingerprint"]:
        raise ValueError(
            f"the tokenizer in {directory} has fingerprint {tokenizer.fingerprint}, but was saved with "
            f"{description['fingerprint']}: its files were changed or damaged; delete the directory and train again"
        )
    return tokenizer


def split_text(text: str, limit: int) -> Iterator[str]:
    """Cuts `text` into pieces of at most `limit` characters, after a line or before a space where there is one."""
    start = 0
    while len(text) - start > limit:
        cut = text.rfind("\n", start, start + limit) + 1
        if cut <= start:
            cut = text.rfind(" ", start + 1, start + limit)
        if cut <= start:
            cut = start + limit
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _train_subwords(config: TokenizerConfig, texts: Iterable[str]) -> bytes:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    vocab_size = config.vocab_size - 2 * config.document_boundaries
    options = {"vocab_size": vocab_size, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    split = [pre_tokenizers.Split(tokenizers.Regex(GPT4_SPLIT), "isolated")]
    if config.kind == "byte_bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(**options)
    else:
        # All 256 bytes are in the vocabulary, so no word is unknown; the library wants a name for it all the same.
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=1 << 20))
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix="", **options)
        # Longest match is quadratic in the length of a word, and some text has no spaces.
        split.append(pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]{1,64}"), "isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise _vocabulary_too_large(config, tokenizer.get_vocab_size())
    return tokenizer.to_str().encode()


def _train_sentencepiece(config: TokenizerConfig, texts: Iterable[str]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for text in texts for piece in split_text(text, 1000)),
            model_writer=model,
            model_type=config.kind.removeprefix("spm_"),
            vocab_size=config.vocab_size - 2 * config.document_boundaries,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 16,
            # Candidate pieces of the unigram model; the library's million is for vocabularies ten times ours.
            seed_sentencepiece_size=min(1_000_000, 25 * config.vocab_size),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"set it to a value <= (\d+)", str(error)):
            raise _vocabulary_too_large(config, int(found[1])) from error
        raise ValueError(f"SentencePiece could not train {config.kind} with {config.vocab_size=}: {error}") from error
    return model.getvalue()


def _vocabulary_too_large(config: TokenizerConfig, largest: int) -> ValueError:
    return ValueError(
        f"data.tokenizer.vocab_size={config.vocab_size} is more than the training text supports: a {config.kind} vocabulary "
        f"of it has at most {largest + 2 * config.document_boundaries} entries; lower vocab_size to that, or train on more "
        "text (data.tokenizer.train_bytes)"
    )


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 for itself, the others from U+0100 in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
