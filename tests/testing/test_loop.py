"""The virtual loop: time jumps, order holds, and a standstill is reported. Nothing here waits for real time."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.clock import LoopClock
from llama_orch.testing.loop import VirtualLoop, run


def test_five_minutes_pass_in_virtual_time() -> None:
    """300 sleeps of a second move the loop's clock by 300 s; an hour-long one moves it by an hour."""

    async def main() -> list[float]:
        loop, times = asyncio.get_running_loop(), []
        for _ in range(300):
            await asyncio.sleep(1.0)
        times.append(loop.time())
        await asyncio.sleep(3600.0)
        return [*times, loop.time()]

    assert run(main()) == [300.0, 3900.0]


def test_time_stands_still_while_there_is_something_to_do() -> None:
    """Passing the turn costs no time, however often."""

    async def main() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert run(main()) == 0.0


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(waits=st.lists(st.floats(0, 1e6), max_size=8))
def test_tasks_wake_up_in_the_order_of_their_timers(waits: list[float]) -> None:
    """Each wakes up when it was due and not before; the clock never goes back."""
    woken: list[tuple[float, float]] = []

    async def wait(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append((asyncio.get_running_loop().time(), seconds))

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for seconds in waits:
                group.create_task(wait(seconds))

    run(main())
    assert [seconds for _, seconds in woken] == pytest.approx(sorted(waits), abs=1e-8)
    assert all(at == pytest.approx(seconds, abs=1e-8) for at, seconds in woken)
    assert woken == sorted(woken, key=lambda pair: pair[0])


def test_timeouts_work_in_virtual_time() -> None:
    """`asyncio.timeout` fires after its virtual seconds."""

    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60.0):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run(main()) == 60.0


def test_a_standstill_is_reported_with_those_who_wait() -> None:
    """Nothing ready and nothing scheduled is a RuntimeError that names the tasks, and not a test that hangs."""

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.Event().wait(), name="reader")
            await asyncio.sleep(5.0)

    with pytest.raises(RuntimeError, match=r"deadlock: .*; tasks that wait: .*reader"):
        run(main())


def test_going_in_circles_is_reported_too() -> None:
    """A task that never lets time pass is a RuntimeError, and not a test that hangs."""

    async def main() -> None:
        while True:  # noqa: ASYNC110  # the very thing
            await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match=r"livelock: .* turns at 0 s"):
        run(main())


def test_a_standstill_lets_tasks_clean_up() -> None:
    """Those who waited are canceled, as at the end of any run."""
    left: list[str] = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1.0)
            left.append("cleaned up")

    with pytest.raises(RuntimeError, match="deadlock"):
        run(main())
    assert left == ["cleaned up"]


def test_results_and_errors_come_through() -> None:
    """`run` is `asyncio.run` but for the time."""

    async def answer() -> int:
        return 42

    async def fail() -> None:
        raise LookupError("why")

    assert run(answer()) == 42
    with pytest.raises(LookupError, match="why"):
        run(fail())


def test_every_run_starts_at_zero() -> None:
    """Runs do not share a clock, so that examples of a property are independent."""

    async def main() -> tuple[float, float]:
        loop, begin = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        await asyncio.sleep(7.0)
        assert isinstance(loop, VirtualLoop)
        return begin, loop.time()

    assert [run(main()) for _ in range(2)] == [(0.0, 7.0)] * 2


def test_the_services_clock_follows_the_loop() -> None:
    """LoopClock counts virtual seconds under the virtual loop."""

    async def main() -> tuple[float, float, float]:
        clock = LoopClock(started_at=1000.0)
        begin = clock.now()
        await asyncio.sleep(30.0)
        return begin, clock.now(), clock.wall()

    assert run(main()) == (0.0, 30.0, 1030.0)
