"""The throttle in virtual time: pauses are kept, and a busy server gets what it had taken."""

from __future__ import annotations

import asyncio

import pytest

from llama_orch.engines.remote.throttle import StillBusy, Throttle
from llama_orch.testing.loop import run

pytestmark = pytest.mark.spec("HP-REM-5")
FOREVER = float("inf")


def test_a_pause_is_kept_and_then_fewer_go() -> None:
    """Of four, the fourth is refused for 5 s: until then nobody enters, then no more than three are in at a time."""

    async def main() -> None:
        throttle, loop = Throttle(4), asyncio.get_running_loop()
        for _ in range(4):
            await throttle.enter(FOREVER)
        throttle.refused(5.0)
        throttle.leave()
        entered: list[float] = []

        async def enter() -> None:
            await throttle.enter(FOREVER)
            entered.append(loop.time())

        waiting = [asyncio.ensure_future(enter()) for _ in range(2)]
        throttle.leave()
        await asyncio.wait(waiting, timeout=100)
        assert entered == [5.0]
        assert throttle.limit == 3
        throttle.served()
        throttle.leave()
        await asyncio.wait(waiting)
        assert len(entered) == 2
        assert throttle.limit == 4

    run(main())


def test_first_come_first_served() -> None:
    async def main() -> None:
        throttle, order = Throttle(1), list[int]()
        await throttle.enter(FOREVER)

        async def enter(number: int) -> None:
            await throttle.enter(FOREVER)
            order.append(number)
            throttle.leave()

        waiting = [asyncio.ensure_future(enter(number)) for number in range(5)]
        await asyncio.wait(waiting, timeout=1)
        assert order == []
        throttle.leave()
        await asyncio.wait(waiting)
        assert order == [0, 1, 2, 3, 4]

    run(main())


def test_patience_ends_and_leaves_nothing_behind() -> None:
    """Who gives up, or is canceled, is no longer in anybody's way."""

    async def main() -> None:
        throttle, loop = Throttle(1), asyncio.get_running_loop()
        await throttle.enter(FOREVER)
        canceled = asyncio.ensure_future(throttle.enter(FOREVER))
        with pytest.raises(StillBusy):
            await throttle.enter(loop.time() + 3)
        assert loop.time() == 3
        canceled.cancel()
        await asyncio.wait([canceled])
        throttle.leave()
        await throttle.enter(FOREVER)

    run(main())


def test_one_always_goes() -> None:
    """However often it is refused, the limit stays at one, so that somebody finds out when it is well again."""

    async def main() -> None:
        throttle = Throttle(2)
        for _ in range(5):
            await throttle.enter(FOREVER)
            throttle.refused(1.0)
            throttle.leave()
        assert throttle.limit == 1

    run(main())
