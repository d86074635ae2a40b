"""Callers of many threads and of asyncio: answers are theirs, leaving gives pages back, errors reach everyone."""

import asyncio
import concurrent.futures

import pytest

from inference.engine import Engine, Request
from inference.service import Service
from tests.inference.test_engine import CHAIN, MODEL, PARAMS, ROOMY, SAMPLINGS, check_answer

REQUESTS = [Request(CHAIN[: 2 + i], SAMPLINGS[i % 4], 1 + i % 2, 9, seed=i) for i in range(8)]


@pytest.fixture
def service():
    made = Service(Engine(PARAMS, MODEL, ROOMY))
    yield made
    made.close()


def check_tokens(request, tokens):
    for sample in range(request.num_samples):
        check_answer(request, sample, [token for token in tokens if token.sample == sample])


def test_threads_get_their_own_answers(service):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for request, tokens in zip(REQUESTS, pool.map(lambda r: list(service.stream(r)), REQUESTS), strict=True):
            check_tokens(request, tokens)
    assert service.call(lambda engine: engine.num_pages_held) == 0


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_tells_everyone():
    def watch(_sample):
        return lambda token: 1 // 0

    service = Service(Engine(PARAMS, MODEL, ROOMY))
    with pytest.raises(RuntimeError, match="ended before the answer did"):
        list(service.stream(Request(CHAIN[:3], watch=watch)))
    with pytest.raises(RuntimeError, match="thread has ended"):
        service.call(lambda engine: engine.has_work)


def test_closing_tells_those_who_wait():
    service = Service(Engine(PARAMS, MODEL, ROOMY))
    stream = service.stream(Request(CHAIN[:3]))
    next(stream)
    service.close()
    with pytest.raises(RuntimeError, match="ended before the answer did"):
        list(stream)
