"""Opens a model with all that belongs to it: a directory of Hugging Face, a .gguf file, or a name of the store.

A directory of `peft` is opened as the model that its adapters belong to, with these in it.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.gguf_tokenizer import TURN_ENDS, tokenizer_of
from data.tokenizer import HuggingFaceTokenizer, Tokenizer, open_huggingface_tokenizer
from inference import store
from model.config import DType, ModelConfig
from model.convert import gguf, huggingface
from model.convert.families import Family, read_family_and_config
from model.convert.gguf_file import GgufFile, read_gguf
from model.convert.peft import CONFIG as ADAPTER_CONFIG
from model.convert.peft import holds_adapters, load_adapters, match_adapters, merging, read_adapter_config
from model.params import Params
from model.quantize import Bits, rounding, with_own_head


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be used.

    Attributes:
      params: of the structure of `param_specs(config)`, some of them Quantized if that was asked for.
      chat_template: Jinja for `data.chat_template`, if it came with one.
      stop_ids: tokens that end an answer.
      name: what it calls itself, for people.
    """

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: str | None
    stop_ids: frozenset[int]
    name: str


def locate(source: str | Path) -> Path:
    """The .gguf file, or the directory of a checkpoint or of adapters, that a path, or a name of the store, stands for.

    Raises:
      ValueError: there is none.
    """
    path = Path(source).expanduser()
    path = path if path.exists() else store.find(str(source))
    return store.weights_of(path) if path.is_dir() else path


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """All of a model but its weights, which `load` reads; see LoadedModel.

    Attributes:
      adapters: a directory of those that `load` puts into the weights.
    """

    file: GgufFile | Path
    family: Family
    config: ModelConfig
    tokenizer: HuggingFaceTokenizer
    chat_template: str | None
    stop_ids: frozenset[int]
    name: str
    adapters: Path | None = None

    def load(self, config: ModelConfig, shardings: Params | None = None, keep: huggingface.Keep = huggingface.whole) -> Params:
        """The parameters of `config`, which is `self.config` with what does not change the network replaced.

        Args:
          shardings: where each goes, a tree of NamedSharding; None is the default device.
          keep: see `model.convert.huggingface.load`.
        """
        if self.adapters:
            wide = dataclasses.replace(config, param_dtype="float32")  # rounded once, when they are in the weights
            keep = merging(*load_adapters(self.adapters, wide, self.family), keep)
        read = gguf.load if isinstance(self.file, GgufFile) else huggingface.load
        return read(self.file, config, shardings, keep)[0]  # pyright: ignore[reportArgumentType]


def describe_model(source: str | Path) -> ModelDescription:
    """Opens a model without its weights. Arguments and errors are those of `open_model`."""
    path = locate(source)
    name = path.parent.name if path.parent.parent == store.root() else path.stem if path.is_file() else path.resolve().name
    if path.is_dir() and holds_adapters(path):
        found = _describe_adapted(path, name)
    elif path.is_file():
        file = read_gguf(path)
        tokenizer = tokenizer_of(file.metadata, str(path))
        _, family, config = gguf.read_config(file)
        template, stop_ids = file.metadata.get("tokenizer.chat_template"), _gguf_stop_ids(file, tokenizer)
        found = ModelDescription(file, family, config, tokenizer, template, stop_ids, name)
    else:
        family, config = read_family_and_config(path)
        tokenizer = open_huggingface_tokenizer(path)
        found = ModelDescription(path, family, config, tokenizer, _chat_template(path), _stop_ids(path, tokenizer), name)
    if found.tokenizer.vocab_size > found.config.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {found.tokenizer.vocab_size} tokens, the model {found.config.vocab_size}: they are not "
            "of one model"
        )
    return found


def _describe_adapted(directory: Path, name: str) -> ModelDescription:
    """The base of adapters with what they bring: the tokenizer, chat template and stop tokens beside them, if there are any."""
    base = describe_model(_base_of(directory))
    match_adapters(directory, base.config, base.family)
    tokenizer = open_huggingface_tokenizer(directory) if (directory / "tokenizer.json").is_file() else base.tokenizer
    ends = frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
    said = (directory / "generation_config.json").is_file()
    return dataclasses.replace(
        base,
        tokenizer=tokenizer,
        chat_template=_chat_template(directory) or base.chat_template,
        stop_ids=_stop_ids(directory, tokenizer) if said else base.stop_ids | ends,
        name=name,
        adapters=directory,
    )


def _base_of(directory: Path) -> str:
    """The path or the name in the store of the model that adapters belong to.

    Raises:
      ValueError: it is not named, not here, or has adapters itself.
    """
    described, where = read_adapter_config(directory), f"{directory / ADAPTER_CONFIG}: base_model_name_or_path"
    base, revision = described.get("base_model_name_or_path"), described.get("revision")
    if not base:
        raise ValueError(f"{where} is empty: set it to the directory, or the name of `loam models`, of the adapters' base")
    if not Path(base).expanduser().exists():
        published = f"{base}@{revision}" if revision and revision != "main" else base
        names = [entry.name for entry in store.entries() if entry.name == base or entry.source == published]
        if not names:
            raise ValueError(
                f"{where}={base!r}, the base of these adapters, is neither a path nor a model of {store.root()}: "
                f"loam pull {shlex.quote(published)}, or set it to where that model is"
            )
        base = names[0]
    path = locate(base)
    if path.is_dir() and holds_adapters(path):
        raise ValueError(f"{where}={base!r} has adapters itself: loam convert {shlex.quote(base)} DIRECTORY, and name that")
    return base


def open_model(
    source: str | Path,
    *,
    dtype: DType = "float32",
    param_dtype: DType = "float32",
    place: Callable[[ModelConfig], Params | None] = lambda config: None,
    bits: Bits | None = None,
) -> LoadedModel:
    """Opens a model.

    Args:
      source: a directory with config.json, or adapter_config.json, and safetensors files; a .gguf file; a name of the store.
      dtype, param_dtype: of activations and of parameters.
      place: a NamedSharding for each parameter of a network; None is the default device.
      bits: rounds matrices of `param_dtype` (`model/quantize.py`), each before the next is read.

    Raises:
      ValueError: there is none, or it cannot be read; the message names the file and what is wrong with it.
    """
    found = describe_model(source)
    config = dataclasses.replace(found.config, dtype=dtype, param_dtype=param_dtype)
    params = found.load(config, place(config), rounding(config, bits) if bits else huggingface.whole)
    if bits:
        params, config = with_own_head(params, config, bits)
    return LoadedModel(params, config, found.tokenizer, found.chat_template, found.stop_ids, found.name)


def _gguf_stop_ids(file: GgufFile, tokenizer: HuggingFaceTokenizer) -> frozenset[int]:
    named = {file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    ends = named | {tokenizer.special_tokens.get(text) for text in TURN_ENDS}
    return frozenset(token for token in ends if token is not None)


def _stop_ids(directory: Path, tokenizer: HuggingFaceTokenizer) -> frozenset[int]:
    """What generation_config.json says, or else config.json; and the tokenizer's <eos>."""
    for name in ("generation_config.json", "config.json"):
        said = _json(directory / name).get("eos_token_id")
        if said is not None:
            ids = said if isinstance(said, list) else [said]
            if not all(isinstance(i, int) for i in ids):
                raise ValueError(f"{directory / name}: eos_token_id={said!r} should be numbers: download it again")
            return frozenset([*ids, *([tokenizer.eos_id] if tokenizer.eos_id is not None else [])])
    return frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})


def _chat_template(directory: Path) -> str | None:
    """The template, or of several that called default."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text()
    said = _json(directory / "tokenizer_config.json").get("chat_template")
    said = said or _json(directory / "chat_template.json").get("chat_template")
    if isinstance(said, list):
        said = next((entry["template"] for entry in said if entry.get("name") == "default"), None)
    if said is not None and not isinstance(said, str):
        raise ValueError(f"{directory}: its chat_template is no text: download tokenizer_config.json again")
    return said


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    return value if isinstance(value, dict) else {}
