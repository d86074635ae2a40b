"""What config.json of a checkpoint says, as fields of `ModelConfig`, and back. No jax: it is read before anything expensive.

A family declares its keys one by one (`model/convert/families.py`); what takes more than a name is a `Codec` here. A key that
nobody asked for is refused: it may change the network. Written are the keys that transformers 4 and 5 both read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from model.config import ModelConfig, RopeConfig

# Keys that change nothing of what the network computes from its weights, for whatever family.
# fmt: off
HARMLESS = frozenset([
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_num_labels", "architectures",
    "attention_dropout", "attn_pdrop", "auto_map", "aux_loss_alpha", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "ep_size", "finetuning_task",
    "gradient_checkpointing", "hidden_dropout", "id2label", "is_decoder", "is_encoder_decoder", "is_llama_config",
    "label2id", "model_type", "n_ctx", "num_logits_to_keep", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "pruned_heads", "reorder_and_upcast_attn",
    "resid_pdrop", "return_dict", "router_jitter_noise", "seq_aux", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16",
    "use_cache",
])
# fmt: on
# Of these an export keeps what the source said.
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")


class Settings:
    """config.json, of which every key has to be taken by somebody."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self.values, self.defaults, self.where = values, defaults, where
        self.taken: set[str] = set()

    def take(self, key: str) -> Any:
        """The value of a key; what transformers would take where the file has none."""
        self.taken.add(key)
        if key not in self.values and key not in self.defaults:
            raise ValueError(f"{self.where} has no {key!r}: is the file complete? Take it from where the checkpoint came from")
        return self.values.get(key, self.defaults.get(key))

    def number(self, key: str) -> Any:
        """A number or truth value; 0 for null."""
        value = self.take(key)
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{self.where}: {key}={value!r} should be a number: restore the file from its source")
        return 0 if value is None else value

    def refuse(self, key: str, value: Any, why: str) -> ValueError:
        return ValueError(f"{self.where}: {key}={value!r} {why}")

    def check_all_taken(self) -> None:
        unknown = [key for key, value in self.values.items() if key not in self.taken | HARMLESS and value is not None]
        if unknown:
            listed = ", ".join(f"{key}={self.values[key]!r}"[:80] for key in unknown[:5])
            raise ValueError(
                f"{self.where}: this converter does not know {listed}, which may change what the network computes. If it does "
                "not, remove it from the file; if it does, the checkpoint cannot be converted"
            )


@dataclasses.dataclass(frozen=True)
class Codec:
    """Some keys of config.json as some fields of ModelConfig, and back."""

    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


# --- Rotation -----------------------------------------------------------------------------------------------------------------

# Keys of each way of scaling: name in the file -> field of RopeConfig and what it is where the file leaves it out.
_SCALING_KEYS: dict[str, dict[str, tuple[str, Any]]] = {
    "none": {},
    "linear": {"factor": ("factor", None)},
    "llama3": {
        "factor": ("factor", None),
        "low_freq_factor": ("low_freq_factor", None),
        "high_freq_factor": ("high_freq_factor", None),
    },
    "yarn": {"factor": ("factor", None), "beta_fast": ("beta_fast", 32.0), "beta_slow": ("beta_slow", 1.0)},
}


def _parse_rope(settings: Settings, given: Mapping[str, Any], local_theta: float = 0.0, latent: bool = False) -> RopeConfig:
    """RopeConfig of a dictionary of rope parameters.

    Args:
      latent: for latent attention, where YaRN's temperature must be that of the whole logit.
    """
    rope = {key: value for key, value in given.items() if value is not None}
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope} or {"default"}
    scaling = {"default": "none"}.get(kind := kinds.pop(), kind)
    if kinds or scaling not in _SCALING_KEYS:
        raise settings.refuse("rope type", kind, "is not implemented; default, linear, llama3 and yarn are")
    fields: dict[str, Any] = {"theta": float(rope.pop("rope_theta")), "local_theta": local_theta, "scaling": scaling}
    fields["fraction"] = float(rope.pop("partial_rotary_factor", 1.0))
    original = rope.pop("original_max_position_embeddings", 0)
    if scaling in ("llama3", "yarn"):
        fields["original_max_len"] = settings.values.get("original_max_position_embeddings") or original
        fields["original_max_len"] = fields["original_max_len"] or settings.take("max_position_embeddings")
    for key, (field, default) in _SCALING_KEYS[scaling].items():
        value = rope.pop(key, default)
        if value is None:
            raise settings.refuse("rope parameters", dict(given), f"lack {key!r}: restore the file from its source")
        fields[field] = float(value)
    if scaling == "yarn":
        _check_temperature(settings, rope, fields["factor"], latent)
    if rope:
        raise settings.refuse("rope parameters", rope, f"are not implemented for {scaling} scaling")
    return RopeConfig(**fields)


def _check_temperature(settings: Settings, rope: dict[str, Any], factor: float, latent: bool) -> None:
    """Takes what YaRN's temperature is made of out of `rope`; it must be 0.1 ln(factor) + 1, as in model/rope.py."""

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    said = {key: rope.pop(key) for key in ("mscale", "mscale_all_dim", "attention_factor") if key in rope}
    mscale, of_all = said.get("mscale"), said.get("mscale_all_dim")
    on_table = temperature(mscale) / temperature(of_all) if mscale and of_all else temperature(1.0)
    on_table = said.get("attention_factor", on_table)
    # Squared, as the table meets itself in the product of a query and a key.
    of_logit = on_table**2 * (temperature(of_all) ** 2 if latent and of_all else 1.0)
    in_one_place = not latent or abs(on_table - 1) < 1e-6
    if abs(of_logit - temperature(1.0) ** 2) > 1e-6 or not in_one_place or rope.pop("truncate", True) is not True:
        raise settings.refuse("rope parameters", said, "make another temperature than 0.1 ln(factor) + 1: not implemented")


def _said_rope(rope: RopeConfig, latent: bool = False) -> dict[str, Any] | None:
    """`rope_scaling` as transformers 4 and 5 read it."""
    if rope.scaling == "none":
        return None
    said: dict[str, Any] = {"rope_type": rope.scaling}
    said |= {key: getattr(rope, field) for key, (field, _) in _SCALING_KEYS[rope.scaling].items()}
    if rope.scaling != "linear":
        said["original_max_position_embeddings"] = rope.original_max_len
    if rope.scaling == "yarn" and latent:
        said |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    return said


def _rope_parameters(settings: Settings) -> dict[str, Any]:
    """The one dictionary of transformers 5 out of its own form and that of transformers 4, which has precedence there."""
    scaling, parameters = settings.take("rope_scaling"), settings.take("rope_parameters")
    rope = dict(scaling or parameters or {})
    outside = {key: settings.take(key) for key in ("rope_theta", "partial_rotary_factor")}
    settings.take("original_max_position_embeddings")
    return {key: value for key, value in outside.items() if value is not None} | rope


def _rope_codec(latent: bool = False, partial: bool = False) -> Codec:
    def read(settings: Settings) -> dict[str, Any]:
        rope = _parse_rope(settings, _rope_parameters(settings), latent=latent)
        if rope.fraction != 1 and not partial:  # some ways of scaling heed it in transformers, others do not
            raise settings.refuse("partial_rotary_factor", rope.fraction, "is not implemented for this family; 1.0 is")
        return {"rope": rope}

    def write(config: ModelConfig) -> dict[str, Any]:
        said = {"rope_theta": config.rope.theta, "rope_scaling": _said_rope(config.rope, latent)}
        return said | ({"partial_rotary_factor": config.rope.fraction} if partial else {})

    return Codec(read, write)


ROPE, PARTIAL_ROPE, LATENT_ROPE = _rope_codec(), _rope_codec(partial=True), _rope_codec(latent=True)


def _read_local_rope(settings: Settings) -> dict[str, Any]:
    parameters, scaling = settings.take("rope_parameters") or {}, settings.take("rope_scaling") or {}
    everywhere = {"rope_theta": settings.take("rope_theta")} | scaling | (parameters.get("full_attention") or {})
    local = {"rope_theta": settings.take("rope_local_base_freq")} | (parameters.get("sliding_attention") or {})
    unknown = set(parameters) - {"full_attention", "sliding_attention"}
    of_local = _parse_rope(settings, local)
    if unknown or of_local.scaling != "none":
        raise settings.refuse("rope_parameters", parameters, "are not implemented: those of sliding_attention have no scaling")
    return {"rope": _parse_rope(settings, everywhere, local_theta=of_local.theta)}


def _write_local_rope(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    return {
        "rope_theta": rope.theta,
        "rope_local_base_freq": rope.local_theta or rope.theta,
        "rope_scaling": _said_rope(rope),
    }


LOCAL_ROPE = Codec(_read_local_rope, _write_local_rope)  # Gemma 3: windowed layers have a base of their own


# --- Windows and which layers rotate ------------------------------------------------------------------------------------------


def shortest_period(of_layers: list[Any]) -> tuple[Any, ...]:
    """The shortest pattern that, repeated, begins with what is given."""
    for period in range(1, len(of_layers) + 1):
        if all(value == of_layers[i % period] for i, value in enumerate(of_layers)):
            return tuple(of_layers[:period])
    return ()


def windows(config: ModelConfig) -> list[int]:
    return [config.window(layer) for layer in range(config.num_layers)]


def uniform_window(switch: bool) -> Codec:
    """One window for all layers. With `switch` it counts only where use_sliding_window says so."""

    def read(settings: Settings) -> dict[str, Any]:
        on = settings.take("use_sliding_window") if switch else True
        return {"window_pattern": (settings.number("sliding_window") * bool(on),)}

    def write(config: ModelConfig) -> dict[str, Any]:
        window = config.window(0)
        return {"sliding_window": window or None} | ({"use_sliding_window": window > 0} if switch else {})

    return Codec(read, write)


def layered_window(default: Callable[[Settings, int], bool], switch: bool) -> Codec:
    """A window for the layers whose type says so.

    Args:
      default: whether a layer has one where the file has no layer_types.
    """

    def read(settings: Settings) -> dict[str, Any]:
        on = settings.take("use_sliding_window") if switch else True
        window = settings.number("sliding_window") * bool(on)
        layers = range(settings.take("num_hidden_layers"))
        types = settings.take("layer_types")
        if types is None:
            types = ["sliding_attention" if window and default(settings, layer) else "full_attention" for layer in layers]
        known = set(types) <= {"full_attention", "sliding_attention"} and len(types) == len(layers)
        if not known or (not window and "sliding_attention" in types):
            raise settings.refuse(
                "layer_types",
                types,
                "is not one of full_attention and sliding_attention for each layer, the latter with a sliding_window",
            )
        return {"window_pattern": shortest_period([window if kind == "sliding_attention" else 0 for kind in types])}

    def write(config: ModelConfig) -> dict[str, Any]:
        largest = max(windows(config))
        types = ["sliding_attention" if window else "full_attention" for window in windows(config)]
        said: dict[str, Any] = {"sliding_window": largest or None, "layer_types": types}
        return said | ({"use_sliding_window": largest > 0} if switch else {})

    return Codec(read, write)


def rotations(settings: Settings) -> list[bool]:
    """Whether each layer rotates."""
    interval, layers = settings.take("no_rope_layer_interval"), settings.take("no_rope_layers")
    count = settings.take("num_hidden_layers")
    return [bool(layers[layer] if layers else (layer + 1) % interval) for layer in range(count)]


ROTATIONS = Codec(
    lambda settings: {"rope_pattern": shortest_period(rotations(settings))},
    lambda config: {"no_rope_layers": [int(config.rotates(layer)) for layer in range(config.num_layers)]},
)


# --- Other things of more than one name ---------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
}
_PLAIN_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu2": "relu2",
}


def activation(key: str, gated: bool = True, also: Mapping[str, str] = {}) -> Codec:
    """The MLP's form. `also` are names that stand for something else in this family."""
    names = {**(_ACTIVATIONS if gated else _PLAIN_ACTIVATIONS), **also}

    def read(settings: Settings) -> dict[str, Any]:
        value = settings.take(key)
        if value not in names:
            raise settings.refuse(key, value, f"is not implemented; {', '.join(names)} are")
        return {"mlp": names[value]}

    def write(config: ModelConfig) -> dict[str, Any]:
        return {key: next((name for name, mlp in names.items() if mlp == config.mlp), next(iter(names)))}

    return Codec(read, write)


def _read_query_scale(settings: Settings) -> dict[str, Any]:
    scalar, head_dim = settings.number("query_pre_attn_scalar"), settings.number("head_dim")
    return {"attention_scale": 0.0 if scalar == head_dim else scalar**-0.5}


QUERY_SCALE = Codec(
    _read_query_scale,
    lambda c: {"query_pre_attn_scalar": round(c.attention_scale**-2) if c.attention_scale else c.head_dim},
)


# --- The whole file -----------------------------------------------------------------------------------------------------------

# Fields that say how a network is computed or trained, not what it is.
_NOT_OF_THE_NETWORK = ("attention_backend", "dtype", "init_std", "param_dtype", "remat", "scan_layers")


def network(config: ModelConfig) -> dict[str, Any]:
    """What a config computes, field by field: equal for equal networks, however they were written down."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields = {name: value for name, value in fields.items() if name not in _NOT_OF_THE_NETWORK}
    fields["window_pattern"] = shortest_period(windows(config))
    fields["rope_pattern"] = shortest_period([config.rotates(layer) for layer in range(config.num_layers)])
    fields["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    rope = config.rope
    used = {"theta", "fraction", "scaling", *(field for field, _ in _SCALING_KEYS[rope.scaling].values())}
    used |= {"original_max_len"} if rope.scaling in ("llama3", "yarn") else set()
    fields["rope"] = {name: getattr(rope, name) for name in used} if config.positions == "rope" else {}
    plain = rope.local_theta in (0, rope.theta) and rope.scaling == "none"
    fields["rope"]["local_theta"] = 0.0 if plain or not any(windows(config)) else rope.local_theta
    if config.moe:
        moe = dataclasses.replace(config.moe, bias_update_rate=0.0, balance_loss=0.0, z_loss=0.0)
        fields |= {"moe": moe, "d_ff": config.d_ff if moe.num_dense_layers else 0}
    return fields


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields in which two networks differ, with the values of `a`."""
    of_a, of_b = network(a), network(b)
    return [f"model.{name}={of_a[name]!r}" for name in of_a if of_a[name] != of_b[name]]


def nested(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"moe.d_ff": 8, "d_ff": 9}` -> `{"moe": {"d_ff": 8}, "": {"d_ff": 9}}`."""
    parts: dict[str, dict[str, Any]] = {"": {}}
    for name, value in fields.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = value
    return parts
