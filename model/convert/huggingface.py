"""Checkpoints of Hugging Face, in and out: `load(directory)` -> our parameters, `save(directory, params, config)` -> theirs.

One leaf is made after the other, straight into its sharding; each device reads its part of the files, and memory on the host
stays near one tensor. What is known of families is in `model/convert/families.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.convert.config_json import CARRIED, differences
from model.convert.families import Family, family_of, read_family_and_config, write_config
from model.convert.safetensors import plan_shards, read_headers, write_json, write_shards
from model.convert.tensors import FileTensor, Part
from model.params import Params, ParamSpec, block_layout, is_spec, param_specs, path_name

# What belongs to a checkpoint beside its network, taken over as it is.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_HARMLESS_TENSORS = (r".*rotary_emb\.inv_freq",)


def _by_path(specs: Params) -> dict[str, ParamSpec]:
    return {path_name(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}


def _place(config: ModelConfig, layer: int) -> tuple[str, tuple[int, ...]]:
    """Where a layer's parameters are: the path of its block, and its index in leaves that are stacked."""
    if not config.scan_layers:
        return f"blocks/{layer}", ()
    first, period, repetitions = block_layout(config)
    if layer < first:
        return f"dense_blocks/{layer}", ()
    repetition, entry = divmod(layer - first, period)
    if repetition < repetitions:
        return f"scanned_blocks/{entry}", (repetition,)
    return f"blocks/{layer - first - period * repetitions}", ()


def file_tensors(config: ModelConfig, family: Family) -> list[FileTensor]:
    """Every tensor of a checkpoint, in the order of its layers, with the parameters that it is made of."""
    specs = _by_path(param_specs(config))
    layers = [("", ()), *(_place(config, layer) for layer in range(config.num_layers))]
    found = []
    for number, (block, lead) in enumerate(layers):
        for tensor in family.tensors(config):
            if ("{i}" in tensor.name) != (number > 0):
                continue
            paths = [f"{block}/{leaf}" if block else leaf for leaf in tensor.leaves]
            if paths[0] not in specs:
                continue
            groups = getattr(config, tensor.groups) if tensor.groups else 1
            rotary = config.mla.qk_rope_head_dim if tensor.interleaved and config.mla else 0
            experts = range(config.moe.num_experts) if "{e}" in tensor.name and config.moe else (None,)
            for expert in experts:
                leads = (*lead, expert) if expert is not None else lead
                parts = tuple(Part(path, leads, specs[path].shape[len(leads) :]) for path in paths)
                name = tensor.name.format(i=number - 1, e=expert)
                found.append(FileTensor(name, tensor, parts, groups, rotary))
    made = {part.path for tensor in found for part in tensor.parts}
    assert made == set(specs), f"{family.model_type} has no names for {sorted(set(specs) - made)}"
    return found


# --- In -----------------------------------------------------------------------------------------------------------------------

Keep = Callable[[str, jax.Array], Any]


def whole(path: str, leaf: jax.Array) -> jax.Array:
    """Keeps a parameter as it is."""
    return leaf


def load(
    directory: str | Path, config: ModelConfig | None = None, shardings: Params | None = None, keep: Keep = whole
) -> tuple[Params, ModelConfig]:
    """Reads a checkpoint.

    Args:
      config: that of `read_config` with `param_dtype`, `scan_layers` and the like replaced; None is just that of `read_config`.
      shardings: where each parameter goes, a tree of NamedSharding; None is the default device.
      keep: what makes of a parameter, given its path, what is kept of it, before the next one is read.

    Returns:
      the parameters, of `config.param_dtype` and the structure of `param_specs(config)`, and the config.

    Raises:
      ValueError: what is there is not a checkpoint that can be read; the message names the file, the key or the tensor.
    """
    directory = Path(directory)
    family, described = read_family_and_config(directory)
    return load_stored(read_headers(directory), family, described, str(directory), config, shardings, keep)


class StoredTensor(Protocol):
    """A tensor on disk, as it would stand in a checkpoint of Hugging Face."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> np.ndarray: ...


def load_stored(
    tensors: Mapping[str, StoredTensor],
    family: Family,
    described: ModelConfig,
    where: str,
    config: ModelConfig | None,
    shardings: Params | None,
    keep: Keep,
) -> tuple[Params, ModelConfig]:
    """What `load` does, with the tensors by name and the network that the file, `where`, describes."""
    config = described if config is None else config
    if different := differences(config, described):
        raise ValueError(
            f"{where} holds another network than the config: {', '.join(different)} of the config is not so there; replace "
            "only what does not change the network in what read_config gives"
        )
    expected = file_tensors(config, family)
    stored = _match(tensors, where, family, config, expected)
    sources: dict[str, dict[tuple[int, ...], tuple[FileTensor, int]]] = {}
    for tensor in expected:
        for i, part in enumerate(tensor.parts):
            sources.setdefault(part.path, {})[part.lead] = (tensor, i)

    def make(path: tuple[Any, ...], spec: ParamSpec, sharding: jax.sharding.Sharding | None = None) -> Any:
        leaf = _Leaf(spec, sources[path_name(path)], stored)
        if sharding is None:
            made = jnp.asarray(leaf[(slice(None),) * len(spec.shape)])
        else:
            made = jax.make_array_from_callback(spec.shape, sharding, lambda index: leaf[index or ()])
        # Or what is on its way to the devices would pile up on the host.
        return jax.block_until_ready(keep(path_name(path), made.block_until_ready()))

    trees = (param_specs(config),) if shardings is None else (param_specs(config), shardings)
    return jax.tree_util.tree_map_with_path(make, *trees, is_leaf=is_spec), config


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A parameter that is still on disk; indexing it with a slice per dimension reads that part."""

    spec: ParamSpec
    sources: Mapping[tuple[int, ...], tuple[FileTensor, int]]
    stored: Mapping[str, StoredTensor]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        depth = len(next(iter(self.sources)))
        ranges = [range(size)[part] for size, part in zip(self.spec.shape, index, strict=True)]
        out = np.empty([len(part) for part in ranges], jnp.dtype(self.spec.dtype))
        for place in np.ndindex(*out.shape[:depth]):
            lead = tuple(part[i] for part, i in zip(ranges, place, strict=False))
            tensor, i = self.sources[lead]
            out[place] = tensor.split(self.stored[tensor.name].read())[i][index[depth:]]
        return out


def _match(
    tensors: Mapping[str, StoredTensor], where: str, family: Family, config: ModelConfig, expected: list[FileTensor]
) -> dict[str, StoredTensor]:
    """The stored tensors by the names of the table, each found and of its shape, and none left over."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        ours = _canonical(name, family)
        if ours in found:
            raise ValueError(f"{where} has both {found[ours].name!r} and {name!r}, which are one parameter: take either out")
        found[ours] = tensor
    if not any(name.startswith(family.prefix) for name in found):  # of a base model, which has no head
        found = {name if name.startswith("lm_head.") else family.prefix + name: tensor for name, tensor in found.items()}
    head = found.pop("lm_head.weight", None) if config.tie_embeddings else None
    patterns = "|".join((*_HARMLESS_TENSORS, *family.ignored)).replace("{n}", str(config.num_layers))
    ignored = re.compile(patterns)
    shapes = {tensor.name: tensor.shape for tensor in expected}
    missing = [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in found]
    unknown = [
        f"{tensor.name} {list(tensor.shape)}"
        for name, tensor in found.items()
        if name not in shapes and not ignored.fullmatch(name)
    ]
    differing = [
        f"{name} {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    complaints = [
        f"{len(names)} {what}: {'; '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", unknown), ("of another shape", differing))
        if names
    ]
    if complaints:
        raise ValueError(
            f"the tensors in {where} are not those of the {family.model_type} model that it describes: "
            f"{'. '.join(complaints)}. Download all of its files again, from one place"
        )
    if head is not None:  # some files have a copy of the embedding
        embedding = next(found[tensor.name] for tensor in expected if tensor.tensor.leaves == ("embedding",))
        if not _is_copy(head, embedding, jnp.dtype(config.param_dtype)):
            raise ValueError(
                f"{where} says that the head is the embedding (tie_word_embeddings), and holds {head.name!r}, which is not a "
                f"copy of {embedding.name!r}: set tie_word_embeddings=false in config.json to read both, as transformers does"
            )
    return {name: found[name] for name in shapes}


def _is_copy(a: StoredTensor, b: StoredTensor, dtype: np.dtype) -> bool:
    """Whether two matrices are the same once they are of `dtype`; some rows at a time, or both would be in memory."""
    if a.shape != b.shape:
        return False
    x, y = a.read(), b.read()
    pieces = (slice(start, start + 1024) for start in range(0, len(x), 1024))
    return all(np.array_equal(x[rows].astype(dtype), y[rows].astype(dtype)) for rows in pieces)


def _canonical(name: str, family: Family) -> str:
    """Names of a language model within one that sees pictures too, without where it stands there."""
    for inside in family.inside:
        if name.startswith(inside):
            return family.prefix + name[len(inside) :]
    return name.removeprefix("language_model.") if family.inside else name


# --- Out ----------------------------------------------------------------------------------------------------------------------


def save(
    directory: str | Path,
    params: Params,
    config: ModelConfig,
    family: str | None = None,
    source: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint that transformers loads. The directory appears when it is complete.

    Args:
      directory: where; it must not exist, or be empty.
      params: of the structure of `param_specs(config)`, all of it on this process' devices.
      family: model_type to write it as; None is the first that can express the network.
      source: a checkpoint whose tokenizer, chat template, generation settings and special tokens are taken over.
      settings: more keys for config.json, such as eos_token_id.

    Raises:
      ValueError: no family has words for this network, or the directory is not empty.
    """
    chosen = family_of(config, family)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tensors = file_tensors(config, chosen)
    dtypes = {tensor.name: np.dtype(leaves[tensor.parts[0].path].dtype) for tensor in tensors}

    def arrays() -> Iterator[np.ndarray]:
        for tensor in tensors:
            yield tensor.join([np.asarray(leaves[part.path][part.lead]) for part in tensor.parts])

    with new_directory(Path(directory)) as temporary:
        special = dict.fromkeys(CARRIED) | (_special_tokens(Path(source)) if source else {}) | dict(settings or {})
        values = write_config(config, chosen) | special | {"dtype": config.param_dtype, "torch_dtype": config.param_dtype}
        shards = plan_shards(((tensor.name, tensor.shape, dtypes[tensor.name]) for tensor in tensors), max_shard_bytes)
        write_shards(temporary, shards, arrays())
        write_json(temporary / "config.json", values)
        if source:
            copy_tokenizer(Path(source), temporary)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `directory` when it is complete.

    Raises:
      ValueError: there is one that is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory: choose another, or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Takes over the files of TOKENIZER_FILES that are there."""
    for path in (source / name for name in TOKENIZER_FILES):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def _special_tokens(source: Path) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad, from the config.json of a checkpoint."""
    values = json.loads((source / "config.json").read_text())
    return {key: values[key] for key in CARRIED if key in values}
