"""From examples of chats to the token sequences that rows are made of; what does not fit a row is left out, and counted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data.chat import BadExample, Conversation, Labelled, Message, Pair, Prompt, Stepwise, from_json
from data.chat_encoder import DATE, ChatEncoder, Encoded
from data.chat_template import render
from data.config import IGNORE, ChatContent
from data.steps import LineTokens, line_tokens, step_ends
from data.storage import TRAINED_BIT


@dataclasses.dataclass
class Refused:
    """How many examples were left out for which reason, and the first of each."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, error: BadExample, where: str) -> None:
        self.counts[error.reason] += 1
        self.first.setdefault(error.reason, f"{where}: {error}")

    def __str__(self) -> str:
        return "; ".join(f"{number:,} × {self.first[reason]}" for reason, number in self.counts.most_common())


@dataclasses.dataclass(frozen=True)
class Sequences:
    """What one example becomes: one sequence, or two answers to one prompt; and the label of each, or of each token where steps
    are labelled (see `PackedRows.read`)."""

    encoded: Sequence[Encoded]
    labels: Sequence[float]

    def flagged(self) -> Iterator[np.ndarray]:
        """uint32 [num_tokens] of each sequence, with the TRAINED_BIT."""
        for one in self.encoded:
            yield one.ids.astype(np.uint32) | np.where(one.trained, TRAINED_BIT, np.uint32(0))


def encode_examples(
    lines: Sequence[str], content: ChatContent, encoder: ChatEncoder, seq_len: int, refused: Refused
) -> Iterator[Sequences]:
    """Sequences of each example, those that are together longer than a row of `seq_len` targets left out.

    Args:
      lines: what `data.chat.to_json` wrote.

    Raises:
      ValueError: labelled answers whose prompts are all the same.
    """
    examples = [from_json(line, content) for line in lines]
    broken_by = line_tokens(encoder.tokenizer)
    for number, example in enumerate(examples, start=1):
        try:
            if isinstance(example, Labelled):
                sequences = _labelled(example, _other_completion(examples, number - 1), encoder)
            elif isinstance(example, Stepwise):
                sequences = _stepwise(example, encoder, broken_by)
            else:
                sequences = _sequences(example, encoder)
            _check_length(sequences.encoded, seq_len)
        except BadExample as error:
            refused.add(error, f"example {number}")
            continue
        yield sequences


def encode_prompts(lines: Sequence[str], encoder: ChatEncoder, seq_len: int, refused: Refused) -> Iterator[dict[str, Any]]:
    """`ids` of each prompt that leaves room for an answer within `seq_len` tokens, its `messages` and `info`."""
    for number, line in enumerate(lines, start=1):
        example: Prompt = from_json(line, "prompts")
        try:
            ids = encoder.encode_prompt(example.prompt, example.tools)
            _check_prompt_length(ids.size, seq_len)
        except BadExample as error:
            refused.add(error, f"example {number}")
            continue
        yield {"ids": ids.tolist(), "messages": example.prompt, "info": example.info}


def rendered_texts(line: str, content: ChatContent, template: str) -> list[str]:
    """What a tokenizer is trained on: conversations as the template writes them, without special tokens."""
    example = from_json(line, content)
    if isinstance(example, Conversation):
        chats: list[Sequence[Message]] = [example.messages]
    elif isinstance(example, Prompt):
        chats = [example.prompt]
    else:
        answers = (example.chosen, example.rejected) if isinstance(example, Pair) else (example.completion,)
        chats = [[*example.prompt, *answer] for answer in answers]
    options = {"tools": example.tools, "now": DATE, "add_generation_prompt": content == "prompts"}
    return [render(template, chat, **options) for chat in chats]


def _sequences(example: Conversation | Pair, encoder: ChatEncoder) -> Sequences:
    if isinstance(example, Conversation):
        return Sequences([encoder.encode(example.messages, example.tools)], [0.0])
    answers = encoder.encode_answers(example.prompt, [example.chosen, example.rejected], example.tools)
    if np.array_equal(answers[0].ids, answers[1].ids):
        raise BadExample("identical pair", "the chat template writes chosen and rejected alike")
    return Sequences(_read_to_the_end(answers), [example.margin] * 2)


def _labelled(example: Labelled, other: Sequence[Message], encoder: ChatEncoder) -> Sequences:
    answers = encoder.encode_answers(example.prompt, [example.completion, other], example.tools)
    return Sequences(_read_to_the_end(answers), [float(example.label)] * 2)


def _stepwise(example: Stepwise, encoder: ChatEncoder, lines: LineTokens) -> Sequences:
    (one,) = _read_to_the_end(encoder.encode_answers(example.prompt, [example.completion], example.tools))
    ends = np.flatnonzero(step_ends(one.ids, one.trained, lines))
    if ends.size != len(example.steps):
        raise BadExample(
            "no token boundary", f"the tokenizer writes {len(example.steps)} lines with {ends.size} tokens that end one"
        )
    labels = np.full(one.ids.size, IGNORE)
    labels[ends] = example.labels
    return Sequences([one], labels.tolist())


def _read_to_the_end(answers: Sequence[Encoded]) -> list[Encoded]:
    """The answers with their last token once more, which nobody learns to write: in a row all tokens but the last are read, and
    a reward model judges what it has read, the stop token too."""
    return [Encoded(np.append(one.ids, one.ids[-1]), np.append(one.trained, False)) for one in answers]


def _other_completion(examples: Sequence[Labelled], number: int) -> Sequence[Message]:
    """The next answer, round the end, that is to another prompt: of such pairs is the mean KL that KTO subtracts
    (arXiv:2402.01306, section 4.1)."""
    for i in range(1, len(examples)):
        other = examples[(number + i) % len(examples)]
        if other.prompt != examples[number].prompt:
            return other.completion
    raise ValueError("labelled answers need at least two different prompts in a split: an answer is compared with another's")


def _check_length(encoded: Sequence[Encoded], seq_len: int) -> None:
    _check_prompt_length(int(np.argmax(encoded[0].trained)), seq_len)
    targets = sum(one.ids.size - 1 for one in encoded)
    if targets > seq_len:
        raise BadExample("longer than a row", f"{targets} tokens to predict; data.seq_len={seq_len}")


def _check_prompt_length(size: int, seq_len: int) -> None:
    if size >= seq_len:
        raise BadExample("prompt longer than the context", f"{size} tokens leave no room for an answer; data.seq_len={seq_len}")
