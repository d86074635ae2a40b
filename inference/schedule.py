"""Whose turn it is: what waits, what is filled, what runs, and the pages of each. Weights and logits are nothing to it.

One sequence at a time is filled, that is, computed up to its last token but one; then it runs, a token or more a step. When
pages run out, the one that came last gives up its own and waits again.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from inference.config import EngineConfig
from inference.pages import PagePool
from inference.request import Constraint, Request
from inference.sampling import Sampling

CopyPage = Callable[[int, int], None]  # writes what the first page holds to the second


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
        sampling = self.request.sampling
        names = [field.name for field in dataclasses.fields(Sampling) if field.name != "logit_bias"]
        return {name: getattr(sampling, name) for name in names} | {
            "reads_history": sampling.reads_history,
            "seed": self.request.seed,
            "sample": self.sample,
            "top_logprobs": self.request.top_logprobs,
        }


class Schedule:
    """Attributes:
    filling: the sequence whose prompt is computed, if any.
    running: those that get a token every step.
    unclean: pages that may hold what is not finite, to be zeroed before any is written or read: attention takes what a row does
      not see times 0, and 0 times NaN is NaN.
    """

    def __init__(self, config: EngineConfig, sight: int = 0):
        """
        Args:
          sight: how far back logits see the keys and values of every layer; 0 is to the beginning.
        """
        self.filling: Ongoing | None = None
        self.running: list[Ongoing] = []
        self.unclean: list[int] = []
        self._unproven: set[int] = set()  # held pages that were written to since logits that see them were last finite
        self._unseen: set[int] = set()  # that finite logits came after, from beyond a window; zeroed when taken by another
        self._sight = sight
        self._waiting: collections.deque[Ongoing] = collections.deque()
        self._slots = list(range(config.max_batch - 1, -1, -1))
        self._pool = PagePool(config.num_pages, config.page_size)
        self._page_size = config.page_size

    @property
    def holding(self) -> list[Ongoing]:
        """Those that have pages."""
        return [*self.running, *([self.filling] if self.filling else [])]

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self.holding)

    @property
    def num_available(self) -> int:
        """Pages that nobody holds."""
        return self._pool.num_available

    # --- coming and going ---------------------------------------------------------------------------------------------

    def add(self, samples: Iterable[Ongoing]) -> None:
        self._waiting += samples

    def admit(self) -> Ongoing | None:
        """Makes the sequence that has waited longest the one that is filled, if there is room for it."""
        if not self._waiting or not self._slots:
            return None
        seq = self._waiting[0]
        pages, num_cached = self._pool.match(seq.tokens[:-1])
        wanted = -(-len(seq.tokens) // self._page_size) - len(pages)
        # Everyone who is running may need a page next, and who comes now would be the first to give its own up. A last page
        # that others hold too is copied.
        margin = len(self.running) + (num_cached % self._page_size > 0) if self.running else 0
        if self._pool.num_available < wanted + margin:
            for page in reversed(pages):
                self._pool.release(page)
            return None
        self._waiting.popleft()
        seq.pages, seq.num_cached = pages, num_cached
        self._unproven |= self._unseen.intersection(pages)  # by this one, which may see them
        self._unseen.difference_update(pages)
        for _ in range(wanted):
            page = self._take()
            assert page is not None
            seq.pages.append(page)
        seq.slot = self._slots.pop()
        self.filling = seq
        return seq

    def run(self) -> None:
        """What is filled is complete, and runs."""
        assert self.filling is not None
        self.learn(self.filling, partial=True)
        self.running.append(self.filling)
        self.filling = None

    def drop(self, request_id: int) -> None:
        """All samples of a request leave; nothing if it has ended."""
        self._waiting = collections.deque(seq for seq in self._waiting if seq.request_id != request_id)
        for seq in self.holding:
            if seq.request_id == request_id:
                self.let_go(seq)

    def start_over(self) -> int:
        """Forgets what pages hold; sends all who hold any back to the queue, in their order, and returns how many."""
        holding = sorted(self.holding, key=lambda seq: seq.order, reverse=True)
        for seq in holding:
            self._preempt(seq)
        self._pool.forget_all()
        return len(holding)

    def let_go(self, seq: Ongoing) -> None:
        """It leaves, and its pages and its slot are free; what nobody else can prove finite any more is forgotten."""
        for page in self._unproven.intersection(seq.pages):
            if self._pool.holders(page) == 1:
                self._pool.forget_beyond(page, 0)
                self._unproven.remove(page)
                self.unclean.append(page)
        # The beginning last: what others may share longest is forgotten last.
        for page in reversed(seq.pages):
            self._pool.release(page)
        self._slots.append(seq.slot)
        seq.pages, seq.num_cached, seq.slot = [], 0, -1
        if seq is self.filling:
            self.filling = None
        else:
            self.running.remove(seq)

    def _preempt(self, seq: Ongoing) -> None:
        """Sends a sequence back to the head of the queue, without its pages."""
        self.let_go(seq)
        self._waiting.appendleft(seq)

    # --- pages --------------------------------------------------------------------------------------------------------

    def make_room(self, copy_page: CopyPage) -> int:
        """Gives every running sequence a page for its next token; who came last gives up its own for the others.

        Returns:
          How many were sent back.
        """
        num_sent_back = 0
        for seq in sorted(self.running, key=lambda seq: seq.order):
            while seq.slot >= 0 and not self._has_room(seq, copy_page):
                self._preempt(max(self.holding, key=lambda other: other.order))
                num_sent_back += 1
        return num_sent_back

    def extend(self, seq: Ongoing, count: int) -> int:
        """Pages for `count` tokens after the next one, if there are so many; returns for how many of them there is room."""
        while (seq.num_cached + count) // self._page_size >= len(seq.pages):
            page = self._take()
            if page is None:
                return len(seq.pages) * self._page_size - seq.num_cached - 1
            seq.pages.append(page)
        return count

    def own_next_page(self, seq: Ongoing, copy_page: CopyPage) -> bool:
        """Makes the page written to next one that nobody else holds, by copying if need be; False if there is none left."""
        index = seq.num_cached // self._page_size
        shared = seq.pages[index]
        if self._pool.holders(shared) == 1:
            self._pool.forget_beyond(shared, seq.num_cached - index * self._page_size)
            self._unproven.add(shared)
            return True
        page = self._take()
        if page is None:
            return False
        copy_page(shared, page)
        self._pool.release(shared)
        seq.pages[index] = page
        return True

    def learn(self, seq: Ongoing, *, partial: bool = False) -> None:
        """Others may share the pages that are full, and where `partial` the last one too."""
        self._pool.learn(seq.pages, seq.tokens[: seq.num_cached], partial=partial)

    def prove(self, seq: Ongoing) -> None:
        """The logits after all that its pages hold are finite, and so are the pages that they see."""
        if self._sight:
            num_unseen = -(-max(0, seq.num_cached - self._sight) // self._page_size)
            self._unseen |= self._unproven.intersection(seq.pages[:num_unseen])
        self._unproven.difference_update(seq.pages)

    def _take(self) -> int | None:
        page = self._pool.take()
        if page is not None:
            self._unproven.add(page)
            if page in self._unseen:
                self._unseen.remove(page)
                self.unclean.append(page)
        return page

    def _has_room(self, seq: Ongoing, copy_page: CopyPage) -> bool:
        if seq.num_cached // self._page_size == len(seq.pages):
            page = self._take()
            if page is None:
                return False
            seq.pages.append(page)
        return self.own_next_page(seq, copy_page)
