"""LoRA adapters in the format of Hugging Face's `peft`: adapter_config.json and adapter_model.safetensors, in and out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from model.config import LoraConfig, ModelConfig, check
from model.convert.families import Family, family_of
from model.convert.huggingface import file_tensors
from model.convert.safetensors import SINGLE, plan_shards, read_header, write_json, write_shards
from model.convert.tensors import Part
from model.lora import adapter_specs
from model.params import Params, is_spec, path_name

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What would make it another adapter than ours, and the values that do not.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None,),
    "lora_bias": (False, None),
}


def _modules(config: ModelConfig, family: Family, lora: LoraConfig) -> list[tuple[str, Part]]:
    """Name of each adapted module in the family's network, and the projection of ours that it is."""
    found = []
    for tensor in file_tensors(config, family):
        targets = [
            part for part in tensor.parts if part.path.rpartition("/")[2] in lora.targets and "/experts/" not in part.path
        ]
        if not targets or tensor.tensor.kind == "vector":
            continue
        plain = len(tensor.parts) == 1 and tensor.tensor.kind == "matrix" and tensor.groups == 1 and not tensor.rotary
        check(
            plain,
            f"{family.model_type} keeps {targets[0].path} in {tensor.name} together with others, or turned: such adapters are "
            "not converted; merge them into the model instead",
        )
        found.append((tensor.name.removesuffix(".weight"), targets[0]))
    return found


def save_adapters(directory: str | Path, adapters: Params, config: ModelConfig, lora: LoraConfig, base: str = "") -> None:
    """Writes adapters for `peft` to load.

    Args:
      directory: new, or without these files.
      adapters: of the structure of `model.lora.adapter_specs`.
      base: name of the model that they belong to.

    Raises:
      ValueError: no family has words for the network, or it keeps a target together with others.
    """
    directory = Path(directory)
    family = family_of(config, None)
    leaves = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)}
    arrays: dict[str, np.ndarray] = {}
    modules = _modules(config, family, lora)
    for module, part in modules:
        a, b = (leaves[f"{part.path}/{name}"][part.lead] for name in ("a", "b"))
        arrays[f"{_PREFIX}{module}.lora_A.weight"] = a.reshape(-1, lora.rank).T
        arrays[f"{_PREFIX}{module}.lora_B.weight"] = b.reshape(lora.rank, -1).T
    directory.mkdir(parents=True, exist_ok=True)

    def in_order() -> Iterator[np.ndarray]:
        yield from arrays.values()

    declared = ((name, array.shape, array.dtype) for name, array in arrays.items())
    write_shards(directory, plan_shards(declared, 1 << 62), in_order())
    (directory / SINGLE).rename(directory / _WEIGHTS)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module, _ in modules}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(directory / _CONFIG, described)


def load_adapters(directory: str | Path, config: ModelConfig) -> tuple[Params, LoraConfig]:
    """Reads adapters that `peft` or `save_adapters` wrote, for the network of `config`.

    Raises:
      ValueError: they are of another kind or another network; the message names the key or the tensor.
    """
    directory = Path(directory)
    for name in (_CONFIG, _WEIGHTS):
        check((directory / name).is_file(), f"{directory} has no {name}: it is not an adapter of peft's with safetensors")
    described = json.loads((directory / _CONFIG).read_text())
    for key, values in _PLAIN.items():
        value = described.get(key, values[0])
        check(value in values, f"{directory / _CONFIG}: {key}={value!r} is not implemented; {values[0]!r} is")
    stored = read_header(directory / _WEIGHTS)
    family = family_of(config, None)
    every = LoraConfig(described["r"], float(described["lora_alpha"]), LoraConfig.targets)
    paths: dict[str, Part] = {}
    for target in every.targets:
        try:
            paths |= dict(_modules(config, family, LoraConfig(every.rank, every.alpha, (target,))))
        except ValueError:  # one that this family keeps together with others; missed below if it is there
            continue
    modules = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in stored}
    unknown = sorted(modules - paths.keys())
    check(
        not unknown,
        f"{directory / _WEIGHTS} adapts {', '.join(unknown[:5])}, which {family.model_type} does not have, or not alone",
    )
    targets = tuple(sorted({paths[module].path.rpartition("/")[2] for module in modules}))
    lora = LoraConfig(every.rank, every.alpha, targets)
    specs = adapter_specs(config, lora)
    by_path = {path_name(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}
    arrays = {path: np.zeros(spec.shape, spec.dtype) for path, spec in by_path.items()}
    for module in modules:
        part = paths[module]
        for name, letter in (("a", "A"), ("b", "B")):
            tensor = stored.get(f"{_PREFIX}{module}.lora_{letter}.weight")
            check(tensor is not None, f"{directory / _WEIGHTS} has no lora_{letter} of {module}")
            array, place = np.asarray(tensor.read()), arrays[f"{part.path}/{name}"]  # pyright: ignore[reportOptionalMemberAccess]
            shape = place[part.lead].shape
            check(
                array.size == np.prod(shape, dtype=int),
                f"{directory / _WEIGHTS}: lora_{letter} of {module} is {list(array.shape)}; the network wants {list(shape)}",
            )
            place[part.lead] = array.T.reshape(shape)
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(arrays[path_name(path)]), specs, is_leaf=is_spec), lora
