"""From a config file and `--config.key=value` words to frozen dataclasses; a mistake names the key and its nearest match."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import math
import threading
import traceback
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake in a config, told in words for the person who wrote it."""


def load_config_file(path: str) -> dict[str, Any]:
    """The nested dict that the file's `get_config()` returns; `name` defaults to the file's name.

    Raises:
      ConfigError: no such file, it fails to run, or it has no `get_config`.
    """
    file = Path(path)
    if not file.is_file():
        neighbours = [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ConfigError(f"config file {path!r} does not exist.{_nearest(path, neighbours)}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"config file {path!r} has no function get_config() that returns an ml_collections.ConfigDict")
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
        where = f"{path}:{lines[-1]}" if lines else path
        raise ConfigError(f"config file {where}: {type(error).__name__}: {error}") from error
    tree = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return {"name": file.stem, **tree}


def apply_overrides(tree: dict[str, Any], overrides: list[str], cls: type) -> dict[str, Any]:
    """Sets `--config.a.b=value` words in a nested dict that will become a `cls`; sequences take an index as a key.

    Values are Python literals where they parse as such, and text otherwise; a key that holds text takes it as it stands.

    Raises:
      ConfigError: a malformed word or an unknown key.
    """
    for word in overrides:
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not equals:
            raise ConfigError(f"{word!r} is not of the form --config.key=value")
        tree = _set(tree, cls, key.split("."), text, path=())
    return tree


def _set(node: Any, kind: Any, keys: list[str], text: str, path: tuple[str, ...]) -> Any:
    kind, _ = _optional(kind)
    if not keys:
        return _parse(text, kind)
    key, rest = keys[0], keys[1:]
    if isinstance(node, list | tuple):
        if not key.isdecimal() or int(key) >= len(node):
            entries = f"has entries 0 to {len(node) - 1}" if node else "is empty: set all of it at once"
            raise ConfigError(f"config.{'.'.join((*path, key))}: {'.'.join(path)} {entries}")
        items = list(node)
        items[int(key)] = _set(items[int(key)], _item_type(kind, int(key)), rest, text, (*path, key))
        return tuple(items)
    if not dataclasses.is_dataclass(kind):
        raise ConfigError(f"config.{'.'.join(path)} is a single value; it has no key {key!r}")
    hints = typing.get_type_hints(kind)
    _check_known([key], hints, path)
    node = _chosen_fields(node) if dataclasses.is_dataclass(node) else dict(node or {})
    inner = node.get(key)
    if rest and inner is None:
        default = next(field.default for field in dataclasses.fields(kind) if field.name == key)
        inner = None if default is dataclasses.MISSING else default
    return {**node, key: _set(inner, hints[key], rest, text, (*path, key))}


def _chosen_fields(node: Any) -> dict[str, Any]:
    """Fields of a dataclass without those that it filled in from others (`head_dim`), so that these follow an override."""

    def derived(field: dataclasses.Field[Any]) -> bool:
        if field.default is dataclasses.MISSING:
            return False
        try:
            return dataclasses.replace(node, **{field.name: field.default}) == node
        except ValueError:
            return False

    return {field.name: getattr(node, field.name) for field in dataclasses.fields(node) if not derived(field)}


# CPython 3.11 counts the depth of what `ast` builds for all threads together, and raises SystemError where they meet; the
# threads of a study read configurations.
_LITERALS = threading.Lock()


def _parse(text: str, kind: Any) -> Any:
    try:
        with _LITERALS:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    return text if kind is str and not isinstance(value, str) else value


def build(cls: type[T], value: Any, path: tuple[str, ...] = ()) -> T:
    """`value` as a `cls`: a dataclass from a mapping, recursively, or a checked number, text, literal or tuple; None where the
    annotation is `... | None`.

    Raises:
      ConfigError: an unknown or missing key, a value of another type, or what the dataclass itself refuses.
    """
    where = "config." + ".".join(path) if path else "config"
    kind, may_be_none = _optional(cls)
    if may_be_none:
        return typing.cast(T, None if value is None else build(kind, value, path))
    if dataclasses.is_dataclass(cls):
        if isinstance(value, cls):  # made in a config file: its literals and types are checked like everything else
            value = {name: getattr(value, name) for name in typing.get_type_hints(cls)}
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r} must be a group of keys, like those of {cls.__name__}")
        hints = typing.get_type_hints(cls)
        _check_known(list(value), hints, path)
        required = {
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - set(value))
        if missing:
            raise ConfigError(f"{where} lacks {', '.join(missing)}: set {where}.{missing[0]} in the config file")
        arguments = {name: build(hints[name], item, (*path, name)) for name, item in value.items()}
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    origin = typing.get_origin(cls)
    if origin is typing.Literal:
        choices = typing.get_args(cls)
        if value not in choices:
            raise ConfigError(
                f"{where}={value!r} must be one of {', '.join(map(str, choices))}.{_nearest(str(value), choices)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r} must be a sequence, such as ({value!r},)")
        kinds = typing.get_args(cls)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}={value!r} must have {len(kinds)} entries")
        items = enumerate(zip(kinds, value, strict=True))
        return typing.cast(T, tuple(build(kind, item, (*path, str(i))) for i, (kind, item) in items))
    if origin in (typing.Union, types.UnionType):
        raise TypeError(f"{where}: config dataclasses hold no unions but with None")
    if cls is Any:
        return value
    if cls is float and type(value) is int:
        value = float(value)
    if type(value) is not cls:
        raise ConfigError(f"{where}={value!r} must be of type {cls.__name__}, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value!r} must be a finite number")
    return value


def _optional(kind: Any) -> tuple[Any, bool]:
    """X and True of `X | None`; any other annotation and False."""
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType) and len(kinds) == 2 and kinds[1] is type(None):
        return kinds[0], True
    return kind, False


def _item_type(kind: Any, index: int) -> Any:
    kinds = typing.get_args(kind)
    return kinds[0] if kinds[-1] is Ellipsis else kinds[index]


def _check_known(keys: list[str], known: dict[str, Any], path: tuple[str, ...]) -> None:
    for key in keys:
        if key not in known:
            where = ".".join(("config", *path, key))
            raise ConfigError(f"{where} is unknown.{_nearest(key, known)} Known keys there: {', '.join(sorted(known))}.")


def _nearest(word: str, choices: typing.Iterable[Any]) -> str:
    matches = difflib.get_close_matches(word, [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def chosen(value: Any) -> Any:
    """A config as dicts of the fields that do not have their defaults: for hashes, which a new option is not to change."""
    if isinstance(value, (list, tuple)):
        return [chosen(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: (field, getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {name: chosen(set_to) for name, (field, set_to) in fields.items() if set_to != _default(field)}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
