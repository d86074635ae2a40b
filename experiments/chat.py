"""Talks with a model in a terminal (`loam chat`).

    /system TEXT   what the model is told beforehand; begins anew
    /reset         forgets the conversation
    /save FILE     writes it, one JSON object of messages
    /help, /quit

A model without a chat template is not one that was taught to answer: it continues what is typed.

Each answer of a talk has random numbers by --seed and its own number, after /reset too: what is asked again is answered anew,
and the same lines get the same talk again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from data.chat_template import encode_chat
from experiments.sampling import open_draft, open_to_decode
from inference.config import EngineConfig
from inference.engine import Engine
from inference.models import LoadedModel
from inference.request import Request
from inference.sampling import Sampling, derived_seed
from inference.service import Service
from inference.speculate import guesser
from inference.text import Answers
from model.config import CacheDType, check

Message = dict[str, str]
_HELP = "/system TEXT  /reset  /save FILE  /quit; Ctrl-C breaks an answer off"


class Conversation:
    """Messages with one model, whose engine keeps what it has read of them.

    Args:
      context: tokens that the conversation may have, at most as many as the model knows places.
      num_guesses, draft: for speculative decoding, see `inference.speculate.guesser`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: Sampling,
        max_tokens: int,
        seed: int,
        context: int,
        cache_dtype: CacheDType = "model",
        num_guesses: int = 0,
        draft: LoadedModel | None = None,
    ):
        self._loaded, self._sampling, self._max_tokens, self._seed = loaded, sampling, max_tokens, seed
        page_size = EngineConfig.page_size
        tokens = -(-min(context, loaded.config.max_seq_len) // page_size) * page_size
        config = EngineConfig(max_batch=1, cache_tokens=tokens, num_guesses=num_guesses, cache_dtype=cache_dtype)
        vocab_size = loaded.tokenizer.vocab_size
        guess = guesser(config, vocab_size, draft)
        self._service = Service(Engine(loaded.params, loaded.config, config, vocab_size=vocab_size, guess=guess))
        self.messages: list[Message] = []
        self._num_answers = 0

    def reset(self, system: str = "") -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to `text`, piece by piece. What was said of it is remembered, broken off or not; if nothing
        was, neither is `text`.

        Raises:
          ValueError: the conversation does not fit the context; RuntimeError: the answer failed, as of weights whose logits are
            not finite.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        room = self._service.call(lambda engine: engine.max_len) - len(prompt)
        check(room > 0, f"the conversation has {len(prompt)} tokens, more than fit: begin anew with /reset, or raise --context")
        request = Request(
            prompt,
            self._sampling,
            max_tokens=min(self._max_tokens, room),
            stop_ids=self._loaded.stop_ids,
            seed=derived_seed("answer", self._seed, self._num_answers),
        )
        answers = Answers(request, self._loaded.tokenizer.token_bytes)
        self._num_answers += 1
        said, has_ended = "", False
        stream = self._service.stream(answers.request)
        try:
            for token in stream:
                piece = answers.text(token)
                said += piece
                yield piece
            has_ended = True
        finally:
            stream.close()
            if said or has_ended:
                self.messages = [*messages, {"role": "assistant", "content": said}]

    def _prompt(self, messages: list[Message]) -> list[int]:
        tokenizer, template = self._loaded.tokenizer, self._loaded.chat_template
        if template is None:
            return tokenizer.encode_prompt("".join(message["content"] for message in messages))
        return encode_chat(tokenizer, template, messages, add_generation_prompt=True)

    def close(self) -> None:
        self._service.close()


def chat(
    arguments: argparse.Namespace, read: Callable[[str], str] = input, write: Callable[[str], object] = sys.stdout.write
) -> None:
    """Answers `--prompt` and ends, or talks until the end of the input.

    Raises:
      ValueError, FileNotFoundError: see `open_to_decode`, `open_draft`, `Sampling` and `Request`; RuntimeError: `--prompt` has
        no answer.
    """
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
    check(0 <= arguments.seed < 2**32, f"--seed={arguments.seed} must lie in [0, 2^32)")
    check(arguments.max_tokens > 0, f"--max-tokens={arguments.max_tokens} must be positive")
    draft = open_draft(arguments)
    loaded = open_to_decode(arguments)
    conversation = Conversation(
        loaded,
        sampling,
        arguments.max_tokens,
        arguments.seed,
        arguments.context,
        arguments.cache_dtype,
        arguments.guesses,
        draft,
    )
    conversation.reset(arguments.system)
    try:
        if arguments.prompt is not None:
            _write_answer(conversation, arguments.prompt, write)
            return
        write(f"{loaded.name}: {_HELP}\n")
        while True:
            try:
                text = read("> ").strip()
            except EOFError:
                return
            if text == "/quit":
                return
            if text:
                _turn(conversation, text, write)
    finally:
        conversation.close()


def _write_answer(conversation: Conversation, text: str, write: Callable[[str], object]) -> None:
    """Each piece is shown at once: a terminal would keep it until the end of the line."""
    for piece in conversation.answer(text):
        write(piece)
        sys.stdout.flush()
    write("\n")


def _turn(conversation: Conversation, text: str, write: Callable[[str], object]) -> None:
    """One line of the user's; what is wrong with it is told, and the talk goes on."""
    command, _, rest = text.partition(" ")
    try:
        if command == "/system":
            conversation.reset(rest.strip())
        elif command == "/reset":
            conversation.reset()
        elif command == "/save":
            check(bool(rest.strip()), "/save needs the name of a file")
            Path(rest.strip()).write_text(json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=2) + "\n")
        elif command.startswith("/"):
            write(_HELP + "\n")
        else:
            _write_answer(conversation, text, write)
    except KeyboardInterrupt:
        write("\n")
    except (ValueError, OSError, RuntimeError) as error:
        write(f"{error}: {error.__cause__}\n" if error.__cause__ else f"{error}\n")
