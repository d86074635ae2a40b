"""Chat templates: a conversation as the text that a model was trained on.

The templates come with the models: other people's programs. They are Jinja, as transformers runs it, in a sandbox: nothing
with an underscore is reached, nothing is changed, imported or read. What they may use up is counted: steps of loops and calls,
seconds, and the size of what they make. A filter that works long on much data is the one thing the count sees only afterwards.
"""

from __future__ import annotations

import contextvars
import dataclasses
import datetime
import functools
import json
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.tokenizer import HuggingFaceTokenizer, Tokenizer

MAX_STEPS = 200_000
MAX_SECONDS = 5.0
MAX_SIZE = 16_000_000  # characters, or entries of a list
_MAX_NUMBER = 1_000_000  # in arguments: a width, a count
# Characters that are none (Unicode's noncharacters).
_GUARD = "\ufdd0"
GENERATION_BEGINS, GENERATION_ENDS = "\ufdd1", "\ufdd2"
RESERVED = _GUARD + GENERATION_BEGINS + GENERATION_ENDS


class _Refused(jinja2.TemplateError):
    """What a template raises, or is stopped by."""


@dataclasses.dataclass
class _Budget:
    deadline: float
    steps: int = 0


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def _bounded(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple | dict) and len(value) > MAX_SIZE:
        raise _Refused(f"it makes a value of {len(value):,} parts; {MAX_SIZE:,} are allowed")
    if isinstance(value, int) and value.bit_length() > 64:
        raise _Refused("it makes a number of more than 64 bits")
    return value


def _check_arguments(args: Iterable[Any]) -> None:
    for value in args:
        if isinstance(value, int | float) and abs(value) > _MAX_NUMBER:
            raise _Refused(f"it asks for {value}; numbers up to {_MAX_NUMBER:,} are allowed here")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%", "//"))

    def tick(self) -> bool:
        budget = _BUDGET.get()
        budget.steps += 1
        if budget.steps > MAX_STEPS:
            raise _Refused(f"it takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > budget.deadline:
            raise _Refused(f"it takes more than {MAX_SECONDS:g} seconds")
        return True

    def bounded(self, value: Any) -> Any:
        return _bounded(value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise _Refused(f"it reaches for {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "**":
            _check_arguments([left, right])
            if isinstance(right, int | float) and abs(right) > 64:
                raise _Refused(f"it asks for a power of {right}")
        if operator == "*":
            for parts, count in ((left, right), (right, left)):
                if isinstance(parts, str | list | tuple) and isinstance(count, int) and len(parts) * count > MAX_SIZE:
                    raise _Refused(f"it repeats something {count} times")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_arguments(right if isinstance(right, tuple) else [right])
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if obj in (self.tick, self.bounded):
            return obj(*args)
        self.tick()
        _check_arguments((*args, *kwargs.values()))
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str):
            if obj.__name__ in ("format", "format_map"):
                _check_format(owner)
            if obj.__name__ == "replace" and len(args) > 1:
                _check_replacement(owner, *args[:2])
        return _bounded(super().call(context, obj, *args, **kwargs))


def _check_format(text: str) -> None:
    if re.search(r"\d{5}", text):
        raise _Refused("it formats to a width of more than four digits")


def _check_replacement(text: str, old: Any, new: Any) -> None:
    if len(text) * len(str(new)) // max(len(str(old)), 1) > MAX_SIZE and str(old) in text:
        raise _Refused("it replaces by a text too long")


def _counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter that heeds the bounds."""

    @functools.wraps(function)  # with the marks that tell jinja2 what to pass
    def run(*args: Any, **kwargs: Any) -> Any:
        plain = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, int | float)]
        _check_arguments(plain)
        texts = [value for value in args if isinstance(value, str)]
        if name == "format" and texts:
            _check_format(texts[0])
        if name == "replace" and len(texts) == 3:
            _check_replacement(texts[0], texts[1], texts[2])
        return _bounded(function(*args, **kwargs))

    return run


class _Generation(Extension):
    """`{% generation %}`, which marks what a model is trained on: by characters around it, where `render` is asked for them."""

    tags = frozenset(("generation",))  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno

        def mark(name: str) -> nodes.Node:
            return nodes.Output([nodes.Name(name, "load")]).set_lineno(line)

        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [mark("_generation_begins"), *body, mark("_generation_ends")]


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    _check_arguments([indent or 0])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise _Refused(str(message))


def _watched(template: nodes.Template, environment: _Environment) -> nodes.Template:
    """The template with a tick in every turn of a loop and every macro, and a bound on what `~` joins."""

    def call(name: str, *args: nodes.Expr, lineno: int) -> nodes.Call:
        made = nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)
        return made.set_lineno(lineno).set_environment(environment)  # pyright: ignore[reportReturnType]

    for loop in template.find_all(nodes.For):
        if loop.recursive:
            raise jinja2.TemplateSyntaxError("loops that call themselves are not allowed", loop.lineno)
        if loop.test is not None:
            loop.test = nodes.And(call("tick", lineno=loop.lineno), loop.test, lineno=loop.lineno)
    for body in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        ticking = nodes.ExprStmt(call("tick", lineno=body.lineno), lineno=body.lineno)
        body.body.insert(0, ticking)  # pyright: ignore[reportAttributeAccessIssue]
    joins = set(map(id, template.find_all(nodes.Concat)))

    def bound(node: nodes.Node) -> None:
        for name, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                bound(value)
                if id(value) in joins:
                    setattr(node, name, call("bounded", value, lineno=value.lineno))  # pyright: ignore[reportArgumentType]
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    if isinstance(item, nodes.Node):
                        bound(item)
                        if id(item) in joins:
                            value[i] = call("bounded", item, lineno=item.lineno)  # pyright: ignore[reportArgumentType]

    bound(template)
    return template


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False)
    environment.filters = {name: _counted(function, name) for name, function in environment.filters.items()}
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(_watched(environment.parse(source), environment))


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str = "",
    eos_token: str = "",
    now: datetime.datetime | None = None,
    mark_generation: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
      template: Jinja, as it stands in a checkpoint.
      messages: each with `role` and `content`, and what else the template wants.
      add_generation_prompt: whether the text ends where the model answers.
      now: what `strftime_now` tells; None is the time.
      mark_generation: put GENERATION_BEGINS and GENERATION_ENDS around what `{% generation %}` encloses.
      variables: what else this template reads.

    Raises:
      ValueError: the template is broken, refuses these messages, reaches for what it may not, or does not come to an end;
        with its line.
    """
    given = {
        "messages": list(messages),
        "tools": None if tools is None else list(tools),
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "strftime_now": lambda form: (now or datetime.datetime.now()).strftime(form),
        **variables,
        "_generation_begins": GENERATION_BEGINS if mark_generation else "",
        "_generation_ends": GENERATION_ENDS if mark_generation else "",
    }
    token = _BUDGET.set(_Budget(time.monotonic() + MAX_SECONDS))
    try:
        pieces, size = [], 0
        for piece in _compiled(template).generate(given):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_SIZE:
                raise _Refused(f"it writes more than {MAX_SIZE:,} characters")
        return "".join(pieces)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template, line {error.lineno}, cannot be read: {error.message}") from error
    except Exception as error:  # whatever other people's programs do
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None)
        reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        place = f", line {line}," if line else ""
        raise ValueError(f"the chat template{place} gives an error: {reason}") from error
    finally:
        _BUDGET.reset(token)


def encode_chat(tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
    """Token ids of a conversation: special tokens where the template writes them, never where a message or tool spells them.

    Args:
      arguments: those of `render`; `bos_token` and `eos_token` are the tokenizer's.

    Raises:
      ValueError: see `render`.
    """
    return encode_guarded(tokenizer, render_guarded(tokenizer, template, messages, **arguments))[0]


def render_guarded(tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
    """`render`, with special tokens that a message or tool spells broken by a character, so that they do not become any."""
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    names = {"bos_token": texts.get(tokenizer.bos_id, ""), "eos_token": texts.get(tokenizer.eos_id, "")}  # pyright: ignore[reportArgumentType, reportCallIssue]
    special = special_pattern(tuple(tokenizer.special_tokens))

    def guard(value: Any) -> Any:
        if isinstance(value, str):
            return special.sub(lambda found: found[0][0] + _GUARD + found[0][1:], value)
        if isinstance(value, Mapping):
            return {guard(key): guard(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [guard(item) for item in value]
        return value

    return render(template, guard(messages), **(names | {name: guard(value) for name, value in arguments.items()}))


def encode_guarded(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Token ids of what `render_guarded` wrote, and the character of `text` at which each begins."""
    if isinstance(tokenizer, HuggingFaceTokenizer) and _GUARD not in text:
        return tokenizer.encode_with_starts(text, parse_special=True)
    ids, starts = [], []

    def encode_plain(begin: int, end: int) -> None:
        if begin == end:
            return
        places = [i for i in range(begin, end) if text[i] != _GUARD]
        plain_ids, plain_starts = tokenizer.encode_with_starts("".join(text[i] for i in places))
        ids.extend(plain_ids)
        starts.extend(places[min(start, len(places) - 1)] for start in plain_starts)

    at = 0
    for found in special_pattern(tuple(tokenizer.special_tokens)).finditer(text):
        encode_plain(at, found.start())
        ids.append(tokenizer.special_tokens[found[0]])
        starts.append(found.start())
        at = found.end()
    encode_plain(at, len(text))
    return ids, starts


@functools.lru_cache(maxsize=16)
def special_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Finds them in a text, the longest where several fit."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
