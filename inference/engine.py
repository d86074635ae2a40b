"""The decode engine: many requests at once over a paged KV cache, for rollouts, evaluation and serving alike.

Token ids in, token ids and their log-probabilities out. `step` computes at most `prefill_chunk` tokens of waiting prompts and
one more token for every running sequence; requests join and leave between steps. A prompt's last token is not part of its
prefill: decoding takes it, so every token is drawn by one program, and samples of one prompt share all that was computed of it.

Shapes come in a few sizes, which `warm_up` compiles: powers of two of rows and of prefilled tokens. Nothing compiles after it.

When pages run out, the sequence that came last gives up its own and waits; it goes on where it was, with the same random
numbers.

Not safe to use from several threads; `inference/service.py` is.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inference.pages import PagePool
from inference.sampling import SAMPLING, TOP_LOGPROBS, Draws, History, Rows, Sampling, draw_in_turn
from model.attention import check_backend
from model.config import CacheDType, ModelConfig, check, check_choices
from model.kernels.tiles import MASKED
from model.params import Params, path_name, unstack_layers
from model.sharding import Layout
from model.transformer import KVCache, LayerPages, empty_pages, forward, unembed

FinishReason = Literal["stop", "length", "error"]
Tree = TypeVar("Tree")


MAX_SAMPLES = 16_384  # of a request
FAILED = "watcher, constraint or guess failed, or its logits are not finite"


class Constraint(Protocol):
    """What an answer may consist of, token by token (`inference/grammar.py`).

    Attributes:
      stop_id: the token that it allows after what is complete.
    """

    stop_id: int

    def allowed(self) -> np.ndarray:
        """uint32 [words]: bit i of word w is set where token 32 w + i may come next. At least one may."""
        ...

    def advance(self, token: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Attributes:
    max_batch: sequences that are decoded at once.
    cache_tokens: tokens that the pages hold together, at least those of one request.
    page_size: tokens of a page, the unit in which sequences share and grow.
    prefill_chunk: tokens of prompts computed in a step, at most; running sequences wait for them.
    num_guesses: tokens of a sequence that a step may check beside the one it is at (speculative decoding); 0 is off.
    cache_dtype: of the pages: that of the `model`, or `int8` with a scale per token and head (`model/kernels/kv_pages.py`).
    """

    max_batch: int = 32
    cache_tokens: int = 16_384
    page_size: int = 64
    prefill_chunk: int = 512
    num_guesses: int = 0
    cache_dtype: CacheDType = "model"

    def __post_init__(self) -> None:
        check_choices("engine", self)
        for name in ("max_batch", "cache_tokens", "page_size", "prefill_chunk"):
            check(getattr(self, name) > 0, f"engine.{name}={getattr(self, name)} must be positive")
        check(self.num_guesses >= 0, f"engine.num_guesses={self.num_guesses} must not be negative (0 is off)")
        check(
            self.cache_tokens >= self.page_size,
            f"engine.cache_tokens={self.cache_tokens} is less than a page of engine.page_size={self.page_size}: raise it",
        )

    @property
    def num_pages(self) -> int:
        return self.cache_tokens // self.page_size


@dataclasses.dataclass(frozen=True)
class Request:
    """Attributes:
    prompt: token ids, at least one.
    num_samples: answers that are drawn independently of each other.
    first_sample: number of the first of them; samples of a seed differ by their number alone.
    answer: tokens that were drawn before, as of an answer that was broken off; what is drawn goes on from there.
    max_tokens: of an answer, with what was drawn before; None is as many as the context holds.
    min_tokens: before them no token of `stop_ids` is drawn, and a watcher that says stop is not heeded.
    stop_ids: tokens that end an answer and are its last.
    seed: with it and the weights, an answer is always the same, whatever else the engine does.
    top_logprobs: alternatives reported for each token.
    watch: makes, for a sample by its number, a function that is told its tokens and says whether to stop there.
    constraint: makes, for each sample, what its tokens must satisfy; of `stop_ids` only its own may then be drawn, so that an
      answer that ends with `stop` is complete.
    """

    prompt: Sequence[int]
    sampling: Sampling = SAMPLING
    num_samples: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    first_sample: int = 0
    answer: Sequence[int] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    top_logprobs: int = 0
    watch: Callable[[int], Callable[[int], bool]] | None = None
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_tokens", "min_tokens", "seed", "first_sample", "top_logprobs"):
            value = getattr(self, name)
            check(value is None or isinstance(value, numbers.Integral), f"{name}={value} must be a whole number")
        for name in ("prompt", "answer", "stop_ids"):
            strange = [token for token in getattr(self, name) if not isinstance(token, numbers.Integral)]
            check(not strange, f"{name} holds {strange[:1]}: tokens are whole numbers")
        check(len(self.prompt) > 0, "a prompt needs at least one token: give some text, or a <bos> token")
        check(0 < self.num_samples <= MAX_SAMPLES, f"num_samples={self.num_samples} must lie in [1, {MAX_SAMPLES}]")
        check(self.max_tokens is None or self.max_tokens > 0, f"max_tokens={self.max_tokens} must be positive")
        check(self.min_tokens >= 0, f"min_tokens={self.min_tokens} must not be negative")
        check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}",
        )
        check(
            self.max_tokens is None or len(self.answer) < self.max_tokens,
            f"the answer has {len(self.answer)} tokens already, and max_tokens={self.max_tokens}",
        )
        check(
            not (self.answer and (self.watch or self.constraint)),
            "an answer that was broken off cannot be watched or constrained: leave it out, and it is drawn again the same",
        )
        check(
            not (self.constraint and self.min_tokens),
            f"min_tokens={self.min_tokens} does not go with a constraint, which may allow nothing but its end: leave it out",
        )
        check(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2^32)")
        check(0 <= self.first_sample < 2**31, f"first_sample={self.first_sample} must lie in [0, 2^31)")
        check(0 <= self.top_logprobs <= TOP_LOGPROBS, f"top_logprobs={self.top_logprobs} must lie in [0, {TOP_LOGPROBS}]")


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """The most probable tokens at a place and their log-probabilities, the most probable first."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
      request, sample: whose.
      logprob: under the distribution it was drawn from (0 where the most likely one was taken).
      raw_logprob: under the model's own distribution, as the trainer computes it.
      finish_reason: if it is the last: `stop` (a stop token, or the watcher said so), `length` (cut off: as long as it may
        become, or the watcher said so of an answer with a constraint, which nobody knows to be complete there), or `error`.
      error: what the request's own watcher or constraint raised, or the guesses at it, or that the model's logits are not
        finite; the token then says nothing.
    """

    request: int
    sample: int
    token: int
    logprob: float
    raw_logprob: float
    top: Alternatives | None
    raw_top: Alternatives | None
    finish_reason: FinishReason | None
    error: Exception | None = None


@dataclasses.dataclass
class Stats:
    """Counts since the engine was made.

    Attributes:
      prefilled: tokens of prompts that were computed; shared: those that were taken from known pages instead.
      decoded: tokens that were drawn and stand; guessed, guessed_right: of speculative decoding.
    """

    prefilled: int = 0
    shared: int = 0
    decoded: int = 0
    guessed: int = 0
    guessed_right: int = 0
    preemptions: int = 0
    steps: int = 0


@dataclasses.dataclass(eq=False)
class Ongoing:
    """One sample of a request, on its way.

    Attributes:
      order: in which it came.
      tokens: of the prompt and the answer so far.
      max_len: how many they may become.
      pages: that hold the first `num_cached` of its tokens.
      slot: its row of the history; negative while it waits.
      error: as of a `Token`; it ends this sample and nothing else.
    """

    request_id: int
    request: Request
    sample: int
    order: int
    tokens: list[int]
    max_len: int
    watcher: Callable[[int], bool] | None
    constraint: Constraint | None
    pages: list[int] = dataclasses.field(default_factory=list)
    num_cached: int = 0
    slot: int = -1
    error: Exception | None = None

    @property
    def num_drawn(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @functools.cached_property
    def asked(self) -> dict[str, Any]:
        """What its row of `Rows` says at every step."""
        return _asked(self.request, self.sample)


# For speculative decoding: up to so many tokens each that may follow (`inference/speculate.py`).
Guess = Callable[[Sequence[Ongoing], Sequence[int]], Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the engine's own arrays live: on the mesh of the weights, key-value heads over `tensor` where it divides them.

    Attributes:
      heads, kv_heads: the mesh axes over which these lie. Queries go with their keys, or alone where all have the same keys.
    """

    mesh: Mesh | None
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()

    @classmethod
    def beside(cls, params: Params, heads: int, kv_heads: int) -> Placement:
        sharding = jax.tree.leaves(params)[0].sharding
        if not isinstance(sharding, NamedSharding):
            return cls(None)
        mesh = sharding.mesh
        assert isinstance(mesh, Mesh)
        of_heads, of_kv_heads = (
            ("tensor",) if "tensor" in mesh.shape and n % mesh.shape["tensor"] == 0 else () for n in (heads, kv_heads)
        )
        return cls(mesh, of_heads if kv_heads == 1 else of_kv_heads, of_kv_heads)

    @property
    def layout(self) -> Layout | None:
        return None if self.mesh is None else Layout(self.mesh, {"heads": self.heads, "kv_heads": self.kv_heads})

    def pages(self, tree: Tree) -> Tree:
        return self._constrain(tree, PartitionSpec(None, self.kv_heads or None))

    def everywhere(self, tree: Tree) -> Tree:
        return self._constrain(tree, PartitionSpec())

    def _constrain(self, tree: Tree, spec: PartitionSpec) -> Tree:
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))


@functools.partial(jax.jit, static_argnames=("config", "engine", "placement"))
def _start(config: ModelConfig, engine: EngineConfig, placement: Placement) -> tuple[tuple[LayerPages, ...], History]:
    pages = empty_pages(config, engine.num_pages, engine.page_size, engine.cache_dtype)
    return placement.pages(pages), placement.everywhere(History.empty(engine.max_batch, config.vocab_size))


@functools.partial(jax.jit, static_argnames=("config", "placement"), donate_argnames="pages")
def _prefill(
    params: Params,
    config: ModelConfig,
    placement: Placement,
    pages: tuple[LayerPages, ...],
    table: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[LayerPages, ...]:
    """Writes keys and values of int32 tokens [B, T] to their pages."""
    _, cache, _ = forward(params, config, tokens, positions, cache=KVCache(pages, table, placement.layout))
    assert cache is not None
    return placement.pages(cache.pages)


@functools.partial(jax.jit, static_argnames=("config", "placement"), donate_argnames="pages")
def _decode(
    params: Params,
    config: ModelConfig,
    placement: Placement,
    pages: tuple[LayerPages, ...],
    table: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[tuple[LayerPages, ...], jax.Array]:
    """`_prefill`, and the float32 logits [B, T, V] after each token."""
    hidden, cache, _ = forward(params, config, tokens, positions, cache=KVCache(pages, table, placement.layout))
    assert cache is not None
    return placement.pages(cache.pages), unembed(params, config, hidden)


# Apart from `_decode`, so that networks of one vocabulary share it.
@functools.partial(jax.jit, static_argnames="placement", donate_argnames="history")
def _draw(
    history: History,
    placement: Placement,
    logits: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    rows: Rows,
    allowed: jax.Array,
) -> tuple[Draws, History]:
    return placement.everywhere(draw_in_turn(logits, tokens, positions >= 0, rows, history, allowed))


@functools.partial(jax.jit, static_argnames="placement", donate_argnames="pages")
def _copy_page(
    pages: tuple[LayerPages, ...], placement: Placement, source: jax.Array, target: jax.Array
) -> tuple[LayerPages, ...]:
    return placement.pages(jax.tree.map(lambda leaf: leaf.at[target].set(leaf[source]), pages))


@functools.partial(jax.jit, static_argnames="placement", donate_argnames="pages")
def _zero_page(pages: tuple[LayerPages, ...], placement: Placement, page: jax.Array) -> tuple[LayerPages, ...]:
    return placement.pages(jax.tree.map(lambda leaf: leaf.at[page].set(0), pages))


@functools.partial(jax.jit, static_argnames="placement", donate_argnames="pages")
def _zero_pages(pages: tuple[LayerPages, ...], placement: Placement) -> tuple[LayerPages, ...]:
    return placement.pages(jax.tree.map(jnp.zeros_like, pages))


@functools.partial(jax.jit, static_argnames="placement", donate_argnames="history")
def _set_history(history: History, placement: Placement, slot: jax.Array, row: History) -> History:
    return placement.everywhere(jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), history, row))


def abstract_pages(params: Params, model: ModelConfig, config: EngineConfig) -> tuple[LayerPages, ...]:
    """ShapeDtypeStruct of an engine's pages, with shardings where (abstract) `params` have them."""
    placement = _placement(params, model)
    shapes = jax.eval_shape(functools.partial(empty_pages, model, config.num_pages, config.page_size, config.cache_dtype))
    sharding = placement.mesh and NamedSharding(placement.mesh, PartitionSpec(None, placement.kv_heads or None))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def lower_decode(params: Params, model: ModelConfig, config: EngineConfig) -> jax.stages.Lowered:
    """The program that decodes `max_batch` rows, one token each.

    Args:
      params: abstract, with shardings, of a network with a separate entry per layer.
    """
    rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    table, column = rows((config.max_batch, _table_width(model, config))), rows((config.max_batch, 1 + config.num_guesses))
    pages = abstract_pages(params, model, config)
    return _decode.lower(params, model, _placement(params, model), pages, table, column, column)


def _placement(params: Params, model: ModelConfig) -> Placement:
    return Placement.beside(params, model.num_heads, 1 if model.mla else model.num_kv_heads)


def _described(params: Params) -> dict[str, str]:
    return {path_name(path): f"{leaf.dtype} {leaf.shape}" for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _placed_like(new: jax.Array | np.ndarray, old: jax.Array) -> jax.Array:
    """`new` where `old` lies, tied to that place or not as it is: for others the programs would be compiled anew."""
    if isinstance(new, jax.Array) and (new.sharding, new.committed) == (old.sharding, old.committed):
        return new
    return jax.device_put(new, old.sharding) if old.committed else jax.device_put(np.asarray(new))


def _table_width(model: ModelConfig, config: EngineConfig) -> int:
    """Pages of the longest row."""
    return min(-(-model.max_seq_len // config.page_size), config.num_pages)


def _sizes(largest: int, smallest: int = 1) -> list[int]:
    """Powers of two below `largest`, and itself."""
    powers = itertools.takewhile(lambda size: size < largest, (smallest << i for i in itertools.count()))
    return [*powers, largest]


def _fitting(sizes: list[int], count: int) -> int:
    return next(size for size in sizes if size >= count)


class Engine:
    """Attributes:
    model: the network, as it is run here.
    vocab_size: tokens beyond it are never drawn.
    stats: what was done so far.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        config: EngineConfig = EngineConfig(),
        *,
        vocab_size: int | None = None,
        guess: Guess | None = None,
    ):
        """
        Args:
          params: of the trainer or a file, with or without stacked layers; they stay where they are, on one device or a mesh.
          vocab_size: of the tokenizer; None is that of the model.
          guess: for speculative decoding, with `num_guesses`.

        Raises:
          ValueError: settings that do not go with each other, with the model or with the devices.
        """
        self.params, self.model = unstack_layers(params, model)
        self.config = config
        check_backend(model.attention_backend, next(iter(jax.tree.leaves(self.params)[0].devices())).platform)
        self.vocab_size = model.vocab_size if vocab_size is None else vocab_size
        check(
            0 < self.vocab_size <= model.vocab_size,
            f"vocab_size={self.vocab_size} must lie in (0, model.vocab_size={model.vocab_size}]: whose tokenizer is it?",
        )
        check(
            (guess is None) == (config.num_guesses == 0),
            f"engine.num_guesses={config.num_guesses}, but {'no' if guess is None else 'a'} function that guesses: give both "
            "or neither",
        )
        self.stats = Stats()
        self._guess = guess
        self._pool = PagePool(config.num_pages, config.page_size)
        self._placement = _placement(self.params, model)
        self._pages, self._history = _start(self.model, config, self._placement)
        self._table_width = _table_width(self.model, config)
        self._row_sizes = _sizes(config.max_batch)
        self._chunk_sizes = _sizes(config.prefill_chunk, smallest=min(16, config.prefill_chunk))
        words = -(-model.vocab_size // 32)
        in_vocabulary = np.arange(words * 32) < self.vocab_size
        self._in_vocabulary = np.packbits(in_vocabulary, bitorder="little").view(np.uint32)
        self._waiting: collections.deque[Ongoing] = collections.deque()
        self._unclaimed: list[Token] = []  # drawn beside what `generate` was asked for
        self._filling: Ongoing | None = None
        self._running: list[Ongoing] = []
        self._slots = list(range(config.max_batch - 1, -1, -1))
        self._ids = itertools.count()
        self._orders = itertools.count()

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queues a request and returns its number.

        Raises:
          ValueError: what no state of the engine could answer: tokens outside the vocabulary, a prompt or an answer beyond the
            context or the pages, options that do not go together.
        """
        given = (*request.prompt, *request.answer)
        lowest, highest = min(given), max(given)
        check(
            lowest >= 0 and highest < self.model.vocab_size,
            f"a prompt holds token ids {lowest}..{highest}, but the vocabulary is 0..{self.model.vocab_size - 1}: was it "
            "encoded with another tokenizer?",
        )
        length, wanted = len(request.prompt), request.max_tokens or len(request.answer) + 1
        for name, limit in (("model.max_seq_len", self.model.max_seq_len), ("engine.cache_tokens", self.max_len)):
            check(
                length + wanted <= limit,
                f"a prompt of {length} tokens and {wanted} new ones exceed {name}={limit}: shorten one of them",
            )
        biased = [*(token for token, _ in request.sampling.logit_bias), *request.stop_ids]
        check(
            all(0 <= token < self.model.vocab_size for token in biased),
            f"logit_bias and stop_ids name tokens {sorted(biased)}, but the vocabulary is 0..{self.model.vocab_size - 1}",
        )
        check(
            not (self.config.num_guesses and request.constraint),
            "a constrained answer does not go with speculative decoding: set engine.num_guesses=0",
        )
        request_id = next(self._ids)
        # All of them before any is queued: what the request brings along may raise.
        samples = [
            Ongoing(
                request_id,
                request,
                sample,
                next(self._orders),
                [*map(int, request.prompt), *map(int, request.answer)],
                self.max_len if request.max_tokens is None else length + request.max_tokens,
                request.watch(sample) if request.watch else None,
                request.constraint() if request.constraint else None,
            )
            for sample in range(request.first_sample, request.first_sample + request.num_samples)
        ]
        for seq in samples:
            check(
                seq.constraint is None or seq.constraint.stop_id in request.stop_ids,
                "a constraint ends an answer with a token that is not among stop_ids: add it",
            )
        self._waiting += samples
        return request_id

    def abort(self, request_id: int) -> None:
        """Drops what is left of a request; nothing if it has ended."""
        self._waiting = collections.deque(seq for seq in self._waiting if seq.request_id != request_id)
        self._unclaimed = [token for token in self._unclaimed if token.request != request_id]
        for seq in self._holding():
            if seq.request_id == request_id:
                self._let_go(seq)

    @property
    def max_len(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return min(self.model.max_seq_len, self.config.num_pages * self.config.page_size)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._holding() or self._unclaimed)

    @property
    def num_pages_held(self) -> int:
        return self.config.num_pages - self._pool.num_available

    def load(self, params: Params, model: ModelConfig) -> None:
        """Takes other weights of the same network, as after an update of the trainer.

        They are put where the old ones lie. What was computed with those is forgotten; sequences that are running go on with
        their tokens, whose keys and values are computed anew.

        Raises:
          ValueError: the configuration, or a parameter's name, shape or dtype, is another. The engine keeps the old ones.
        """
        params, model = unstack_layers(params, model)
        check(model == self.model, "the new weights are of another network: make a new Engine")
        old, new = _described(self.params), _described(params)
        for name in sorted(old | new):
            there, here = new.get(name, "missing"), old.get(name, "no parameter")
            check(there == here, f"of the new weights {name} is {there}, in this engine {here}: they are of another network")
        for seq in sorted(self._holding(), key=lambda seq: seq.order, reverse=True):
            self._preempt(seq)
        self._pool.forget_all()
        # What the old ones made of tokens may not be finite, and attention takes what a row does not see times 0.
        self._pages = _zero_pages(self._pages, self._placement)
        self.params = jax.tree.map(_placed_like, params, self.params)

    def generate(self, requests: Iterable[Request]) -> list[list[list[Token]]]:
        """The answers of each request, a list of tokens per sample; what was drawn of others beside, the next step returns.

        Raises:
          ValueError: see `submit`; RuntimeError: a watcher, a constraint or a guess failed, or logits are not finite. The
            requests are dropped.
        """
        answers: dict[int, dict[int, list[Token]]] = {}
        try:
            for request in requests:
                samples = range(request.first_sample, request.first_sample + request.num_samples)
                answers[self.submit(request)] = {n: [] for n in samples}
            unfinished = sum(len(samples) for samples in answers.values())
            while unfinished:
                tokens = self._draw_next()
                self._unclaimed += [token for token in tokens if token.request not in answers]
                for token in tokens:
                    if token.request in answers:
                        if token.error is not None:
                            raise RuntimeError(f"a request's {FAILED}") from token.error
                        answers[token.request][token.sample].append(token)
                        unfinished -= token.finish_reason is not None
        except BaseException:
            for request_id in answers:
                self.abort(request_id)
            raise
        return [list(samples.values()) for samples in answers.values()]

    def logits_along(self, tokens: Sequence[int], num_prefilled: int) -> np.ndarray:
        """float32 [len(tokens) - num_prefilled, V]: after each token that is not prefilled, by the programs that decode.

        Raises:
          ValueError: the engine has work, or the tokens do not fit.
        """
        check(not self.has_work, "the engine has work: wait for its end")
        request_id = self.submit(Request(tokens[: num_prefilled + 1], max_tokens=len(tokens) - num_prefilled))
        try:
            while not self._running:
                self._fill()
            seq, logits = self._running[0], []
            for i in range(num_prefilled, len(tokens)):
                seq.tokens, seq.num_cached = [*tokens[: i + 1]], i
                self._find_room()
                token, position = (np.full((1, 1 + self.config.num_guesses), fill, np.int32) for fill in (0, -1))
                token[0, 0], position[0, 0] = tokens[i], i
                table = self._table([seq], 1)
                self._pages, row = _decode(self.params, self.model, self._placement, self._pages, table, token, position)
                logits.append(np.asarray(row)[0, 0])
        finally:
            self.abort(request_id)
        return np.stack(logits)

    def warm_up(self) -> None:
        """Compiles every shape."""
        nowhere = np.zeros((1, self._table_width), np.int32)
        for size in self._chunk_sizes:
            padding = np.full((1, size), -1, np.int32)
            self._pages = _prefill(
                self.params, self.model, self._placement, self._pages, nowhere, np.zeros_like(padding), padding
            )
        for size in self._row_sizes:
            self._run([], size)
        self._pages = _copy_page(self._pages, self._placement, np.int32(0), np.int32(0))
        self._pages = _zero_page(self._pages, self._placement, np.int32(0))
        self._pages = _zero_pages(self._pages, self._placement)
        self._history = _set_history(self._history, self._placement, np.int32(0), self._history_row(Sampling(), [], []))

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Token]:
        """Goes on with what there is to do; returns the tokens that were drawn, those of a request in their order."""
        drawn = self._draw_next()
        unclaimed, self._unclaimed = self._unclaimed, []
        return [*unclaimed, *drawn]

    def _draw_next(self) -> list[Token]:
        self.stats.steps += 1
        self._fill()
        self._find_room()
        return self._advance() if self._running else []

    def _holding(self) -> list[Ongoing]:
        return [*self._running, *([self._filling] if self._filling else [])]

    def _fill(self) -> None:
        """Admits what is waiting, and computes up to `prefill_chunk` tokens of it."""
        budget = self.config.prefill_chunk
        while budget and (self._filling or self._admit()):
            seq = self._filling
            assert seq is not None
            count = min(len(seq.tokens) - 1 - seq.num_cached, budget)
            if count > 0:
                self._prefill(seq, count)
                budget -= count
            if seq.num_cached == len(seq.tokens) - 1:
                self._pool.learn(seq.pages, seq.tokens[: seq.num_cached], partial=True)
                self._running.append(seq)
                self._filling = None

    def _admit(self) -> bool:
        """Makes the sequence that has waited longest the one that is filled, if there is room for it."""
        if not self._waiting or not self._slots:
            return False
        seq = self._waiting[0]
        pages, num_cached = self._pool.match(seq.tokens[:-1])
        wanted = -(-len(seq.tokens) // self.config.page_size) - len(pages)
        # Everyone who is running may need a page next, and who comes now would be the first to give its own up. A last page
        # that others hold too is copied.
        margin = len(self._running) + (num_cached % self.config.page_size > 0) if self._running else 0
        if self._pool.num_available < wanted + margin:
            for page in reversed(pages):
                self._pool.release(page)
            return False
        self._waiting.popleft()
        seq.pages, seq.num_cached = pages, num_cached
        self.stats.shared += num_cached
        for _ in range(wanted):
            page = self._pool.take()
            assert page is not None
            seq.pages.append(page)
        seq.slot = self._slots.pop()
        if seq.request.sampling.reads_history:
            prompt, answer = seq.tokens[: len(seq.request.prompt)], seq.tokens[len(seq.request.prompt) :]
            row = self._history_row(seq.request.sampling, prompt, answer)
            self._history = _set_history(self._history, self._placement, np.int32(seq.slot), row)
        self._filling = seq
        return True

    def _prefill(self, seq: Ongoing, count: int) -> None:
        owned = self._own_page(seq, seq.num_cached // self.config.page_size)
        assert owned, "admission left no page for a copy"
        size = _fitting(self._chunk_sizes, count)
        tokens = np.zeros((1, size), np.int32)
        positions = np.full((1, size), -1, np.int32)
        tokens[0, :count] = seq.tokens[seq.num_cached : seq.num_cached + count]
        positions[0, :count] = np.arange(seq.num_cached, seq.num_cached + count)
        self._pages = _prefill(self.params, self.model, self._placement, self._pages, self._table([seq], 1), tokens, positions)
        seq.num_cached += count
        self.stats.prefilled += count
        self._pool.learn(seq.pages, seq.tokens[: seq.num_cached])

    def _find_room(self) -> None:
        """Gives every running sequence a page for its next token; who came last gives up its own for the others."""
        for seq in sorted(self._running, key=lambda seq: seq.order):
            while seq.slot >= 0 and not self._has_room(seq):
                self._preempt(max(self._holding(), key=lambda other: other.order))

    def _has_room(self, seq: Ongoing) -> bool:
        index = seq.num_cached // self.config.page_size
        if index == len(seq.pages):
            page = self._pool.take()
            if page is None:
                return False
            seq.pages.append(page)
        return self._own_page(seq, index)

    def _own_page(self, seq: Ongoing, index: int) -> bool:
        """Makes the page written to next one that nobody else holds, by copying if need be; False if there is none left."""
        shared = seq.pages[index]
        if self._pool.holders(shared) == 1:
            self._pool.forget_beyond(shared, seq.num_cached - index * self.config.page_size)
            return True
        page = self._pool.take()
        if page is None:
            return False
        self._pages = _copy_page(self._pages, self._placement, np.int32(shared), np.int32(page))
        self._pool.release(shared)
        seq.pages[index] = page
        return True

    def _advance(self) -> list[Token]:
        """One token, or more where guesses were right, for every running sequence."""
        rows = list(self._running)
        guesses = self._guesses(rows)
        draws = self._run(rows, _fitting(self._row_sizes, len(rows)), guesses)
        drawn: list[Token] = []
        for row, seq in enumerate(rows):
            self.stats.guessed += len(guesses[row])
            for turn in range(len(guesses[row]) + 1):
                token = self._token(seq, draws, row, turn)
                drawn.append(token)
                seq.num_cached = len(seq.tokens)
                seq.tokens.append(token.token)
                if seq.num_cached % self.config.page_size == 0:
                    self._pool.learn(seq.pages, seq.tokens[: seq.num_cached])
                if token.finish_reason:
                    if math.isfinite(token.raw_logprob):
                        self._pool.learn(seq.pages, seq.tokens[: seq.num_cached], partial=True)
                    else:
                        self._zero_own_pages(seq)
                    self._let_go(seq)
                    break
                if turn == len(guesses[row]) or guesses[row][turn] != token.token:
                    break
                self.stats.guessed_right += 1
        self.stats.decoded += len(drawn)
        return drawn

    def _token(self, seq: Ongoing, draws: Draws, row: int, turn: int) -> Token:
        token = int(draws.token[row, turn])
        request = seq.request
        finish_reason: FinishReason | None = "length" if len(seq.tokens) + 1 == seq.max_len else None
        if token in request.stop_ids:
            finish_reason = "stop"
        raw_logprob = float(draws.raw_logprob[row, turn])
        try:
            if not math.isfinite(raw_logprob):
                raise FloatingPointError(
                    f"the logits after token {len(seq.tokens) - 1} are not finite: look at the weights and model.dtype"
                )
            if seq.constraint:
                seq.constraint.advance(token)
            if seq.watcher and seq.watcher(token) and seq.num_drawn + 1 >= request.min_tokens:
                finish_reason = "length" if seq.constraint else "stop"
        except Exception as error:
            seq.error = seq.error or error
        if seq.error is not None:
            finish_reason = "error"

        def best(tokens: jax.Array, logprobs: jax.Array) -> Alternatives | None:
            if not request.top_logprobs:
                return None
            ids, values = tokens[row, turn, : request.top_logprobs], logprobs[row, turn, : request.top_logprobs]
            possible = values > MASKED / 2  # There may be fewer than were asked for.
            return Alternatives(tuple(map(int, ids[possible])), tuple(map(float, values[possible])))

        return Token(
            seq.request_id,
            seq.sample,
            token,
            float(draws.logprob[row, turn]),
            raw_logprob,
            best(draws.top_tokens, draws.top_logprobs),
            best(draws.raw_top_tokens, draws.raw_top_logprobs),
            finish_reason,
            seq.error,
        )

    def _guesses(self, rows: list[Ongoing]) -> list[list[int]]:
        """Tokens that may follow each row's, as far as its answer and pages of its own go."""
        guesses: list[list[int]] = [[] for _ in rows]
        if self._guess is None:
            return guesses
        # A minimum of tokens forbids some for a whole step.
        asked = [i for i, seq in enumerate(rows) if seq.num_drawn >= seq.request.min_tokens]
        counts = [min(self.config.num_guesses, rows[i].max_len - len(rows[i].tokens) - 1) for i in asked]
        try:
            found = self._checked_guesses([rows[i] for i in asked], counts)
        except Exception:
            # Each by itself: an error is that of the row at which it comes again.
            found = [self._guessed_alone(rows[i], count) for i, count in zip(asked, counts, strict=True)]
        for i, guessed in zip(asked, found, strict=True):
            guesses[i] = self._within_pages(rows[i], guessed)
        return guesses

    def _checked_guesses(self, rows: list[Ongoing], counts: list[int]) -> list[list[int]]:
        assert self._guess is not None
        found = [
            [int(token) for token in guessed[:count]] for guessed, count in zip(self._guess(rows, counts), counts, strict=True)
        ]
        for guessed in found:
            check(
                all(0 <= token < self.model.vocab_size for token in guessed),
                f"tokens {guessed} were guessed, but the vocabulary is 0..{self.model.vocab_size - 1}",
            )
        return found

    def _guessed_alone(self, seq: Ongoing, count: int) -> list[int]:
        try:
            return self._checked_guesses([seq], [count])[0]
        except Exception as error:
            seq.error = error
            return []

    def _within_pages(self, seq: Ongoing, guesses: list[int]) -> list[int]:
        while (seq.num_cached + len(guesses)) // self.config.page_size >= len(seq.pages):
            page = self._pool.take()
            if page is None:
                return guesses[: len(seq.pages) * self.config.page_size - seq.num_cached - 1]
            seq.pages.append(page)
        return guesses

    def _run(self, rows: list[Ongoing], size: int, guesses: Sequence[Sequence[int]] = ()) -> Draws:
        """The next tokens of `rows`, padded to `size`; arrays of the host."""
        tokens = np.zeros((size, 1 + self.config.num_guesses), np.int32)
        positions = np.full_like(tokens, -1)
        allowed = np.tile(self._in_vocabulary, (size, 1))
        for i, (seq, guessed) in enumerate(zip(rows, guesses, strict=True)):
            count = 1 + len(guessed)
            tokens[i, :count] = seq.tokens[-1], *guessed
            positions[i, :count] = np.arange(seq.num_cached, seq.num_cached + count)
            allowed[i] &= self._allowed(seq)
        wanted = [seq.asked | {"slot": seq.slot, "num_drawn": seq.num_drawn} for seq in rows]
        # Rows without a sequence name a slot that does not exist, and what they add to it is dropped.
        wanted += [_NOTHING | {"slot": self.config.max_batch, "num_drawn": 0}] * (size - len(rows))
        columns: dict[str, Any] = {
            field.name: np.array([row[field.name] for row in wanted], _DTYPES.get(field.name, np.float32))
            for field in dataclasses.fields(Rows)
        }
        table = self._table(rows, size)
        self._pages, logits = _decode(self.params, self.model, self._placement, self._pages, table, tokens, positions)
        draws, self._history = _draw(self._history, self._placement, logits, tokens, positions, Rows(**columns), allowed)
        return jax.device_get(draws)

    def _allowed(self, seq: Ongoing) -> np.ndarray:
        """uint32 [words], as `Constraint.allowed`; what raises, or allows nothing, is an error of the sequence."""
        allowed = self._in_vocabulary.copy()
        try:
            ends = seq.request.stop_ids if seq.num_drawn < seq.request.min_tokens else frozenset[int]()
            if seq.constraint:
                allowed &= seq.constraint.allowed()
                ends = seq.request.stop_ids - {seq.constraint.stop_id}
            for token in ends:
                allowed[token // 32] &= ~np.uint32(1 << (token % 32))
            check(bool(allowed.any()), "no token is allowed here, by the constraint, or min_tokens and stop_ids")
        except Exception as error:
            seq.error = error
            return self._in_vocabulary
        return allowed

    def _table(self, rows: Sequence[Ongoing], size: int) -> np.ndarray:
        table = np.zeros((size, self._table_width), np.int32)
        for i, seq in enumerate(rows):
            table[i, : len(seq.pages)] = seq.pages
        return table

    def _history_row(self, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> History:
        size = self.model.vocab_size
        bias = np.zeros(size, np.float32)
        for token, value in sampling.logit_bias:
            bias[token] = value
        counts = np.bincount(np.asarray(answer, np.int64), minlength=size).astype(np.int32)
        in_prompt = np.zeros(size, bool)
        in_prompt[np.asarray(prompt, np.int64)] = True
        return History(*map(jnp.asarray, (bias, counts, in_prompt)))

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _preempt(self, seq: Ongoing) -> None:
        """Sends a sequence back to the head of the queue, without its pages."""
        self.stats.preemptions += 1
        self._let_go(seq)
        self._waiting.appendleft(seq)

    def _zero_own_pages(self, seq: Ongoing) -> None:
        """Forgets what is not finite, perhaps: whoever got such a page next would take it times 0, which is not 0."""
        for page in seq.pages:
            if self._pool.holders(page) == 1:
                self._pool.forget_beyond(page, 0)
                self._pages = _zero_page(self._pages, self._placement, np.int32(page))

    def _let_go(self, seq: Ongoing) -> None:
        # The beginning last: what others may share longest is forgotten last.
        for page in reversed(seq.pages):
            self._pool.release(page)
        self._slots.append(seq.slot)
        seq.pages, seq.num_cached, seq.slot = [], 0, -1
        if seq is self._filling:
            self._filling = None
        else:
            self._running.remove(seq)


def _asked(request: Request, sample: int) -> dict[str, Any]:
    """The fields of `Rows` that stay the same from token to token."""
    sampling = request.sampling
    names = [field.name for field in dataclasses.fields(Sampling) if field.name != "logit_bias"]
    return {name: getattr(sampling, name) for name in names} | {
        "reads_history": sampling.reads_history,
        "seed": request.seed,
        "sample": sample,
        "top_logprobs": request.top_logprobs,
    }


_NOTHING = _asked(Request([0], Sampling(temperature=0.0)), sample=0)
_DTYPES = {
    "slot": np.int32,
    "reads_history": bool,
    "top_k": np.int32,
    "seed": np.uint32,
    "sample": np.uint32,
    "num_drawn": np.uint32,
    "top_logprobs": np.int32,
}
