"""The whole service but its HTTP edge, on the simulated engine, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from msgspec import structs

from llama_orch.contract.config import PoolSettings, QueueSettings, ServerSettings, TasksSettings
from llama_orch.contract.models import CatalogModelRequest, Priority, TaskState
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import WorkerLost
from llama_orch.engines.simulated import ServiceModel
from llama_orch.errors import (
    AdmissionReject,
    Conflict,
    DeadlineUnmet,
    InvalidParams,
    NotFound,
    PoolUnavailable,
    PoolUnready,
    ReplicaExhausted,
)
from llama_orch.runtime import orchestrator as orchestrator_module
from llama_orch.testing.builders import a_task
from llama_orch.testing.loop import run
from llama_orch.testing.rehearsal import Stage, a_rehearsal, read_all, settings_for

from .frames import Seen, check_order, events, parse

SECOND = ServiceModel(load_s=0.5, prefill_s_per_token=0.0, decode_s_per_token=0.1)
ONE_SLOT = PoolSettings(slots=1)


def rehearse(scenario: Callable[[Stage], Awaitable[None]], *pools: PoolSettings, **options: object) -> None:
    """Run a scenario on pools of the simulated engine at ten tokens a second."""
    sections = {key: options.pop(key) for key in ("server", "tasks") if key in options}

    async def main() -> None:
        async with a_rehearsal(settings_for(*pools, **sections), model=SECOND, **options) as stage:  # type: ignore[arg-type]
            await scenario(stage)

    run(main())


async def frames_of(stage: Stage, task_id: str) -> list[Seen]:
    frames = parse(await read_all(stage.service.open_stream(task_id, -1)))
    check_order(frames)
    return frames


def states(stage: Stage) -> list[TaskState]:
    return [task.state for task in stage.orchestrator.scheduler.tasks.values()]


@pytest.mark.spec("HP-STR-1", "HP-STR-2", "HP-STR-3", "HP-DET-2")
def test_the_life_of_a_task() -> None:
    """started, tokens with metrics at least once a second, a last metrics frame, end with what repeats the run."""

    async def scenario(stage: Stage) -> None:
        admission = await stage.service.submit(a_task(max_tokens=35, seed=7))
        assert (admission.queue_position, admission.predicted_start_ms, admission.seed) == (0, 0, 7)
        frames = await frames_of(stage, admission.task_id)
        names = events(frames)
        assert names.count("token") == 35
        assert names.count("metrics") >= 4  # 3.5 s of decoding, and the one before the end
        assert names[-2:] == ["metrics", "end"]
        end = frames[-1].data
        assert (end["tokens_out"], end["seed"], end["engine"], end["finish_reason"]) == (35, 7, "simulated", "length")
        assert end["model_digest"].startswith("sha256:")
        status = stage.service.get_task(admission.task_id)
        assert (status.state, status.tokens_out) == (TaskState.SUCCEEDED, 35)
        assert status.text == "".join(frame.data["t"] for frame in frames if frame.event == "token")
        assert status.placement is not None
        assert "default-0 chosen" in status.placement

    rehearse(scenario)


@pytest.mark.spec("HP-STR-2", "HP-ADM-5")
def test_position_and_prediction_stay_fresh_while_a_task_waits() -> None:
    """A waiting task is told each second where it stands; the prediction is null until two tasks were measured."""

    async def scenario(stage: Stage) -> None:
        ids = [(await stage.service.submit(a_task(max_tokens=20))).task_id for _ in range(5)]
        last = await frames_of(stage, ids[-1])
        waiting = [f.data for f in last if f.event == "metrics" and f.data["queue_position"] is not None]
        positions = [frame["queue_position"] for frame in waiting]
        assert positions == sorted(positions, reverse=True)
        assert positions[0] == 3
        assert positions[-1] == 0
        predictions = [frame["predicted_start_ms"] for frame in waiting]
        assert predictions[0] is None
        known = [p for p in predictions if p is not None]
        assert known
        assert all(later < earlier for earlier, later in pairwise(known))

    rehearse(scenario, ONE_SLOT)


@pytest.mark.spec("HP-STR-2")
def test_who_comes_late_is_told_at_once_where_the_task_stands() -> None:
    """Nothing is written for a task that nobody looks at; its first reader has a fresh frame, and no second to wait."""

    async def scenario(stage: Stage) -> None:
        ids = [(await stage.service.submit(a_task(max_tokens=20))).task_id for _ in range(4)]
        await asyncio.sleep(2.5)  # virtual: the first has ended, the second runs
        assert stage.orchestrator._streams[ids[-1]].last_number == 0
        reader = stage.service.open_stream(ids[-1], -1)
        frames = parse(await reader.batch() or b"")
        assert events(frames) == ["started", "metrics"]
        assert frames[-1].data["queue_position"] == 1
        reader.close()

    rehearse(scenario, ONE_SLOT)


@pytest.mark.spec("HP-PLC-3")
def test_prediction_is_close_once_speeds_are_known() -> None:
    """With two measured tasks of the same kind, the predicted start of the third in line is within 10 %."""

    async def scenario(stage: Stage) -> None:
        for _ in range(2):
            await frames_of(stage, (await stage.service.submit(a_task(max_tokens=20))).task_id)
        now = asyncio.get_running_loop().time
        for _ in range(3):
            admission = await stage.service.submit(a_task(max_tokens=20))
        submitted = now()
        await frames_of(stage, admission.task_id)
        task = stage.orchestrator.scheduler.tasks[admission.task_id]
        assert task.started_s is not None
        assert admission.predicted_start_ms is not None
        assert admission.predicted_start_ms / 1000 == pytest.approx(task.started_s - submitted, rel=0.1)

    rehearse(scenario, ONE_SLOT)


@pytest.mark.spec("HP-STR-6")
def test_cancel_of_a_running_task_frees_its_slot() -> None:
    """After cancel has returned no token follows, the stream ends with CANCELED, and the next task starts."""

    async def scenario(stage: Stage) -> None:
        first = (await stage.service.submit(a_task(max_tokens=200))).task_id
        second = (await stage.service.submit(a_task(max_tokens=5))).task_id
        await asyncio.sleep(1.05)
        before = stage.service.get_task(first).tokens_out
        await stage.service.cancel(first)
        await stage.service.cancel(first)
        frames = await frames_of(stage, first)
        assert events(frames).count("token") == before
        assert frames[-1].data["code"] == "CANCELED"
        assert events(await frames_of(stage, second))[-1] == "end"
        assert states(stage) == [TaskState.CANCELED, TaskState.SUCCEEDED]
        assert stage.orchestrator.scheduler.is_idle

    rehearse(scenario, ONE_SLOT)


@pytest.mark.spec("HP-STR-6")
def test_cancel_of_a_waiting_task() -> None:
    """A task canceled in the queue never starts; those behind it move up."""

    async def scenario(stage: Stage) -> None:
        ids = [(await stage.service.submit(a_task(max_tokens=10))).task_id for _ in range(3)]
        await stage.service.cancel(ids[1])
        assert stage.service.get_task(ids[2]).queue_position == 0
        assert events(await frames_of(stage, ids[1])) == ["started", "metrics", "error"]
        assert events(await frames_of(stage, ids[2]))[-1] == "end"

    rehearse(scenario, ONE_SLOT)


@pytest.mark.spec("HP-PLC-7", "HP-ERR-4")
def test_a_crash_costs_its_own_tasks_and_the_pool_recovers() -> None:
    """The dead replica's task ends with WORKER_RESET, another replica's goes on, and the dead one comes back."""

    async def scenario(stage: Stage) -> None:
        first = await stage.service.submit(a_task(max_tokens=50))
        second = await stage.service.submit(a_task(max_tokens=50))
        await asyncio.sleep(1)
        replica = stage.service.get_task(first.task_id).replica_id or ""
        assert stage.service.get_task(second.task_id).replica_id != replica
        stage.worker(replica).crash()
        lost = (await frames_of(stage, first.task_id))[-1]
        assert (lost.event, lost.data["code"], lost.data["retriable"]) == ("error", "WORKER_RESET", True)
        assert events(await frames_of(stage, second.task_id))[-1] == "end"
        health = stage.service.get_pool_health("default")
        assert [one.state.value for one in health.replicas] == ["ready", "ready"]
        assert sum(one.restarts for one in health.replicas) == 1

    rehearse(scenario, ONE_SLOT, cards=("3090", "3060"))


@pytest.mark.spec("HP-PLC-7")
def test_a_hanging_worker_is_replaced() -> None:
    """No token for the idle limit: DECODE_TIMEOUT for the task, a new worker for the replica."""

    async def scenario(stage: Stage) -> None:
        hung = await stage.service.submit(a_task(max_tokens=50))
        await asyncio.sleep(1)
        stage.worker().hang()
        assert (await frames_of(stage, hung.task_id))[-1].data["code"] == "DECODE_TIMEOUT"
        again = await stage.service.submit(a_task(max_tokens=5))
        assert events(await frames_of(stage, again.task_id))[-1] == "end"
        assert stage.service.get_pool_health("default").replicas[0].restarts == 1

    rehearse(scenario, tasks=TasksSettings(decode_idle_timeout_ms=2000))


@pytest.mark.spec("HP-PLC-7", "HP-ERR-4")
def test_a_replica_that_never_loads_is_given_up() -> None:
    """After a bounded number of tries the pool says so: its queue fails and newcomers get POOL_UNAVAILABLE."""

    async def scenario(stage: Stage) -> None:
        stage.engine.load_error = "bad magic"
        waiting = await stage.service.submit(a_task(max_tokens=5))
        stage.worker().crash("killed by SIGKILL")
        assert (await frames_of(stage, waiting.task_id))[-1].data["code"] in ("WORKER_RESET", "POOL_UNAVAILABLE")
        queued = await stage.service.submit(a_task(max_tokens=5))
        last = (await frames_of(stage, queued.task_id))[-1].data
        assert last["code"] == "POOL_UNAVAILABLE"
        assert "bad magic" in last["message"]
        with pytest.raises(PoolUnavailable, match="bad magic"):
            await stage.service.submit(a_task())
        health = stage.service.get_pool_health("default")
        assert (health.live, health.ready, health.last_error) == (False, False, health.replicas[0].last_error)

    rehearse(scenario)


@pytest.mark.spec("HP-ADM-5", "HP-ADM-7")
def test_admission_while_the_model_loads() -> None:
    """What fits by its bytes is admitted with a null prediction and counted later; what may not fit is 503."""

    async def scenario(stage: Stage) -> None:
        admission = await stage.service.submit(a_task(prompt="a b c", max_tokens=5))
        assert (admission.queue_position, admission.predicted_start_ms) == (0, None)
        await asyncio.sleep(0.25)
        with pytest.raises(PoolUnready) as refusal:
            await stage.service.submit(a_task(prompt="long " * 600))
        assert refusal.value.retry_after_ms == 250  # as long again as it has been loading
        frames = await frames_of(stage, admission.task_id)
        assert frames[-1].data["tokens_in"] > 0
        longer = await stage.service.submit(a_task(prompt="long " * 600, max_tokens=3))
        assert events(await frames_of(stage, longer.task_id))[-1] == "end"

    rehearse(scenario, is_loaded=False)


@pytest.mark.spec("HP-ADM-7")
def test_context_is_counted_with_the_models_own_tokenizer() -> None:
    """A prompt that is longer than the context in tokens is 400 with both numbers; bytes alone do not matter."""

    async def scenario(stage: Stage) -> None:
        fits = await stage.service.submit(a_task(prompt="x" * 3000, max_tokens=2))
        assert events(await frames_of(stage, fits.task_id))[-1] == "end"
        with pytest.raises(InvalidParams, match="context of 2048") as refusal:
            await stage.service.submit(a_task(prompt="x " * 2500))
        assert refusal.value.details is not None
        assert refusal.value.details["pool_ctx"] == 2048

    rehearse(scenario)


@pytest.mark.spec("HP-ADM-7", "HP-ERR-4")
def test_deadlines_are_kept_in_the_queue_and_while_decoding() -> None:
    """A missed deadline ends the task with DEADLINE_UNMET, wherever it is; one that cannot be met is refused."""

    async def scenario(stage: Stage) -> None:
        running = await stage.service.submit(a_task(max_tokens=100, deadline_ms=2000))
        queued = await stage.service.submit(a_task(max_tokens=10, deadline_ms=1500))
        for admission in (queued, running):
            last = (await frames_of(stage, admission.task_id))[-1].data
            assert (last["code"], last["policy_label"]) == ("DEADLINE_UNMET", "deadline")
        assert asyncio.get_running_loop().time() == pytest.approx(2.5, abs=0.1)
        for _ in range(2):
            await frames_of(stage, (await stage.service.submit(a_task(max_tokens=20))).task_id)
        await stage.service.submit(a_task(max_tokens=20))
        with pytest.raises(DeadlineUnmet, match="allow more time"):
            await stage.service.submit(a_task(max_tokens=20, deadline_ms=500))

    rehearse(scenario, ONE_SLOT)


@pytest.mark.spec("HP-ADM-8")
def test_equal_submissions_with_one_id_are_one_task() -> None:
    """The same task_id and body twice, even at the same time, run once."""

    async def scenario(stage: Stage) -> None:
        request = a_task(task_id="3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90", max_tokens=5)
        shouted = structs.replace(request, task_id="3F2B8C1E-9D5A-4C57-8A43-0C7D5B1F2E90")
        answers = await asyncio.gather(*(stage.service.submit(one) for one in (request, shouted, request, request)))
        assert len({(answer.task_id, answer.seed) for answer in answers}) == 1
        await frames_of(stage, answers[0].task_id)
        assert len(stage.orchestrator.scheduler.tasks) == 1

    rehearse(scenario)


@pytest.mark.spec("HP-ADM-1", "HP-ADM-2", "HP-STR-1")
def test_64_tasks_from_16_clients_on_one_replica() -> None:
    """Each ends exactly once, without a gap in its tokens; interactive ones start before batch ones."""

    async def scenario(stage: Stage) -> None:
        async def client(number: int) -> None:
            for turn in range(4):
                priority = Priority.BATCH if (number + turn) % 2 else Priority.INTERACTIVE
                admission = await stage.service.submit(a_task(max_tokens=5, priority=priority))
                assert events(await frames_of(stage, admission.task_id))[-1] == "end"

        await asyncio.gather(*(client(number) for number in range(16)))
        assert states(stage) == [TaskState.SUCCEEDED] * 64

    rehearse(scenario, PoolSettings(slots=4))


@pytest.mark.spec("HP-ADM-3", "HP-ERR-2")
def test_a_full_queue_tells_when_to_come_back() -> None:
    """The refusal's wait follows the load: it is the time until the head of the queue will have started."""

    async def scenario(stage: Stage) -> None:
        for _ in range(2):
            await frames_of(stage, (await stage.service.submit(a_task(max_tokens=20))).task_id)
        waits = []
        for tokens in (10, 100):
            first = await stage.service.submit(a_task(max_tokens=tokens, expected_tokens=tokens))
            second = await stage.service.submit(a_task(max_tokens=5))
            with pytest.raises(AdmissionReject) as refusal:
                await stage.service.submit(a_task(max_tokens=5))
            waits.append(refusal.value.retry_after_ms or 0)
            await frames_of(stage, first.task_id)
            await frames_of(stage, second.task_id)
        assert waits == [pytest.approx(1000, rel=0.1), pytest.approx(10_000, rel=0.1)]

    rehearse(scenario, PoolSettings(slots=1, queue=QueueSettings(capacity=1)))


def test_drain_sends_back_what_waits_and_lets_finish_what_runs() -> None:
    """The service ends when its running tasks have; newcomers get POOL_UNAVAILABLE."""

    async def scenario(stage: Stage) -> None:
        running = await stage.service.submit(a_task(max_tokens=30))
        waiting = await stage.service.submit(a_task(max_tokens=30))
        drain = asyncio.ensure_future(stage.orchestrator.drain())
        await asyncio.sleep(0)
        assert (await frames_of(stage, waiting.task_id))[-1].data["code"] == "POOL_UNAVAILABLE"
        with pytest.raises(PoolUnavailable):
            await stage.service.submit(a_task())
        assert events(await frames_of(stage, running.task_id))[-1] == "end"
        await drain

    rehearse(scenario, ONE_SLOT)


def test_drain_does_not_wait_for_ever() -> None:
    """A task that runs past the limit is canceled."""

    async def scenario(stage: Stage) -> None:
        running = await stage.service.submit(a_task(max_tokens=2000))
        await stage.orchestrator.drain()
        assert (await frames_of(stage, running.task_id))[-1].data["code"] == "CANCELED"
        assert asyncio.get_running_loop().time() < 2 * orchestrator_module.DRAIN_LIMIT_S

    rehearse(scenario, ONE_SLOT)


@pytest.mark.spec("HP-STR-7")
def test_ended_tasks_are_kept_for_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After tasks.retain_ms a task is NOT_FOUND; before, only the bound on bytes can take it."""

    async def scenario(stage: Stage) -> None:
        first = await stage.service.submit(a_task(max_tokens=5))
        await frames_of(stage, first.task_id)
        await asyncio.sleep(59)
        assert stage.service.get_task(first.task_id).state is TaskState.SUCCEEDED
        await asyncio.sleep(2)
        with pytest.raises(NotFound, match="kept for 60 s"):
            stage.service.get_task(first.task_id)
        monkeypatch.setattr(orchestrator_module, "RETAINED_BYTES_MAX", 9000)
        ids = []
        for _ in range(10):
            ids.append((await stage.service.submit(a_task(max_tokens=10))).task_id)
            await frames_of(stage, ids[-1])
        kept = [task_id for task_id in ids if task_id in stage.orchestrator.scheduler.tasks]
        assert kept
        assert kept == ids[-len(kept) :]
        assert len(kept) < 5

    rehearse(scenario, tasks=TasksSettings(retain_ms=60_000))


@pytest.mark.spec("HP-STR-7")
def test_open_streams_are_bounded() -> None:
    """One stream more than server.max_streams is refused, of tasks and of fetches; a closed one makes room, once."""

    async def scenario(stage: Stage) -> None:
        task_id = (await stage.service.submit(a_task(max_tokens=50))).task_id
        readers = [stage.service.open_stream(task_id, -1) for _ in range(2)]
        with pytest.raises(ReplicaExhausted, match="max_streams"):
            stage.service.open_stream(task_id, -1)
        readers[0].close()
        stage.service.open_stream(task_id, -1).close()
        await stage.service.catalog.create(CatalogModelRequest(id="tiny", source_url="builtin:tiny"))
        fetch = stage.service.catalog.open_fetch("tiny")
        with pytest.raises(ReplicaExhausted, match="max_streams"):
            stage.service.catalog.open_fetch("tiny")
        for _ in range(2):
            fetch.close()
        assert stage.orchestrator.streams_open == 1

    rehearse(scenario, server=structs.replace(ServerSettings(), max_streams=2))


def test_several_inputs_run_in_order_as_one_task() -> None:
    """The tokens of all inputs are one stream with one end; equal inputs differ, since each has its own seed."""

    async def scenario(stage: Stage) -> None:
        both = await stage.service.submit(a_task(inputs=["same words", "same words"], max_tokens=5, seed=1))
        frames = await frames_of(stage, both.task_id)
        words = [frame.data["t"] for frame in frames if frame.event == "token"]
        assert len(words) == 10
        assert words[:5] != words[5:]
        assert frames[-1].data["tokens_out"] == 10

    rehearse(scenario)


@pytest.mark.spec("HP-OBS-1", "HP-OBS-2")
def test_metrics_tell_what_happened() -> None:
    """Counters move with committed events, gauges are the state at the scrape."""

    async def scenario(stage: Stage) -> None:
        running = await stage.service.submit(a_task(max_tokens=10))
        await stage.service.submit(a_task(priority=Priority.BATCH, max_tokens=10))
        with pytest.raises(AdmissionReject):
            await stage.service.submit(a_task())
        text = stage.service.metrics_text().decode()
        labels = 'engine="simulated",engine_version="1",pool_id="default"'
        assert f'queue_depth{{{labels},priority="batch"}} 1.0' in text
        assert f'slots_busy{{{labels},replica_id="default-0"}} 1.0' in text
        assert 'tasks_rejected_total{engine="simulated",reason="ADMISSION_REJECT"} 1.0' in text
        policy = 'admission_backpressure_events_total{engine="simulated",policy="reject",pool_id="default"} 1.0'
        assert policy in text
        await frames_of(stage, running.task_id)
        text = stage.service.metrics_text().decode()
        assert f'tokens_out_total{{{labels},replica_id="default-0"}} 10.0' in text
        assert f'tasks_finished_total{{{labels},state="succeeded"}} 1.0' in text
        assert f'latency_first_token_ms_count{{{labels},priority="interactive"}} 1.0' in text

    rehearse(scenario, PoolSettings(slots=1, queue=QueueSettings(capacity=1)))


def test_lists_are_newest_first_and_paged() -> None:
    """A cursor goes on behind the page before, also when new tasks came in between."""

    async def scenario(stage: Stage) -> None:
        ids = [(await stage.service.submit(a_task(max_tokens=1))).task_id for _ in range(5)]
        page = stage.service.list_tasks(state=None, session_id=None, limit=2, cursor=None)
        assert [item.task_id for item in page.items] == [ids[4], ids[3]]
        await stage.service.submit(a_task(max_tokens=1))
        page = stage.service.list_tasks(state=None, session_id=None, limit=2, cursor=page.next_cursor)
        assert [item.task_id for item in page.items] == [ids[2], ids[1]]
        last = stage.service.list_tasks(state=None, session_id=None, limit=2, cursor=page.next_cursor)
        assert ([item.task_id for item in last.items], last.next_cursor) == ([ids[0]], None)
        with pytest.raises(InvalidParams, match="cursor"):
            stage.service.list_tasks(state=None, session_id=None, limit=2, cursor="nonsense")
        done = stage.service.list_tasks(state=TaskState.QUEUED, session_id=None, limit=50, cursor=None)
        assert all(item.state is TaskState.QUEUED for item in done.items)

    rehearse(scenario)


def test_a_device_that_cannot_be_read_does_not_end_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor left, say: the last figure stays, and tasks go on."""

    async def scenario(stage: Stage) -> None:
        def fails(self: Source) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(Source, "read_free_bytes", property(lambda source: lambda: fails(source)))
        admission = await stage.service.submit(a_task(max_tokens=5))
        assert events(await frames_of(stage, admission.task_id))[-1] == "end"

    rehearse(scenario)


@pytest.mark.spec("HP-STR-3")
def test_tokens_in_is_counted_for_tasks_that_were_admitted_on_a_bound() -> None:
    """The metrics frames of a task that came while the model was loading have its real count."""

    async def scenario(stage: Stage) -> None:
        admission = await stage.service.submit(a_task(prompt="a b c", max_tokens=15))
        frames = await frames_of(stage, admission.task_id)
        running = [f.data["tokens_in"] for f in frames if f.event == "metrics" and f.data["tokens_out"]]
        assert running
        assert set(running) == {frames[-1].data["tokens_in"]}

    rehearse(scenario, is_loaded=False)


def test_ids_are_the_same_in_either_case() -> None:
    """A session is found by its UUID whatever the case of its letters was."""

    async def scenario(stage: Stage) -> None:
        session = "ABCDEF00-0000-4000-8000-000000000001"
        await stage.service.submit(a_task(session_id=session, max_tokens=1))
        found = stage.service.list_tasks(state=None, session_id=session.lower(), limit=5, cursor=None)
        assert len(found.items) == 1

    rehearse(scenario)


def test_an_ended_task_keeps_its_figures_and_not_its_prompt() -> None:
    """Prompts may be megabytes; a repeat of the same body is still recognised, and another one is a conflict."""

    async def scenario(stage: Stage) -> None:
        request = a_task(task_id="3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90", prompt="x " * 1000, max_tokens=1)
        await frames_of(stage, (await stage.service.submit(request)).task_id)
        task = stage.orchestrator.scheduler.tasks["3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"]
        assert task.request.prompt is None
        assert (await stage.service.submit(request)).task_id == task.task_id
        with pytest.raises(Conflict):
            await stage.service.submit(structs.replace(request, prompt="other"))

    rehearse(scenario)


@pytest.mark.spec("HP-ADM-7")
def test_a_text_that_no_vocabulary_could_fit_is_refused_without_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody makes the worker count megabytes for a context of 2,048 tokens."""

    async def scenario(stage: Stage) -> None:
        async def count(text: str) -> int:
            raise AssertionError("it was counted")

        monkeypatch.setattr(stage.worker(), "count_tokens", count)
        with pytest.raises(InvalidParams, match="cannot fit the context"):
            await stage.service.submit(a_task(prompt="x" * 1_000_000))

    rehearse(scenario)


@pytest.mark.spec("HP-ADM-3")
def test_a_full_queue_refuses_before_anything_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal costs the worker nothing."""

    async def scenario(stage: Stage) -> None:
        for _ in range(2):
            await stage.service.submit(a_task(max_tokens=50))

        async def count(text: str) -> int:
            raise AssertionError("it was counted")

        monkeypatch.setattr(stage.worker(), "count_tokens", count)
        with pytest.raises(AdmissionReject):
            await stage.service.submit(a_task())

    rehearse(scenario, PoolSettings(slots=1, queue=QueueSettings(capacity=1)))


def test_a_pool_with_room_is_preferred_to_a_full_one() -> None:
    """Of two pools on one model, the one whose queue is full is not chosen while the other has places."""

    async def scenario(stage: Stage) -> None:
        for _ in range(8):
            await stage.service.submit(a_task(max_tokens=50))
        assert len(stage.orchestrator.scheduler.pools["b"].queue) > 1

    tiny = PoolSettings(id="a", slots=4, queue=QueueSettings(capacity=1))
    rehearse(scenario, tiny, PoolSettings(id="b", slots=1))


@pytest.mark.spec("HP-STR-1")
def test_a_number_behind_the_end_still_gets_the_last_frame() -> None:
    """Last-Event-ID 999 on an ended stream: the last frame again, not an empty answer."""

    async def scenario(stage: Stage) -> None:
        task_id = (await stage.service.submit(a_task(max_tokens=2))).task_id
        await frames_of(stage, task_id)
        assert events(parse(await read_all(stage.service.open_stream(task_id, 999)))) == ["end"]

    rehearse(scenario)


@pytest.mark.spec("HP-PLC-7")
def test_an_idle_worker_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody decodes on it, so only the count finds out that it hangs: 503 for this one, a new worker for the next."""

    async def scenario(stage: Stage) -> None:
        async def hangs(text: str) -> int:
            await asyncio.sleep(30)
            raise WorkerLost("POST /tokenize had no answer within 30 s")

        monkeypatch.setattr(stage.worker(), "count_tokens", hangs)
        with pytest.raises(PoolUnready, match="no answer within 30 s"):
            await stage.service.submit(a_task(max_tokens=2))
        assert stage.service.get_pool_health("default").ready is False
        await asyncio.sleep(2)
        admission = await stage.service.submit(a_task(max_tokens=2))
        assert events(await frames_of(stage, admission.task_id))[-1] == "end"
        assert stage.service.get_pool_health("default").replicas[0].restarts == 1

    rehearse(scenario)


def test_waiting_for_a_turn_to_be_counted_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two counts run at a time; the others are told to come back instead of waiting for ever."""

    async def scenario(stage: Stage) -> None:
        async def slow(text: str) -> int:
            await asyncio.sleep(50)
            return 3

        monkeypatch.setattr(stage.worker(), "count_tokens", slow)
        submissions = (stage.service.submit(a_task(max_tokens=1)) for _ in range(4))
        answers = await asyncio.gather(*submissions, return_exceptions=True)
        assert sorted(type(answer).__name__ for answer in answers) == ["AdmissionResponse"] * 2 + ["PoolUnready"] * 2

    rehearse(scenario)
