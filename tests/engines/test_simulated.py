"""The simulated engine: its clock, its faults, and the registry that it is in. Stop strings are tested here too."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.engines import ctransformers
from llama_orch.engines.base import DecodeStalled, LoadFailed, OutOfMemory, ReplicaSpec, WorkerLost
from llama_orch.engines.registry import build_engines
from llama_orch.engines.simulated import ANSWER_LIMIT_S, LOAD_SILENCE_S, ServiceModel, SimulatedEngine, SimulatedWorker
from llama_orch.testing import loop as virtual
from llama_orch.workers.stop_strings import StopStrings

from .support import a_job, a_spec, a_worker, collect, run, text_of

_FAST = ServiceModel(load_s=0.0, prefill_s_per_token=0.0, decode_s_per_token=0.0)
_NO_FILE = Path("/nonexistent.gguf")


def test_a_load_can_be_made_to_fail() -> None:
    """The next launch fails with the given reason, later ones may work again."""

    async def main() -> None:
        engine = SimulatedEngine(_FAST, load_error="CUDA error: out of memory")
        worker = await engine.launch(a_spec(_NO_FILE))
        with pytest.raises(LoadFailed, match="out of memory"):
            await worker.ready()
        assert await worker.lost() == "CUDA error: out of memory"
        engine.load_error = None
        await (await engine.launch(a_spec(_NO_FILE))).ready()

    run(main())


@pytest.mark.parametrize(
    ("load_error", "kind"),
    [("CUDA error: out of memory", OutOfMemory), (OutOfMemory("full"), OutOfMemory), ("bad magic", LoadFailed)],
)
def test_a_load_fails_with_the_kind_of_its_reason(load_error: str | LoadFailed, kind: type[LoadFailed]) -> None:
    """A text is judged as a real engine's last words are; an exception is raised as it is."""

    async def main() -> None:
        worker = await SimulatedEngine(_FAST, load_error=load_error).launch(a_spec(_NO_FILE))
        with pytest.raises(LoadFailed) as caught:
            await worker.ready()
        assert type(caught.value) is kind
        assert await worker.lost() == str(load_error)

    run(main())


def test_a_crash_interrupts_a_load() -> None:
    """A load of an hour ends with the worker."""

    async def main() -> None:
        worker = await SimulatedEngine(ServiceModel(load_s=3600)).launch(a_spec(_NO_FILE))
        asyncio.get_running_loop().call_soon(worker.crash)
        with pytest.raises(LoadFailed, match="SIGKILL"):
            await worker.ready()

    run(main())


def test_times_follow_the_service_model() -> None:
    """What a completion reports is what the model of the service says."""

    async def main() -> None:
        engine = SimulatedEngine(ServiceModel(load_s=0, prefill_s_per_token=0.001, decode_s_per_token=0.002))
        async with a_worker(engine, a_spec(_NO_FILE)) as worker:
            _, done = await collect(worker, a_job(prompt="a b c", max_tokens=5))
            assert (done.tokens_in, done.tokens_out) == (4, 5)
            assert (done.prefill_ms, done.decode_ms) == (pytest.approx(4), pytest.approx(10))

    run(main())


def test_answers_may_end_by_themselves() -> None:
    """With a mean length, most answers end before their limit."""

    async def main() -> None:
        engine = SimulatedEngine(ServiceModel(load_s=0, prefill_s_per_token=0, decode_s_per_token=0, mean_tokens=5))
        async with a_worker(engine, a_spec(_NO_FILE)) as worker:
            reasons = [(await collect(worker, a_job(seed=seed, max_tokens=60)))[1].finish_reason for seed in range(20)]
            assert reasons.count("stop") > 10

    run(main())


def test_answers_may_be_of_any_length_in_a_range() -> None:
    """Each seed has its own, the token that ends the text included; all are met, and none outside of the range."""

    async def main() -> None:
        engine = SimulatedEngine(replace(_FAST, uniform_tokens=(3, 6)))
        async with a_worker(engine, a_spec(_NO_FILE)) as worker:
            found = [(await collect(worker, a_job(seed=seed, max_tokens=60)))[1] for seed in range(60)]
            assert {done.tokens_out for done in found} == {3, 4, 5, 6}
            assert {done.finish_reason for done in found} == {"stop"}

    run(main())


def test_a_hang_can_end() -> None:
    """After `resume` the same stream goes on."""

    async def main() -> None:
        engine = SimulatedEngine(_FAST)
        async with a_worker(engine, a_spec(_NO_FILE)) as worker:
            stream = worker.generate(a_job(max_tokens=3))
            await anext(stream)
            engine.workers["r-1"].hang()
            asyncio.get_running_loop().call_soon(engine.workers["r-1"].resume)
            assert [item async for item in stream]

    run(main())


STEP = 0.06  # who begins first does its first step alone: each is paced by who is at work when it begins


def on_card(card: str, replica_id: str = "r-1", slots: int = 4) -> ReplicaSpec:
    return ReplicaSpec(replica_id, "p-1", _NO_FILE, slots=slots, ctx=512, backend="simulated", device_uuids=(card,))


async def timed(worker: SimulatedWorker, *slots: int, tokens: int = 10) -> float:
    """Seconds until a job on each of these slots is done, all begun at once."""
    now = asyncio.get_running_loop().time
    began = now()
    await asyncio.gather(*(collect(worker, a_job(slot=slot, max_tokens=tokens)) for slot in slots))
    return now() - began


def test_speed_may_depend_on_the_replica() -> None:
    """A callable service model sees the launch's spec, so that one card is slower than another and loads longer."""
    seconds = {"3090": 0.01, "3060": 0.03}

    def service(spec: ReplicaSpec) -> ServiceModel:
        one = seconds[spec.device_uuids[0]]
        return ServiceModel(load_s=one * 100, prefill_s_per_token=0, decode_s_per_token=one)

    async def main() -> None:
        engine = SimulatedEngine(service)
        for card, one in seconds.items():
            worker = await engine.launch(on_card(card, card))
            assert (await worker.ready()).load_ms == round(one * 100_000)
            assert await timed(worker, 0) == pytest.approx(10 * one)

    virtual.run(main())


def test_busy_slots_share_the_card() -> None:
    """With n busy slots a token takes 1 + batch_slowdown × (n − 1) times as long, and the completion says so."""

    async def main() -> None:
        service = ServiceModel(load_s=0, prefill_s_per_token=0, decode_s_per_token=0.1, batch_slowdown=0.5)
        worker = await SimulatedEngine(service).launch(on_card("3090"))
        await worker.ready()
        assert await timed(worker, 0) == pytest.approx(1.0)
        assert await timed(worker, 0, 1, 2) == pytest.approx(2.0, rel=STEP)
        both = await asyncio.gather(*(collect(worker, a_job(slot=slot, max_tokens=10)) for slot in (0, 1)))
        assert [done.decode_ms for _, done in both] == [pytest.approx(1500, rel=STEP)] * 2

    virtual.run(main())


def test_busy_workers_share_the_card() -> None:
    """Another worker that is at work on the same device costs its part; an idle one and another card's cost nothing."""

    async def main() -> None:
        service = ServiceModel(load_s=0, prefill_s_per_token=0, decode_s_per_token=0.1, card_slowdown=1.0)
        engine = SimulatedEngine(service)
        one, two = [await engine.launch(on_card("3090", name)) for name in ("r-1", "r-2")]
        other = await engine.launch(on_card("3060", "r-3"))
        assert await timed(one, 0) == pytest.approx(1.0)
        assert await asyncio.gather(*(timed(each, 0) for each in (one, other))) == [pytest.approx(1.0)] * 2
        assert await asyncio.gather(*(timed(each, 0) for each in (one, two))) == [pytest.approx(2.0, rel=STEP)] * 2

    virtual.run(main())


def test_tokens_may_come_in_chunks() -> None:
    """The same text, tokens and time in fewer pieces; the first token still comes alone."""

    async def main(chunk_tokens: int) -> tuple[str, float, list[int]]:
        service = ServiceModel(load_s=0, prefill_s_per_token=0, decode_s_per_token=0.1, chunk_tokens=chunk_tokens)
        worker = await SimulatedEngine(service).launch(on_card("3090"))
        chunks, done = await collect(worker, a_job(max_tokens=10))
        assert done.tokens_out == 10
        return text_of(chunks), asyncio.get_running_loop().time(), [chunk.tokens for chunk in chunks]

    text, seconds, pieces = virtual.run(main(4))
    assert pieces == [1, 4, 4, 1]
    assert (text, pytest.approx(seconds)) == virtual.run(main(1))[:2]


def test_loads_can_be_slowed_and_made_to_fail_at_launch() -> None:
    """Whoever drives the engine sees each worker before it loads, and acts on the ones that it means."""
    launched: list[SimulatedWorker] = []

    def act(worker: SimulatedWorker) -> None:
        launched.append(worker)
        if len(launched) == 1:
            worker.slow_load(9.0)
        elif len(launched) == 2:
            worker.fail_load()

    async def main() -> None:
        engine = SimulatedEngine(ServiceModel(load_s=1.0), on_launch=act)
        now = asyncio.get_running_loop().time
        assert (await (await engine.launch(on_card("3090"))).ready()).load_ms == 10_000
        assert now() == pytest.approx(10.0)
        with pytest.raises(LoadFailed, match="out of memory"):
            await (await engine.launch(on_card("3090"))).ready()
        assert [worker.is_alive for worker in launched] == [True, False]

    virtual.run(main())


def test_a_load_that_hangs_fails_in_the_end() -> None:
    """As the real supervision has it: so long without a sign of life is a failed load."""

    async def main() -> None:
        worker = await SimulatedEngine(_FAST).launch(on_card("3090"))
        worker.hang()
        with pytest.raises(LoadFailed, match="no sign of life"):
            await worker.ready()
        assert asyncio.get_running_loop().time() == pytest.approx(LOAD_SILENCE_S)

    virtual.run(main())


def test_a_frozen_worker_answers_no_question() -> None:
    """A hung one still counts tokens; a frozen one leaves the question open until that is given up."""

    async def main() -> None:
        worker = await SimulatedEngine(_FAST).launch(on_card("3090"))
        worker.hang()
        assert await worker.count_tokens("a b") == 3
        worker.freeze()
        with pytest.raises(WorkerLost, match="no answer"):
            await worker.count_tokens("a b")
        assert asyncio.get_running_loop().time() == pytest.approx(ANSWER_LIMIT_S)
        with pytest.raises(DecodeStalled):
            await collect(worker, a_job(idle_timeout_s=5.0))
        worker.resume()
        assert await worker.count_tokens("a b") == 3

    virtual.run(main())


def test_memory_can_run_out_while_decoding() -> None:
    """The stream breaks at once, and the reason is CUDA's."""

    async def main() -> None:
        worker = await SimulatedEngine(ServiceModel(load_s=0)).launch(on_card("3090"))
        stream = worker.generate(a_job(max_tokens=50))
        await anext(stream)
        worker.run_out_of_memory()
        with pytest.raises(WorkerLost, match="out of memory"):
            await anext(stream)
        assert (await worker.lost(), worker.is_busy) == ("CUDA error: out of memory", False)

    virtual.run(main())


def test_a_cancel_takes_its_time() -> None:
    """The slot stays busy until the engine has heard of the cancel, also while it is in the middle of a token."""

    async def main() -> None:
        service = ServiceModel(load_s=0, prefill_s_per_token=0, decode_s_per_token=1.0, cancel_s=0.2)
        worker = await SimulatedEngine(service).launch(on_card("3090"))
        job = asyncio.ensure_future(collect(worker, a_job(max_tokens=50)))
        await asyncio.sleep(0.5)
        job.cancel()
        await asyncio.sleep(0.1)
        assert worker.is_busy
        with pytest.raises(asyncio.CancelledError):
            await job
        assert (worker.is_busy, asyncio.get_running_loop().time()) == (False, pytest.approx(0.7))

    virtual.run(main())


@pytest.mark.spec("HP-ADM-2")
def test_a_slot_that_is_leased_twice_is_a_loud_mistake() -> None:
    """It is the service's fault, and must not look like an engine's."""

    async def main() -> None:
        async with a_worker(SimulatedEngine(_FAST), a_spec(_NO_FILE)) as worker:
            stream = worker.generate(a_job(max_tokens=3))
            await anext(stream)
            with pytest.raises(RuntimeError, match="twice"):
                await collect(worker, a_job())
            await stream.aclose()
            chunks, _ = await collect(worker, a_job())
            assert text_of(chunks)

    run(main())


def test_the_registry_has_every_engine() -> None:
    """ctransformers only where its package is."""
    names = {"llamacpp", "simulated"} | ({"ctransformers"} if ctransformers.is_installed() else set())
    assert set(build_engines()) == names
    engine = SimulatedEngine(_FAST)
    assert build_engines(simulated=engine)["simulated"] is engine


def test_the_registry_refuses_weakening_arguments() -> None:
    """A configuration cannot move a worker's listener."""
    with pytest.raises(ValueError, match="--host"):
        build_engines("binary", "/bin/true", ["--host", "0.0.0.0"])


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    """Fed in any pieces, what is shown is the text up to the first stop string that is complete."""
    matcher, shown, rest = StopStrings(stops), "", text
    while rest and not matcher.has_matched:
        n = data.draw(st.integers(1, len(rest)))
        shown, rest = shown + matcher.feed(rest[:n]), rest[n:]
    shown += matcher.flush()
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    assert matcher.has_matched == any(stop in text for stop in stops)
    if not matcher.has_matched:
        assert shown == text
