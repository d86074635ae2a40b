"""A model that writes: conversations in, answers out. What is drawn is a function of (weights, seed, stage, number)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from data.chat import BadExample, Message
from data.chat_encoder import ChatEncoder
from data.tokenizer import NO_TEXT
from inference.config import EngineConfig
from inference.engine import Engine
from inference.request import Request, Token
from inference.sampling import Sampling
from inference.score import score
from model.config import check
from model.params import Params, abstract_params, param_specs
from train.initial import open_initial
from train.rollouts import prompt_seed
from train.synthesis.config import SynthesisConfig


@dataclasses.dataclass(frozen=True)
class Answer:
    """Attributes:
    text: without what ended it; bytes that are no UTF-8, and special tokens, are U+FFFD.
    complete: it ended by itself, and not at the limit of tokens.
    tokens: as they were drawn.
    """

    text: str
    complete: bool
    tokens: Sequence[Token] = ()

    @property
    def no_text(self) -> bool:
        """Whether it holds tokens that are no text. (Or U+FFFD itself, which is seldom meant either.)"""
        return NO_TEXT in self.text


# (conversations, stage, number of each) -> an answer to each, or None where it is too long to be read.
Write = Callable[[Sequence[Sequence[Message]], int, Sequence[int]], list[Answer | None]]
# (conversations, replies) -> log-probability of each reply after each conversation [conversations, replies], NaN where that is
# too long to be read.
Weigh = Callable[[Sequence[Sequence[Message]], Sequence[str]], np.ndarray]


class Writer:
    """Attributes:
    params, tokenizer, stop_ids: of the model.
    """

    def __init__(self, config: SynthesisConfig, samples: int = 1):
        """
        Args:
          samples: answers to each conversation.

        Raises:
          ValueError, FileNotFoundError: there is no such model, or it has no chat template or stop token.
        """
        opened = open_initial(config.initial_weights, config.model)
        self.config, self.tokenizer, self._samples = config, opened.tokenizer, samples
        check(
            not config.chat or bool(opened.chat_template),
            f"chat=True needs a chat template, and {config.initial_weights} has none: set it to False",
        )
        self.chat = ChatEncoder(opened.tokenizer, opened.chat_template) if config.chat else None
        eos_id = self.tokenizer.eos_id
        self.stop_ids = self.chat.stop_ids if self.chat else frozenset() if eos_id is None else frozenset({eos_id})
        check(bool(self.stop_ids), f"the tokenizer of {config.initial_weights} has no token that ends an answer")
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract_params(param_specs(config.model))
        )
        self.params: Params = opened.load(abstract)
        rows = min(config.max_batch, config.batch * samples)
        pages = -(-(config.max_prompt_tokens + config.max_tokens) // 16) * rows + 1
        settings = EngineConfig(max_batch=rows, cache_tokens=pages * 16, page_size=16, prefill_chunk=256)
        self._engine = Engine(self.params, config.model, settings, vocab_size=self.tokenizer.vocab_size)

    def encode(self, messages: Sequence[Message]) -> list[int] | None:
        """What the model reads; None where that is too long, or the template refuses it."""
        if self.chat is None:
            ids = self.tokenizer.encode_prompt("".join(message["content"] for message in messages))
        else:
            try:
                ids = self.chat.encode_prompt(messages).tolist()
            except BadExample:
                return None
        return ids if 0 < len(ids) <= self.config.max_prompt_tokens else None

    def draw(self, conversations: Sequence[Sequence[Message]], stage: int, numbers: Sequence[int]) -> list[list[Answer] | None]:
        """`samples` answers to each conversation, None where it is too long to be read.

        Args:
          stage, numbers: of each conversation; with the seed they give its random numbers.
        """
        config = self.config
        prompts = [self.encode(messages) for messages in conversations]
        requests = {
            i: Request(
                prompt,
                Sampling(config.temperature, config.top_k, config.top_p),
                num_samples=self._samples,
                max_tokens=config.max_tokens,
                stop_ids=self.stop_ids,
                seed=prompt_seed(config.seed, stage, numbers[i]),
            )
            for i, prompt in enumerate(prompts)
            if prompt is not None
        }
        drawn = dict(zip(requests, self._engine.generate(requests.values()), strict=True))
        return [[self._answer(tokens) for tokens in drawn[i]] if i in drawn else None for i in range(len(prompts))]

    def write(self, conversations: Sequence[Sequence[Message]], stage: int, numbers: Sequence[int]) -> list[Answer | None]:
        """The first answer to each; see `Write`."""
        return [answers[0] if answers else None for answers in self.draw(conversations, stage, numbers)]

    def weigh(self, conversations: Sequence[Sequence[Message]], replies: Sequence[str]) -> np.ndarray:
        """See `Weigh`."""
        prompts, ends = (
            [self.encode(messages) for messages in conversations],
            [self.tokenizer.encode(reply) for reply in replies],
        )
        rows = {(i, j): [*prompt, *end] for i, prompt in enumerate(prompts) if prompt for j, end in enumerate(ends)}
        found = np.full((len(prompts), len(ends)), np.nan)
        places = list(rows)
        for k, scores in score(self.params, self.config.model, list(rows.values())):
            found[places[k]] = scores.logprobs[-len(ends[places[k][1]]) :].astype(np.float64).sum()
        return found

    def _answer(self, tokens: Sequence[Token]) -> Answer:
        complete = tokens[-1].finish_reason == "stop"
        ids = [token.token for token in tokens][: -1 if complete else None]
        return Answer(self.tokenizer.decode_answer(ids), complete, tokens)
