"""From a conversation to token ids and an exact mask: which of them the model is to write.

Those are the assistant's tokens and the stop token after them, and nothing else: no header, no newline after the stop token, no
output of a tool, and no answer of weight 0. Where a template has `{% generation %}`, that says what is the assistant's. For any
other template it is found by rendering the conversation up to each answer: a template that then writes the beginning otherwise
than within the whole (as those do that drop earlier thoughts) is refused, for the mask would be of another text than the model
reads later.

What precedes an answer has the ids that `encode_prompt` gives when the model is asked: where encoding the whole would merge
across that boundary, the text is encoded in two parts. Deviation from transformers' `return_assistant_tokens_mask`: it encodes
the whole always, and masks all that `{% generation %}` encloses, after the stop token too.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.chat import BadExample, Message, is_learned
from data.chat_template import GENERATION_BEGINS, GENERATION_ENDS, RESERVED, encode_guarded, render_guarded, special_pattern
from data.tokenizer import Tokenizer, UnknownCharacter

# For tokenizers of ours, which have <bos> and <eos>: every message is a document, which begins with who speaks.
DEFAULT_TEMPLATE = """{%- for message in messages %}
{{- bos_token + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content + eos_token }}{% endgeneration %}
{%- else %}{{- message.content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- bos_token + 'assistant\n' }}{% endif %}"""
# What a template that writes the date is told: the data must not change from day to day.
DATE = datetime.datetime(2024, 7, 26)
_FORMAT_VERSION = 2
_QUESTION, _ANSWER = "question", "answer"
Tools = Sequence[Mapping[str, Any]] | None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Attributes:
    ids: int32 [num_tokens].
    trained: bool [num_tokens]; whether the model is to write this token.
    """

    ids: np.ndarray
    trained: np.ndarray


class ChatEncoder:
    """Encodes with one tokenizer and one template. Picklable, and safe to use from several threads.

    Attributes:
      stop_ids: what ends an answer of the assistant.
      fingerprint: hash of all that encoding depends on.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = DEFAULT_TEMPLATE):
        """Raises:
        ValueError: the template is broken, lacks a generation prompt or a stop token, or marks with `{% generation %}` what is
          not the answer.
        """
        self.tokenizer, self.template = tokenizer, template
        self._marks = re.search(r"{%[-+]?\s*generation\b", template) is not None
        self.stop_ids = frozenset({self._probe()})
        identity = json.dumps([_FORMAT_VERSION, template, tokenizer.fingerprint])
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def encode(self, messages: Sequence[Message], tools: Tools = None, first: int = 0) -> Encoded:
        """Ids and mask of a conversation.

        Args:
          first: answers before this message are read only.

        Raises:
          BadExample: the template refuses the conversation, or its answers cannot be told from the rest; or the tokenizer has
            no id for a character of it.
        """
        return self._encode(*self._render_answers(messages, tools), messages, first)

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = None) -> np.ndarray:
        """int32 ids of a conversation up to where the assistant is to answer.

        Raises:
          BadExample: the template refuses the conversation, or the tokenizer has no id for a character of it.
        """
        text, spans = self._render_answers(messages, tools, prompt=True)
        return np.array(self._split_at(text, [begin for begin, _ in spans])[0], np.int32)

    def encode_answers(
        self, prompt: Sequence[Message], answers: Sequence[Sequence[Message]], tools: Tools = None
    ) -> list[Encoded]:
        """Each answer after the same prompt, which is read only and has the same ids in all.

        Raises:
          BadExample: see `encode`; or the template writes the prompt otherwise for one of the answers.
        """
        encoded = [self.encode([*prompt, *answer], tools, first=len(prompt)) for answer in answers]
        shared = self.encode_prompt(prompt, tools)
        for one in encoded:
            if not np.array_equal(one.ids[: np.argmax(one.trained)], shared):
                raise BadExample(
                    "prompt depends on the answer", "the chat template writes the prompt otherwise with the answer"
                )
        return encoded

    # --- Where the answers are ------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], tools: Tools, prompt: bool, mark: bool = False) -> str:
        written = json.dumps([messages, tools], ensure_ascii=False, default=str)
        if any(character in written for character in RESERVED):
            raise BadExample("not text", f"a message has U+{ord(RESERVED[0]):04X} to U+{ord(RESERVED[-1]):04X}, no characters")
        options = {"add_generation_prompt": prompt, "mark_generation": mark, "now": DATE, "tools": tools}
        try:
            return render_guarded(self.tokenizer, self.template, messages, **options)
        except ValueError as error:
            raise BadExample("refused by the template", str(error)) from error

    def _render_answers(
        self, messages: Sequence[Message], tools: Tools, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where each of the assistant's messages, with what ends it, stands in it."""
        number = sum(message["role"] == "assistant" for message in messages)
        if not self._marks:
            return self._by_prefixes(messages, tools, prompt)
        parts = re.split(f"([{GENERATION_BEGINS}{GENERATION_ENDS}])", self._render(messages, tools, prompt, mark=True))
        if parts[1::2] != [GENERATION_BEGINS, GENERATION_ENDS] * number:
            raise BadExample(
                "unmarked answer",
                f"{{% generation %}} of the chat template encloses {parts.count(GENERATION_BEGINS)} parts, and the assistant "
                f"has {number} messages",
            )
        text, spans = "", []
        for i, part in enumerate(parts[::2]):
            if i % 2:
                spans.append((len(text), len(text) + len(part)))
            text += part
        return text, spans

    def _by_prefixes(self, messages: Sequence[Message], tools: Tools, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self._render(messages, tools, prompt), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], tools, prompt=True)
            through = self._render(messages[: i + 1], tools, prompt=False)
            if not (text.startswith(through) and through.startswith(before)):
                raise BadExample(
                    "not a prefix",
                    f"the chat template writes what precedes message {i + 1} otherwise once that and later ones follow: mark "
                    "the answers in it by {% generation %}, or end the conversation there",
                )
            spans.append((len(before), len(through)))
        return text, spans

    # --- Tokens ---------------------------------------------------------------------------------------------------------------

    def _encode(self, text: str, spans: list[tuple[int, int]], messages: Sequence[Message], first: int) -> Encoded:
        ids, starts = self._split_at(text, [begin for begin, _ in spans])
        special = set(self.tokenizer.special_tokens.values())
        trained = np.zeros(len(ids), bool)
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        begins = np.array(starts)
        for number, (begin, end) in zip(numbers, spans, strict=True):
            inside = np.flatnonzero((begins >= begin) & (begins < end))
            stops = [i for i in inside.tolist() if ids[i] in special]
            if not stops or self.tokenizer.decode(ids[stops[-1] : inside[-1] + 1]).strip():
                raise _missing_stop(number + 1, self._marks)
            if number >= first and is_learned(messages[number]):
                trained[inside[0] : stops[-1] + 1] = True
        return Encoded(np.array(ids, np.int32), trained)

    def _split_at(self, text: str, boundaries: list[int]) -> tuple[list[int], list[int]]:
        """Ids of a text, and where each begins; what precedes a boundary has the ids that it has without what follows."""
        kept_ids: list[int] = []
        kept_starts: list[int] = []
        cut = 0
        ids, starts = self._encode_text(text)
        for boundary in boundaries:
            alone, places = self._encode_text(text[cut:boundary])
            if ids[: len(alone)] == alone and all(start >= boundary - cut for start in starts[len(alone) : len(alone) + 1]):
                continue
            rest, rest_starts = self._encode_text(text[boundary:])
            if self.tokenizer.decode_bytes(alone + rest) != self.tokenizer.decode_bytes(ids):
                raise BadExample("no token boundary", "the tokenizer writes an answer otherwise apart from its prompt")
            kept_ids += alone
            kept_starts += [cut + place for place in places]
            cut, ids, starts = boundary, rest, rest_starts
        return kept_ids + ids, kept_starts + [cut + start for start in starts]

    def _encode_text(self, text: str) -> tuple[list[int], list[int]]:
        try:
            return encode_guarded(self.tokenizer, text)
        except UnknownCharacter as error:
            raise BadExample("unknown character", str(error)) from error

    def _probe(self) -> int:
        """The token that ends an answer, found by a conversation of two words."""
        asked: list[Message] = [{"role": "user", "content": _QUESTION}]
        answered = [*asked, {"role": "assistant", "content": _ANSWER}]
        prompt, bare = (self._render(asked, None, prompt=prompt) for prompt in (True, False))
        text, spans = self._render_answers(answered, None)
        between = text[len(prompt) :].partition(_ANSWER)[0]
        if prompt == bare and between.strip():
            raise ValueError(
                "the chat template has no generation prompt: with add_generation_prompt it must write all that stands before "
                f"an answer, here {between!r}"
            )
        if self._marks and text[: spans[0][0]].rstrip() != prompt.rstrip():
            raise ValueError(
                f"{{% generation %}} of the chat template begins after {text[: spans[0][0]][-40:]!r}, and the generation "
                f"prompt ends with {prompt[-40:]!r}: let it begin just there"
            )
        # Looked for in the text: a tokenizer of few characters may not know these words.
        after = text[slice(*spans[0])].rpartition(_ANSWER)[2]
        stops = list(special_pattern(tuple(self.tokenizer.special_tokens)).finditer(after))
        if not stops or after[stops[-1].end() :].strip():
            raise _missing_stop(2, self._marks)
        return self.tokenizer.special_tokens[stops[-1][0]]


def _missing_stop(message: int, marked: bool) -> BadExample:
    hint = ", or it stands after {% endgeneration %}: move it inside" if marked else ""
    return BadExample("missing stop token", f"message {message} does not end with a special token in the chat template{hint}")
