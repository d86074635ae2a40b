"""An engine in a thread of its own, which alone touches jax, for callers of many threads or of asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TypeVar

from inference.engine import Engine
from inference.request import FAILED, Request, Token

T = TypeVar("T")
# What a listener is told: its tokens one by one, or the error that ended the engine. One that raises is told nothing more, and
# its request is dropped.
Listener = Callable[[Token | BaseException], None]


class Service:
    """Runs `engine` until `close`; whoever leaves a stream before its end aborts the request."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[int, tuple[Listener, int]] = {}  # and how many of its samples are unfinished
        self._open = True
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[Engine], T]) -> T:
        """What `function` returns for the engine, between two of its steps.

        Raises:
          RuntimeError: the service is closed, or its engine failed; or this is the engine's own thread, as in a listener.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("a call from the engine's own thread would wait for itself: make it from another one")
        result: concurrent.futures.Future[T] = concurrent.futures.Future()

        def answer() -> None:
            try:
                result.set_result(function(self._engine))
            except BaseException as error:
                result.set_exception(error)

        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended") from self._error
        self._calls.put(answer)
        while not concurrent.futures.wait([result], timeout=1.0).done:
            if not self._thread.is_alive() and not result.done():
                raise RuntimeError("the engine's thread has ended") from self._error
        return result.result()

    def submit(self, request: Request, listener: Listener) -> int:
        """Queues a request; `listener` is told its tokens, in the engine's thread.

        Raises:
          ValueError: see `Engine.submit`; RuntimeError: see `call`.
        """

        def start(engine: Engine) -> int:
            request_id = engine.submit(request)
            self._listeners[request_id] = listener, request.num_samples
            return request_id

        return self.call(start)

    def abort(self, request_id: int) -> None:
        """Drops what is left of a request; its listener is told nothing more. Returns at once."""

        def drop() -> None:
            self._engine.abort(request_id)
            self._listeners.pop(request_id, None)

        self._calls.put(drop)

    def stream(self, request: Request) -> Generator[Token]:
        """The tokens of all samples as they come."""
        tokens: queue.SimpleQueue[Token | BaseException] = queue.SimpleQueue()
        request_id, unfinished, has_left = None, request.num_samples, False

        def listen(token: Token | BaseException) -> None:
            if has_left:  # before it knew the request's number, perhaps
                raise ConnectionAbortedError("nobody listens any more")
            tokens.put(token)

        try:
            request_id = self.submit(request, listen)
            while unfinished:
                token = _raised(tokens.get())
                unfinished -= token.finish_reason is not None
                yield token
        finally:
            has_left = True
            if unfinished and request_id is not None:
                self.abort(request_id)

    async def astream(self, request: Request) -> AsyncGenerator[Token]:
        """`stream`, for asyncio."""
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[Token | BaseException] = asyncio.Queue()
        request_id, unfinished, has_left = None, request.num_samples, False

        def listen(token: Token | BaseException) -> None:
            if has_left:  # before it knew the request's number, perhaps
                raise ConnectionAbortedError("nobody listens any more")
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        try:
            request_id = await asyncio.to_thread(self.submit, request, listen)
            while unfinished:
                token = _raised(await tokens.get())
                unfinished -= token.finish_reason is not None
                yield token
        finally:
            has_left = True
            if unfinished and request_id is not None:
                self.abort(request_id)

    def close(self) -> None:
        """Ends the thread after its step; requests that are unfinished are told so."""
        self._open = False
        self._calls.put(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._open:
                # With nothing to do it sleeps until somebody calls.
                while not self._calls.empty() or not self._engine.has_work:
                    self._calls.get()()
                    if not self._open:
                        return
                for token in self._engine.step():
                    self._tell(token)
        except BaseException as error:
            self._error = error
            raise
        finally:
            ended = self._error or RuntimeError("the engine was closed")
            for listener, _ in self._listeners.values():
                with contextlib.suppress(Exception):  # who cannot be told must not keep it from the others
                    listener(ended)

    def _tell(self, token: Token) -> None:
        if token.request not in self._listeners:  # submitted by `call`
            return
        listener, unfinished = self._listeners[token.request]
        unfinished -= token.finish_reason is not None
        if unfinished:
            self._listeners[token.request] = listener, unfinished
        else:
            del self._listeners[token.request]
        try:
            listener(token)
        except Exception:  # a loop that is closed, for one
            self._engine.abort(token.request)
            self._listeners.pop(token.request, None)


def _raised(token: Token | BaseException) -> Token:
    """
    Raises:
      RuntimeError: the engine has ended, or the request failed (`Token.error`).
    """
    if isinstance(token, BaseException):
        raise RuntimeError("the engine ended before the answer did") from token
    if token.error is not None:
        raise RuntimeError(f"the request's {FAILED}") from token.error
    return token
