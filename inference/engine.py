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

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from inference import programs
from inference.config import EngineConfig
from inference.drawing import allowed, columns, drawn_token, history_row
from inference.programs import Placement
from inference.request import FAILED, Request, Token
from inference.sampling import Draws, Sampling
from inference.schedule import Ongoing, Schedule
from model.attention import check_backend
from model.config import ModelConfig, check
from model.params import Params, path_name, unstack_layers


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


# For speculative decoding: up to so many tokens each that may follow (`inference/speculate.py`).
Guess = Callable[[Sequence[Ongoing], Sequence[int]], Sequence[Sequence[int]]]


def _described(params: Params) -> dict[str, str]:
    return {path_name(path): f"{leaf.dtype} {leaf.shape}" for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _placed_like(new: jax.Array | np.ndarray, old: jax.Array) -> jax.Array:
    """`new` where `old` lies, tied to that place or not as it is: for others the programs would be compiled anew."""
    if isinstance(new, jax.Array) and (new.sharding, new.committed) == (old.sharding, old.committed):
        return new
    return jax.device_put(new, old.sharding) if old.committed else jax.device_put(np.asarray(new))


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
        windows = {model.window(layer) for layer in range(model.num_layers)} - {0}
        self._schedule = Schedule(config, sight=min(windows, default=0))
        self._placement = Placement.beside(self.params, model)
        self._pages, self._history = programs.empty_state(self.model, config, self._placement)
        self._table_width = programs.table_width(self.model, config)
        self._row_sizes = _sizes(config.max_batch)
        self._chunk_sizes = _sizes(config.prefill_chunk, smallest=min(16, config.prefill_chunk))
        words = -(-model.vocab_size // 32)
        in_vocabulary = np.arange(words * 32) < self.vocab_size
        self._in_vocabulary = np.packbits(in_vocabulary, bitorder="little").view(np.uint32)
        self._unclaimed: list[Token] = []  # drawn beside what `generate` was asked for
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
        self._schedule.add(samples)
        return request_id

    def abort(self, request_id: int) -> None:
        """Drops what is left of a request; nothing if it has ended."""
        self._schedule.drop(request_id)
        self._unclaimed = [token for token in self._unclaimed if token.request != request_id]

    @property
    def max_len(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return min(self.model.max_seq_len, self.config.num_pages * self.config.page_size)

    @property
    def has_work(self) -> bool:
        return self._schedule.has_work or bool(self._unclaimed)

    @property
    def num_pages_held(self) -> int:
        return self.config.num_pages - self._schedule.num_available

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
        self.stats.preemptions += self._schedule.start_over()
        # What the old ones made of tokens may not be finite, and attention takes what a row does not see times 0.
        self._pages = programs.zero_pages(self._pages, self._placement)
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
            while not self._schedule.running:
                self._fill()
            seq, logits = self._schedule.running[0], []
            for i in range(num_prefilled, len(tokens)):
                seq.tokens, seq.num_cached = [*tokens[: i + 1]], i
                self.stats.preemptions += self._schedule.make_room(self._copy_page)
                token, position = (np.full((1, 1 + self.config.num_guesses), fill, np.int32) for fill in (0, -1))
                token[0, 0], position[0, 0] = tokens[i], i
                table = self._table([seq], 1)
                logits.append(np.asarray(self._decode(table, token, position))[0, 0])
        finally:
            self.abort(request_id)
        return np.stack(logits)

    def warm_up(self) -> None:
        """Compiles every shape. It writes to pages, so what is known of them is forgotten.

        Raises:
          ValueError: the engine has work.
        """
        check(not self.has_work, "the engine has work: wait for its end")
        self._schedule.start_over()
        nowhere = np.zeros((1, self._table_width), np.int32)
        for size in self._chunk_sizes:
            padding = np.full((1, size), -1, np.int32)
            self._prefill(nowhere, np.zeros_like(padding), padding)
        for size in self._row_sizes:
            self._run([], size)
        self._copy_page(0, 0)
        self._zero_page(0)
        self._pages = programs.zero_pages(self._pages, self._placement)
        self._set_history(0, Sampling(), [], [])

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Token]:
        """Goes on with what there is to do; returns the tokens that were drawn, those of a request in their order."""
        drawn = self._draw_next()
        unclaimed, self._unclaimed = self._unclaimed, []
        return [*unclaimed, *drawn]

    def _draw_next(self) -> list[Token]:
        self.stats.steps += 1
        self._fill()
        self.stats.preemptions += self._schedule.make_room(self._copy_page)
        return self._advance() if self._schedule.running else []

    def _fill(self) -> None:
        """Admits what is waiting, and computes up to `prefill_chunk` tokens of it."""
        budget = self.config.prefill_chunk
        while budget and (seq := self._schedule.filling or self._admit()):
            count = min(len(seq.tokens) - 1 - seq.num_cached, budget)
            if count > 0:
                self._fill_in(seq, count)
                budget -= count
            if seq.num_cached == len(seq.tokens) - 1:
                self._schedule.run()

    def _admit(self) -> Ongoing | None:
        seq = self._schedule.admit()
        if seq:
            self.stats.shared += seq.num_cached
            if seq.request.sampling.reads_history:
                length = len(seq.request.prompt)
                self._set_history(seq.slot, seq.request.sampling, seq.tokens[:length], seq.tokens[length:])
        return seq

    def _fill_in(self, seq: Ongoing, count: int) -> None:
        owned = self._schedule.own_next_page(seq, self._copy_page)
        assert owned, "admission left no page for a copy"
        size = _fitting(self._chunk_sizes, count)
        tokens = np.zeros((1, size), np.int32)
        positions = np.full((1, size), -1, np.int32)
        tokens[0, :count] = seq.tokens[seq.num_cached : seq.num_cached + count]
        positions[0, :count] = np.arange(seq.num_cached, seq.num_cached + count)
        self._prefill(self._table([seq], 1), tokens, positions)
        seq.num_cached += count
        self.stats.prefilled += count
        self._schedule.learn(seq)

    def _advance(self) -> list[Token]:
        """One token, or more where guesses were right, for every running sequence."""
        rows = list(self._schedule.running)
        guesses = self._guesses(rows)
        draws = self._run(rows, _fitting(self._row_sizes, len(rows)), guesses)
        drawn: list[Token] = []
        for row, seq in enumerate(rows):
            self.stats.guessed += len(guesses[row])
            for turn in range(len(guesses[row]) + 1):
                token = drawn_token(seq, draws, row, turn)
                drawn.append(token)
                seq.num_cached = len(seq.tokens)
                seq.tokens.append(token.token)
                if seq.num_cached % self.config.page_size == 0:
                    self._schedule.learn(seq)
                is_finite = math.isfinite(token.raw_logprob)
                if is_finite:
                    self._schedule.prove(seq)
                if token.finish_reason:
                    if is_finite:
                        self._schedule.learn(seq, partial=True)
                    self._schedule.let_go(seq)
                    break
                if turn == len(guesses[row]) or guesses[row][turn] != token.token:
                    break
                self.stats.guessed_right += 1
        self.stats.decoded += len(drawn)
        return drawn

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
            guesses[i] = guessed[: self._schedule.extend(rows[i], len(guessed))]
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

    def _run(self, rows: list[Ongoing], size: int, guesses: Sequence[Sequence[int]] = ()) -> Draws:
        """The next tokens of `rows`, padded to `size`; arrays of the host."""
        tokens = np.zeros((size, 1 + self.config.num_guesses), np.int32)
        positions = np.full_like(tokens, -1)
        may = np.tile(self._in_vocabulary, (size, 1))
        for i, (seq, guessed) in enumerate(zip(rows, guesses, strict=True)):
            count = 1 + len(guessed)
            tokens[i, :count] = seq.tokens[-1], *guessed
            positions[i, :count] = np.arange(seq.num_cached, seq.num_cached + count)
            may[i] &= allowed(seq, self._in_vocabulary)
        logits = self._decode(self._table(rows, size), tokens, positions)
        asked = columns(rows, size, no_slot=self.config.max_batch)
        draws, self._history = programs.draw(self._history, self._placement, logits, tokens, positions, asked, may)
        return jax.device_get(draws)

    def _prefill(self, table: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> None:
        self._clean()
        self._pages = programs.prefill(self.params, self.model, self._placement, self._pages, table, tokens, positions)

    def _decode(self, table: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> jax.Array:
        self._clean()
        self._pages, logits = programs.decode(self.params, self.model, self._placement, self._pages, table, tokens, positions)
        return logits

    def _table(self, rows: Sequence[Ongoing], size: int) -> np.ndarray:
        table = np.zeros((size, self._table_width), np.int32)
        for i, seq in enumerate(rows):
            # The rest is read where another row is longer, and times 0: another's pages may hold what is not finite.
            table[i] = seq.pages[0]
            table[i, : len(seq.pages)] = seq.pages
        return table

    def _set_history(self, slot: int, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> None:
        row = history_row(sampling, prompt, answer, self.model.vocab_size)
        self._history = programs.set_history(self._history, self._placement, np.int32(slot), row)

    def _clean(self) -> None:
        while self._schedule.unclean:
            self._zero_page(self._schedule.unclean.pop())

    def _copy_page(self, source: int, target: int) -> None:
        self._clean()
        self._pages = programs.copy_page(self._pages, self._placement, np.int32(source), np.int32(target))

    def _zero_page(self, page: int) -> None:
        self._pages = programs.zero_page(self._pages, self._placement, np.int32(page))
