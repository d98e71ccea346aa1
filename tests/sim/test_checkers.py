"""The checkers can fail: worlds are broken on purpose, each in one way, and the checker has the word for it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from llama_orch.contract.config import PoolSettings, QueueSettings, TasksSettings
from llama_orch.contract.models import Determinism
from llama_orch.core.effects import Ended, Start
from llama_orch.core.replica import Lease, Replica
from llama_orch.engines.base import Job
from llama_orch.engines.simulated import ServiceModel, SimulatedWorker
from llama_orch.testing import frames
from llama_orch.testing.builders import a_task
from llama_orch.testing.cards import parse_cards
from llama_orch.testing.frames import Seen
from llama_orch.testing.imaginary import a_model
from llama_orch.testing.simulator import Prepare, simulate_world
from llama_orch.testing.stage import Stage
from llama_orch.testing.world import Arrival, World

MODEL = a_model()
SECOND = ServiceModel(load_s=0.5, prefill_s_per_token=0.0, decode_s_per_token=0.1)


def crowded(*, slots: int = 2, capacity: int = 64, clients: Sequence[str] = ("reads",) * 8, **fields: Any) -> World:
    """Eight equal tasks of a second, which arrive together in front of two slots of one card."""
    requests = [
        a_task(
            task_id=f"{number:08x}-0000-4000-8000-000000000000",
            model_ref=MODEL.reference,
            determinism=Determinism.BEST_EFFORT,
            max_tokens=10,
            seed=number,
            **fields,
        )
        for number in range(len(clients))
    ]
    return World(
        seed=0,
        cards=parse_cards("3090"),
        models=[MODEL],
        pools=[
            PoolSettings(id="p", model=MODEL.reference, slots=slots, ctx=512, queue=QueueSettings(capacity=capacity))
        ],
        tasks=TasksSettings(decode_idle_timeout_ms=1000),
        service={(MODEL.name, "3090"): SECOND},
        strict_needs_exclusive=True,
        arrivals=[Arrival(n, 1.0, request, clients[n], 0.5) for n, request in enumerate(requests)],
        faults=[],
    )


def violations(prepare: Prepare, world: World | None = None) -> str:
    return "\n".join(simulate_world(crowded() if world is None else world, prepare).violations)


def replica_of(stage: Stage) -> Replica:
    return next(iter(stage.scheduler.replicas.values()))


def test_the_world_itself_is_sound() -> None:
    """Unbroken, all of these worlds pass: what the tests below find, they have done themselves."""
    for world in (crowded(), crowded(capacity=2), crowded(clients=["cancels", "returns", "looks", "repeats"])):
        assert simulate_world(world).violations == []
    assert simulate_world(crowded()).admitted == 8


def test_a_slot_that_is_leased_twice_is_seen() -> None:
    """A scheduler that always gives slot 0: by what tasks say they hold, and by the engine's own word."""

    def prepare(stage: Stage) -> None:
        def take(self: Replica, task_id: str, *, exclusive: bool, slot: int | None = None) -> Lease:
            self.leases[0] = task_id
            return Lease(self.replica_id, (0,))

        replica = replica_of(stage)
        replica_class = type("Doctored", (type(replica),), {"__slots__": (), "take": take})
        replica.__class__ = replica_class

    found = violations(prepare)
    assert "slot 0 of p-0 is leased twice: to task 1 and task 2" in found
    assert "met a defect of ours" in found


def test_a_card_that_is_oversold_is_seen() -> None:
    """A plan that puts more on a card than it holds: the workers' memory is real."""

    def prepare(stage: Stage) -> None:
        stage.machine.cards["3090"] = parse_cards("3090:4GB:936")[0]
        stage.scheduler.devices["3090"].vram_total_bytes = stage.machine.cards["3090"].vram_bytes

    assert "3090 is oversold: workers hold" in violations(prepare)


def after(stage: Stage, event: str, act: Callable[..., None]) -> None:
    """Have a scheduler do something more after one of its events."""
    original = getattr(stage.scheduler, event)

    def doctored(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        act(*args, **kwargs)
        return result

    setattr(stage.scheduler, event, doctored)


def test_a_task_that_is_forgotten_is_seen() -> None:
    """A queue that loses an entry: the task is queued in one place only, and whoever looks for its place falls."""

    def prepare(stage: Stage) -> None:
        pool = stage.scheduler.pools["p"]
        after(stage, "finished", lambda *_, **__: pool.queue.remove(pool.queue.head() or ""))

    found = violations(prepare)
    assert "of p is queued in one place and not in the other" in found
    assert "the service fell over: KeyError" in found


def test_a_queue_that_nobody_serves_is_seen() -> None:
    """A dispatcher that starts nothing any more: clients wait for ever, and tasks have no end."""

    def prepare(stage: Stage) -> None:
        dispatcher = stage.scheduler._dispatcher
        after(stage, "finished", lambda *_, **__: setattr(dispatcher, "place", lambda *_, **__: False))

    found = violations(prepare)
    assert "still waits after" in found
    assert "has no end: Admitted, queued in p (p-0 ready), which lacks nothing" in found


@pytest.mark.parametrize(("effect", "words"), [(Ended, "Ended of"), (Start, "Start of")])
def test_what_is_emitted_after_the_end_is_seen(effect: type[Ended] | type[Start], words: str) -> None:
    """A second end, or a start of a task that has ended."""

    def prepare(stage: Stage) -> None:
        after(stage, "finished", lambda task_id, *_, **__: stage.scheduler._effects.append(effect(task_id)))

    found = violations(prepare)
    assert re.search(rf"{words} \w+ after Ended", found)


def test_a_task_that_overtakes_is_seen() -> None:
    """A queue that serves its last first."""

    def prepare(stage: Stage) -> None:
        queue = stage.scheduler.pools["p"].queue
        queue.head = lambda: next(reversed(list(queue)), None)  # type: ignore[method-assign]

    found = violations(prepare)
    assert "overtakes task" in found
    assert "not first in, first out" in found


def test_a_head_that_waits_for_nothing_is_seen() -> None:
    """A dispatcher that starts nobody once a task has ended."""

    def prepare(stage: Stage) -> None:
        stage.scheduler._dispatcher.dispatch = lambda pool, now: None  # type: ignore[method-assign]

    assert "task 3 waits, though p-0 is free" in violations(prepare)


def test_a_queue_over_its_limit_is_seen() -> None:
    """A queue that takes more than it says."""

    def prepare(stage: Stage) -> None:
        queue = stage.scheduler.pools["p"].queue
        queue._make_room = lambda newcomer: None  # type: ignore[method-assign]
        queue.is_closed_to = lambda newcomer: False  # type: ignore[method-assign]

    found = violations(prepare, crowded(capacity=2))
    assert "3 tasks wait in p, with 2 places" in found


def test_a_lease_that_stays_is_seen() -> None:
    """A scheduler that never takes a slot back."""

    def prepare(stage: Stage) -> None:
        stage.scheduler._let_go = lambda task, now: None  # type: ignore[method-assign]

    assert "task 1 still holds a slot" in violations(prepare, crowded(clients=["reads"]))


def test_an_ended_task_that_changes_is_seen() -> None:
    """Figures that move after the end."""

    def prepare(stage: Stage) -> None:
        def change(task_id: str, *_: object, **__: object) -> None:
            stage.scheduler.tasks[task_id].tokens_out += 1

        after(stage, "released", change)

    assert "task 1 has changed after its end" in violations(prepare, crowded(clients=["cancels", "reads"]))


def test_a_missed_deadline_is_seen() -> None:
    """A scheduler that looks at no deadline."""

    def prepare(stage: Stage) -> None:
        table = stage.scheduler._table
        table.add = lambda task: table.tasks.update({task.task_id: task})  # type: ignore[method-assign]
        table.settle_deadline = lambda task: None  # type: ignore[method-assign]

    found = violations(prepare, crowded(clients=["reads"], deadline_ms=500))
    assert "after its deadline" in found


def test_gauges_that_lie_are_seen() -> None:
    """A scrape that says that nobody waits and nothing was admitted."""

    def prepare(stage: Stage) -> None:
        text = stage.service.metrics_text
        stage.service.metrics_text = lambda: text().replace(b"tasks_enqueued_total{", b"other{")  # type: ignore[method-assign]

    assert "tasks_enqueued_total says {}, but the state is {('p',): 8}" in violations(prepare)


def test_a_defect_is_not_taken_for_a_fault() -> None:
    """An unforeseen exception in the middle of a task ends the task and is still a violation."""

    def prepare(stage: Stage) -> None:
        def progressed(task_id: str, tokens: int) -> None:
            raise ZeroDivisionError

        stage.scheduler.progressed = progressed  # type: ignore[method-assign]

    assert "met a defect of ours" in violations(prepare)


def test_text_after_a_cancel_is_seen() -> None:
    """A stream that goes on once the cancel has returned."""

    def prepare(stage: Stage) -> None:
        number = iter(range(1000))
        text = stage.orchestrator.text
        stage.orchestrator.text = lambda task_id: text(task_id) + str(next(number))  # type: ignore[method-assign]

    assert "gets more text after its cancel" in violations(prepare, crowded(clients=["cancels"]))


def test_different_answers_to_the_same_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose answers depend on the slot."""
    world = crowded(clients=["reads", "reads"])
    first, second = world.arrivals
    same = structs.replace(first.request, task_id=second.request.task_id)
    world = replace(world, arrivals=[first, replace(second, request=same)])
    assert simulate_world(world).violations == []

    def words(self: SimulatedWorker, job: Job) -> Iterator[str]:
        while True:
            yield f"slot{job.slot}"

    monkeypatch.setattr(SimulatedWorker, "_words", words)
    assert simulate_world(world).violations == ["client 1 and client 0 asked the same and were answered differently"]


def test_a_service_that_falls_over_is_seen() -> None:
    """Whatever ends the orchestrator is a violation, and not the end of the simulator."""

    def prepare(stage: Stage) -> None:
        def tick(now: float) -> None:
            raise ZeroDivisionError("tick")

        stage.scheduler.tick = tick  # type: ignore[method-assign]

    assert "the service fell over: ZeroDivisionError('tick')" in violations(prepare)


def test_a_standstill_is_seen() -> None:
    """A service in which nothing will ever happen again."""

    def prepare(stage: Stage) -> None:
        async def never() -> None:
            await asyncio.Event().wait()

        stage.orchestrator.run = never  # type: ignore[method-assign]
        stage.machine.engine.service = replace(SECOND, load_s=0.0)

    assert "still waits after" in violations(prepare)


def frame(number: int, event: str, **data: Any) -> Seen:
    return Seen(number, event, data)


SOUND = [
    frame(0, "started"),
    frame(1, "token", t="a", i=0),
    frame(2, "token", t="b", i=1),
    frame(3, "metrics"),
    frame(4, "end", tokens_out=2),
]


@pytest.mark.spec("HP-STR-1")
@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (SOUND[1:], "only `started`"),
        ([SOUND[0], *SOUND], "only `started`"),
        (SOUND[:-1], "does not end with"),
        ([*SOUND, SOUND[-1]], "2 last frames"),
        ([*SOUND, frame(5, "token", t="c", i=2)], "does not end with"),
        ([*SOUND[:1], *SOUND[2:]], "its tokens are counted [1]"),
        ([SOUND[0], SOUND[2], SOUND[1], *SOUND[3:]], "its frames are numbered [0, 2, 1, 3, 4]"),
        ([*SOUND[:3], SOUND[4]], "no `metrics` before its last frame"),
        ([*SOUND[:4], frame(4, "end", tokens_out=1)], "ends with 1 tokens after 2"),
        ([], "does not begin"),
    ],
)
def test_a_stream_that_is_not_whole_is_seen(stream: list[Seen], words: str) -> None:
    """Started first, no gap, no step back, one last frame."""
    assert list(frames.problems(SOUND)) == []
    assert words in "; ".join(frames.problems(stream))


@pytest.mark.parametrize("raw", [b"id: 0\ndata: {}\n\n", b"data\n\n", b"id: 0\nevent: a\ndata: {}\n\nid: 1", b"\n\n"])
def test_bytes_that_are_no_frames_are_seen(raw: bytes) -> None:
    """Each frame has its three lines and its empty one."""
    with pytest.raises(frames.BadStream):
        frames.parse(raw)
