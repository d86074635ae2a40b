"""Callers of many threads and of asyncio: answers are theirs, leaving gives pages back, errors reach everyone."""

import asyncio
import concurrent.futures
import queue
import re
import threading

import pytest

from inference.beam import beam_search
from inference.engine import Engine
from inference.request import Request
from inference.service import Service
from tests.inference.engine_reference import CHAIN, MODEL, PARAMS, ROOMY, SAMPLINGS, check_answer

REQUESTS = [Request(CHAIN[: 2 + i], SAMPLINGS[i % 4], 1 + i % 2, 9, seed=i) for i in range(8)]


@pytest.fixture
def service():
    made = Service(Engine(PARAMS, MODEL, ROOMY))
    yield made
    made.close()


def check_tokens(request, tokens):
    for sample in range(request.num_samples):
        check_answer(request, sample, [token for token in tokens if token.sample == sample])


def in_time(future, service):
    """What it returns or raises; where it hangs, closing the service ends the thread."""
    if not concurrent.futures.wait([future], timeout=20).done:
        service.close()
        pytest.fail("the caller waits for ever")
    return future.result()


def test_threads_get_their_own_answers(service):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for request, tokens in zip(REQUESTS, pool.map(lambda r: list(service.stream(r)), REQUESTS), strict=True):
            check_tokens(request, tokens)
    assert service.call(lambda engine: engine.num_pages_held) == 0


def test_what_is_generated_between_two_steps_takes_no_tokens_from_others(service):
    """Beams call the engine's own `generate`, in which those who stream go on."""
    request = Request(CHAIN[:3], SAMPLINGS[0], max_tokens=20, seed=3)
    stream = service.stream(request)
    tokens = [next(stream)]
    beams = service.call(lambda engine: beam_search(engine, CHAIN[:4], num_beams=2, max_tokens=25))
    assert beams
    tokens += concurrent.futures.ThreadPoolExecutor(1).submit(list, stream).result(timeout=60)
    check_tokens(request, tokens)
    assert not service.call(lambda engine: engine.has_work)


def test_a_search_that_fails_takes_no_tokens_from_others(service):
    """It draws for those who stream too, before what it asks for next is refused."""
    request = Request(CHAIN[:3], SAMPLINGS[0], max_tokens=20, seed=3)
    told = queue.SimpleQueue()

    def submit_and_search(engine):
        service._listeners[engine.submit(request)] = told.put, request.num_samples
        with pytest.raises(ValueError, match=r"exceed model\.max_seq_len"):
            beam_search(engine, CHAIN[:28], num_beams=2, max_tokens=9)

    service.call(submit_and_search)
    check_tokens(request, [told.get(timeout=20) for _ in range(request.max_tokens)])


def test_tasks_get_their_own_answers(service):
    async def collect(request):
        return [token async for token in service.astream(request)]

    async def collect_all():
        return await asyncio.gather(*map(collect, REQUESTS))

    for request, tokens in zip(REQUESTS, asyncio.run(collect_all()), strict=True):
        check_tokens(request, tokens)


def test_who_leaves_gives_its_pages_back_and_the_others_go_on(service):
    async def leave(request):
        async for _ in service.astream(request):
            break

    async def stay(request):
        return [token async for token in service.astream(request)]

    async def both():
        task = asyncio.create_task(stay(REQUESTS[3]))
        await asyncio.gather(*(leave(request) for request in REQUESTS[4:]))
        cancelled = asyncio.create_task(stay(REQUESTS[5]))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        return await task

    check_tokens(REQUESTS[3], asyncio.run(both()))
    stream = service.stream(REQUESTS[1])
    next(stream)
    stream.close()
    assert service.call(lambda engine: (engine.num_pages_held, engine.has_work)) == (0, False)


def test_a_request_that_is_refused_is_an_error_of_its_caller_alone(service):
    with pytest.raises(ValueError, match="at least one token"):
        Request([])
    with pytest.raises(ValueError, match=r"token ids 1\.\.99"):
        next(service.stream(Request([1, 99])))
    check_tokens(REQUESTS[0], list(service.stream(REQUESTS[0])))


def test_what_a_call_raises_reaches_its_caller_even_if_it_is_a_timeout(service):
    """Which is no sign that the call still waits."""

    def late(_engine):
        raise TimeoutError("of a name server")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with pytest.raises(TimeoutError, match="of a name server"):
            in_time(pool.submit(service.call, late), service)
        with pytest.raises(TimeoutError, match="of a name server"):
            in_time(pool.submit(service.submit, Request(CHAIN[:3], watch=late), lambda token: None), service)
    assert not service.call(lambda engine: engine.has_work)


def test_who_asks_in_the_engines_own_thread_is_told_instead_of_waiting_for_himself(service):
    told = queue.SimpleQueue()

    def listen(_token):
        for ask in (lambda: service.call(lambda engine: engine.has_work), lambda: next(service.stream(REQUESTS[0]))):
            try:
                ask()
            except RuntimeError as error:
                told.put(str(error))

    service.submit(Request(CHAIN[:3], max_tokens=1), listen)
    assert [re.search("engine's own thread", told.get(timeout=60)) is not None for _ in range(2)] == [True, True]
    check_tokens(REQUESTS[0], list(service.stream(REQUESTS[0])))


def test_who_is_interrupted_before_his_request_has_a_number_leaves_nothing(service, monkeypatch):
    """As by Ctrl-C while the engine takes its step: the request is queued, and nobody will read it."""
    call, drawn = service.call, []

    def interrupted(function):
        call(function)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(service, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(service.stream(Request(CHAIN[:5], watch=lambda _sample: drawn.append)))
    check_tokens(REQUESTS[7], list(service.stream(REQUESTS[7])))  # takes as long as it may
    assert service.call(lambda engine: (engine.num_pages_held, engine.has_work)) == (0, False)
    assert len(drawn) == 1


def test_a_watcher_that_raises_is_an_error_of_its_caller_alone(service):
    stream = service.stream(Request(CHAIN[:3], watch=lambda _sample: lambda token: 1 // 0))
    with pytest.raises(RuntimeError, match="watcher, constraint or guess failed"):
        list(stream)
    check_tokens(REQUESTS[0], list(service.stream(REQUESTS[0])))
    assert service.call(lambda engine: engine.num_pages_held) == 0


def test_a_loop_that_is_closed_and_a_request_without_a_listener_stop_nobody(service, monkeypatch):
    """The client leaves while a step runs, and what the step tells him finds his loop closed."""
    step, in_step, go_on = service._engine.step, threading.Event(), threading.Event()

    def slowly():
        in_step.set()
        assert go_on.wait(60)
        return step()

    async def leave_at_once():
        task = asyncio.create_task(anext(service.astream(Request(CHAIN[:5]))))
        await asyncio.to_thread(in_step.wait, 60)
        task.cancel()

    with monkeypatch.context() as patch:
        patch.setattr(service._engine, "step", slowly)
        asyncio.run(leave_at_once())
        go_on.set()
        service.call(lambda engine: engine.submit(REQUESTS[2]))
        check_tokens(REQUESTS[0], list(service.stream(REQUESTS[0])))
    for _ in service.stream(REQUESTS[6]):
        pass
    assert service.call(lambda engine: engine.num_pages_held) == 0


def test_who_is_cancelled_before_his_request_has_a_number_leaves_nothing(service):
    entered, go_on = threading.Event(), threading.Event()

    def hold(_engine):
        entered.set()
        assert go_on.wait(60)

    async def cancelled():
        holder = asyncio.create_task(asyncio.to_thread(service.call, hold))
        await asyncio.to_thread(entered.wait, 60)
        task = asyncio.create_task(anext(service.astream(Request(CHAIN[:5]))))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go_on.set()
        await holder
        # The other request takes longer, and by its end the first is gone.
        return [token async for token in service.astream(REQUESTS[7])]

    check_tokens(REQUESTS[7], asyncio.run(cancelled()))
    assert service.call(lambda engine: (engine.num_pages_held, engine.has_work)) == (0, False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_tells_everyone(monkeypatch):
    engine = Engine(PARAMS, MODEL, ROOMY)
    service = Service(engine)
    monkeypatch.setattr(engine, "_fill", lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="ended before the answer did"):
        list(service.stream(Request(CHAIN[:3])))
    with pytest.raises(RuntimeError, match="thread has ended"):
        service.call(lambda engine: engine.has_work)


def test_closing_tells_those_who_wait():
    service = Service(Engine(PARAMS, MODEL, ROOMY))
    stream = service.stream(Request(CHAIN[:3]))
    next(stream)
    service.close()
    with pytest.raises(RuntimeError, match="ended before the answer did"):
        list(stream)
