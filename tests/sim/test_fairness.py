"""A strict task takes a whole replica, and best-effort tasks share one: neither kind keeps the other waiting for longer
than its place in the queue says."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from llama_orch.contract.config import PoolSettings, QueueSettings
from llama_orch.contract.models import Determinism, Priority
from llama_orch.testing.builders import a_task
from llama_orch.testing.cards import parse_cards
from llama_orch.testing.checks import Checker
from llama_orch.testing.imaginary import ImaginaryLibrary, a_model
from llama_orch.testing.loop import run
from llama_orch.testing.machine import Machine
from llama_orch.testing.rehearsal import read_all
from llama_orch.testing.stage import Stage, on_stage, settings_of

MODEL = a_model("8b")
POOL = PoolSettings(id="p", model=MODEL.reference, slots=4, ctx=2048, queue=QueueSettings(capacity=64))
FOR_S = 120.0  # of virtual time; a task takes about a second
STRICT, SHARED = Determinism.STRICT, Determinism.BEST_EFFORT
Prepare = Callable[[Stage], None]


def turns(
    agents: Sequence[Determinism], cards: str = "3090", prepare: Prepare | None = None, priority: str = "interactive"
) -> list[int]:
    """How many turns each agent gets: it asks, waits for the end of its answer, and asks again."""
    counts: Counter[int] = Counter()

    async def agent(stage: Stage, number: int) -> None:
        while True:
            request = a_task(
                model_ref=MODEL.reference, determinism=agents[number], max_tokens=100, priority=Priority(priority)
            )
            admission = await stage.service.submit(request)
            await read_all(stage.service.open_stream(admission.task_id, -1))
            counts[number] += 1

    async def main() -> list[str]:
        machine = Machine(parse_cards(cards), ImaginaryLibrary([MODEL]))
        checkers = []

        def watch(stage: Stage) -> None:
            if prepare is not None:
                prepare(stage)
            checkers.append(Checker(stage, lambda _: None, asyncio.get_running_loop().time))

        async with on_stage(settings_of([POOL]), machine, watch) as stage:
            going = [asyncio.ensure_future(agent(stage, number)) for number in range(len(agents))]
            await asyncio.wait(going, timeout=FOR_S)
            for one in going:
                one.cancel()
            await asyncio.wait(going)
            return [problem for checker in checkers for problem in checker.violations]

    violations = run(main())
    assert violations == [] or prepare is not None
    return [counts[number] for number in range(len(agents))]


@pytest.mark.spec("HP-ADM-2", "HP-DET-1")
@pytest.mark.parametrize(("cards", "priority"), [("3090", "interactive"), ("3090,3060", "batch")])
@pytest.mark.parametrize(
    "agents",
    [[STRICT, *[SHARED] * 8], [*[STRICT] * 8, SHARED], [STRICT, SHARED] * 4],
    ids=["one strict", "one best effort", "half of each"],
)
def test_both_kinds_have_their_turns(cards: str, priority: str, agents: list[Determinism]) -> None:
    """Whoever asks again waits behind those who asked before: with tasks of one length, all get as many turns. On two
    unequal cards some of the agents meet the slow one more often, whatever their kind."""
    found = turns(agents, cards, priority=priority)
    assert min(found) >= 12
    assert max(found) - min(found) <= (2 if cards == "3090" else 0.3 * max(found))


def test_a_scheduler_that_favours_one_kind_is_seen() -> None:
    """With best-effort tasks let past a strict head, the strict agent gets next to no turn."""

    def prepare(stage: Stage) -> None:
        pool = stage.scheduler.pools["p"]

        def head() -> str | None:
            shared = (one for one in pool.queue if not stage.scheduler.tasks[one].is_strict)
            return next(shared, next(iter(pool.queue), None))

        pool.queue.head = head  # type: ignore[method-assign]

    found = turns([STRICT, *[SHARED] * 8], prepare=prepare)
    assert found[0] < min(found[1:]) / 2
