"""The tokenizer in the metadata of a GGUF file, as the tokenizer.json that it was made from, and back.

A file has the vocabulary, the merges or scores, and a name for how text is split before. Byte-level BPE (`gpt2`) and
SentencePiece's BPE (`llama`) are read; both as llama.cpp encodes, which normalises nothing. One split differs: for `tekken`
llama.cpp has an approximation (combining marks are no letters, and only ASCII has upper and lower case), and here it is that of
the published tokenizer, which the models were trained with.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from data.tokenizer import GPT4_SPLIT, HuggingFaceTokenizer, Tokenizer, as_huggingface

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPM_SPACE = "\u2581"
_KEYS = "tokenizer.ggml."
# Special tokens that end a turn, whatever a file names as its one <eos>; llama.cpp knows them by their text, too.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(*patterns: str) -> dict[str, Any]:
    """Each pattern splits the pieces that those before it left."""
    splits = [{"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False} for each in patterns]
    return {"type": "Sequence", "pretokenizers": [*splits, _byte_level(use_regex=False)]}


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Also of a file that names none.
_DEFAULT = _split(r"[\p{P}$+<=>^~|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9]{3}")
_GPT2 = _byte_level(use_regex=True)
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}
_LLAMA3 = _split(GPT4_SPLIT)
_QWEN2 = _split(GPT4_SPLIT.replace("{1,3}", ""))
_TEKKEN = _split(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Split(NamedTuple):
    """What the name of a split stands for in llama.cpp.

    Attributes:
      whole_words: a word that is a token is taken whole, whatever the merges say.
      adds_bos: a text begins with <bos> where the file does not say.
    """

    pre_tokenizer: dict[str, Any]
    whole_words: bool = False
    adds_bos: bool = False


# The first of several names is the one that is written.
SPLITS = {
    "default": Split(_DEFAULT),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4"), Split(_GPT2)),
    **dict.fromkeys(("trillion", "granite-docling"), Split(_GPT2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), Split(_DIGITS)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "midm-2.0", "pixtral", "lfm2"),
        Split(_LLAMA3, whole_words=True, adds_bos=True),
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), Split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"), Split(_QWEN2)),
    "tekken": Split(_TEKKEN, whole_words=True, adds_bos=True),
}
# Ids of a SentencePiece file that does not say.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> HuggingFaceTokenizer:
    """The tokenizer of a file.

    Args:
      metadata: all keys of the file; `where` is its name.

    Raises:
      ValueError: it has none, or one of another kind, or its parts do not fit together.
    """
    kind, tokens = metadata.get(_KEYS + "model"), metadata.get(_KEYS + "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"{where} has no tokenizer: take a file with one, or the tokenizer.json of the model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{where}: {_KEYS}model={kind!r} is not implemented; gpt2 and llama are")
    types = [int(kind) for kind in metadata.get(_KEYS + "token_type", [_NORMAL] * len(tokens))]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{where} has {len(tokens)} tokens, {len(set(tokens))} of them different, and {len(types)} types of them"
        )
    usual = _SENTENCEPIECE_IDS if kind == "llama" else {}
    special = {name: _special(metadata, name, usual.get(name), len(tokens), where) for name in ("bos", "eos")}
    if kind == "gpt2":
        split = _split_of(metadata, where)
        described, adds_bos = _byte_bpe(metadata, split, where), split.adds_bos
    else:
        described, adds_bos = _sentencepiece(metadata, types, where), True
    adds_bos = bool(metadata.get(_KEYS + "add_bos_token", adds_bos))
    added = [_added(i, tokens[i], kind == _CONTROL) for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)]
    bos = special["bos"] if adds_bos else None
    described |= {"version": "1.0", "added_tokens": added, "post_processor": _puts_before(tokens, bos)}
    # llama.cpp wants a token for each row of the embedding, and files are padded with these.
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED or token != _padding(i)}
    described["model"] |= {"type": "BPE", "vocab": vocab}
    try:
        model = json.dumps(described, ensure_ascii=False).encode()
        return HuggingFaceTokenizer(model, special | {"adds_bos": adds_bos})
    except ValueError as error:
        raise ValueError(f"the tokenizer in {where} cannot be used: {error}") from error


def _padding(token_id: int) -> str:
    return f"[PAD{token_id}]"


def _special(metadata: Mapping[str, Any], name: str, usual: int | None, size: int, where: str) -> int | None:
    token = metadata.get(f"{_KEYS}{name}_token_id", usual)
    if token is not None and not 0 <= token < size:
        raise ValueError(f"{where}: {_KEYS}{name}_token_id={token} is not one of its {size} tokens: download it again")
    return token


def _added(token_id: int, text: str, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **plain, "special": special}


def _puts_before(tokens: Sequence[str], bos: int | None) -> dict[str, Any] | None:
    if bos is None:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": tokens[bos], "type_id": 0}}, text]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    names = {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": names}


def _split_of(metadata: Mapping[str, Any], where: str) -> Split:
    name = metadata.get(_KEYS + "pre", "default")
    if name not in SPLITS:
        near = difflib.get_close_matches(str(name), SPLITS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{where}: {_KEYS}pre={name!r} is not a way to split text that is known here. The nearest is {near!r}; known are "
            f"{', '.join(sorted(SPLITS))}"
        )
    return SPLITS[name]


def _byte_bpe(metadata: Mapping[str, Any], split: Split, where: str) -> dict[str, Any]:
    merges = metadata.get(_KEYS + "merges")
    if not isinstance(merges, list):
        raise ValueError(f"{where} has no {_KEYS}merges: download it again")
    pairs = [merge.split(" ") for merge in merges]
    return {
        "normalizer": None,
        "pre_tokenizer": split.pre_tokenizer,
        "decoder": _byte_level(use_regex=True),
        "model": {"merges": pairs, "ignore_merges": split.whole_words},
    }


def _sentencepiece(metadata: Mapping[str, Any], types: Sequence[int], where: str) -> dict[str, Any]:
    tokens, scores = metadata[_KEYS + "tokens"], metadata.get(_KEYS + "scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError(
            f"{where} has {len(tokens)} tokens and {0 if scores is None else len(scores)} scores: download it again"
        )
    if sum(kind == _BYTE for kind in types) != 256:
        raise ValueError(f"{where}: its SentencePiece tokenizer has no token for some bytes, which is not implemented")
    # Gemma's merges go by the place in the vocabulary: its scores tell another order.
    by_place = str(metadata.get("general.architecture")).startswith("gemma")
    ranks = [-i for i in range(len(tokens))] if by_place else [float(score) for score in scores]
    normal = {token: rank for token, rank, kind in zip(tokens, ranks, types, strict=True) if kind == _NORMAL}
    prefix = metadata.get(_KEYS + "add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPM_SPACE}
    prepend = [{"type": "Prepend", "prepend": _SPM_SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": _SPM_SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {"merges": _merges_of(normal), "byte_fallback": True, "unk_token": unknown, "fuse_unk": True},
    }


def _merges_of(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that give these tokens, those of higher rank first: what SentencePiece does, as a list."""
    order = {token: i for i, token in enumerate(ranks)}
    found = [
        (-rank, order[token[:at]], order[token[at:]], token[:at], token[at:])
        for token, rank in ranks.items()
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def metadata_of(
    tokenizer: Tokenizer, vocab_size: int, chat_template: str | None = None, stop_ids: Set[int] = frozenset()
) -> dict[str, Any]:
    """The keys of a GGUF file for a tokenizer: byte-level BPE, or BPE of SentencePiece with byte fallback.

    llama.cpp normalises nothing, so NFC, which Qwen's tokenizers make of a text first, is not kept. For SentencePiece it always
    puts a space before a text, as that does; tokenizers with `Metaspace` put none before a text that begins with one.

    Args:
      vocab_size: of the model, which may have more rows than the tokenizer has tokens.
      stop_ids: tokens that end an answer.

    Raises:
      ValueError: it is of another kind, splits text in a way that llama.cpp has no name for, or has more tokens than the model.
    """
    tokenizer = as_huggingface(tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}: they are not of one model")
    described = json.loads(tokenizer.model)
    model = described["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"a {model.get('type')} tokenizer has no form in GGUF: BPE ones have (kind='byte_bpe')")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    texts = {token: text for text, token in model["vocab"].items()}
    types = dict.fromkeys(texts, _NORMAL)
    for token in described.get("added_tokens") or ():
        texts[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    if model.get("byte_fallback"):
        types |= {i: _BYTE for i, text in texts.items() if re.fullmatch("<0x[0-9A-F]{2}>", text)}
        types |= {i: _UNKNOWN for i, text in texts.items() if text == model.get("unk_token")}
        scores = _scores(merges, {text: i for i, text in texts.items() if types[i] == _NORMAL})
        kind = {
            "model": "llama",
            "scores": [scores.get(texts.get(i, ""), 0.0) for i in range(vocab_size)],
            "add_space_prefix": _adds_space(described),
        }
    else:
        kind = {
            "model": "gpt2",
            "pre": _name_of(described, bool(model.get("ignore_merges"))),
            "merges": [" ".join(merge) for merge in merges],
        }
    said = kind | {
        "tokens": [texts.get(i, _padding(i)) for i in range(vocab_size)],
        "token_type": [types.get(i, _UNUSED) for i in range(vocab_size)],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": tokenizer.adds_bos,
        **_other_ends(tokenizer, stop_ids),
    }
    keys = {_KEYS + key: value for key, value in said.items() if value is not None}
    return keys | ({"tokenizer.chat_template": chat_template} if chat_template else {})


def _other_ends(tokenizer: HuggingFaceTokenizer, stop_ids: Set[int]) -> dict[str, int]:
    """The keys of the tokens beside <eos> that end an answer. A file has two; those of TURN_ENDS need none."""
    by_text = {tokenizer.special_tokens.get(text) for text in TURN_ENDS}
    others = sorted(stop_ids - {tokenizer.eos_id}, key=lambda token: (token in by_text, token))
    if len([token for token in others if token not in by_text]) > 2:
        raise ValueError(f"a GGUF file names <eos> and two more tokens that end an answer, and here are {sorted(stop_ids)}")
    return dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """What a normaliser or pre-tokenizer does, one after the other."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _steps(inner, name)] if part["type"] == "Sequence" else [part]


def _name_of(described: Mapping[str, Any], whole_words: bool) -> str:
    """The first name of a split; where there are two, that which treats whole words alike."""
    if any(step["type"] != "NFC" for step in _steps(described.get("normalizer"), "normalizers")):
        raise ValueError(
            "this tokenizer has a normaliser, which GGUF has no form for: it would see other text than it was made for"
        )
    split = _essence(described.get("pre_tokenizer"))
    fits = [(each.whole_words != whole_words, name) for name, each in SPLITS.items() if _essence(each.pre_tokenizer) == split]
    if not fits:
        raise ValueError("this tokenizer splits text in a way that has no name in GGUF: take the tokenizer of a known model")
    return min(fits, key=lambda fit: fit[0])[1]


def _essence(pre_tokenizer: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    """What of a pre-tokenizer decides where text is split, whichever way published files spell it."""
    found = []
    for step in _steps(pre_tokenizer, "pretokenizers"):
        if step["type"] == "ByteLevel":
            found.append(("ByteLevel", step["add_prefix_space"], step.get("use_regex", True)))
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            pattern = step["pattern"]["Regex"].replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
            found.append(("Split", pattern, step["behavior"], step["invert"]))
        else:
            found.append((step["type"], json.dumps(step, sort_keys=True)))
    return found


def _scores(merges: Sequence[tuple[str, ...]], normal: Mapping[str, int]) -> dict[str, float]:
    """Of each token that merges make; SentencePiece merges what has the highest."""
    made = [left + right for left, right in merges]
    scores = {token: -float(i) for i, token in reversed([*enumerate(made)])}
    again = _merges_of({token: scores.get(token, -float(len(made))) for token in sorted(normal, key=normal.__getitem__)})
    if [left + right for left, right in again] != made:
        raise ValueError(
            "the merges of this tokenizer are not in the order of its tokens, so they are none of SentencePiece, and GGUF has "
            "no form for byte fallback with others"
        )
    return scores


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalizers, steps = (
        _steps(described.get("normalizer"), "normalizers"),
        _steps(described.get("pre_tokenizer"), "pretokenizers"),
    )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPM_SPACE}
    if not steps and normalizers in ([replace], [{"type": "Prepend", "prepend": _SPM_SPACE}, replace]):
        return len(normalizers) == 2
    if not normalizers and len(steps) == 1 and steps[0]["type"] == "Metaspace":
        metaspace = steps[0]
        if (metaspace["replacement"], metaspace.get("split", True)) == (_SPM_SPACE, False):
            return metaspace["prepend_scheme"] != "never"
    raise ValueError("this tokenizer prepares text in another way than SentencePiece does, which GGUF has no form for")
