"""Answer with a JSON object that a schema allows. The checker knows the part of JSON Schema that the task draws from."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any, ClassVar

from data.tasks.task import RIGHT, Example, Score, Task, check_range

_NAMES = (
    "age",
    "city",
    "color",
    "count",
    "day",
    "done",
    "id",
    "name",
    "open",
    "price",
    "size",
    "status",
    "tags",
    "title",
    "year",
)
_WORDS = ("blue", "cold", "green", "high", "large", "late", "low", "new", "old", "red", "small", "warm")


@dataclasses.dataclass(frozen=True)
class JsonSchema(Task):
    """Attributes:
    min_properties, max_properties: of the object; each is required with probability 3/4, others are forbidden.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("schema",)
    template: str = "Answer with JSON that matches this schema:\n{schema}\n"
    min_properties: int = 1
    max_properties: int = 4

    def validate(self) -> None:
        check_range(self, "min_properties", "max_properties", least=1)
        if self.max_properties > len(_NAMES):
            raise ValueError(f"JsonSchema.max_properties={self.max_properties} must be at most {len(_NAMES)}")

    def draw(self, rng: random.Random) -> Example:
        names = rng.sample(_NAMES, k=rng.randint(self.min_properties, self.max_properties))
        schema = {
            "type": "object",
            "properties": {name: _random_property(rng) for name in names},
            "required": [name for i, name in enumerate(names) if i == 0 or rng.random() < 0.75],
            "additionalProperties": False,
        }
        instance = {name: _instance(rng, schema["properties"][name]) for name in names}
        text = json.dumps(schema)
        return Example(
            self.template.format(schema=text), json.dumps(instance), json.dumps(schema, sort_keys=True), {"schema": schema}
        )

    def judge(self, answer: str, example: Example) -> Score:
        try:
            value = parse_json(answer)
        except (ValueError, RecursionError):
            return Score(0.0, "not JSON")
        keyword = violated(value, example.metadata["schema"])
        return RIGHT if keyword is None else Score(0.0, f"schema not met: {keyword}")


def parse_json(text: str) -> Any:
    """One JSON value and nothing else. NaN, Infinity and a key that occurs twice are refused (RFC 8259 leaves the last open).

    Raises:
      ValueError: it is not JSON.
      RecursionError: it is nested too deeply.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def violated(value: Any, schema: dict[str, Any]) -> str | None:
    """The first keyword of `schema` that `value` does not meet, or None.

    Keywords known: type, enum, minimum, maximum, minLength, maxLength, items, minItems, maxItems, properties, required,
    additionalProperties (false). As in the specification, true is no number and 1.0 is an integer.

    Raises:
      ValueError: the schema has another keyword.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    types = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "number": is_number,
        "integer": is_number and value == value // 1,
    }
    for keyword, limit in schema.items():
        match keyword:
            case "type":
                met = types[limit]
            case "enum":
                met = any(type(value) is type(choice) and value == choice for choice in limit)
            case "minimum":
                met = not is_number or value >= limit
            case "maximum":
                met = not is_number or value <= limit
            case "minLength":
                met = not isinstance(value, str) or len(value) >= limit
            case "maxLength":
                met = not isinstance(value, str) or len(value) <= limit
            case "minItems":
                met = not isinstance(value, list) or len(value) >= limit
            case "maxItems":
                met = not isinstance(value, list) or len(value) <= limit
            case "items":
                met = not isinstance(value, list) or all(violated(item, limit) is None for item in value)
            case "required":
                met = not isinstance(value, dict) or all(name in value for name in limit)
            case "properties":
                met = not isinstance(value, dict) or all(
                    violated(value[name], inner) is None for name, inner in limit.items() if name in value
                )
            case "additionalProperties" if limit is False:
                met = not isinstance(value, dict) or value.keys() <= schema.get("properties", {}).keys()
            case _:
                raise ValueError(f"JSON schema: keyword {keyword!r} with {limit!r} is not supported")
        if not met:
            return keyword
    return None


def _random_property(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(("integer", "number", "boolean", "string", "enum", "array"))
    if kind in ("integer", "number"):
        low = rng.randint(-20, 100)
        return {"type": kind, "minimum": low, "maximum": low + rng.randint(1, 50)}
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(1, 3), "maxLength": rng.randint(5, 12)}
    if kind == "enum":
        return {"type": "string", "enum": rng.sample(_WORDS, k=rng.randint(2, 4))}
    if kind == "array":
        items = {"type": rng.choice(("integer", "string", "boolean"))}
        return {"type": "array", "items": items, "minItems": rng.randint(0, 2), "maxItems": rng.randint(2, 4)}
    return {"type": "boolean"}


def _instance(rng: random.Random, schema: dict[str, Any]) -> Any:
    """A value that a schema made by `_random_property`, or its `items`, allows."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    match schema["type"]:
        case "integer":
            return rng.randint(schema.get("minimum", 0), schema.get("maximum", 9))
        case "number":
            return schema["minimum"] + rng.choice((0, 0.5, 1))
        case "boolean":
            return rng.random() < 0.5
        case "string":
            return rng.choice(_WORDS)[: schema.get("maxLength", 12)]
        case _:
            return [_instance(rng, schema["items"]) for _ in range(rng.randint(schema["minItems"], schema["maxItems"]))]
