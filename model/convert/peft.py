"""LoRA adapters in the format of Hugging Face's `peft`: adapter_config.json and adapter_model.safetensors, in and out.

The tensors say which projections are adapted; target_modules and the like, which chose them, are not read.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import LoraConfig, ModelConfig, check
from model.convert.families import Family, family_of
from model.convert.huggingface import Keep, copy_tokenizer, file_tensors, new_directory, whole
from model.convert.safetensors import INDEX, SINGLE, Stored, plan_shards, read_header, write_json, write_shards
from model.convert.tensors import FileTensor
from model.lora import Adapted, adapter_specs
from model.params import Params, is_spec, path_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Keys that do not change what trained adapters compute: where they are from, what they begin with, what training alone sees,
# which modules were chosen (the tensors say it), and fan_in_fan_out, which tells how the base's matrices lie. Any other key
# must be empty: it stands for another adapter, or for one that is not known here.
_READ = ("peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "init_lora_weights", "bias")
_HARMLESS = (
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
# What adapters begin with where that leaves the base as it is. pissa, olora, corda, loftq and lora_ga take what they begin with
# out of the base, which then is not the one that base_model_name_or_path names.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def holds_adapters(directory: Path) -> bool:
    """Whether a directory has adapters in it, and no model.

    Raises:
      ValueError: it has both.
    """
    found = (directory / CONFIG).is_file()
    check(
        not (found and any((directory / name).is_file() for name in (SINGLE, INDEX))),
        f"{directory} holds a model and {CONFIG}, the adapters of one: move either into a directory of its own",
    )
    return found


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """What adapter_config.json says.

    Raises:
      ValueError: that it is another kind of adapter than ours; the key is named.
    """
    path = directory / CONFIG
    check(path.is_file(), f"{directory} has no {CONFIG}: it is no directory of peft's")
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): get it again") from error
    check(isinstance(values, dict), f"{path} holds no object: get it again")
    for key, allowed in (("peft_type", ("LORA",)), ("bias", ("none", None)), ("use_rslora", (True, False, None))):
        value = values.get(key)
        check(value in allowed, f"{path}: {key}={value!r} is not implemented; {allowed[0]!r} is")
    init = values.get("init_lora_weights")
    check(
        init in _INITS,
        f"{path}: init_lora_weights={init!r} changes the base, whose weights are not here: write the adapters again with "
        "save_pretrained(path_initial_model_for_weight_conversion=...), or merge them where they were trained",
    )
    for key, value in values.items():
        check(
            key in _READ or key in _HARMLESS or value in (None, False, 0, "", [], {}),
            f"{path}: {key}={value!r} is not implemented: merge the adapters with peft (merge_and_unload), and take that model",
        )
    rank, alpha, base = (values.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path"))
    check(type(rank) is int and rank > 0, f"{path}: r={rank!r} must be a positive whole number")
    check(type(alpha) in (int, float) and 0 < alpha < math.inf, f"{path}: lora_alpha={alpha!r} must be a positive number")
    check(base is None or isinstance(base, str), f"{path}: base_model_name_or_path={base!r} must be a text")
    return values


def _modules(config: ModelConfig, family: Family, targets: tuple[str, ...]) -> dict[str, FileTensor]:
    """The tensor of each adapted projection by the name of its module in the family's network."""
    found = {}
    for tensor in file_tensors(config, family):
        paths = [part.path for part in tensor.parts if part.path.rpartition("/")[2] in targets and "/experts/" not in part.path]
        if not paths or tensor.tensor.kind == "vector":
            continue
        check(
            len(tensor.parts) == 1 and tensor.groups == 1 and not tensor.rotary,
            f"{family.model_type} keeps {paths[0]} in {tensor.name} together with others, or turned: such adapters are "
            "not converted; merge them into the model instead",
        )
        found[tensor.name.removesuffix(".weight")] = tensor
    return found


def save_adapters(
    directory: str | Path,
    adapters: Params,
    config: ModelConfig,
    lora: LoraConfig,
    base: str = "",
    family: Family | None = None,
    source: str | Path | None = None,
) -> None:
    """Writes adapters for `peft` to load. The directory appears when it is complete.

    Args:
      directory: where; it must not exist, or be empty.
      adapters: of the structure of `model.lora.adapter_specs`.
      base: name of the model that they belong to.
      family: of that model; None is the first that can express the network.
      source: a directory whose tokenizer and chat template are taken over.

    Raises:
      ValueError: no family has words for the network, it keeps a target together with others, the base was rounded, or the
        directory is not empty.
    """
    check(
        not lora.base_bits,
        f"lora.base_bits={lora.base_bits}: the adapters belong to weights that were rounded to {lora.base_bits} bits, for "
        "which peft has no word; write the merged model instead",
    )
    modules = _modules(config, family or family_of(config, None), lora.targets)
    leaves = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)}
    arrays: dict[str, np.ndarray] = {}
    for module, tensor in modules.items():
        part = tensor.parts[0]
        a, b = (leaves[f"{part.path}/{name}"][part.lead] for name in ("a", "b"))
        arrays[f"{_PREFIX}{module}.lora_A.weight"] = a.reshape(-1, lora.rank).T
        arrays[f"{_PREFIX}{module}.lora_B.weight"] = b.reshape(lora.rank, -1).T

    def in_order() -> Iterator[np.ndarray]:
        yield from arrays.values()

    declared = ((name, array.shape, array.dtype) for name, array in arrays.items())
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(tensor.tensor.kind == "transposed" for tensor in modules.values()),
        "inference_mode": True,
    }
    with new_directory(Path(directory)) as temporary:
        write_shards(temporary, plan_shards(declared, 1 << 62), in_order())
        (temporary / SINGLE).rename(temporary / WEIGHTS)
        write_json(temporary / CONFIG, described)
        if source:
            copy_tokenizer(Path(source), temporary)


def match_adapters(
    directory: str | Path, config: ModelConfig, family: Family | None = None
) -> tuple[LoraConfig, list[tuple[FileTensor, Stored, Stored]]]:
    """Finds adapters of a network on disk: what they adapt, with the two matrices of each; these are not read yet.

    Args:
      family: of the model that they belong to; None is the first that can express the network.

    Raises:
      ValueError: they are of another kind or another network; the message names the key or the tensor.
    """
    directory = Path(directory)
    described, path = read_adapter_config(directory), directory / WEIGHTS
    check(
        path.is_file(),
        f"{directory} has no {WEIGHTS}: it is not an adapter of peft's with safetensors (a pickle, which can run code, is "
        "not read)",
    )
    stored = read_header(path)
    family = family or family_of(config, None)
    tensors: dict[str, FileTensor] = {}
    for target in LoraConfig.targets:
        try:
            tensors |= _modules(config, family, (target,))
        except ValueError:  # one that this family keeps together with others; missed below if it is there
            continue
    rank = described["r"]
    sizes: dict[str, tuple[str, tuple[int, int]]] = {}  # of what the network may have: the module and the shape
    for module, tensor in tensors.items():
        shape = tensor.parts[0].shape
        inputs, outputs = (math.prod(side) for side in (shape[: tensor.tensor.contract], shape[tensor.tensor.contract :]))
        sizes[f"{_PREFIX}{module}.lora_A.weight"] = (module, (rank, inputs))
        sizes[f"{_PREFIX}{module}.lora_B.weight"] = (module, (outputs, rank))
    unknown = [name for name in sorted(stored) if name not in sizes]
    check(
        not unknown,
        f"{path} holds {', '.join(unknown[:5])}, for which {family.model_type} has no projection, or not one alone",
    )
    for name, tensor in stored.items():
        shape = sizes[name][1]
        check(tensor.shape == shape, f"{path}: {name} is {list(tensor.shape)}; the network wants {list(shape)} for r={rank}")
    found = []
    modules = sorted({sizes[name][0] for name in stored})
    check(bool(modules), f"{path} holds no adapters")
    for module in modules:
        a, b = (stored.get(f"{_PREFIX}{module}.lora_{letter}.weight") for letter in "AB")
        check(a is not None and b is not None, f"{path} has not both lora_A and lora_B of {module}")
        found.append((tensors[module], a, b))
    targets = tuple(sorted({tensor.parts[0].path.rpartition("/")[2] for tensor, _, _ in found}))
    # Rank-stabilised ones (arXiv:2312.03732) are multiplied by alpha / sqrt(rank).
    alpha = described["lora_alpha"] * (math.sqrt(rank) if described.get("use_rslora") else 1)
    lora = LoraConfig(rank, float(alpha), targets)
    adapter_specs(config, lora)  # refuses latent attention
    return lora, found


def load_adapters(directory: str | Path, config: ModelConfig, family: Family | None = None) -> tuple[Params, LoraConfig]:
    """Reads adapters that `peft` or `save_adapters` wrote, for the network of `config`; a projection without is adapted by 0.

    Arguments and errors are those of `match_adapters`.
    """
    lora, found = match_adapters(directory, config, family)
    specs = adapter_specs(config, lora)
    by_path = {path_name(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}
    arrays = {path: np.zeros(spec.shape, spec.dtype) for path, spec in by_path.items()}
    for tensor, *matrices in found:
        part = tensor.parts[0]
        for name, matrix in zip("ab", matrices, strict=True):
            place = arrays[f"{part.path}/{name}"]
            place[part.lead] = matrix.read().T.reshape(place[part.lead].shape)
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(arrays[path_name(path)]), specs, is_leaf=is_spec), lora


def merging(adapters: Params, lora: LoraConfig, keep: Keep = whole) -> Keep:
    """For `model.convert.huggingface.load`: puts adapters into each projection as it is read, before `keep` has it."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        projection, _, letter = path_name(path).rpartition("/")
        pairs.setdefault(projection, {})[letter] = np.asarray(leaf)

    def kept(path: str, leaf: jax.Array) -> Any:
        if pair := pairs.get(path):
            leaf = _merge(leaf.sharding, lora.alpha / lora.rank)(leaf, pair["a"], pair["b"])
        return keep(path, leaf)

    return kept


@functools.cache
def _merge(sharding: jax.sharding.Sharding, scale: float) -> Any:
    return jax.jit(lambda base, a, b: Adapted(base, a, b, scale).merged(), out_shardings=sharding)
