"""Chat data: what one example is, and the layouts in which the world writes it down.

  conversations  `messages` [{role, content}]; `conversations` [{from, value}] (ShareGPT); `prompt` and `completion`;
                 `instruction`, `input`, `output` (Alpaca).
  pairs          `chosen` and `rejected`, as answers to a `prompt` or as whole conversations that share their beginning, these
                 also as texts "\\n\\nHuman: … \\n\\nAssistant: …" (HH); `margin`, or `score_chosen` and `score_rejected`
                 where `SourceConfig.margin` says so.
  labels         `prompt`, `completion`, `label` (true or false), as KTO needs them (arXiv:2402.01306).
  steps          `prompt`, `completions` (a list of lines, the steps of one answer), `labels` (of each: true or false, a chance
                 in [0, 1], or null where nobody judged), as process reward models need them (arXiv:2305.20050).
  prompts        `prompt`, `messages`, `conversations` or `instruction`; every other column goes along for the verifier.

A prompt or answer is a text or a list of messages. Of a conversation the assistant's messages are learned, but for those in a
prompt and those of `weight` 0, which are read only. What could only teach nonsense raises BadExample, whose `reason` is one of
a few that can be counted: data of millions of rows always has some, and neither a crash nor silence is an answer to them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from data.config import IGNORE, ChatContent, Margin

# `role` and `content`, a text; `weight` (0 or 1) of the assistant's; `tool_calls`, `name` and what else a template reads.
Message = dict[str, Any]
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "tool",
    "developer": "system",
}  # fmt: skip
_KNOWN_ROLES = ("system", "user", "assistant", "tool")


class BadExample(ValueError):
    """An example that is left out.

    Attributes:
      reason: what to count it under.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, of which the assistant's are learned, but for those of weight 0."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first of which is preferred, by `margin` if that is known."""

    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message]
    margin: float = 0.0
    tools: Sequence[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An answer, and whether it is desirable."""

    prompt: Sequence[Message]
    completion: Sequence[Message]
    label: bool
    tools: Sequence[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Stepwise:
    """An answer of several lines, and of each whether it is right, or how likely (IGNORE where unknown)."""

    prompt: Sequence[Message]
    steps: Sequence[str]
    labels: Sequence[float]
    tools: Sequence[dict[str, Any]] | None = None

    @property
    def completion(self) -> list[Message]:
        return [{"role": "assistant", "content": "\n".join(self.steps)}]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be answered; `info` is what a verifier wants to know of it."""

    prompt: Sequence[Message]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: Sequence[dict[str, Any]] | None = None
    used: ClassVar = ("prompt", "messages", "conversations", "instruction", "input", "tools")


Example = Conversation | Pair | Labelled | Stepwise | Prompt
_KINDS: dict[ChatContent, type[Any]] = {
    "conversations": Conversation,
    "pairs": Pair,
    "labels": Labelled,
    "steps": Stepwise,
    "prompts": Prompt,
}


def to_json(example: Example) -> str:
    """One line of text, the same for equal examples."""
    return json.dumps(dataclasses.asdict(example), ensure_ascii=False, default=str)


def from_json(text: str, content: ChatContent) -> Any:
    """What `to_json` wrote: a Conversation, Pair, Labelled, Stepwise or Prompt, by `content`."""
    return _KINDS[content](**json.loads(text))


def import_row(row: Any, content: ChatContent, margin: Margin = "column") -> Example:
    """The example in a row of a file.

    Args:
      margin: of pairs, see `SourceConfig`.

    Raises:
      BadExample: it is not one that can be learned from.
    """
    if not isinstance(row, Mapping):
        raise BadExample("unknown layout", f"a row is a {type(row).__name__}, not an object")
    row = {key: value for key, value in row.items() if value is not None}
    tools = row.get("tools") or None
    if content == "conversations":
        messages = _conversation(row)
        check_messages(messages)
        if not any(is_learned(message) for message in messages):
            raise BadExample("nothing to learn", "all answers have weight 0")
        return Conversation(messages, tools)
    if content == "prompts":
        prompt = _prompt(row)
        check_prompt(prompt)
        return Prompt(prompt, {key: value for key, value in row.items() if key not in Prompt.used}, tools)
    if content == "pairs":
        prompt, chosen, rejected = _pair(row)
        for answer in (chosen, rejected):
            _check_answer(prompt, answer)
        return Pair(prompt, chosen, rejected, _margin(row, margin), tools)
    if content == "steps":
        return _stepwise(row, tools)
    _require(row, "prompt", "completion", "label")
    prompt, completion = _texts_or_messages(row["prompt"], "user"), _texts_or_messages(row["completion"], "assistant")
    _check_answer(prompt, completion)
    if row["label"] not in (True, False):
        raise BadExample("label is not true or false", repr(row["label"])[:80])
    return Labelled(prompt, completion, bool(row["label"]), tools)


# --- Layouts --------------------------------------------------------------------------------------------------------------


def _require(row: Mapping[str, Any], *names: str) -> None:
    if missing := [name for name in names if name not in row]:
        raise BadExample("unknown layout", f"no column {', '.join(missing)} (found: {', '.join(sorted(row))})")


def _conversation(row: Mapping[str, Any]) -> list[Message]:
    for name in ("messages", "conversations"):
        if name in row:
            return _messages(row[name])
    if "instruction" in row:
        _require(row, "output")
        return [*_read_only(_prompt(row)), *_texts_or_messages(row["output"], "assistant")]
    _require(row, "prompt", "completion")
    return [*_read_only(_texts_or_messages(row["prompt"], "user")), *_texts_or_messages(row["completion"], "assistant")]


def _read_only(prompt: list[Message]) -> list[Message]:
    return [message | {"weight": 0} if message["role"] == "assistant" else message for message in prompt]


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    if "prompt" in row:
        return _texts_or_messages(row["prompt"], "user")
    for name in ("messages", "conversations"):
        if name in row:
            return _messages(row[name])
    _require(row, "instruction")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return _messages([*system, {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row.get("input"))))}])


def _pair(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    if ("chosen" in row) != ("rejected" in row):
        raise BadExample("one-sided", f"only {'chosen' if 'chosen' in row else 'rejected'} is there")
    _require(row, "chosen", "rejected")
    if row["chosen"] == row["rejected"]:
        raise BadExample("identical pair", "chosen is rejected")
    if "prompt" in row:
        prompt = _texts_or_messages(row["prompt"], "user")
        chosen, rejected = (_texts_or_messages(row[name], "assistant") for name in ("chosen", "rejected"))
        if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:  # the prompt is told twice
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return prompt, chosen, rejected
    chosen, rejected = (
        _dialogue(row[name]) if isinstance(row[name], str) else _messages(row[name]) for name in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise BadExample("identical pair", "chosen is rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise BadExample("no common prompt", "chosen and rejected begin differently, and there is no column prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _stepwise(row: Mapping[str, Any], tools: Any) -> Stepwise:
    _require(row, "prompt", "completions", "labels")
    prompt, steps, labels = _texts_or_messages(row["prompt"], "user"), row["completions"], row["labels"]
    if not all(isinstance(column, Sequence) and not isinstance(column, str) for column in (steps, labels)):
        raise BadExample("unknown layout", "completions and labels must be lists, with an entry for each step")
    if len(steps) != len(labels):
        raise BadExample("unequal steps and labels", f"{len(steps)} steps and {len(labels)} labels")
    if not all(isinstance(step, str) and "\n" not in step and step.strip() for step in map(_bare, steps)):
        raise BadExample(
            "step is not a line", "each of completions must be one line of text: steps are told apart by line breaks"
        )
    if not all(label is None or (isinstance(label, int | float) and 0 <= label <= 1) for label in labels):
        raise BadExample("label is no chance", f"{labels!r}: true, false, null or a number in [0, 1] is needed"[:200])
    if all(label is None for label in labels):
        raise BadExample("no label", "nobody judged any of the steps")
    example = Stepwise(prompt, [_bare(step) for step in steps], [IGNORE if x is None else float(x) for x in labels], tools)
    _check_answer(prompt, example.completion)
    return example


def _bare(step: Any) -> Any:
    """Without the line breaks around it, which some data sets write."""
    return step.strip("\r\n") if isinstance(step, str) else step


def _margin(row: Mapping[str, Any], kind: Margin) -> float:
    if kind == "none":
        return 0.0
    if kind == "scores":
        _require(row, "score_chosen", "score_rejected")
        scores = row["score_chosen"], row["score_rejected"]
        margin = scores[0] - scores[1] if all(isinstance(score, int | float) for score in scores) else None
    else:
        margin = row.get("margin", 0.0)
    if not isinstance(margin, int | float) or not math.isfinite(margin):
        raise BadExample("margin is no number", repr(margin)[:80])
    if margin < 0:
        raise BadExample("margin contradicts the pair", f"{margin} is below 0, as if the rejected answer were the better one")
    return float(margin)


def _dialogue(text: str) -> list[Message]:
    """Anthropic's HH texts."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip() or len(parts) < 3:
        raise BadExample("no common prompt", "a pair of texts needs a column prompt, or turns marked Human: and Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": said.strip()} for role, said in zip(parts[1::2], parts[2::2], strict=True)]


def _texts_or_messages(value: Any, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value)


def _messages(value: Any) -> list[Message]:
    """Messages with our names of roles and texts as content; parts of text are joined."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadExample("unknown layout", f"messages are a {type(value).__name__}, not a list")
    return [_message(message) for message in value]


def _message(given: Any) -> Message:
    if not isinstance(given, Mapping):
        raise BadExample("unknown layout", f"a message is a {type(given).__name__}, not an object")
    # Columns of parquet hold a null for what a message does not have.
    message = {key: value for key, value in given.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    content = message.pop("content", message.pop("value", ""))
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN_ROLES:
        raise BadExample("unknown role", f"{role!r} is none of {', '.join(_KNOWN_ROLES)}"[:200])
    if isinstance(content, Sequence) and not isinstance(content, str):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise BadExample("not text", f"a message of the {role}'s has parts that are no text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadExample("not text", f"a message of the {role}'s holds {type(content).__name__}")
    if role == "assistant" and message.get("weight", 1) not in (0, 1):
        raise BadExample("weight is neither 0 nor 1", repr(message["weight"])[:80])
    return {"role": role, "content": content, **message}


# --- What makes sense -----------------------------------------------------------------------------------------------------


def check_messages(messages: Sequence[Message]) -> None:
    """Raises BadExample unless these are turns of user and assistant, ending with an answer."""
    if not messages:
        raise BadExample("empty", "there is no message")
    roles = [message["role"] for message in messages]
    for role in ("user", "assistant"):
        if role not in roles:
            raise BadExample("one-sided", f"there is no message of the {role}'s")
    _check_order(messages)
    if roles[-1] != "assistant":
        raise BadExample("no answer at the end", f"the last message is the {roles[-1]}'s")


def is_learned(message: Message) -> bool:
    """Whether the model is to write this message, and not only to read it."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def check_prompt(messages: Sequence[Message]) -> None:
    """Raises BadExample unless the assistant is next."""
    if not messages:
        raise BadExample("empty", "the prompt has no message")
    _check_order(messages)
    if messages[-1]["role"] not in ("user", "tool"):
        raise BadExample("role order", f"the prompt ends with a message of the {messages[-1]['role']}'s")


def _check_answer(prompt: Sequence[Message], answer: Sequence[Message]) -> None:
    if not answer:
        raise BadExample("empty", "an answer has no message")
    check_prompt(prompt)
    check_messages([*prompt, *answer])
    if any(message["role"] == "assistant" and not is_learned(message) for message in answer):
        raise BadExample("answer of weight 0", "one that is compared or judged counts as a whole: leave weight out")


def _check_order(messages: Sequence[Message]) -> None:
    before = "start"
    allowed = {
        "start": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    for message in messages:
        role = message["role"]
        if role not in allowed[before]:
            raise BadExample("role order", f"{role} after {before}")
        if role in ("user", "assistant") and not message["content"].strip() and not message.get("tool_calls"):
            raise BadExample("empty", f"a message of the {role}'s says nothing")
        before = role
