"""Backpressure that adds up, over the whole of HTTP: three figures that say the same, from the drain of the queue; and
clients that follow them without a storm (HP-ERR-2, HP-ERR-3)."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import httpx
import msgspec
import pytest

from llama_orch.contract.config import PoolSettings, QueueSettings, ServerSettings
from llama_orch.contract.models import Error, ErrorCode, Priority, TaskRequest
from llama_orch.engines.simulated import ServiceModel
from llama_orch.testing.loop import run
from llama_orch.testing.rehearsal import settings_for

from .stack import TOKEN, URL, Stack, a_request, a_stack

TOKEN_S = 0.02
MODEL = ServiceModel(load_s=0.5, prefill_s_per_token=0.0, decode_s_per_token=TOKEN_S)


def a_pool(capacity: int, *, slots: int = 1, max_tokens: int = 50, **queue: Any) -> PoolSettings:
    return PoolSettings(slots=slots, max_tokens=max_tokens, queue=QueueSettings(capacity=capacity, **queue))


async def post(stack: Stack, request: TaskRequest) -> httpx.Response:
    """One attempt, whatever comes of it."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=URL, transport=stack.transport, headers=headers) as http:
        return await http.post("/v1/tasks", content=msgspec.json.encode(request))


async def refusal(stack: Stack, number: int, **fields: Any) -> httpx.Response:
    answer = await post(stack, a_request(number, **fields))
    assert not answer.is_success
    return answer


def wait_ms(answer: httpx.Response) -> int:
    """The one wait that a 429 or 503 names, three times."""
    error = msgspec.json.decode(answer.content, type=Error)
    told = int(answer.headers["X-Backoff-Ms"])
    assert error.retry_after_ms == told > 0
    assert int(answer.headers["Retry-After"]) == math.ceil(told / 1000)
    assert error.retriable is True
    assert answer.status_code == 503 or isinstance(error.policy_label, str)
    return told


async def measured(stack: Stack) -> None:
    """Two tasks have shown how fast the model is."""
    for number in (9001, 9002):
        await stack.client.run(a_request(number))


async def filled(stack: Stack, count: int, **fields: Any) -> None:
    for number in range(count):
        assert (await post(stack, a_request(number, **fields))).status_code == 202


# -- every refusal that can pass -------------------------------------------------------------------------------------


async def _full(stack: Stack) -> httpx.Response:
    await filled(stack, 3)
    return await refusal(stack, 100)


async def _full_of_better(stack: Stack) -> httpx.Response:
    await filled(stack, 3)
    return await refusal(stack, 100, priority=Priority.BATCH)


async def _hurried(stack: Stack) -> httpx.Response:
    await measured(stack)
    await filled(stack, 2)
    return await refusal(stack, 100, deadline_ms=100)


async def _drained(stack: Stack) -> httpx.Response:
    await stack.client.drain_pool("default", 60_000)
    return await refusal(stack, 100)


async def _loading(stack: Stack) -> httpx.Response:
    return await refusal(stack, 100, prompt="a long one " * 1000)


async def _lost(stack: Stack) -> httpx.Response:
    """Its worker died, and comes back."""
    stack.stage.worker().crash()
    await asyncio.sleep(0)
    return await refusal(stack, 100, prompt="a long one " * 1000)


async def _ending(stack: Stack) -> httpx.Response:
    stack.stage.orchestrator.scheduler.drain(asyncio.get_running_loop().time())
    return await refusal(stack, 100)


async def _too_many_streams(stack: Stack) -> httpx.Response:
    """The limit is one."""
    admission = await stack.client.submit(a_request())
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=URL, transport=stack.transport, headers=headers) as http:
        first = await http.send(http.build_request("GET", f"/v1/tasks/{admission.task_id}/stream"), stream=True)
        async with aclosing(first):
            return await http.get(f"/v1/tasks/{admission.task_id}/stream")


@pytest.mark.spec("HP-ERR-2")
@pytest.mark.parametrize(
    ("situation", "code", "policy", "is_loaded"),
    [
        (_full, ErrorCode.ADMISSION_REJECT, "reject", True),
        (_full_of_better, ErrorCode.ADMISSION_REJECT, "drop-lru", True),
        (_hurried, ErrorCode.DEADLINE_UNMET, "reject", True),
        (_drained, ErrorCode.POOL_UNAVAILABLE, "reject", True),
        (_loading, ErrorCode.POOL_UNREADY, "reject", False),
        (_lost, ErrorCode.POOL_UNREADY, "reject", True),
        (_ending, ErrorCode.POOL_UNAVAILABLE, "reject", True),
        (_too_many_streams, ErrorCode.REPLICA_EXHAUSTED, "reject", True),
    ],
)
def test_the_three_figures_agree(
    situation: Callable[[Stack], Awaitable[httpx.Response]], code: ErrorCode, policy: Any, is_loaded: bool
) -> None:
    """Retry-After is X-Backoff-Ms in whole seconds, rounded up, and `retry_after_ms` is the same; a 429 names its
    policy."""
    settings = settings_for(a_pool(2, full_policy=policy), server=ServerSettings(max_streams=1))

    async def scenario() -> httpx.Response:
        async with a_stack(settings, MODEL, is_loaded=is_loaded) as stack:
            return await situation(stack)

    answer = run(scenario())
    assert answer.json()["code"] == code
    wait_ms(answer)


# -- where the wait comes from ---------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ERR-2")
def test_the_wait_is_the_predicted_drain_of_the_queue() -> None:
    """Each one that is sent away is told when the next place gets free: what the tasks of the queue themselves are told
    of their starts, and beyond them the same pace."""

    async def scenario() -> tuple[list[int], list[int | None]]:
        async with a_stack(settings_for(a_pool(3)), MODEL) as stack:
            await measured(stack)
            await filled(stack, 4)
            told = [wait_ms(await refusal(stack, 100 + n)) for n in range(5)]
            page = await stack.client.list_tasks()
            starts = [task.predicted_start_ms for task in page.items if task.queue_position is not None]
            return told, starts[::-1]

    told, starts = run(scenario())
    assert told[:3] == pytest.approx(starts, abs=1)
    assert [b - a for a, b in itertools.pairwise(told)] == pytest.approx([1000] * 4, abs=60)


@pytest.mark.spec("HP-ERR-2")
@pytest.mark.parametrize("tokens", [10, 50, 200])
def test_a_longer_queue_means_a_longer_wait(tokens: int) -> None:
    """Five times the work in the queue, five times the wait of those behind it; and no wait once it has drained."""

    async def scenario() -> list[int]:
        pool = a_pool(4, max_tokens=500)
        async with a_stack(settings_for(pool), MODEL) as stack:
            for number in (9001, 9002):
                await stack.client.run(a_request(number, max_tokens=50))
            await filled(stack, 5, max_tokens=tokens, expected_tokens=tokens)
            return [wait_ms(await refusal(stack, 100 + n)) for n in range(6)]

    told = run(scenario())
    service_ms = tokens * TOKEN_S * 1000
    assert told == pytest.approx([service_ms * (1 + n) for n in range(6)], rel=0.1, abs=60)


@pytest.mark.spec("HP-ERR-2")
def test_the_wait_shrinks_as_the_queue_drains() -> None:
    """The same client that asks again too early is told the rest of its wait, to the millisecond of the clock."""

    async def scenario() -> list[int]:
        async with a_stack(settings_for(a_pool(2)), MODEL) as stack:
            await measured(stack)
            await filled(stack, 3)
            told = [wait_ms(await refusal(stack, 100))]
            for _ in range(4):
                await asyncio.sleep(0.2)
                told.append(wait_ms(await refusal(stack, 100)))
            return told

    told = run(scenario())
    assert [told[0] - one for one in told] == pytest.approx([0, 200, 400, 600, 800], abs=30)


# -- what clients make of it -----------------------------------------------------------------------------------------

CLIENTS = 50


async def _storm(stack: Stack, gap_s: float, **fields: Any) -> float:
    """All clients with a task each; the seconds that they took."""
    began = asyncio.get_running_loop().time()

    async def one(number: int) -> int:
        await asyncio.sleep(number * gap_s)
        return (await stack.client.run(a_request(number, **fields))).end.tokens_out

    tokens = await asyncio.gather(*(one(number) for number in range(CLIENTS)))
    assert all(tokens)
    return asyncio.get_running_loop().time() - began


@pytest.mark.spec("HP-ERR-2", "HP-ERR-3")
@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize(
    ("slots", "token_s", "mean_tokens", "gap_s", "is_measured"),
    [
        (4, 0.02, None, 0.0, False),
        (4, 0.02, None, 0.05, True),
        (1, 0.02, None, 0.0, False),
        (1, 0.1, None, 0.3, True),
        (4, 0.2, None, 0.0, False),
        (2, 0.03, 25, 0.0, True),
        (4, 0.02, 25, 0.01, False),
    ],
)
def test_fifty_clients_at_a_queue_of_eight(
    slots: int, token_s: float, mean_tokens: int | None, gap_s: float, is_measured: bool, seed: int
) -> None:
    """All finish, each task runs once, and there is no storm: at most four requests for each task that finished, its
    submission and its stream among them. Nor do they come too late: the slots are at work most of the time."""
    settings = settings_for(a_pool(8, slots=slots))
    model = ServiceModel(prefill_s_per_token=0.0, decode_s_per_token=token_s, mean_tokens=mean_tokens)

    async def scenario() -> tuple[int, float, float]:
        async with a_stack(settings, model, dice=random.Random(seed)) as stack:
            if is_measured:
                await measured(stack)
            before = len(stack.transport.requests)
            took_s = await _storm(stack, gap_s)
            requests = len(stack.transport.requests) - before
            known = stack.stage.orchestrator.scheduler.tasks.values()
            tasks = [task for task in known if task.number > 2 * is_measured]
            assert len(tasks) == CLIENTS
            work_s = sum(task.outcome.decode_ms for task in tasks if task.outcome is not None) / 1000 / slots
            return requests, took_s, work_s

    requests, took_s, work_s = run(scenario())
    print(f"slots {slots}, {token_s} s: {requests / CLIENTS:.2f} a task, {took_s:.1f} s for {work_s:.1f} s")
    assert requests / CLIENTS <= 4
    assert took_s <= 1.5 * work_s + CLIENTS * gap_s
