"""Who holds which page of the KV cache: free pages, reference counts, and prefixes that can be shared. No jax.

A page that holds the keys and values of a full run of tokens is known by its tokens and the page before it, so a sequence that
begins with the same tokens takes it instead of computing it again. A page that nobody holds stays known until its room is
needed; the one that was let go of first goes first. The last, partly filled page of a prompt is known too: whoever takes it
copies it before writing, if somebody else holds it, and otherwise makes the pool forget what it writes over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

_ROOT = -1  # stands before a sequence's first page

# (serial number of the page before it, its tokens): compared as such, so that no two prefixes are taken for one another.
_Key = tuple[int, tuple[int, ...]]


@dataclasses.dataclass
class _Page:
    holders: int = 0
    serial: int = _ROOT  # of what it holds; never used twice, unlike the page
    keys: list[_Key] = dataclasses.field(default_factory=list)


class PagePool:
    """Attributes:
    page_size: tokens of a page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self._pages = [_Page() for _ in range(num_pages)]
        self._free = list(range(num_pages - 1, -1, -1))
        self._unheld: dict[int, None] = {}  # known pages that nobody holds, in the order in which they were let go of
        self._known: dict[_Key, int] = {}
        self._next_serial = 0

    @property
    def num_available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._unheld)

    def holders(self, page: int) -> int:
        return self._pages[page].holders

    def take(self) -> int | None:
        """A page of one's own, of unknown contents; None if all are held."""
        if self._free:
            page = self._free.pop()
        elif self._unheld:
            page = next(iter(self._unheld))
            del self._unheld[page]
            self._forget(page)
        else:
            return None
        self._pages[page].holders = 1
        return page

    def release(self, page: int) -> None:
        state = self._pages[page]
        assert state.holders > 0, f"page {page} was let go of more often than taken"
        state.holders -= 1
        if not state.holders:
            if state.keys:
                self._unheld[page] = None
            else:
                self._free.append(page)

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Takes the known pages that hold the beginning of `tokens`; returns them and how many tokens they hold."""
        pages: list[int] = []
        serial, start = _ROOT, 0
        while start < len(tokens):
            run = tuple(tokens[start : start + self.page_size])
            page = self._known.get((serial, run))
            if page is None:
                break
            self._hold(page)
            pages.append(page)
            serial, start = self._pages[page].serial, start + len(run)
        return pages, start

    def learn(self, pages: Sequence[int], tokens: Sequence[int], *, partial: bool = False) -> None:
        """Makes `pages`, which hold `tokens` in order, known; the last page, if not full, only where `partial`.

        Where others know the same tokens already, theirs stay the known ones.
        """
        serial = _ROOT
        for i, page in enumerate(pages):
            run = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
            if not run or (len(run) < self.page_size and not partial):
                break
            key = (serial, run)
            known = self._known.get(key)
            if known is None:
                self._known[key] = known = page
                state = self._pages[page]
                state.keys.append(key)
                if state.serial == _ROOT:
                    state.serial = self._new_serial()
            serial = self._pages[known].serial

    def forget_beyond(self, page: int, num_tokens: int) -> None:
        """`page` is about to be written to after its first `num_tokens`: longer runs that it was known to hold are gone."""
        state = self._pages[page]
        gone = [key for key in state.keys if len(key[1]) > num_tokens]
        for key in gone:
            del self._known[key]
            state.keys.remove(key)
        if gone:  # What came after them does not come after what will stand here.
            state.serial = self._new_serial()

    def forget_all(self) -> None:
        """No page is known any more: the weights that filled them have changed."""
        for page in list(self._unheld):
            self._free.append(page)
        self._unheld.clear()
        self._known.clear()
        for state in self._pages:
            state.keys.clear()
            state.serial = _ROOT

    def _new_serial(self) -> int:
        self._next_serial += 1
        return self._next_serial

    def _hold(self, page: int) -> None:
        self._unheld.pop(page, None)
        self._pages[page].holders += 1

    def _forget(self, page: int) -> None:
        for key in self._pages[page].keys:
            del self._known[key]
        self._pages[page].keys.clear()
        self._pages[page].serial = _ROOT
