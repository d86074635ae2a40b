"""Models of llama.cpp, in and out: `load(path)` -> our parameters, `save(path, params, config)` -> a .gguf file.

A file is read as the checkpoint of Hugging Face that it was made from: keys and tensors get the names of that family
(`model/convert/families.py`), and from there on all is as in `model/convert/huggingface.py`. What llama.cpp's converter does to
some tensors on the way is undone: in the llama architecture queries and keys rotate neighbours instead of halves, Gemma's norms
have their one added, GPT-2's matrices are transposed. Refused are, beside architectures not listed, experts, longrope, and
`rope_freqs` that no published Llama has.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import jax
import numpy as np

from model.config import ModelConfig, RopeConfig
from model.convert.config_json import differences
from model.convert.families import FAMILIES, Family, parse_config, write_config
from model.convert.gguf_file import GgufFile, StoredBlocks, read_gguf
from model.convert.huggingface import Keep, file_tensors, load_stored, whole
from model.params import Params, path_name
from model.rope import inverse_frequencies

FileType = Literal["F32", "F16", "Q8_0"]
_FILE_TYPES = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
_ROPE_FREQS = "rope_freqs.weight"

# Key after the architecture's name -> key of config.json. The file must have the first group.
_NEEDED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_YARN = {
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Read by name below, or of no meaning for the network.
_HANDLED = {
    "attention.key_length",
    "attention.value_length",
    "attention.causal",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How llama.cpp writes a family down.

    Attributes:
      family: model_type of the checkpoint that it comes from.
      needed: keys that a file has, and what they are in config.json.
      settings: what else config.json said, as llama.cpp takes it for granted.
      interleaved: queries and keys rotate neighbours.
      transposed: matrices stand the other way.
      added_one: norms have their one added.
    """

    family: str
    needed: Mapping[str, str]
    settings: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}
    interleaved: bool = False
    transposed: bool = False
    added_one: bool = False


def _gemma_scale(layers_of_27b: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """llama.cpp scales logits by the head's width, but in the largest model by that which hidden size and heads give."""

    def settings(values: dict[str, Any]) -> dict[str, Any]:
        large = values["num_hidden_layers"] == layers_of_27b
        scalar = values["hidden_size"] // values["num_attention_heads"] if large else values.get("head_dim", 256)
        return {"query_pre_attn_scalar": scalar}

    return settings


def _phi3_window(values: dict[str, Any]) -> dict[str, Any]:
    """Files from before there was a key for it: the two models of 4,096 tokens have the window that llama.cpp gave them
    (ggml-org/llama.cpp#8931), the others none."""
    has_one = values["num_hidden_layers"] in (32, 40) and values["max_position_embeddings"] == 4096
    return {"sliding_window": 2047} if has_one and "sliding_window" not in values else {}


ARCHITECTURES = {
    "llama": Architecture("llama", _NEEDED | _RMS, interleaved=True),
    "qwen2": Architecture("qwen2", _NEEDED | _RMS),
    "qwen3": Architecture("qwen3", _NEEDED | _RMS),
    "gemma": Architecture("gemma", _NEEDED | _RMS, added_one=True),
    "gemma2": Architecture("gemma2", _NEEDED | _RMS, _gemma_scale(46), added_one=True),
    "gemma3": Architecture("gemma3_text", _NEEDED | _RMS, _gemma_scale(62), added_one=True),
    # Its window is that of the checkpoint, 0 for none, though llama.cpp itself has let it see everything since.
    "phi3": Architecture("phi3", _NEEDED | _RMS, _phi3_window),
    "gpt2": Architecture("gpt2", _GPT2_KEYS, transposed=True),
}


@dataclasses.dataclass(frozen=True)
class _AsPublished:
    """A tensor of the file as the family's checkpoint has it."""

    name: str
    stored: StoredBlocks
    change: Callable[[np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.change(np.broadcast_to(np.float32(0), self.stored.shape)).shape

    def read(self) -> np.ndarray:
        return self.change(self.stored.read())


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys of which neighbours rotate, ordered so that halves do."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _neighbours(array: np.ndarray, heads: int) -> np.ndarray:
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _change(name: str, architecture: Architecture, config: ModelConfig, out: bool) -> Callable[[np.ndarray], np.ndarray]:
    """What makes a file's tensor one of the family's checkpoint, or with `out` the other way round."""
    for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        if architecture.interleaved and part in name:
            return lambda array: (_neighbours if out else _halves)(array, heads)
    if architecture.transposed and ".c_" in name:
        return lambda array: array.T
    if architecture.added_one and name.endswith("norm.weight"):
        return lambda array: array + np.float32(1 if out else -1)
    return lambda array: array


def _names(name: str, config: ModelConfig, family: Family) -> dict[str, str]:
    """Of the family's tensors -> of the architecture's."""
    number = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[name]
    mapping = gguf.get_tensor_name_map(number, config.num_layers)
    names = {tensor.name: mapping.get_name(tensor.name, (".weight", ".bias")) for tensor in file_tensors(config, family)}
    assert all(names.values()), names
    return {ours: str(theirs) for ours, theirs in names.items()}


# --- In -----------------------------------------------------------------------------------------------------------------------


def read_config(file: GgufFile) -> tuple[str, Family, ModelConfig]:
    """The name of the architecture, its family, and the network of a file.

    Raises:
      ValueError: not an architecture, or a network, that is implemented; the key is named.
    """
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(str(name), ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{file.path}: general.architecture={name!r} is not one that this converter knows. The nearest is {near!r}; it "
            f"knows {', '.join(sorted(ARCHITECTURES))}"
        )
    try:
        values = _config_json(file, name, ARCHITECTURES[name])
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file.path} has a value of another kind than it should ({error}): download it again") from error
    return name, *parse_config(values, str(file.path))


def _config_json(file: GgufFile, name: str, architecture: Architecture) -> dict[str, Any]:
    family = FAMILIES[architecture.family]
    prefix = name + "."
    given = {key.removeprefix(prefix): _plain(value) for key, value in file.metadata.items() if key.startswith(prefix)}
    if not any(key in given for key in architecture.needed):
        raise ValueError(
            f"{file.path} has no keys of a model ({prefix}…): is it a vocabulary or an adapter alone? Give the model"
        )
    if given.get("expert_count"):
        raise ValueError(
            f"{file.path}: {prefix}expert_count={given['expert_count']}: experts are not implemented for GGUF files"
        )
    for key in architecture.needed:
        if key not in given:
            raise ValueError(f"{file.path} has no key {prefix + key!r}: is the file complete? Download it again")
    renamed = {**architecture.needed, **_OPTIONAL}
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight' of two dimensions: download it again")
    values: dict[str, Any] = {"model_type": architecture.family, "vocab_size": embedding.shape[0]}
    values |= {renamed[key]: value for key, value in given.items() if key in renamed}
    # A key that nobody knows is refused by its own name when the config is parsed.
    known = {"expert_count", "expert_used_count", *renamed, *_YARN, *_HANDLED}
    values |= {prefix + key: value for key, value in given.items() if key not in known}
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    if "attention_bias" in family.keys:
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if "mlp_bias" in family.keys:
        values["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    heads = values.get("num_attention_heads")
    if "hidden_size" in values:
        values |= _head_dim(file, prefix, given, values["hidden_size"], heads, family)
        values |= _rope_scaling(file, prefix, given, values)
    return values | architecture.settings(values)


def _plain(value: Any) -> Any:
    """Numbers of 32 bits as somebody wrote them, 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_dim(file: GgufFile, prefix: str, given: Mapping[str, Any], hidden: int, heads: Any, family: Family) -> dict[str, Any]:
    if not isinstance(heads, int) or not heads:
        raise ValueError(f"{file.path}: {prefix}attention.head_count={heads!r}: layers of unlike heads are not implemented")
    head_dim = given.get("attention.key_length", hidden // heads)
    if given.get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{file.path}: keys and values of unlike widths are not implemented for GGUF files")
    if "head_dim" not in family.keys and head_dim != hidden // heads:
        raise ValueError(f"{file.path}: {prefix}attention.key_length={head_dim} is not implemented for this architecture")
    rotary = given.get("rope.dimension_count", head_dim)
    said = {"head_dim": head_dim} if "head_dim" in family.keys else {}
    return said | ({} if rotary == head_dim else {"partial_rotary_factor": rotary / head_dim})


def _rope_scaling(file: GgufFile, prefix: str, given: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    kind = given.get("rope.scaling.type", "none")
    if any(name.startswith("rope_factors_") for name in file.tensors):
        raise ValueError(f"{file.path}: longrope, which rope_factors_* belong to, is not implemented")
    if _ROPE_FREQS in file.tensors:
        if prefix != "llama.":
            raise ValueError(f"{file.path}: {_ROPE_FREQS} belongs to llama, not to {prefix.removesuffix('.')}")
        return {"rope_scaling": _llama3_scaling(file, values)}
    if kind == "none":
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": given.get("rope.scaling.factor")}
    if kind == "yarn":
        scaling |= {said: given[key] for key, said in _YARN.items() if key in given}
    return {"rope_scaling": scaling}


# Llama 3.1 to 3.3; a file has no numbers but what they come to.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_freqs(rope: RopeConfig, rotary_dim: int) -> np.ndarray:
    """float32 [rotary_dim / 2]: what llama.cpp divides the frequencies of rotation by."""
    plain = dataclasses.replace(rope, scaling="none", factor=1.0)
    return (inverse_frequencies(plain, rotary_dim)[0] / inverse_frequencies(rope, rotary_dim)[0]).astype(np.float32)


def _llama3_scaling(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    factors = file.tensors[_ROPE_FREQS].read().reshape(-1)
    scaling = {"rope_type": "llama3", "factor": float(max(factors, default=1.0))} | _LLAMA3_SCALING
    rope = RopeConfig(
        theta=values.get("rope_theta", 10_000.0),
        scaling="llama3",
        factor=max(scaling["factor"], 1.0),
        original_max_len=scaling["original_max_position_embeddings"],
    )
    expected = rope_freqs(rope, values["head_dim"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(f"{file.path}: {_ROPE_FREQS} is not that of Llama 3.1 to 3.3, and no other is implemented")
    return scaling


def load(
    file: GgufFile | str | Path, config: ModelConfig | None = None, shardings: Params | None = None, keep: Keep = whole
) -> tuple[Params, ModelConfig]:
    """Reads a model, dequantised. Arguments, result and errors are those of `model.convert.huggingface.load`."""
    file = file if isinstance(file, GgufFile) else read_gguf(file)
    name, family, described = read_config(file)
    published = {theirs: ours for ours, theirs in _names(name, described, family).items()}
    tensors = {}
    for theirs, stored in file.tensors.items():
        if theirs != _ROPE_FREQS:
            ours = published.get(theirs, theirs)
            tensors[ours] = _AsPublished(ours, stored, _change(ours, ARCHITECTURES[name], described, out=False))
    return load_stored(tensors, family, described, str(file.path), config, shardings, keep)


# --- Out ----------------------------------------------------------------------------------------------------------------------

_WRITTEN = ("llama", "qwen2", "qwen3")


def save(
    path: str | Path,
    params: Params,
    config: ModelConfig,
    kind: FileType = "F16",
    metadata: Mapping[str, Any] | None = None,
    name: str = "",
) -> None:
    """Writes a model that llama.cpp runs. The file appears when it is complete; host memory stays near one tensor.

    Args:
      kind: of the matrices; vectors, and matrices that Q8_0's blocks of 32 do not divide, are wider.
      metadata: more keys, above all those of the tokenizer (`data.gguf_tokenizer.metadata_of`).

    Raises:
      ValueError: no architecture that is written expresses the network, or there are more or fewer tokens than it has.
    """
    path = Path(path)
    architecture, values = _architecture_of(config)
    tokens = (metadata or {}).get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) != config.vocab_size:
        raise ValueError(
            f"there are {len(tokens)} tokens for a model of {config.vocab_size}, which llama.cpp refuses: give metadata_of its "
            "vocab_size"
        )
    family = FAMILIES[ARCHITECTURES[architecture].family]
    leaves = {path_name(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tensors, names = file_tensors(config, family), _names(architecture, config, family)

    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(name or path.stem)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in (_keys_of(architecture, values, config) | dict(metadata or {})).items():
        _add(writer, key, value)

    freqs = rope_freqs(config.rope, config.rotary_dim) if config.rope.scaling == "llama3" else None
    kinds = {tensor.name: _kind_of(tensor.shape, kind) for tensor in tensors}
    if freqs is not None:
        writer.add_tensor_info(_ROPE_FREQS, freqs.shape, freqs.dtype, freqs.nbytes)
    for tensor in tensors:
        blocks = kinds[tensor.name]
        elements, size = gguf.GGML_QUANT_SIZES[blocks]
        shape = (
            gguf.quant_shape_to_byte_shape(tensor.shape, blocks) if blocks == gguf.GGMLQuantizationType.Q8_0 else tensor.shape
        )
        dtype = {"F32": np.float32, "F16": np.float16}.get(blocks.name, np.uint8)
        num_bytes = int(np.prod(tensor.shape)) // elements * size
        writer.add_tensor_info(names[tensor.name], shape, np.dtype(dtype), num_bytes, blocks)

    def arrays() -> Iterator[np.ndarray]:
        if freqs is not None:
            yield freqs
        for tensor in tensors:
            array = tensor.join([np.asarray(leaves[part.path][part.lead], np.float32) for part in tensor.parts])
            array = _change(tensor.name, ARCHITECTURES[architecture], config, out=True)(array)
            yield gguf.quants.quantize(np.ascontiguousarray(array), kinds[tensor.name])

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        writer.write_header_to_file(Path(temporary))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in arrays():
            writer.write_tensor_data(array)
        writer.close()
        _check(temporary, config)
        os.chmod(temporary, 0o644)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _architecture_of(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    reasons = []
    for name in _WRITTEN:
        try:
            return name, write_config(config, FAMILIES[ARCHITECTURES[name].family])
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(
        f"no architecture of {', '.join(_WRITTEN)}, which are written as GGUF, expresses this model. {min(reasons, key=len)}"
    )


def _keys_of(architecture: str, values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    renamed = {**ARCHITECTURES[architecture].needed, **_OPTIONAL}
    keys = {key: values[said] for key, said in renamed.items() if values.get(said) is not None}
    keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    keys |= {"rope.dimension_count": config.rotary_dim, "vocab_size": config.vocab_size}
    if any(config.window_pattern):
        raise ValueError(f"GGUF's {architecture} has no sliding windows: model.window_pattern={config.window_pattern}")
    if config.rope.scaling == "llama3" and architecture != "llama":
        raise ValueError(f"GGUF's {architecture} has no Llama 3 scaling of positions: model.rope.scaling='llama3'")
    if config.rope.scaling in ("linear", "yarn"):
        keys |= {"rope.scaling.type": config.rope.scaling, "rope.scaling.factor": config.rope.factor}
    if config.rope.scaling == "yarn":
        if (config.rope.beta_fast, config.rope.beta_slow) != (32.0, 1.0):
            raise ValueError("GGUF files of YaRN with other than beta_fast=32, beta_slow=1 are not implemented")
        keys["rope.scaling.original_context_length"] = config.rope.original_max_len
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)


def _kind_of(shape: tuple[int, ...], kind: FileType) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "Q8_0" and shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind]


def _check(path: str, config: ModelConfig) -> None:
    """What was written says the same network; llama.cpp has no words for some."""
    if different := differences(config, read_config(read_gguf(path))[2]):
        raise ValueError(f"a GGUF file cannot express {', '.join(different)}: change the model")
